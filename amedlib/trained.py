"""What is trained is one file that samples: a predictor with the record of its training."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch

from amedlib import checks
from amedlib.checks import require
from amedlib.compute import in_precision
from amedlib.files import load_tensors, reading, save_tensors
from amedlib.freedoms import LearnedTable
from amedlib.intermediate import Predictor, numbers
from amedlib.recipes import Training
from amedlib.sampling import Sample, sample
from amedlib.wrapper import Wrapper

LOGGED = 10  # batches whose log is kept with a predictor: how training ended


def make_predictor(
    config: Training, bottleneck_size: tuple[int, int] | None
) -> Predictor | LearnedTable:
    """An untrained ``Predictor`` or, in the form ``"table"``, ``LearnedTable``."""
    memory = config.make_solver().memory
    if config.form == "table":
        return LearnedTable(config.times(), config.freedoms, config.points, memory)
    network = Predictor(
        config.form,
        bottleneck_size,
        config.scale_dir,
        config.scale_time,
        config.uses_bottleneck,
    )
    if config.freedoms == ("r",):
        return network
    rest = [name for name in config.freedoms if name != "r"]
    return LearnedTable(config.times(), rest, memory=memory, network=network)


def weights_fingerprint(denoiser) -> str | None:
    """A hash of a denoiser's weights, 16 hexadecimal digits; ``None`` where it shows none."""
    tensors, around = {}, []
    while isinstance(denoiser, Wrapper):
        around.append(type(denoiser).__name__)
        own = {".".join([*around, name]): value for name, value in vars(denoiser).items()}
        tensors |= {name: value for name, value in own.items() if torch.is_tensor(value)}
        denoiser = denoiser.denoiser
    if isinstance(denoiser, torch.nn.Module):
        tensors |= denoiser.state_dict()
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def below(prefix: str, tensors: dict) -> dict:
    """The entries whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def save_predictor(path: Path, trainer) -> None:
    """Write the predictor of a ``Trainer`` with all that is needed to sample with it.

    Beside the weights: the log of the last batches, the seconds that training took, how many
    gradients of a batch and evaluations of the network it took, its full configuration, the shape
    of a sample, and the fingerprint of the denoiser's weights.
    """
    predictor = trainer.predictor
    tensors = {f"predictor/{k}": v for k, v in predictor.state_dict().items()}
    tensors["log"] = torch.tensor(trainer.log[-LOGGED:], dtype=torch.float32)
    metadata = {
        "training": json.dumps(asdict(trainer.config)),
        "bottleneck_size": json.dumps(predictor.bottleneck_size),
        "seconds": f"{trainer.seconds:.3f}",
        "gradients": str(trainer.gradients),
        "evaluations": str(trainer.evaluations),
        "shape": json.dumps(trainer.shape),
        "denoiser": trainer.fingerprint or "",
    }
    save_tensors(path, tensors, metadata)


def load_predictor(
    path: Path, config: Training | None = None, denoiser=None, shape=None
) -> Predictor | LearnedTable:
    """Read what ``save_predictor`` wrote.

    Args:
        config, denoiser, shape: only if it was trained so, for a denoiser of these weights, and for
            samples of this shape; what is not given, or not stated in the file, is not compared.

    Returns:
        The predictor; its ``trained_for`` is the record of its training.

    Raises:
        ValueError: the file is missing, or of another training; ``Damaged`` if no training wrote
            it, or not so.
    """
    path = checks.path("path", path)
    tensors, metadata = load_tensors(path)
    with reading(path, "one that a training wrote"):
        found = Training(**json.loads(metadata["training"]))
        stated = json.loads(metadata.get("shape", "null"))
        predictor = make_predictor(found, json.loads(metadata["bottleneck_size"]))
        predictor.load_state_dict(below("predictor/", tensors))
    if config is not None and config != found:
        a, b = asdict(found), asdict(config)
        differ = {name: value for name, value in a.items() if value != b[name]}
        asked = {name: b[name] for name in differ}
        require(False, f"the predictor in {path}", differ, f"of the training asked for, {asked}")
    ours, theirs = weights_fingerprint(denoiser), metadata.get("denoiser")
    require(
        not ours or not theirs or ours == theirs,
        f"the predictor in {path}",
        f"one for a denoiser with the fingerprint {theirs}",
        f"trained for this denoiser, whose weights have the fingerprint {ours}",
    )
    require(
        shape is None or stated is None or list(shape) == stated,
        f"the predictor in {path}",
        f"one for {stated}",
        f"trained for samples of shape {list(shape or ())}",
    )
    predictor.trained_for = found
    return predictor.eval()


@dataclass(frozen=True)
class TrainedSampler:
    """What ``load_sampler`` reads: a trained predictor with the method it belongs to.

    Attributes:
        training: the record of the training, and so of the method.
        predictor: the trained ``Predictor`` or ``LearnedTable``.
        seconds: that its training took, where that is known.
    """

    training: Training
    predictor: Predictor | LearnedTable
    seconds: float | None = None

    @property
    def times(self) -> torch.Tensor:
        """The time points [N], float64, descending; intermediate ones lie between them."""
        return self._schedule[0]

    @property
    def network_times(self) -> torch.Tensor:
        """The times that the network is told at the beginnings of the N-1 steps."""
        return self._schedule[1][: len(self.times) - 1]

    @property
    def _schedule(self) -> tuple[torch.Tensor, torch.Tensor]:
        times = self.training.times()
        if not isinstance(self.predictor, LearnedTable):
            return times, times
        with torch.no_grad():
            return self.predictor.schedule(times)

    @cached_property
    def nfe(self) -> int:
        """Evaluations per sample, counted, of a denoiser that makes one per call."""
        size = self.predictor.bottleneck_size

        class Zero:
            gives_bottleneck, bottleneck_size = True, size

            def __call__(self, x, t, labels=None, return_bottleneck=False):
                hidden = torch.zeros(1, 1, *(size or (1, 1)), dtype=torch.float32, device="cpu")
                return (0 * x, hidden) if return_bottleneck else 0 * x

        return self.sample(Zero(), torch.zeros(1, 1, device="cpu")).nfe

    def sample(self, denoiser, latents, labels=None, trajectory: bool = False) -> Sample:
        """``amedlib.sample`` with the method that the predictor was trained for.

        Args:
            denoiser: the one that it was trained on.
            latents: unit normal [B, ...].

        Raises:
            ValueError: as ``amedlib.sample``.
        """
        training = self.training
        return sample(
            in_precision(denoiser, training.precision),
            latents,
            training.times(),
            training.make_solver(),
            training.afs,
            self.predictor.to(latents.device),
            labels,
            trajectory,
        )

    @torch.no_grad()
    def sigmas(self) -> list[float]:
        """All noise levels at which the solver steps, descending, intermediate ones included.

        For samplers that take a list of sigmas; the page "Use AMED on your own model" has the
        lines for diffusers, k-diffusion and ComfyUI. Whether they then sample the same is theirs:
        they know neither AFS nor scaled directions and times, nor learned coefficients, and some
        append a zero.

        Raises:
            ValueError: r depends on the sample, or a step has several intermediate points, so that
                there is no one list.
        """
        times, sigmas = self.times, []
        steps = numbers(self.predictor.cpu(), times)
        for (t_cur, t_next), (r, *_) in zip(pairwise(times), steps, strict=True):
            allowed = "at most one, to have one list of sigmas"
            require(len(r) < 2, "intermediate points of a step", len(r), allowed)
            sigmas += [float(t_cur), *(float(t_next**each * t_cur ** (1 - each)) for each in r)]
        return [*sigmas, float(times[-1])]


def load_sampler(path: Path) -> TrainedSampler:
    """Read what ``train`` wrote, ready to sample.

    Raises:
        ValueError: the file is missing or damaged, or no training wrote it.
    """
    predictor = load_predictor(path)
    _, metadata = load_tensors(checks.path("path", path))
    seconds = float(metadata["seconds"]) if "seconds" in metadata else None
    return TrainedSampler(predictor.trained_for, predictor, seconds)
