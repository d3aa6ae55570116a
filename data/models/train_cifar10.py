"""Train the models of the data set "cifar10_small" from nothing: classifier, then denoiser.

    python data/models/train_cifar10.py                        all parts, on a GPU
    python data/models/train_cifar10.py denoiser --seconds 540 one part, for nine minutes

The parts are "classifier", "denoiser" and "publish", which writes the denoiser's average weights,
the moments of real images' features, the model cards and SHA256SUMS; and "joint", which writes the
moments of their joint features and, since it only needs the classifier, takes minutes on a CPU. The
images are downloaded unless --images names a folder or an archive of them. The training of the
denoiser writes checkpoints and goes on from them, so that several short runs add up; "publish"
takes what there is.
"""

import argparse
import copy
import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from amedlib.checks import one_of, require
from amedlib.compute import best_device
from amedlib.datasets import joint
from amedlib.datasets.files import Asset, fetch
from amedlib.denoisers import edm
from amedlib.denoisers.cifar10 import (
    COUNTS,
    Cifar10Classifier,
    load_cifar10_images,
    moments_to_tensors,
    scaled,
)
from amedlib.files import load_tensors, save_tensors, write_atomically
from amedlib.metrics import Moments, leave_one_out, moments_distance
from amedlib.study.costs import evaluation_flops
from amedlib.study.run import BLOCKS

