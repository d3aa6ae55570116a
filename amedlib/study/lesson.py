"""What the pages for learners show: trajectories and steps of the shipped models."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from IPython.display import HTML

from amedlib.compute import best_device
from amedlib.datasets.loaders import Dataset, load_dataset
from amedlib.sampling import Sampler, make_latents
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver
from amedlib.study import theory
from amedlib.study.figures import LOOKS
from amedlib.study.pieces import Control, Frame, View, around, axes, piece, style

# The data sets of the pages, by the word that they use.
SHOWN = {"digits": "digits", "colour": "cifar10_small"}


class Trajectory(NamedTuple):
    """Solutions of the ODE from the noise of some seeds.

    Attributes:
        data: what is sampled from.
        times: [N], descending.
        states: [N, B, C, H, W].
        denoised: D(x; t) at all times but the last, [N-1, B, C, H, W].
        labels: of the denoiser, or ``None``.
    """

    data: Dataset
    times: torch.Tensor
    states: torch.Tensor
    denoised: torch.Tensor
    labels: torch.Tensor | None


@torch.no_grad()
def solve(dataset: str, seeds: Sequence[int], steps: int = 80, device=None) -> Trajectory:
    """The ODE solved by Heun's method in so many steps of the polynomial schedule."""
    device = best_device(device)
    data = load_dataset(dataset, device)
    times = make_schedule("polynomial", steps + 1, data.sigma_min, data.sigma_max).to(device)
    labels = data.labels and data.labels(seeds)
    x = make_latents(seeds, data.shape, device).double() * times[0]
    sampler = Sampler(data.denoiser, x, times, make_solver("heun"), labels=labels)
    states, evaluations = sampler.run()
    denoised = torch.stack([found for found, _ in evaluations])
    return Trajectory(data, times, torch.stack(states), denoised, labels)


class Looks(NamedTuple):
    """One step from an exact state, with its second evaluation at every r of a grid.

    Positions are coordinates in the plane of the solution during the step; errors are norms of
    the difference to the solution at the step's end, in the plane and across it.

    Attributes:
        curve: the solution, [K, 2].
        middle: where the second evaluation is made, [R, 2].
        ends: where the step of a solver ends, [R, 2]; of those without r, [1, 2].
        errors: the same of its errors, in the plane and across it.
    """

    curve: np.ndarray
    middle: np.ndarray
    ends: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]


@torch.no_grad()
def looks(found: Trajectory, interval: int, intervals: int, grid: Sequence[float]) -> Looks:
    """One of ``intervals`` equal steps of the schedule; ``found`` has one sample."""
    every = (len(found.times) - 1) // intervals
    part = slice(interval * every, (interval + 1) * every + 1)
    curve, times = found.states[part], found.times[part][[0, -1]]
    plane = theory.fit_plane(curve)
    pair = curve[[0, -1]].expand(-1, len(grid), -1, -1, -1)
    labels = None if found.labels is None else found.labels.expand(len(grid), -1)
    r = torch.tensor(grid, dtype=torch.float64, device=times.device)
    how = found.data.denoiser, pair, times, 0
    step = theory.exact_step(*how, make_solver("amed"), theory.at(r), labels)
    heun = theory.exact_step(*how, make_solver("heun"), labels=labels)
    # Solvers that differ in what they make of the same two evaluations.
    ends = {
        "DDIM": make_solver("euler").step(step.evaluations[:1], times[1], 1)[:1],
        "EDM": heun.end[:1],
        "DPM-Solver-2": make_solver("dpm2").step(step.evaluations, times[1], 2),
        "AMED-Solver": step.end,
    }

    def flat(states):
        return plane.coordinates(states).cpu().numpy()

    def error(end):
        parts = plane.split(end - curve[-1])
        return torch.stack([theory.norm(part) for part in parts], dim=1).cpu().numpy()

    return Looks(
        flat(curve)[:, 0],
        flat(step.evaluations[1].x),
        {name: flat(end) for name, end in ends.items()},
        {name: error(end) for name, end in ends.items()},
    )


# What a reader of these pages knows solvers without a free r by, and their names in the tables.
FIXED = {
    "Euler, no second look": "DDIM",
    "Heun, r = 1": "EDM",
    "DPM-Solver-2, r = 0.5": "DPM-Solver-2",
}
MARKS = {"DDIM": "circle", "EDM": "square", "DPM-Solver-2": "diamond", "AMED-Solver": "star"}


