"""What is sampled from: a declarative entry per data set, loaded by ``load_dataset``."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from amedlib.checks import one_of
from amedlib.denoisers import edm
from amedlib.denoisers.digits import DigitsClassifier, load_digits_images, quantise
from amedlib.files import load_tensors
from amedlib.metrics import Moments, feature_distance, lpips_distance
from amedlib.training import squared_l2

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Dataset:
    """A model, its data and how its samples are judged.

    Attributes:
        name: as in ``load_dataset``.
        title: for captions.
        paper: the data set of the paper whose numbers are laid beside these.
        shape: of a sample, (C, H, W).
        denoiser: D(x; t) on states x.
        sigma_min, sigma_max: range of the noise levels.
        solver_options: options that a solver gets on this data set, by its name.
        training: fields of ``Training`` that this data set sets.
        to_images: final states [B, C, H, W] to quantised images in [-1, 1].
        features: images to features [B, d].
        feature_distance_name: what the Frechet distance of these features is called.
        real_images: images of the reference part [n, C, H, W] in [-1, 1].
        reference: their moments, of features (``"fd"``) and of pixels (``"fd_pixels"``).
        distances: the name of a training loss to a distance of states, twice [B, C, H, W] to [B].
        batch: samples per network call.
        fingerprint: hash of the weights.
    """

    name: str
    title: str
    paper: str
    shape: tuple[int, int, int]
    denoiser: Callable
    sigma_min: float
    sigma_max: float
    solver_options: dict[str, dict]
    training: dict
    to_images: Callable
    features: Callable
    feature_distance_name: str
    real_images: torch.Tensor
    reference: dict[str, Moments]
    distances: Callable[[str], Callable]
    batch: int
    fingerprint: str


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


def _digits(name: str, device: str, centred: bool) -> Dataset:
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
    offset = mean if centred else torch.zeros_like(mean)

    def distances(loss):
        # Losses compare states; the perceptual ones look at them as images.
        if loss == "l2":
            return squared_l2
        images = feature_distance(classifier.features) if loss == "features" else lpips_distance()
        return lambda x, y: images((x + offset).float(), (y + offset).float())

    return Dataset(
        name=name,
        title="digits, 8x8" if centred else "digits, 8x8, not centred",
        paper="cifar10",
        shape=(1, 8, 8),
        denoiser=network if centred else Shifted(network, mean),
        sigma_min=0.002,
        sigma_max=80.0,
        # Thresholding keeps images in [-1, 1]; the centred digits reach beyond.
        solver_options={solver: {"thresholding": False} for solver in ("dpmpp", "unipc")},
        # Half of what the paper's text says; `plugin.ipynb` shows what the other half changes.
        training={"images": 10_000},
        to_images=lambda x: quantise(x.float() + offset),
        features=classifier.features,
        feature_distance_name="FD (digits features)",
        real_images=real,
        reference={
            "fd": Moments.of(classifier.features(real).cpu()),
            "fd_pixels": Moments.of(real.flatten(1).cpu()),
        },
        distances=distances,
        batch=500,
        fingerprint=hashlib.sha256((digest + classifier_digest).encode()).hexdigest()[:12],
    )


DATASETS = {
    "digits": partial(_digits, centred=True),
    "digits_uncentred": partial(_digits, centred=False),
}


@lru_cache(maxsize=4)
def load_dataset(name: str, device: str = "cpu") -> Dataset:
    """A data set with everything that a study needs, on ``device``.

    Raises:
        ValueError: no such data set, or its files are missing or altered.
    """
    one_of("dataset", name, DATASETS)
    return DATASETS[name](name, device)