HERE = Path(__file__).parent
# The published archive without pickles: torchvision's is made of them.
PUBLISHED = Asset(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "no licence stated; asks to cite Krizhevsky (2009)",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
# Half precision keeps file and checkpoints small. Rounding moves a weight by less than a step of
# Adam does, and Adam's second moments need bfloat16's range.
CHECKPOINT = {
    "net": torch.float16,
    "average": torch.float16,
    "exp_avg": torch.bfloat16,
    "exp_avg_sq": torch.bfloat16,
}
PART_BYTES = 13_500_000  # of a file of a checkpoint, at most
SAVE_EVERY = 120  # seconds
RESERVE = 10  # seconds that are kept for the last checkpoint
SIGMA_LOG_MEAN, SIGMA_LOG_STD = -1.2, 1.2  # Karras et al., 2022, Table 1
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4}  # bfloat16, not sparse: NVIDIA's data sheets
SEED = 0
START = time.monotonic()  # --seconds counts from here


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        init_kwargs: of the denoiser: EDM's DDPM++ for CIFAR-10 with half the blocks, and with the
            fewer channels the higher the resolution, where they cost most. These 6.5 million
            parameters are one file of 13 MB in half precision. Its bottleneck is 8x8, as that of
            EDM's model is.
        batch: images per update.
        images: draws that the training of the denoiser ends after.
        learning_rate, ramp, plateau: it rises over ``ramp`` draws and falls with the square root of
            their number after ``plateau`` (as in Karras et al., 2024, arXiv:2312.02696), so that no
            end needs to be known.
        average: half-life of the average of the weights, as a part of the draws so far.
        width, epochs: of the classifier.
        counts: of images, of each part.
    """

    init_kwargs: dict = field(
        default_factory=lambda: {
            "img_resolution": 32,
            "img_channels": 3,
            "model_type": "SongUNet",
            "model_channels": 32,
            "channel_mult": [1, 3, 5],
            "num_blocks": 2,
            "attn_resolutions": [16],
            "dropout": 0.0,  # small for its many augmented images: it does not learn them by heart
            "augment_dim": 9,
            "sigma_data": 0.5,
        }
    )
    batch: int = 512
    images: int = 40_000_000
    learning_rate: float = 2e-3
    ramp: int = 500_000
    plateau: int = 1_000_000
    average: float = 0.08
    width: int = 64
    epochs: int = 24
    counts: dict = field(default_factory=lambda: COUNTS)


_SMALL = {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
TINY = Settings(
    init_kwargs=Settings().init_kwargs | _SMALL,
    **{"batch": 4, "images": 40, "ramp": 8, "plateau": 20, "width": 4, "epochs": 2},
    counts={"train": 60, "test": 30},
)


# --- classifier ---------------------------------------------------------------------------------


def moved(images: torch.Tensor, most: int = 4) -> torch.Tensor:
    """Images [B, C, H, W], each flipped or not and shifted by up to ``most`` pixels."""
    batch, _, height, width = images.shape
    flipped = torch.rand(batch, 1, 1, 1, device=images.device) < 0.5
    images = F.pad(torch.where(flipped, images.flip(3), images), [most] * 4, mode="reflect")
    dy, dx = torch.randint(2 * most + 1, (2, batch, 1), device=images.device)
    rows = dy + torch.arange(height, device=images.device)
    columns = dx + torch.arange(width, device=images.device)
    each = torch.arange(batch, device=images.device)[:, None, None]
    return images.movedim(1, 3)[each, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def train_classifier(data, settings: Settings, device):
    """SGD with a one-cycle schedule; returns the network, and the seconds it took."""
    torch.manual_seed(SEED)
    begin = time.monotonic()
    net = Cifar10Classifier(settings.width).to(device, memory_format=torch.channels_last)
    pixels, labels = (tensor.to(device) for tensor in data["train"])
    batch = min(settings.batch, len(pixels))
    steps = settings.epochs * (len(pixels) // batch)
    optimiser = torch.optim.SGD(
        net.parameters(), 0.2, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=steps)
    with tqdm(total=steps, desc="classifier", mininterval=5) as bar:
        for _ in range(settings.epochs):
            order = torch.randperm(len(pixels), device=device)
            for pick in order[: len(order) // batch * batch].split(batch):
                images = moved(scaled(pixels[pick])).contiguous(memory_format=torch.channels_last)
                with torch.autocast(device.type, torch.bfloat16):
                    loss = F.cross_entropy(net(images), labels[pick], label_smoothing=0.1)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
    require(bool(loss.isfinite()), "the loss of the classifier", loss.item(), "finite")
    return net.eval().requires_grad_(False), time.monotonic() - begin


@torch.no_grad()
def in_batches(function, pixels, device, batch=1000):
    """``function`` of images in [-1, 1], of all pixels, on the CPU."""
    return torch.cat([function(scaled(part.to(device))).cpu() for part in pixels.split(batch)])


def accuracy(net, images, device) -> float:
    """Of the classifier on one part of the data."""
    found = in_batches(net, images.pixels, device).argmax(1)
    return (found == images.labels).float().mean().item()


def make_classifier(data, into, settings, device, **_):
    net, seconds = train_classifier(data, settings, device)
    net.half().float()  # what is measured is what is published
    about = {
        "class": "Cifar10Classifier",
        "width": settings.width,
        "epochs": settings.epochs,
        "seconds": round(seconds),
        "device": device_name(device),
        **{f"accuracy_{part}": accuracy(net, images, device) for part, images in data.items()},
    }
    save_half(into / "cifar10_classifier.safetensors", net.state_dict(), about)
    print(f"classifier: {about['accuracy_test']:.1%} of the test images in {seconds:.0f} s")


# --- augmentation -------------------------------------------------------------------------------


def augment(images: torch.Tensor, chance: float = 0.12) -> tuple[torch.Tensor, torch.Tensor]:
    """EDM's augmentation (Karras et al., 2022, Appendix F.2) of images [B, C, S, S].

    Half of the images are flipped in x, and with probability ``chance`` each: flipped in y (half of
    them), scaled by 2^(0.2 n), rotated by any angle, stretched by 2^(0.2 n) along any direction,
    moved by 1/8 of the size times n, to the right and down (n: normal numbers).

    Returns:
        The images, and labels [B, 9] that tell the network what was done, zero where nothing was:
        flips, the exponent of the scale, cosine minus 1 and sine of the rotation, the exponent of
        the stretch times cosine and sine of its direction, and both movements in units of 1/8.
    """
    batch, device = len(images), images.device

    def happens(probability):
        return (torch.rand(batch, device=device) < probability).float()

    def normal(*shape):
        return torch.randn(batch, *shape, device=device)

    def angles():
        return (torch.rand(batch, device=device) * 2 - 1) * math.pi

    flips = torch.stack([happens(0.5), happens(0.5 * chance)], dim=1)
    scale = normal() * happens(chance)
    angle = angles() * happens(chance)
    stretch, direction = normal() * happens(chance), angles()
    shift = normal(2) * happens(chance)[:, None]
    labels = torch.cat(
        [
            flips,
            torch.stack([scale, angle.cos() - 1, angle.sin()], dim=1),
            stretch[:, None] * torch.stack([direction.cos(), direction.sin()], dim=1),
            shift,
        ],
        dim=1,
    )
    return transformed(images, flips, scale, angle, stretch, direction, shift), labels


def transformed(images, flips, scale, angle, stretch, direction, shift) -> torch.Tensor:
    """Images [B, C, S, S] flipped, then scaled, rotated (x to y), stretched and moved.

    flips and shift are [B, 2], for x and y; the others [B], as in ``augment``. Beyond an edge is
    the mirror image. Other than in EDM's code, images are resampled once and bicubically, not by
    way of a larger image.
    """
    for axis, flip in zip((3, 2), flips.bool().unbind(1), strict=True):
        images = torch.where(flip[:, None, None, None], images.flip(axis), images)
    # The grid says where each point of the result comes from: the inverse of each, in turn.
    factors = torch.stack([2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)], dim=1)
    stretched = rotation(direction) @ (factors[:, :, None] * rotation(-direction))
    matrix = 2 ** (-0.2 * scale)[:, None, None] * (rotation(-angle) @ stretched)
    # From edge to edge the grid goes from -1 to 1, so that 1/8 of the size is 1/4.
    offset = matrix @ (-shift / 4)[:, :, None]
    grid = F.affine_grid(torch.cat([matrix, offset], dim=2), images.shape, align_corners=False)
    warped = F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False)
    # Interpolation costs the last digits even where nothing moves.
    moves = torch.stack([scale, angle, stretch, *shift.unbind(1)], dim=1).any(1)
    return torch.where(moves[:, None, None, None], warped, images)


def rotation(angle):
    """Matrices [B, 2, 2] of angles [B]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)


