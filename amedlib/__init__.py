"""Solvers, predictor training and the study of *Fast ODE-based Sampling in Around 5 Steps*."""

from amedlib import denoisers
from amedlib.datasets import describe, load_dataset
from amedlib.intermediate import Intermediate, Predictor, TimeWise
from amedlib.metrics import frechet_distance
from amedlib.sampling import Sample, make_latents, sample
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver
from amedlib.study import Result, Run, run, run_all
from amedlib.training import Training, train

__all__ = [
    "Intermediate",
    "Predictor",
    "Result",
    "Run",
    "Sample",
    "TimeWise",
    "Training",
    "denoisers",
    "describe",
    "frechet_distance",
    "load_dataset",
    "make_latents",
    "make_schedule",
    "make_solver",
    "run",
    "run_all",
    "sample",
    "train",
]
