"""Solvers, predictor training and the study of *Fast ODE-based Sampling in Around 5 Steps*."""

from amedlib import denoisers
from amedlib.intermediate import Intermediate, Predictor, TimeWise
from amedlib.sampling import Sample, make_latents, sample
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver

__all__ = [
    "Intermediate",
    "Predictor",
    "Sample",
    "TimeWise",
    "denoisers",
    "make_latents",
    "make_schedule",
    "make_solver",
    "sample",
]