# --- denoiser -----------------------------------------------------------------------------------


def denoising_loss(net, images, labels):
    """EDM's loss: log-normal noise levels, each weighted so that all start out equal."""
    levels = torch.randn(len(images), 1, 1, 1, device=images.device)
    sigma = (levels * SIGMA_LOG_STD + SIGMA_LOG_MEAN).exp()
    weight = (sigma**2 + net.sigma_data**2) / (sigma * net.sigma_data) ** 2
    noisy = images + torch.randn_like(images) * sigma
    with torch.autocast(images.device.type, torch.bfloat16):
        denoised = net(noisy, sigma, augment_labels=labels)
    return (weight * (denoised - images) ** 2).mean()


def learning_rate(seen: int, settings: Settings) -> float:
    """After ``seen`` draws."""
    falls = math.sqrt(settings.plateau / max(seen, settings.plateau))
    return settings.learning_rate * min(1, seen / settings.ramp) * falls


class State:
    """Everything that a checkpoint keeps: network, average, Adam's moments, and what was done.

    Attributes:
        about: images and updates so far, what the network is, and the runs that trained it.
    """

    def __init__(self, settings: Settings, device):
        torch.manual_seed(SEED)
        net = edm.build("EDMPrecond", settings.init_kwargs)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimiser = torch.optim.Adam(self.net.parameters(), fused=True)
        for p in self.net.parameters():  # made here, in the layout of the parameter
            step = torch.zeros((), device=device)
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.optimiser.state[p] = {"step": step} | moments
        self.about = {"images": 0, "updates": 0, "init_kwargs": settings.init_kwargs, "runs": []}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by the name that they have in a checkpoint; to read or to fill."""
        found = {}
        for kind in ("net", "average"):
            found |= {f"{kind}/{n}": t for n, t in getattr(self, kind).state_dict().items()}
        for name, p in self.net.named_parameters():
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{kind}/{name}"] = self.optimiser.state[p][kind]
        return found

    def save(self, folder: Path):
        """Write a set of files, then the index that names them, then delete the former set."""
        parts, size = [{}], 0
        for name, tensor in self.tensors().items():
            tensor = tensor.to(CHECKPOINT[name.split("/")[0]])
            if size + tensor.nbytes > PART_BYTES:
                parts.append({})
                size = 0
            parts[-1][name] = tensor
            size += tensor.nbytes
        stem = f"checkpoint-{self.about['images']:011d}"
        files = [f"{stem}-{i}.safetensors" for i in range(len(parts))]
        for file, part in zip(files, parts, strict=True):
            save_tensors(folder / file, part, {})
        index = json.dumps(self.about | {"files": files}, indent=1)
        write_atomically(folder / "checkpoint.json", index.encode())
        for path in folder.glob("checkpoint-*.safetensors"):
            if path.name not in files:
                path.unlink()

    def load(self, folder: Path):
        """Go on from the checkpoint in a folder, if there is one.

        Raises:
            ValueError: it is of another network, or its set of files is not whole.
        """
        if not (folder / "checkpoint.json").is_file():
            return
        about = read_index(folder)
        require(
            about["init_kwargs"] == self.about["init_kwargs"],
            f"the network of the checkpoint in {folder}",
            about["init_kwargs"],
            f"{self.about['init_kwargs']} (or take another folder)",
        )
        stored = read_checkpoint(folder, about)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(stored[name])
        for values in self.optimiser.state.values():
            values["step"].fill_(about["updates"])
        self.about = {name: value for name, value in about.items() if name != "files"}


def read_index(folder: Path) -> dict:
    """The index of the checkpoint in a folder."""
    path = folder / "checkpoint.json"
    require(path.is_file(), "into", str(folder), "a folder with a checkpoint: train first")
    return json.loads(path.read_text())


def read_checkpoint(folder: Path, about: dict) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    stored = {}
    for file in about["files"]:
        stored |= load_tensors(folder / file)[0]
    return stored


def device_name(device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def make_denoiser(data, into, settings, device, deadline=math.inf, compiled=False, **_):
    """Train until the settings' number of draws or the deadline; leaves a checkpoint."""
    state = State(settings, device)
    state.load(into)
    about, net, batch = state.about, state.net, settings.batch
    torch.manual_seed(SEED + about["images"])  # other draws than before
    pixels = data["train"].pixels.to(device)
    averaged, live = list(state.average.parameters()), list(net.parameters())
    loss_of = torch.compile(denoising_loss) if compiled else denoising_loss
    # A backward pass computes twice as much as the forward one.
    flops = 3 * evaluation_flops(settings.init_kwargs)
    run = {"device": device_name(device), "torch": torch.__version__, "seconds": 0.0, "images": 0}

    def step():
        state.optimiser.param_groups[0]["lr"] = learning_rate(about["images"], settings)
        pick = torch.randint(len(pixels), (batch,), device=device)
        images, labels = augment(scaled(pixels[pick]))
        loss = loss_of(net, images.contiguous(memory_format=torch.channels_last), labels)
        state.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(live, 1.0)
        state.optimiser.step()
        for name, more in {"images": batch, "updates": 1}.items():
            about[name] += more
        run["images"] += batch
        keep = 0.5 ** (batch / (settings.average * about["images"]))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, live, 1 - keep)
        return loss.detach()

    def is_due():
        return about["images"] < settings.images and time.monotonic() < deadline

    begin = saved = time.monotonic()
    bar = tqdm(
        total=settings.images,
        initial=about["images"],
        desc="denoiser",
        unit=" images",
        mininterval=9,
    )
    with bar:
        if is_due():
            about["runs"].append(run)
            step().item()  # compiles, and is not timed
        while is_due():
            start = time.monotonic()
            losses = [step()]
            while is_due() and time.monotonic() - start < 10:
                losses.append(step())
            mean = torch.stack(losses).mean().item()  # waits for the GPU, so not after every step
            require(math.isfinite(mean), "the loss", mean, "finite; the last checkpoint is kept")
            now = time.monotonic()
            rate = len(losses) * batch / (now - start)
            run |= {"seconds": round(now - begin, 1), "loss": round(mean, 5)}
            run |= {"images_per_second": round(rate), "TFLOP/s": round(rate * flops / 1e12, 2)}
            bar.n = about["images"]
            bar.set_postfix(loss=mean, TFLOPs=run["TFLOP/s"])
            if now - saved > SAVE_EVERY:
                state.save(into)
                saved = now
    state.save(into)
    print(f"denoiser: {about['images']:,} of {settings.images:,} images; {run}")
    for name, peak in PEAK_TFLOPS.items():
        if name in run["device"] and "TFLOP/s" in run:
            print(f"{run['TFLOP/s'] / peak:.1%} of the nominal {peak} TFLOP/s")


