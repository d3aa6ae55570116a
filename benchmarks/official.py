"""The released code's way from a network to a Frechet distance, restated to race against it.

What is computed, how often and in which order was read in zju-pi/diff-sampler (amed-solver-main:
training/training_loop.py, training/loss.py, training/networks.py, solvers_amed.py, sample.py,
fid.py); the code and the words are ours. So are these differences, all in its favour: one process
for everything, so that nothing is imported twice and no worker has to be started to read images;
no distributed wrapper; no console output.

It trains and samples AMED-Solver and AMED-Plugin on iPNDM on EDM's networks, whose weights it loads
frozen. The predictor's architecture is ``amedlib.Predictor``, as is that of the raced trainer.
"""

from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image

from amedlib.recipes import Training
from amedlib.sampling import make_latents
from amedlib.trained import make_predictor

# Of Adams-Bashforth for equal steps, newest slope first.
WEIGHTS = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def schedule(points: int, first, last, like: torch.Tensor, rho: float = 7) -> torch.Tensor:
    """Polynomial time points from ``first`` down to ``last``, in the precision of ``like``."""
    part = torch.arange(points, dtype=like.dtype, device=like.device) / (points - 1)
    high, low = first ** (1 / rho), last ** (1 / rho)
    return (high + part * (low - high)) ** rho


class Bottleneck:
    """The output of the network's last encoder block, caught by a hook set for one call."""

    def __init__(self, net):
        self.block = list(net.model.enc.values())[-1]
        self.outputs = []

    def __enter__(self):
        keep = lambda module, inputs, output: self.outputs.append(output.detach())  # noqa: E731
        self.handle = self.block.register_forward_hook(keep)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def first_slope(net, x, t, t_next, labels, predictor, afs):
    """The slope at t, and what the predictor makes of the bottleneck there."""
    with Bottleneck(net) as hook:
        slope = x / torch.sqrt(1 + t**2) if afs else (x - net(x, t, labels)) / t
    if predictor is None:
        return slope, None
    seen = x.new_zeros(len(x), *net.bottleneck_size) if afs else hook.outputs[-1].mean(1)
    return slope, predictor(None, t, t_next, seen)


def heun_step(net, x, t, t_next, labels):
    """Euler to the end, then the mean of both slopes."""
    slope = (x - net(x, t, labels)) / t
    end = x + (t_next - t) * slope
    return x + (t_next - t) * (slope + (end - net(end, t_next, labels)) / t_next) / 2


def amed_step(net, x, t, t_next, labels, predictor, afs):
    """One interval of AMED-Solver, and what was predicted for it."""
    slope, predicted = first_slope(net, x, t, t_next, labels, predictor, afs)
    r, scale_dir, scale_time = predicted
    middle = t_next**r * t ** (1 - r)
    state = x + (middle - t) * slope
    slope = (state - net(state, scale_time * middle, labels)) / middle
    return x + scale_dir * (t_next - t) * slope, predicted


def ipndm_step(net, x, t, t_next, labels, predictor, afs, history, order):
    """One interval of iPNDM, plain or with a predictor; ``history`` holds slopes, newest last."""

    def move(x, distance, slope):
        slopes = [slope, *reversed(history)][:order]
        weights = WEIGHTS[len(slopes) - 1]
        history.append(slope.detach())
        return x + distance * sum(w * s for w, s in zip(weights, slopes, strict=True))

    slope, predicted = first_slope(net, x, t, t_next, labels, predictor, afs)
    if predictor is None:
        return move(x, t_next - t, slope), None
    r, scale_dir, scale_time = predicted
    middle = t_next**r * t ** (1 - r)
    x = move(x, middle - t, slope)
    slope = (x - net(x, scale_time * middle, labels)) / middle
    return move(x, scale_dir * (t_next - middle), slope), predicted


