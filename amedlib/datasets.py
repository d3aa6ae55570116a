"""What is sampled from: a declarative entry per data set, loaded by ``load_dataset``."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from amedlib.checks import one_of
from amedlib.denoisers import edm
from amedlib.denoisers.digits import DigitsClassifier, load_digits_images, quantise
from amedlib.files import load_tensors
from amedlib.metrics import Moments, feature_distance, lpips_distance
from amedlib.training import squared_l2

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is declared of a data set: known without loading anything.

    Attributes:
        name: as in ``load_dataset``.
        title: for captions.
        paper: the data set of the paper whose numbers are laid beside these.
        shape: of a sample, (C, H, W).
        load: makes the ``Dataset`` from the entry and a device.
        sigma_min, sigma_max: range of the noise levels.
        noise_levels: the model's own, for the schedule ``"discrete"``; see ``make_schedule``.
        schedule: the one that the paper uses for all methods here; ``None``: each method's own.
        afs: whether the paper uses AFS here, where it uses it at all.
        plugin: the method that the paper applies AMED-Plugin to.
        solver_options: options that a solver gets on this data set, by its name.
        training: fields of ``Training`` that this data set sets.
        samples, nfes: of the paper's tables here.
        metrics: what is measured of samples; ``"fd"``, ``"fd_pixels"``, ``"endpoint_error"``.
        endpoint_samples: the most for which the ODE's solution is computed and kept.
        batch: samples per network call at most; halved where the memory does not suffice.
        precision: in which the network computes, see ``Run``.
        evaluations_per_call: how many evaluations a call of the denoiser counts.
        feature_distance_name: what the Frechet distance is called.
        reference_name: what samples are compared with, for captions.
        floor: whether real images are at hand to compare with each other.
        assets: the files that it needs, names in ``amedlib.assets.ASSETS``.
    """

    name: str
    title: str
    paper: str
    shape: tuple[int, int, int]
    load: Callable[["Entry", str], "Dataset"]
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    noise_levels: str | None = None
    schedule: str | None = None
    afs: bool = True
    plugin: str = "iPNDM"
    solver_options: dict[str, dict] = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    samples: int = 50_000
    nfes: tuple[int, ...] = (3, 5, 7, 9)
    metrics: tuple[str, ...] = ("fd", "endpoint_error")
    endpoint_samples: int = 5_000
    batch: int = 512
    precision: str = "float32"
    evaluations_per_call: int = 1
    feature_distance_name: str = "FID"
    reference_name: str = "published statistics of the training images"
    floor: bool = False
    assets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dataset(Entry):
    """A data set that is loaded: its model, and how samples are judged.

    Attributes:
        denoiser: D(x; t) on states x.
        to_images: final states [B, C, H, W] to images as ``features`` takes them.
        judge: returns ``features`` and ``reference``; called when they are first needed.
        distances: the name of a training loss to a distance of states, twice [B, C, H, W] to [B].
        fingerprint: hash of the weights.
        labels: seeds to what the denoiser gets as labels, one per seed; ``None``: nothing.
        real_images: images of the reference part [n, C, H, W] in [-1, 1], where they are at hand.
    """

    denoiser: Callable
    to_images: Callable
    judge: Callable[[], tuple[Callable, dict]]
    distances: Callable[[str], Callable]
    fingerprint: str
    labels: Callable[[Sequence[int]], torch.Tensor] | None = None
    real_images: torch.Tensor | None = None

    @cached_property
    def _judged(self):
        return self.judge()

    @property
    def features(self) -> Callable:
        """Images to features [B, d]."""
        return self._judged[0]

    @property
    def reference(self) -> dict[str, Moments]:
        """What samples are compared with: moments of features (``"fd"``), perhaps of pixels."""
        return self._judged[1]


