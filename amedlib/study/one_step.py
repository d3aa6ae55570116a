"""What the pages for learners show of a step: where its second evaluation is, and what follows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from IPython.display import HTML

from amedlib.compute import best_device
from amedlib.datasets.loaders import load_dataset
from amedlib.geometry import accurate_solution, rms_distance
from amedlib.intermediate import TimeWise
from amedlib.sampling import Sampler, make_latents, sample
from amedlib.solvers import make_solver
from amedlib.study import theory
from amedlib.study.figures import BLUE, GREY, ORANGE, look
from amedlib.study.lesson import Trajectory, images_of
from amedlib.study.pieces import Control, Frame, View, around, axes, mosaic, piece, style, style_of
from amedlib.study.run import Run


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
    start, end = interval * every, (interval + 1) * every
    curve, times = found.states[start : end + 1], found.times[[start, end]]
    plane = theory.fit_plane(curve)
    r = torch.tensor(grid, dtype=torch.float64, device=times.device)

    def step(solver, copies, intermediate=None):
        x, first = (x[start].expand(copies, -1, -1, -1) for x in (found.states, found.denoised))
        labels = None if found.labels is None else found.labels.expand(copies, -1)
        how = make_solver(solver), False, intermediate, labels
        sampler = Sampler(found.data.denoiser, x, times, *how)
        sampler.advance((first, None))  # the evaluation at the start is known
        return sampler

    free, heun = step("amed", len(grid), theory.at(r)), step("heun", 1)
    evaluations = list(free.history)
    # Solvers that differ in what they make of the same two evaluations.
    ends = {
        "DDIM": make_solver("euler").step(evaluations[:1], times[1], 1)[:1],
        "EDM": heun.x,
        "DPM-Solver-2": make_solver("dpm2").step(evaluations, times[1], 2),
        "AMED-Solver": free.x,
    }

    def flat(states):
        return plane.coordinates(states).cpu().numpy()

    def error(end):
        parts = plane.split(end - curve[-1])
        return torch.stack([theory.norm(part) for part in parts], dim=1).cpu().numpy()

    return Looks(
        flat(curve)[:, 0],
        flat(evaluations[1].x),
        {name: flat(end) for name, end in ends.items()},
        {name: error(end) for name, end in ends.items()},
    )


# What a reader of these pages knows solvers without a free r by, and their names in the tables.
FIXED = {
    "Euler, no second look": "DDIM",
    "Heun, r = 1": "EDM",
    "DPM-Solver-2, r = 0.5": "DPM-Solver-2",
}


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
        Control("r", "Second look at r =", places, "0.30", slides=True),
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
    grey, ink = GREY, look("AMED-Solver")["color"]
    marked = [style_of(name, label, width=0) for label, name in FIXED.items()]
    ours = [
        style("first look, followed to the second", ink, "dash", marker="x", last=True),
        style("second look, followed for the step", ink, marker="star", last=True),
    ]
    flat = [style("the solution", grey, width=5), *marked, *ours]
    whole = [style_of(name, label, dash="dash", marked=False) for label, name in FIXED.items()]
    mean = [
        style("second look alone, free r", ink, width=3),
        style("in the plane", BLUE),
        style("across it", ORANGE, "dot"),
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
        f"where the step ends with r = {grid[i]:.2f}. Where others end:"
    )
    for label, name in FIXED.items():
        mark = style_of(name, label)["marker"]["symbol"]  # Plotly calls a plus a cross
        alt += f" a {mark.split('-')[0].replace('cross', 'plus')}, {label};"
    alt = f"{alt[:-1]}."
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


# --- what greed costs ---------------------------------------------------------------------------


class Greed(NamedTuple):
    """One r of a table moved, the others as they are; for every step and every r of a grid.

    Attributes:
        taught: distance to the teacher after this step, root mean square over samples, [N-1, R].
        after: the same to the solution.
        end: the same to the solution, at the end.
        images: of the first samples, [N-1][R] to [B, C, H, W] in [0, 1].
        teacher: distance of the teacher itself to the solution after every step, [N-1].
    """

    taught: np.ndarray
    after: np.ndarray
    end: np.ndarray
    images: list[list[torch.Tensor]]
    teacher: np.ndarray


def greed(
    run: Run, table: Sequence[float], seeds: Sequence[int], grid, few=8, device=None
) -> Greed:
    """Samples of a Run's method with an r for every step, of which one is moved over a grid."""
    device = best_device(device)
    data, times = load_dataset(run.dataset, device), run.times().to(device)
    latents, labels = make_latents(seeds, data.shape, device), data.labels and data.labels(seeds)
    truth = accurate_solution(data.denoiser, latents, times, run.refined(20), labels=labels)
    how = run.training.teacher_times(), run.training.teacher_solver(), labels
    teacher = accurate_solution(data.denoiser, latents, times, *how)
    errors, images = np.zeros((3, len(table), len(grid))), []
    for k in range(len(table)):
        images.append([])
        for i, r in enumerate(grid):
            moved = TimeWise([*table[:k], r, *table[k + 1 :]])
            how = run.make_solver(), run.afs, moved, labels
            x = sample(data.denoiser, latents, times, *how, trajectory=True).trajectory
            errors[0, k, i] = rms_distance(x, teacher)[k + 1]
            errors[1:, k, i] = rms_distance(x, truth)[[k + 1, -1]].cpu().numpy()
            images[k].append(images_of(data, x[-1, :few]))
    return Greed(*errors, images, rms_distance(teacher, truth)[1:].cpu().numpy())


