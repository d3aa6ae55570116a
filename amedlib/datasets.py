"""What is sampled from: a declarative entry per data set, loaded by ``load_dataset``."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

import torch

from amedlib.assets import ASSETS, cache_folder, fetch, fingerprint
from amedlib.checks import one_of
from amedlib.denoisers import adm, edm, latent
from amedlib.denoisers.cifar10 import Cifar10Classifier, moments_from_tensors, scaled
from amedlib.denoisers.digits import (
    DigitsClassifier,
    NoisyDigitsClassifier,
    load_digits_images,
    quantise,
)
from amedlib.files import load_tensors
from amedlib.inception import Statistics, inception_features, quantise_edm, read_statistics
from amedlib.metrics import Moments, feature_distance, lpips_distance
from amedlib.pickles import edm_network, load_pt
from amedlib.sampling import make_classes
from amedlib.schedules import noise_levels
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
        most_nfe: up to which NFE Tables 3 to 13 and Figure 8 are run, unless asked otherwise.
        metrics: what is measured of samples; ``"fd"``, ``"fd_pixels"``, ``"endpoint_error"``.
        endpoint_samples: the most for which the ODE's solution is computed and kept.
        batch: samples per network call at most; halved where the memory does not suffice.
        precision: in which the network computes, see ``Run``.
        evaluations_per_call: how many evaluations a call of the denoiser counts.
        feature_distance_name: what the Frechet distance is called.
        reference_name: what samples are compared with, for captions.
        guidance: scale of classifier or classifier-free guidance; ``None``: there is none.
        floor: whether real images are at hand to compare with each other.
        assets: the files that it needs, names in ``amedlib.assets.ASSETS``; the last one holds the
            reference statistics.
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
    most_nfe: int = 10
    metrics: tuple[str, ...] = ("fd", "endpoint_error")
    endpoint_samples: int = 5_000
    batch: int = 512
    precision: str = "float32"
    evaluations_per_call: int = 1
    feature_distance_name: str = "FID"
    reference_name: str = "published statistics of the training images"
    guidance: float | None = None
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
        held_out: by metric, moments of blocks of real images that are not in the reference, where
            they are shipped in the place of images.
    """

    denoiser: Callable
    to_images: Callable
    judge: Callable[[], tuple[Callable, dict]]
    distances: Callable[[str], Callable]
    fingerprint: str
    labels: Callable[[Sequence[int]], torch.Tensor] | None = None
    real_images: torch.Tensor | None = None
    held_out: dict[str, list[Moments]] | None = None

    @cached_property
    def _judged(self):
        return self.judge()

    @property
    def features(self) -> Callable:
        """Images to features [B, d]."""
        return self._judged[0]

    @property
    def reference(self) -> dict[str, Moments | Statistics]:
        """What samples are compared with, by metric; see ``moments_distance``."""
        return self._judged[1]