class Trainer:
    """Training of a predictor: the teacher, then every step of the student with all its calls.

    Args:
        config: as for ``amedlib.training.Trainer``; the students are ``"amed"`` and ``"ipndm"``.
        dtype: of the states.
    """

    def __init__(self, net, config: Training, shape, device="cpu", dtype=torch.float32):
        self.net, self.config, self.shape = net, config, shape
        self.device, self.dtype = device, dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.predictor = make_predictor(config, net.bottleneck_size).to(device)
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), config.learning_rate)
        self.log = []

    def teach(self, x, labels) -> list[torch.Tensor]:
        """The teacher's states at the student's times but the first."""
        config, history, states = self.config, [], []
        points = (config.m + 1) * (config.num_steps - 1) + 1
        times = schedule(points, config.sigma_max, config.sigma_min, x)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            if config.solver == "amed":
                x = heun_step(self.net, x, t, t_next, labels)
            else:
                order = config.options.get("order", 4)
                x = ipndm_step(self.net, x, t, t_next, labels, None, False, history, order)[0]
            states.append(x)
        return states[config.m :: config.m + 1]

    def step(self, latents: torch.Tensor, labels=None) -> None:
        """Train on a batch of latents: one update per interval."""
        config, history = self.config, []
        x = config.sigma_max * latents.to(self.device, self.dtype)
        times = schedule(config.num_steps, config.sigma_max, config.sigma_min, x)
        with torch.no_grad():
            targets = self.teach(x, labels)
        for n, target in enumerate(targets):
            self.optimizer.zero_grad()
            ends = schedule(2, times[n], times[n + 1], x)
            given = self.net, x, *ends, labels, self.predictor, config.afs and n == 0
            if config.solver == "amed":
                out, predicted = amed_step(*given)
            else:
                out, predicted = ipndm_step(*given, history, config.options.get("order", 4))
            loss = (out - target) ** 2
            self.log.append([loss.sum((1, 2, 3)).mean().item(), predicted.r.mean().item()])
            (loss.sum() / len(x)).backward()
            for p in self.predictor.parameters():
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
            self.optimizer.step()
            x = target if config.solver == "amed" else out.detach()


@torch.no_grad()
def sample(net, latents, config: Training, predictor) -> torch.Tensor:
    """Samples of a method with its predictor, in the latents' precision."""
    x, history = config.sigma_max * latents, []
    times = schedule(config.num_steps, config.sigma_max, config.sigma_min, x)
    for n, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        given = net, x, t, t_next, None, predictor, config.afs and n == 0
        if config.solver == "amed":
            x, _ = amed_step(*given)
        else:
            x, _ = ipndm_step(*given, history, config.options.get("order", 4))
    return x


# --- from samples to a distance -----------------------------------------------------------------


def write_pngs(images: torch.Tensor, seeds, folder: Path) -> None:
    """8-bit images [B, C, H, W], each into a file, a thousand to a folder."""
    for seed, image in zip(seeds, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        place = folder / f"{seed - seed % 1000:06d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(place / f"{seed:06d}.png")


class Pictures(torch.utils.data.Dataset):
    """The images below a folder, [C, H, W] uint8, in the order of their names."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.rglob("*.png"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).copy()


@torch.no_grad()
def statistics(folder: Path, features, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the features of the images below a folder."""
    total, outer, count = 0.0, 0.0, 0
    for images in torch.utils.data.DataLoader(Pictures(folder), batch):
        found = features(images).double()
        total, outer, count = total + found.sum(0), outer + found.T @ found, count + len(found)
    mean = total / count
    return mean.numpy(), ((outer - mean.outer(mean) * count) / (count - 1)).numpy()


def distance(mean, covariance, mean_ref, covariance_ref) -> float:
    """The Frechet distance with the square root of the product of the covariances."""
    root = scipy.linalg.sqrtm(covariance @ covariance_ref)
    trace = np.trace(covariance + covariance_ref - 2 * root)
    return float(np.real(np.square(mean - mean_ref).sum() + trace))


def samples_to_distance(
    draw, seeds, shape, to_bytes, features, reference, folder: Path, batch: int = 64
) -> float:
    """Sample into files, read the files, compare their features; all in batches of one size.

    Args:
        draw: latents to samples.
        to_bytes: samples to 8-bit images.
        features: 8-bit images to features.
        reference: with mean and covariance.
    """
    for first in range(0, len(seeds), batch):
        part = seeds[first : first + batch]
        write_pngs(to_bytes(draw(make_latents(part, shape))), part, folder)
    return distance(*statistics(folder, features, batch), reference.mean, reference.covariance)