# --- what is published --------------------------------------------------------------------------


def metadata(about: dict) -> dict[str, str]:
    """As a safetensors file takes it."""
    return {n: v if isinstance(v, str) else json.dumps(v) for n, v in about.items()}


def save_half(path: Path, tensors: dict, about: dict):
    """Weights in half precision, with what they are as metadata."""
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    save_tensors(path, tensors, metadata(about))


def load_classifier(into, device) -> tuple[Cifar10Classifier, dict]:
    """The classifier that was trained, and its metadata."""
    weights, about = load_tensors(into / "cifar10_classifier.safetensors")
    net = Cifar10Classifier(json.loads(about["width"]))
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False).to(device), about


@torch.no_grad()
def real_moments(function, data, device) -> dict[str, list[Moments]]:
    """Moments of features: of the training images, and of the test images in random blocks."""
    features = {n: in_batches(function, images.pixels, device) for n, images in data.items()}
    order = torch.randperm(len(features["test"]), generator=torch.Generator().manual_seed(SEED))
    return {
        "train": [Moments.of(features["train"])],
        "test": [Moments.of(features["test"][part]) for part in order.tensor_split(BLOCKS)],
    }


def save_moments(path: Path, moments: dict[str, list[Moments]], source: str):
    """Write the moments, with what they are of as metadata."""
    classifier = (path.parent / "cifar10_classifier.safetensors").read_bytes()
    save_tensors(
        path,
        moments_to_tensors(moments),
        {"data": f"{source}; x/127.5 - 1", "features": hashlib.sha256(classifier).hexdigest()},
    )