def load_weights(name: str, folder: Path = DATA / "models") -> tuple[dict, dict, str]:
    """Tensors, metadata and SHA-256 of a shipped weights file, checked against ``SHA256SUMS``.

    Raises:
        ValueError: the file is missing, truncated or altered.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"The weights file {path} is missing; `make models` trains it again.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    if sums.get(name) != found:
        raise ValueError(
            f"The weights file {path} is not the one that was published: its SHA-256 is {found}, "
            f"SHA256SUMS says {sums.get(name, 'nothing of it')}."
        )
    return *load_tensors(path), found


class Shifted:
    """The denoiser of data moved by ``mean``: D(x; t) = D_0(x - mean; t) + mean."""

    gives_bottleneck = True

    def __init__(self, denoiser, mean):
        self.denoiser, self.mean = denoiser, mean
        self.bottleneck_size = denoiser.bottleneck_size

    def __call__(self, x, t, labels=None, return_bottleneck=False):
        denoised, bottleneck = self.denoiser(x - self.mean, t, labels, return_bottleneck=True)
        denoised = denoised + self.mean
        return (denoised, bottleneck) if return_bottleneck else denoised


def _digits(entry: Entry, device: str) -> Dataset:
    tensors, metadata, digest = load_weights("digits_edm.safetensors")
    mean = tensors.pop("mean_image").to(device)
    network = edm.build(metadata["precond_class"], json.loads(metadata["init_kwargs"]))
    network.load_state_dict(tensors)
    network.eval().requires_grad_(False).to(device)
    weights, _, classifier_digest = load_weights("digits_classifier.safetensors")
    classifier = DigitsClassifier()
    classifier.load_state_dict(weights)
    classifier.eval().requires_grad_(False).to(device)
    digits = load_digits_images()
    real = digits.images[digits.reference_part].to(device)
    centred = entry.name == "digits"
    offset = mean if centred else torch.zeros_like(mean)

    def judge():
        return classifier.features, {
            "fd": Moments.of(classifier.features(real).cpu()),
            "fd_pixels": Moments.of(real.flatten(1).cpu()),
        }

    def distances(loss):
        # Losses compare states; the perceptual ones look at them as images.
        if loss == "l2":
            return squared_l2
        images = feature_distance(classifier.features) if loss == "features" else lpips_distance()
        return lambda x, y: images((x + offset).float(), (y + offset).float())

    return Dataset(
        **vars(entry),
        denoiser=network if centred else Shifted(network, mean),
        to_images=lambda x: quantise(x.float() + offset),
        judge=judge,
        real_images=real,
        distances=distances,
        fingerprint=hashlib.sha256((digest + classifier_digest).encode()).hexdigest()[:12],
    )


_DIGITS = Entry(
    name="digits",
    title="digits, 8x8",
    paper="cifar10",
    shape=(1, 8, 8),
    load=_digits,
    # Thresholding keeps images in [-1, 1]; the centred digits reach beyond.
    solver_options={solver: {"thresholding": False} for solver in ("dpmpp", "unipc")},
    # Half of what the paper's text says; `plugin.ipynb` shows what the other half changes.
    training={"images": 10_000},
    samples=5_000,
    batch=500,
    metrics=("fd", "fd_pixels", "endpoint_error"),
    feature_distance_name="FD (digits features)",
    reference_name="1,198 real images",
    floor=True,
)

DATASETS = {
    entry.name: entry
    for entry in [
        _DIGITS,
        replace(_DIGITS, name="digits_uncentred", title="digits, 8x8, not centred"),
    ]
}


def describe(name: str) -> Entry:
    """What is declared of a data set; nothing is loaded.

    Raises:
        ValueError: no such data set.
    """
    one_of("dataset", name, DATASETS)
    return DATASETS[name]


@lru_cache(maxsize=4)
def load_dataset(name: str, device: str = "cpu") -> Dataset:
    """A data set with everything that a study needs, on ``device``.

    Raises:
        ValueError: no such data set, or its files are missing or altered.
    """
    entry = describe(name)
    return entry.load(entry, device)
