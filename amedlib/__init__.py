"""Solvers, predictor training and the study of *Fast ODE-based Sampling in Around 5 Steps*.

The method is loaded at once; what is sampled from, and the study, when first asked for.
"""

from importlib import import_module

from amedlib import denoisers, training
from amedlib.checks import of_the_study
from amedlib.comparison import compare
from amedlib.intermediate import Intermediate, Predictor, TimeWise
from amedlib.metrics import frechet_distance
from amedlib.sampling import Sample, make_latents, sample
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver
from amedlib.trained import TrainedSampler, load_sampler
from amedlib.training import Training, train

# Each is loaded with its module when it is first asked for.
_LATER = {
    "from_diffusers": "amedlib.denoisers.diffusers_models",
    "to_diffusers": "amedlib.denoisers.diffusers_out",
    "describe": "amedlib.datasets.entries",
    "load_dataset": "amedlib.datasets.loaders",
    "Run": "amedlib.study.run",
    "Result": "amedlib.study.run",
    "run": "amedlib.study.execute",
    "run_all": "amedlib.study.execute",
}

__all__ = [
    "Intermediate",
    "Predictor",
    "Sample",
    "TimeWise",
    "TrainedSampler",
    "Training",
    "compare",
    "denoisers",
    "frechet_distance",
    "load_sampler",
    "make_latents",
    "make_schedule",
    "make_solver",
    "sample",
    "train",
    "training",
    *_LATER,
]


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with of_the_study(f"amedlib.{name}"):
        value = getattr(import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