def make_joint(data, into, device, source, **_):
    """The moments of the joint features of real images, not yet balanced, and their card."""
    net, _ = load_classifier(into, device)
    both = joint.side_by_side(joint.CIFAR10, net.features)
    moments = real_moments(both, data, device)
    path = into / "cifar10_joint.safetensors"
    save_moments(path, moments, source)
    factors = joint.balance(joint.CIFAR10, moments["train"][0])
    test, train = (sum(moments[n][1:], moments[n][0]) * factors for n in ("test", "train"))
    card = JOINT_CARD.format(
        source=source,
        frequencies=joint.CIFAR10.count,
        features=net.FEATURES,
        power=joint.CIFAR10.power,
        train=train.count,
        test=test.count,
        floor=moments_distance(test, train),
    )
    write_atomically(into / "cifar10_joint.md", card.encode())
    enter_sums(into)


def publish(data, into, settings, device, source, **_):
    """Weights in half precision, the moments of real images, model cards and checksums."""
    about = read_index(into)
    stored = read_checkpoint(into, about)
    prefix = "average/"
    weights = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    known = {"precond_class": "EDMPrecond", "init_kwargs": about["init_kwargs"]}
    known |= {"data": f"{source}; x/127.5 - 1", "images": about["images"], "runs": about["runs"]}
    save_half(into / "cifar10_edm.safetensors", weights, known)

    net, of_classifier = load_classifier(into, device)
    moments = real_moments(net.features, data, device)
    floor, _ = leave_one_out(moments["test"], lambda m: moments_distance(m, moments["train"][0]))
    save_moments(into / "cifar10_moments.safetensors", moments, source)
    write_cards(into, source, settings, about, of_classifier, data, floor)
    enter_sums(into)


