"""Denoisers D(x; t) to sample from; each module is loaded when it is first asked for."""

from importlib import import_module

__all__ = [
    "adm",
    "cifar10",
    "diffusers_models",
    "diffusers_out",
    "diffusers_pipelines",
    "diffusers_schedulers",
    "digits",
    "edm",
    "exact",
    "latent",
    "layers",
    "unet",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__():
    return __all__