def greed_piece(found: Greed, grid: Sequence[float], learned: dict[str, Sequence[float]]) -> HTML:
    """One r with a slider: how far its step ends from the teacher, and the path from the solution.

    Args:
        learned: the r of every step, by what they were trained for; of the first the others are.
    """
    steps, places = [str(k + 1) for k in range(len(found.after))], [f"{r:.2f}" for r in grid]
    first = next(iter(learned))
    controls = [
        Control("r", "r of this step =", places, "0.50", slides=True),
        Control("step", "Step", steps, "3"),
    ]
    curves, drawn = {}, {}
    for k, step in enumerate(steps):
        taught, after, end = (errors[k] for errors in found[:3])
        high = 1.05 * np.max([taught, after, end])
        marks = [([table[k]] * 2, [0, high]) for table in learned.values()]
        trained = "; ".join(f"trained {name}: {table[k]:.2f}" for name, table in learned.items())
        for i, place in enumerate(places):
            says = f"r = {place}: after step {step} {taught[i]:.3g} from the teacher and "
            says += f"{after[i]:.3g} from the solution, at the end {end[i]:.3g} from the solution. "
            says += f"{trained[0].upper()}{trained[1:]}."
            alt = f"Three curves over r: two distances after step {step}, one at the end. {says}"
            curve = [(grid, errors) for errors in (taught, after, end)]
            lines = [*curve, *marks, ([grid[i]] * 2, [0, high])]
            curves[place, step] = Frame(says, alt, lines=lines, ranges=((0, 1), (0, high)))
            images = found.images[k][i]
            says = f"Samples with r = {place} in step {step}, the others as trained {first}."
            drawn[place, step] = Frame(says, f"{len(images)} images. {says}", mosaic(images, 4))
    looks = [
        style("to the teacher, after this step", ORANGE, width=3),
        style("to the solution, after this step", ORANGE, "dash"),
        style("to the solution, at the end", BLUE, width=3),
    ]
    colours = (ORANGE, BLUE)
    looks += [style(f"trained {n}", c, "dot") for n, c in zip(learned, colours, strict=True)]
    looks.append(style("", "#888888", width=1))
    layout = axes("r", "distance (norm of the state)")
    follows = ["r", "step"]
    return piece(controls, [View(follows, curves, looks, layout), View(follows, drawn)])