def enter_sums(into: Path):
    """Enter the files of this script into SHA256SUMS; the lines of others stay."""
    path = into / "SHA256SUMS"
    lines = path.read_text().splitlines() if path.exists() else []
    sums = dict(line.split()[::-1] for line in lines if line.strip())
    for file in into.glob("cifar10_*.safetensors"):
        sums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    write_atomically(path, text.encode())


DENOISER_CARD = """# cifar10_edm: a small diffusion model of CIFAR-10

**What.** SongUNet (DDPM++) in EDM's preconditioner, {parameters:,} parameters, trained by
`data/models/train_cifar10.py` on {images:,} draws of the {train:,} training images of CIFAR-10,
without labels. Arguments for `amedlib.denoisers.edm.build` are in the file's metadata. Images in
[-1, 1], noise levels 0.002 to 80. Weights in half precision.

**Data.** {source}. The model draws what it was trained on, artefacts of
compression included; a distance to statistics of another copy of the images counts these too.

**Training.** EDM's loss (log-normal noise levels, mean {mean}, deviation {std}) and its
augmentation (every image flipped in x or not; flipped in y, scaled, rotated, stretched and moved
with probability 0.12 each; nine labels say what was done, zero when sampling). Adam, gradients
clipped to norm 1, batch {batch}, learning rate {rate} with a ramp of {ramp:,} images, falling with
the root of their number after {plateau:,}; the weights are an average whose half-life is
{average:.0%} of the images seen; bfloat16, seed {seed}. One evaluation of one image takes
{gflop:.2f} GFLOP, its training three times as many.

| run | device | seconds | images | images per second | TFLOP/s | loss at the end |
|---|---|---|---|---|---|---|
{runs}

**Limits.** EDM's model of CIFAR-10 has 55.7 million parameters and saw 200 million images (Karras
et al., 2022); this one is for telling solvers apart on colour images. How good its samples are, and
how they compare with real images, is measured in the book. Data: Krizhevsky, "Learning Multiple
Layers of Features from Tiny Images", 2009.
"""

CLASSIFIER_CARD = """# cifar10_classifier: features for the Frechet distance of CIFAR-10

**What.** `amedlib.denoisers.cifar10.Cifar10Classifier`, a residual network with smooth activations
and 128 penultimate features, {parameters:,} parameters in half precision, trained by
`data/models/train_cifar10.py` on the {train:,} training images of CIFAR-10: {epochs} epochs, SGD,
random flips and shifts, bfloat16, seed {seed}; {seconds} seconds on {device}. Input: images in
[-1, 1].

**Data.** {source}.

**Measured.** {accuracy_test:.2%} of the {test:,} test images are classified correctly, and
{accuracy_train:.2%} of those it was trained on. FD of the test images to the training images:
{floor:.3f}. A part of this floor is that the classifier has seen the latter and not the former,
which holds for samples too.

`cifar10_moments.safetensors` holds the moments (count, sum, sum of outer products) of its features:
of the training images, and of the test images in ten random blocks.

**Limits.** A distance in these features is called FD (CIFAR-10 features), never FID.
Data: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""


JOINT_CARD = """# cifar10_joint: real images in the joint features of CIFAR-10