def load_weights(
    name: str, folder: Path = DATA / "models", command: str = "make models"
) -> tuple[dict, dict, str]:
    """Tensors, metadata and SHA-256 of a shipped weights file, checked against ``SHA256SUMS``.

    ``command`` is what trains it.

    Raises:
        ValueError: the file is missing, truncated or altered.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"The weights file {path} is missing; `{command}` trains it again.")
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
        self.bottleneck_size, self.label_dim = denoiser.bottleneck_size, denoiser.label_dim

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
    centred = entry.name != "digits_uncentred" and entry.guidance is None
    offset = mean if centred else torch.zeros_like(mean)

    def judge():
        return classifier.features, {
            "fd": Moments.of(classifier.features(real)),
            "fd_pixels": Moments.of(real.flatten(1)),
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
    parts = ("cifar10_edm", "cifar10_classifier", "cifar10_moments")
    command = "make models DATASET=cifar10_small"
    files = [load_weights(f"{part}.safetensors", command=command) for part in parts]
    tensors, metadata, digests = zip(*files, strict=True)
    network = edm.build(metadata[0]["precond_class"], json.loads(metadata[0]["init_kwargs"]))
    classifier = Cifar10Classifier(json.loads(metadata[1]["width"]))
    for module, weights in zip((network, classifier), tensors[:2], strict=True):
        module.load_state_dict(weights)
        module.eval().requires_grad_(False).to(device)
    moments = moments_from_tensors(tensors[2])

    def judge():
        return lambda images: classifier.features(scaled(images)), {"fd": moments["train"][0]}

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
        held_out={"fd": moments["test"]},
        distances=distances,
        fingerprint=hashlib.sha256("".join(digests).encode()).hexdigest()[:12],
    )


def _cifar10_small_fid(entry: Entry, device: str) -> Dataset:
    def judge():
        features = inception_features(fetch(ASSETS[INCEPTION]), device)
        return features, {"fd": read_statistics(fetch(ASSETS[entry.assets[-1]]))}

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
        return features, {"fd": read_statistics(fetch(ASSETS[entry.assets[-1]]))}

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
    network = edm_network(fetch(ASSETS[entry.assets[0]]))
    return _of_files(entry, device, network, _classes(network, device))


def _consistency(entry: Entry, device: str) -> Dataset:
    return _of_files(entry, device, adm.cm_denoiser(load_pt(fetch(ASSETS[entry.assets[0]]))))


def _guided(entry: Entry, device: str) -> Dataset:
    network, classifier = (load_pt(fetch(ASSETS[name])) for name in entry.assets[:2])
    network, classifier = adm.adm_denoiser(network), adm.adm_classifier(classifier)
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
        return features, {"fd": read_statistics(fetch(ASSETS[entry.assets[-1]]))}

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


INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
VGG = "vgg16-397923af.pth"

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
# Trained here, by `data/models/train_cifar10.py`.
_CIFAR10_SMALL = Entry(
    name="cifar10_small",
    title="CIFAR-10, 32x32, a small model",
    paper="cifar10",
    shape=(3, 32, 32),
    load=_cifar10_small,
    training={"images": 10_000, "batch": 128},
    # As many as there are test images, so that distances compare with the floor.
    samples=10_000,
    endpoint_samples=1_000,
    batch=1_000,
    feature_distance_name="FD (CIFAR-10 features)",
    reference_name="the 50,000 training images",
    floor=True,
)
# Batches as the released code has them: 128 on CIFAR-10, 64 on larger images, 32 on text.
_SMALL = {"shape": (3, 64, 64), "load": _edm, "training": {"batch": 64}}
_LARGE = {
    "shape": (3, 256, 256),
    "training": {"batch": 64, "gradient": "forward"},
    "precision": "float16",
    "endpoint_samples": 500,
    "batch": 64,
}
_IMAGENET = Entry(
    name="imagenet256",
    title="ImageNet 256x256, classifier guidance",
    paper="imagenet256",
    load=_guided,
    sigma_min=adm.sigma_range()[0],
    sigma_max=adm.sigma_range()[1],
    # "Uniform" (Appendix B): uniform in the time of the model's VP process.
    schedule="time_uniform",
    afs=False,
    plugin="DPM-Solver++(3M)",
    nfes=(4, 6, 8, 10),
    guidance=2.0,
    assets=(
        "256x256_diffusion.pt",
        "256x256_classifier.pt",
        "VIRTUAL_imagenet256_labeled.npz",
    ),
    **_LARGE | {"training": {"batch": 64}},  # guidance cannot be differentiated in forward mode
)
_LATENT = {
    "schedule": "discrete",
    "plugin": "DPM-Solver++(3M)",
    "precision": "float16",
    "endpoint_samples": 500,
    "batch": 64,
    "solver_options": {solver: {"thresholding": False} for solver in ("dpmpp", "unipc")},
}

DATASETS = {
    entry.name: entry
    for entry in [
        _DIGITS,
        replace(
            _DIGITS,
            name="digits_uncentred",
            title="digits, 8x8, not centred",
            metrics=("fd", "fd_pixels"),
        ),
        replace(
            _DIGITS,
            name="digits_conditional",
            title="digits, 8x8, conditional",
            paper="imagenet64",
            most_nfe=6,
            metrics=("fd", "fd_pixels"),
            load=_digits_conditional,
        ),
        *(
            replace(
                _DIGITS,
                name=f"digits_guidance_{scale}",
                title=f"digits, 8x8, classifier guidance {scale}",
                paper="imagenet256",
                metrics=("fd", "fd_pixels"),
                load=_digits_guided,
                afs=False,
                plugin="DPM-Solver++(3M)",
                nfes=(4, 6, 8, 10),
                guidance=float(scale),
            )
            for scale in (2, 4, 8)  # Table 13
        ),
        _CIFAR10_SMALL,
        replace(
            _CIFAR10_SMALL,
            name="cifar10_small_fid",
            load=_cifar10_small_fid,
            samples=50_000,
            metrics=("fd",),
            feature_distance_name="FID",
            reference_name="published statistics of the training images",
            floor=False,
            assets=("fid-refs/cifar10-32x32.npz",),
        ),
        Entry(
            name="cifar10",
            title="CIFAR-10, 32x32",
            paper="cifar10",
            shape=(3, 32, 32),
            load=_edm,
            training={"batch": 128, "loss": "lpips"},
            assets=("edm-cifar10-32x32-uncond-vp.pkl", "fid-refs/cifar10-32x32.npz"),
        ),
        Entry(
            name="ffhq",
            paper="ffhq",
            title="FFHQ, 64x64",
            assets=("edm-ffhq-64x64-uncond-vp.pkl", "fid-refs/ffhq-64x64.npz"),
            **_SMALL,
        ),
        Entry(
            name="afhqv2",
            paper="afhqv2",
            title="AFHQv2, 64x64",
            assets=("edm-afhqv2-64x64-uncond-vp.pkl", "fid-refs/afhqv2-64x64.npz"),
            **_SMALL,
        ),
        Entry(
            name="imagenet64",
            paper="imagenet64",
            title="ImageNet, 64x64, conditional",
            assets=("edm-imagenet-64x64-cond-adm.pkl", "fid-refs/imagenet-64x64.npz"),
            **_SMALL,
        ),
        Entry(
            name="lsun_bedroom",
            title="LSUN Bedroom, 256x256",
            paper="lsun_bedroom",
            load=_consistency,
            plugin="DPM-Solver-2",
            assets=("edm_bedroom256_ema.pt", "VIRTUAL_lsun_bedroom256.npz"),
            **_LARGE,
        ),
        Entry(
            name="lsun_cat",
            title="LSUN Cat, 256x256",
            paper="lsun_cat",
            load=_consistency,
            plugin="DPM-Solver-2",
            assets=("edm_cat256_ema.pt", "VIRTUAL_lsun_cat256.npz"),
            **_LARGE,
        ),
        _IMAGENET,
        *(
            replace(_IMAGENET, name=f"imagenet256_guidance_{scale}", guidance=float(scale))
            for scale in (2, 4, 8)  # Table 13
        ),
        Entry(
            name="lsun_bedroom_ldm",
            title="LSUN Bedroom, 256x256, latent space",
            paper="lsun_bedroom_ldm",
            shape=(3, 64, 64),
            load=_latent_bedroom,
            noise_levels="lsun_bedroom_ldm",
            sigma_min=float(noise_levels("lsun_bedroom_ldm")[0]),
            sigma_max=float(noise_levels("lsun_bedroom_ldm")[-1]),
            training={"batch": 64},
            assets=("VIRTUAL_lsun_bedroom256.npz",),
            **_LATENT,
        ),
        Entry(
            name="stable_diffusion",
            title="Stable Diffusion v1, 512x512",
            paper="stable_diffusion",
            shape=(4, 64, 64),
            load=_text_to_image,
            noise_levels="stable_diffusion",
            sigma_min=float(noise_levels("stable_diffusion")[0]),
            sigma_max=float(noise_levels("stable_diffusion")[-1]),
            afs=False,
            training={"batch": 32, "images": 5_000},
            guidance=7.5,
            evaluations_per_call=2,
            nfes=(8, 12, 16, 20),
            metrics=("endpoint_error",),
            samples=500,
            **_LATENT,
        ),
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
