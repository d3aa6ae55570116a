"""What is sampled from: a declarative entry per data set; nothing is loaded."""

from dataclasses import dataclass, field, replace

from amedlib.checks import one_of
from amedlib.denoisers import adm
from amedlib.schedules import noise_levels


def _thresholding(on: bool) -> dict[str, dict]:
    """Options of the solvers that know dynamic thresholding, which is meant for [-1, 1]."""
    return {solver: {"thresholding": on} for solver in ("dpmpp", "unipc")}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is declared of a data set: known without loading anything.

    Attributes:
        name: as in ``load_dataset``.
        title: for captions.
        paper: the data set of the paper whose numbers are laid beside these.
        shape: of a sample, (C, H, W).
        load: name of the function that loads it, see ``loaders.py``.
        sigma_min, sigma_max: range of the noise levels.
        noise_levels: the model's own, for the schedule ``"discrete"``; see ``make_schedule``.
        schedule: the one that the paper uses for all methods here; ``None``: each method's own.
        afs: whether the paper uses AFS here, where it uses it at all.
        plugin: the method that the paper applies AMED-Plugin to.
        solver_options: options that a solver gets on this data set, by its name.
        training: fields of ``Training`` that this data set sets.
        samples, nfes: of the paper's tables here.
        most_nfe: up to which NFE Tables 3 to 13 and Figure 8 are run, unless asked otherwise.
        metrics: what is measured of samples: ``"fd"``, ``"fd_pixels"``, ``"fd_joint"``,
            ``"endpoint_error"``.
        endpoint_samples: the most for which the ODE's solution is computed and kept.
        batch: samples per network call at most; halved where the memory does not suffice.
        precision: in which the network computes, see ``Run``.
        evaluations_per_call: how many evaluations a call of the denoiser counts.
        feature_distance_name: what the Frechet distance is called.
        reference_name: what samples are compared with, for captions.
        guidance: scale of classifier or classifier-free guidance; ``None``: there is none.
        floor: whether real images are at hand to compare with each other.
        assets: the files that it needs, names in ``datasets.files.ASSETS``; the last one holds
            the reference statistics.
    """

    name: str
    title: str
    paper: str
    shape: tuple[int, int, int]
    load: str
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    noise_levels: str | None = None
    schedule: str | None = None
    afs: bool = True
    plugin: str = "iPNDM"
    solver_options: dict[str, dict] = field(default_factory=lambda: _thresholding(True))
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


_DIGITS = Entry(
    name="digits",
    title="digits, 8x8",
    paper="cifar10",
    shape=(1, 8, 8),
    load="digits",
    # The centred digits reach beyond [-1, 1], and so do latents.
    solver_options=_thresholding(False),
    # Half of what the paper's text says; `plugin.ipynb` shows what the other half changes.
    training={"images": 10_000},
    samples=5_000,
    batch=500,
    metrics=("fd", "fd_pixels", "fd_joint", "endpoint_error"),
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
    load="cifar10_small",
    training={"images": 10_000, "batch": 128},
    # As many as there are test images, so that distances compare with the floor.
    samples=10_000,
    metrics=("fd", "fd_joint", "endpoint_error"),
    endpoint_samples=1_024,
    batch=1_000,
    feature_distance_name="FD (CIFAR-10 features)",
    reference_name="the 50,000 training images",
    floor=True,
)

# Batches as the released code has them: 128 on CIFAR-10, 64 on larger images, 32 on text.
_SMALL = {"shape": (3, 64, 64), "load": "edm", "training": {"batch": 64}}

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
    load="guided",
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
    "solver_options": _thresholding(False),
}

DATASETS = {
    entry.name: entry
    for entry in [
        _DIGITS,
        replace(
            _DIGITS,
            name="digits_uncentred",
            title="digits, 8x8, not centred",
            metrics=("fd", "fd_pixels", "fd_joint"),
        ),
        replace(
            _DIGITS,
            name="digits_conditional",
            title="digits, 8x8, conditional",
            paper="imagenet64",
            most_nfe=6,
            metrics=("fd", "fd_pixels", "fd_joint"),
            load="digits_conditional",
        ),
        *(
            replace(
                _DIGITS,
                name=f"digits_guidance_{scale}",
                title=f"digits, 8x8, classifier guidance {scale}",
                paper="imagenet256",
                metrics=("fd", "fd_pixels", "fd_joint"),
                load="digits_guided",
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
            load="cifar10_small_fid",
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
            load="edm",
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
            load="consistency",
            plugin="DPM-Solver-2",
            assets=("edm_bedroom256_ema.pt", "VIRTUAL_lsun_bedroom256.npz"),
            **_LARGE,
        ),
        Entry(
            name="lsun_cat",
            title="LSUN Cat, 256x256",
            paper="lsun_cat",
            load="consistency",
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
            load="latent_bedroom",
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
            load="text_to_image",
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