**What.** Moments (count, sum, sum of outer products) of {frequencies} coefficients of the cosine
transform and the {features} features of `cifar10_classifier`, side by side
(`amedlib.datasets.joint`): of the {train:,} training images, and of the {test:,} test images in ten
random blocks. Written by `data/models/train_cifar10.py joint`.

**Balance.** They are raw. The library divides a coefficient by its deviation to the power
{power:g}, then scales coefficients and features to a total variance of 50 each, all from the
moments of the training images.

**Data.** {source}.

**Measured.** Joint FD of the test images to the training images: {floor:.3f}.

**Limits.** The frequencies stand for all pixels but are not all of them: a pattern at another
frequency is seen by the classifier alone. Data: Krizhevsky, "Learning Multiple Layers of Features
from Tiny Images", 2009.
"""


def write_cards(into, source, settings, about, of_classifier, data, floor):
    """The model cards, every number of which was measured here or read from the files."""
    with torch.device("meta"):
        denoiser = edm.build("EDMPrecond", about["init_kwargs"])
        classifier = Cifar10Classifier(json.loads(of_classifier["width"]))
    columns = ("device", "seconds", "images", "images_per_second", "TFLOP/s", "loss")
    rows = [
        " | ".join(["", str(i), *(f"{run.get(name, '–')}" for name in columns), ""]).strip()
        for i, run in enumerate(about["runs"], start=1)
    ]
    known = {
        "source": source,
        "seed": SEED,
        **{part: len(images.pixels) for part, images in data.items()},
    }
    card = DENOISER_CARD.format(
        **known,
        parameters=sum(p.numel() for p in denoiser.parameters()),
        images=about["images"],
        mean=SIGMA_LOG_MEAN,
        std=SIGMA_LOG_STD,
        batch=settings.batch,
        rate=settings.learning_rate,
        ramp=settings.ramp,
        plateau=settings.plateau,
        average=settings.average,
        gflop=evaluation_flops(about["init_kwargs"]) / 1e9,
        runs="\n".join(rows),
    )
    write_atomically(into / "cifar10_edm.md", card.encode())
    card = CLASSIFIER_CARD.format(
        **known,
        parameters=sum(p.numel() for p in classifier.parameters()),
        epochs=of_classifier["epochs"],
        seconds=of_classifier["seconds"],
        device=of_classifier["device"],
        accuracy_test=json.loads(of_classifier["accuracy_test"]),
        accuracy_train=json.loads(of_classifier["accuracy_train"]),
        floor=floor,
    )
    write_atomically(into / "cifar10_classifier.md", card.encode())


PARTS = {
    "classifier": make_classifier,
    "denoiser": make_denoiser,
    "publish": publish,
    "joint": make_joint,
}


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--images", help="folder or tar with train/CLASS/*.jpg, test/CLASS/*.jpg")
    parser.add_argument("--into", type=Path, default=HERE, help="folder for what is written")
    parser.add_argument("--seconds", type=float, help="the denoiser's training is over by then")
    parser.add_argument("--device")
    parser.add_argument("--eager", action="store_true", help="do not compile the network")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script")
    given = parser.parse_args(arguments)
    for part in given.parts:
        one_of("part", part, PARTS)
    require(
        given.seconds is None or given.seconds > RESERVE,
        "seconds",
        given.seconds,
        f"more than {RESERVE}, which are kept for the checkpoint",
    )
    deadline = math.inf if given.seconds is None else START + given.seconds - RESERVE
    settings = TINY if given.tiny else Settings()
    device = torch.device(best_device(given.device))
    torch.backends.cudnn.benchmark = True  # the shapes never change
    images = Path(given.images or fetch(PUBLISHED))
    data = load_cifar10_images(images, settings.counts)
    published = images.name == PUBLISHED.name
    for part in given.parts or PARTS:
        PARTS[part](
            data=data,
            into=given.into,
            settings=settings,
            device=device,
            deadline=deadline,
            compiled=device.type == "cuda" and not given.eager,
            source="The published images" if published else "JPEG copies of the published images",
        )


if __name__ == "__main__":
    main()