def of_solver(found: Looks, name: str, grid: Sequence[float]) -> int:
    """Where among its ends a solver stands that has an r of its own."""
    return list(grid).index(0.5) if name == "DPM-Solver-2" else 0


def step_piece(found: dict[str, list[Looks]], grid: Sequence[float], step: int) -> HTML:
    """One step with a slider for r: the plane of the solution, and the error in it and across it.

    Args:
        found: the steps of a trajectory, in their order, by what is sampled.
        step: the one that is shown at first, from 1.
    """
    steps = [str(i + 1) for i in range(len(next(iter(found.values()))))]
    places = [f"{r:.2f}" for r in grid]
    controls = [
        Control("r", "Second look at r =", places, "0.50", slides=True),
        Control("images", "Images", list(found), next(iter(found))),
        Control("step", "Step", steps, str(step)),
    ]
    plane, errors = {}, {}
    for images, every in found.items():
        for number, each in zip(steps, every, strict=True):
            for i, place in enumerate(places):
                key = (place, images, number)
                plane[key], errors[key] = _plane_frame(each, grid, i), _error_frame(each, grid, i)
    follows = [control.name for control in controls]
    grey, ink = "#888888", LOOKS["AMED-Solver"][0]
    marked = [
        style(label, LOOKS[name][0], width=0, marker=MARKS[name]) for label, name in FIXED.items()
    ]
    ours = [
        style("first look, followed to the second", ink, "dash", marker="x", last=True),
        style("second look, followed for the step", ink, marker="star", last=True),
    ]
    flat = [style("the solution", grey, width=5), *marked, *ours]
    whole = [style(label, LOOKS[name][0], "dash") for label, name in FIXED.items()]
    mean = [
        style("second look alone, free r", ink, width=3),
        style("in the plane", "#0072B2"),
        style("across it", "#009E73", "dot"),
        style("", grey, width=1),
    ]
    length = "norm of the state"
    return piece(
        controls,
        [
            View(follows, plane, flat, axes(f"along the step ({length})", f"bend ({length})")),
            View(follows, errors, [*whole, *mean], axes("r", f"error ({length})", "y")),
        ],
    )


def _plane_frame(found: Looks, grid: Sequence[float], i: int) -> Frame:
    start, end = found.curve[0], found.ends["AMED-Solver"][i]
    others = [found.ends[name][[of_solver(found, name, grid)]] for name in FIXED.values()]
    points = [found.curve, *others, np.stack([start, found.middle[i]]), np.stack([start, end])]
    # The axes stay where they are while r moves.
    every = [found.curve, found.middle, *others, found.ends["AMED-Solver"]]
    ranges = tuple(around(*(each[:, axis] for each in every)) for axis in (0, 1))
    says = (
        f"r = {grid[i]:.2f}: the second look is at the cross, and the step ends at the star. "
        "The thick line is where it should go."
    )
    alt = (
        f"The plane of the solution during one step. A thick bent line is the solution; a star is "
        f"where the step ends with r = {grid[i]:.2f}; circle, square and diamond are where Euler, "
        "Heun and DPM-Solver-2 end."
    )
    return Frame(says, alt, lines=[tuple(each.T) for each in points], ranges=ranges)


def _error_frame(found: Looks, grid: Sequence[float], i: int) -> Frame:
    ours = found.errors["AMED-Solver"]
    whole = np.hypot(*ours.T)
    others = [
        np.hypot(*found.errors[name][of_solver(found, name, grid)]) for name in FIXED.values()
    ]
    curves = [whole, *ours.T]
    ends = around(*curves, others, log=True)
    lines = [([0, 1], [other, other]) for other in others] + [(grid, curve) for curve in curves]
    lines.append(([grid[i], grid[i]], 10 ** np.array(ends)))
    named = "; ".join(f"{label}: {e:.3g}" for label, e in zip(FIXED, others, strict=True))
    says = (
        f"Error {whole[i]:.3g}: {ours[i, 0]:.3g} in the plane, {ours[i, 1]:.3g} across it. "
        f"Smallest at r = {grid[whole.argmin()]:.2f}: {whole.min():.3g}. {named}."
    )
    alt = f"The error of the step against r, with a line at r = {grid[i]:.2f}. {says}"
    return Frame(says, alt, lines=lines, ranges=((0.0, 1.0), ends))
