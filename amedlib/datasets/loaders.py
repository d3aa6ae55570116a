"""Data sets with everything that a study needs: model, features, reference, losses."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

import torch

from amedlib.checks import one_of
from amedlib.compute import best_device
from amedlib.datasets import joint
from amedlib.datasets.entries import Entry, describe
from amedlib.datasets.files import (
    ASSETS,
    DATA,
    INSTALLED,
    cache_folder,
    fetch,
    fingerprint,
    load,
)
from amedlib.datasets.inception import Statistics, inception_features, quantise_edm
from amedlib.denoisers import adm, edm, latent
from amedlib.denoisers.cifar10 import Cifar10Classifier, moments_from_tensors, scaled
from amedlib.denoisers.digits import (
    DigitsClassifier,
    NoisyDigitsClassifier,
    load_digits_images,
    quantise,
)
from amedlib.files import load_tensors
from amedlib.metrics import Moments, feature_distance, lpips_distance
from amedlib.sampling import make_classes
from amedlib.training import squared_l2
from amedlib.wrapper import Wrapper

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
VGG = "vgg16-397923af.pth"


@dataclass(frozen=True, kw_only=True)
class Dataset(Entry):
    """A data set that is loaded: its model, and how samples are judged.

    Attributes:
        denoiser: D(x; t) on states x.
        to_images: final states [B, C, H, W] to images as ``features`` takes them.
        judge: returns ``features_of`` and ``reference``; called when they are first needed.
        distances: the name of a training loss to a distance of states, twice [B, C, H, W] to [B].
        fingerprint: hash of the weights.
        labels: seeds to what the denoiser gets as labels, one per seed; ``None``: nothing.
        real_images: returns the images of the reference part [n, C, H, W] in [-1, 1], where they
            are at hand.
        held_out: by metric, moments of blocks of real images that are not in the reference, where
            they are shipped in the place of images.
    """

    denoiser: Callable
    to_images: Callable
    judge: Callable[[], tuple[dict, dict]]
    distances: Callable[[str], Callable]
    fingerprint: str
    labels: Callable[[Sequence[int]], torch.Tensor] | None = None
    real_images: Callable[[], torch.Tensor] | None = None
    held_out: dict[str, list[Moments]] | None = None

    @cached_property
    def _judged(self):
        return self.judge()

    @property
    def features_of(self) -> dict[str, Callable]:
        """Images to features [B, d], by metric: what its distance is one of."""
        return self._judged[0]

    @property
    def features(self) -> Callable:
        """Images to the features [B, d] of the metric ``"fd"``."""
        return self.features_of["fd"]

    @property
    def reference(self) -> dict[str, Moments | Statistics]:
        """What samples are compared with, by metric; see ``moments_distance``."""
        return self._judged[1]


def load_weights(
    name: str, folder: Path = DATA / "models", command: str = "make models"
) -> tuple[dict, dict, str]:
    """Tensors, metadata and SHA-256 of a shipped weights file, checked against ``SHA256SUMS``.

    ``command`` is what trains it, in a clone.

    Raises:
        ValueError: the file is missing, truncated or altered.
    """
    path = folder / name
    if not path.is_file():
        remedy = f"`{command}` trains it again"
        if INSTALLED:  # without the script, and of the weights with those of the digits alone
            remedy = "copy it there from the folder data/models of the project's repository"
        raise ValueError(f"The weights file {path} is missing; {remedy}.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    listed = folder / "SHA256SUMS"
    lines = listed.read_text().splitlines() if listed.is_file() else []
    sums = {line.split()[-1]: line.split()[0] for line in lines if line.strip()}
    if sums.get(name) != found:
        raise ValueError(
            f"The weights file {path} is not the one that was published: its SHA-256 is {found}, "
            f"SHA256SUMS says {sums.get(name, 'nothing of it')}."
        )
    return *load_tensors(path), found


class Shifted(Wrapper):
    """The denoiser of data moved by ``mean``: D(x; t) = D_0(x - mean; t) + mean."""

    def __init__(self, denoiser, mean):
        super().__init__(denoiser)
        self.mean = mean

    def __call__(self, x, t, labels=None, return_bottleneck=False):
        denoised, bottleneck = super().__call__(x - self.mean, t, labels, return_bottleneck=True)
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

    @cache
    def real_images():  # scikit-learn has them, which who only samples need not have
        digits = load_digits_images()
        return digits.images[digits.reference_part].to(device)

    centred = entry.name != "digits_uncentred" and entry.guidance is None
    offset = mean if centred else torch.zeros_like(mean)

    def judge():
        real = real_images()
        both = joint.side_by_side(joint.DIGITS, classifier.features)
        features_of = {
            "fd": classifier.features,
            "fd_pixels": lambda images: images.flatten(1),
            "fd_joint": joint.balanced(both, joint.balance(joint.DIGITS, Moments.of(both(real)))),
        }
        return features_of, {name: Moments.of(of(real)) for name, of in features_of.items()}

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
        real_images=real_images,
        distances=distances,
        fingerprint=hashlib.sha256((digest + classifier_digest).encode()).hexdigest()[:12],
    )


def _digits_conditional(entry: Entry, device: str) -> Dataset:
    data = _digits(entry, device)
    return replace(data, labels=_classes(data.denoiser, device))


def _digits_guided(entry: Entry, device: str) -> Dataset:
    data = _digits_conditional(entry, device)
    weights, _, digest = load_weights("digits_noisy_classifier.safetensors")
    classifier = NoisyDigitsClassifier()
    classifier.load_state_dict(weights)
    classifier.eval().requires_grad_(False).to(device)
    mean = data.denoiser.mean
    # Not centred, so that the guided image can be clipped to [-1, 1] as the release does: without
    # that a large scale makes the ODE stiff.
    guided = adm.GuidedDenoiser(data.denoiser, lambda x, t: classifier(x - mean, t), entry.guidance)
    both = hashlib.sha256((data.fingerprint + digest).encode()).hexdigest()[:12]
    return replace(data, denoiser=guided, fingerprint=both)


def _cifar10_small(entry: Entry, device: str) -> Dataset:
    parts = ("cifar10_edm", "cifar10_classifier", "cifar10_moments", "cifar10_joint")
    command = "make models DATASET=cifar10_small"
    files = [load_weights(f"{part}.safetensors", command=command) for part in parts]
    tensors, metadata, digests = zip(*files, strict=True)
    network = edm.build(metadata[0]["precond_class"], json.loads(metadata[0]["init_kwargs"]))
    classifier = Cifar10Classifier(json.loads(metadata[1]["width"]))
    for module, weights in zip((network, classifier), tensors[:2], strict=True):
        module.load_state_dict(weights)
        module.eval().requires_grad_(False).to(device)
    moments = {"fd": moments_from_tensors(tensors[2])}
    both = joint.side_by_side(joint.CIFAR10, classifier.features)
    raw = moments_from_tensors(tensors[3])
    factors = joint.balance(joint.CIFAR10, raw["train"][0])
    moments["fd_joint"] = {part: [m * factors for m in each] for part, each in raw.items()}

    def judge():
        features_of = {"fd": classifier.features, "fd_joint": joint.balanced(both, factors)}
        return (
            {name: lambda images, of=of: of(scaled(images)) for name, of in features_of.items()},
            {name: found["train"][0] for name, found in moments.items()},
        )

    def distances(loss):
        one_of("loss", loss, ("l2", "features", "lpips"))
        if loss != "features":
            return _lpips(loss)
        images = feature_distance(classifier.features)
        return lambda x, y: images(x.float(), y.float())

    return Dataset(
        **vars(entry),
        denoiser=network,
        to_images=quantise_edm,
        judge=judge,
        held_out={name: found["test"] for name, found in moments.items()},
        distances=distances,
        fingerprint=hashlib.sha256("".join(digests).encode()).hexdigest()[:12],
    )


def _cifar10_small_fid(entry: Entry, device: str) -> Dataset:
    def judge():
        features = inception_features(fetch(ASSETS[INCEPTION]), device)
        return {"fd": features}, {"fd": load(ASSETS[entry.assets[-1]])}

    return replace(_cifar10_small(entry, device), judge=judge, held_out=None)


@cache  # building it draws and discards 138 million random weights
def _lpips(loss: str) -> Callable:
    """The training loss of a data set of colour images, by name."""
    one_of("loss", loss, ("l2", "lpips"))
    return squared_l2 if loss == "l2" else lpips_distance(backbone=fetch(ASSETS[VGG]))


def _of_files(entry: Entry, device: str, network, labels=None) -> Dataset:
    """A data set of the paper from its denoiser; samples are judged by FID as EDM computes it."""

    def judge():
        features = inception_features(fetch(ASSETS[INCEPTION]), device)
        return {"fd": features}, {"fd": load(ASSETS[entry.assets[-1]])}

    return Dataset(
        **vars(entry),
        denoiser=network.to(device),
        to_images=quantise_edm,
        judge=judge,
        distances=_lpips,
        labels=labels,
        fingerprint=fingerprint(entry.assets[:-1]),
    )


def _classes(network, device) -> Callable | None:
    if not network.label_dim:
        return None
    return lambda seeds: make_classes(seeds, network.label_dim, device)


def _edm(entry: Entry, device: str) -> Dataset:
    network = load(ASSETS[entry.assets[0]])
    return _of_files(entry, device, network, _classes(network, device))


def _consistency(entry: Entry, device: str) -> Dataset:
    return _of_files(entry, device, load(ASSETS[entry.assets[0]]))


def _guided(entry: Entry, device: str) -> Dataset:
    network, classifier = (load(ASSETS[name]) for name in entry.assets[:2])
    guided = adm.GuidedDenoiser(network, classifier, entry.guidance)
    return _of_files(entry, device, guided, _classes(network, device))


def _l2(loss: str) -> Callable:
    one_of("loss in latent space", loss, ("l2",))
    return squared_l2


def _of_latents(entry: Entry, device: str, network, judge, labels, fingerprint: str) -> Dataset:
    return Dataset(
        **vars(entry),
        denoiser=network.to(device),
        to_images=lambda x: quantise_edm(network.decode(x)),
        judge=judge,
        distances=_l2,
        labels=labels,
        fingerprint=fingerprint,
    )


def _latent_bedroom(entry: Entry, device: str) -> Dataset:
    folder = cache_folder() / "lsun_bedroom_ldm"
    network = latent.lsun_bedroom_ldm(folder)

    def judge():
        features = inception_features(fetch(ASSETS[INCEPTION]), device)
        return {"fd": features}, {"fd": load(ASSETS[entry.assets[-1]])}

    weights = hashlib.sha256((folder / "unet/diffusion_pytorch_model.safetensors").read_bytes())
    return _of_latents(entry, device, network, judge, None, weights.hexdigest()[:12])


# The texts of Figures 1 and 9.
PROMPTS = (
    "A Corgi on the grass surrounded by a cluster of colorful balloons",
    "A portrait of an eagle",
    "Under a gray sky, a castle in ice and snow",
)


def _text_to_image(entry: Entry, device: str) -> Dataset:
    network = latent.stable_diffusion(
        guidance=entry.guidance, cache_dir=cache_folder() / "huggingface"
    )
    embedded = network.to(device).encode(PROMPTS)

    def labels(seeds):
        return embedded[[seed % len(PROMPTS) for seed in seeds]]

    return _of_latents(entry, device, network, None, labels, latent.STABLE_DIFFUSION)


LOADERS = {
    "digits": _digits,
    "digits_conditional": _digits_conditional,
    "digits_guided": _digits_guided,
    "cifar10_small": _cifar10_small,
    "cifar10_small_fid": _cifar10_small_fid,
    "edm": _edm,
    "consistency": _consistency,
    "guided": _guided,
    "latent_bedroom": _latent_bedroom,
    "text_to_image": _text_to_image,
}


def load_dataset(name: str, device: str | None = "cpu") -> Dataset:
    """A data set with everything that a study needs, on ``device``; loaded once.

    Raises:
        ValueError: no such data set or device, or its files are missing or altered.
    """
    return _load(describe(name).name, best_device(device))


@lru_cache(maxsize=4)
def _load(name: str, device: str) -> Dataset:
    entry = describe(name)
    return LOADERS[entry.load](entry, device)
