"""What the pages for learners show: trajectories of the shipped models, and samples of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML

from amedlib.compute import best_device
from amedlib.datasets.loaders import Dataset, load_dataset
from amedlib.geometry import distance
from amedlib.sampling import Sampler, make_latents
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver
from amedlib.study import plans, theory
from amedlib.study.pictures import fractions
from amedlib.study.pieces import Control, Frame, View, around, axes, mosaic, piece, style
from amedlib.study.uncertainty import with_interval

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
        nfe: evaluations per sample, counted.
    """

    data: Dataset
    times: torch.Tensor
    states: torch.Tensor
    denoised: torch.Tensor
    labels: torch.Tensor | None
    nfe: int


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
    return Trajectory(data, times, torch.stack(states), denoised, labels, sampler.nfe)


def images_of(data: Dataset, x: torch.Tensor, t: float = 0.0) -> torch.Tensor:
    """States [B, C, H, W] at a time t as images in [0, 1]; noise is scaled to the same contrast."""
    return fractions(data.to_images(x / (1 + t**2) ** 0.5).cpu())


# --- from noise to an image ---------------------------------------------------------------------


def still_ahead(found: Trajectory) -> np.ndarray:
    """How far the network's guess D(x; t) is from where the trajectory ends, [N-1, B].

    Relative to how far it is at the first time.
    """
    ahead = distance(found.denoised, found.states[-1]).cpu().numpy()
    return ahead / ahead[0]


def filmstrip(found: dict[str, Trajectory], columns: int) -> HTML:
    """The first sample of every trajectory at some of its times, side by side: states alone."""
    strips = []
    for word, each in found.items():
        places = np.linspace(0, len(each.times) - 1, columns).round().astype(int)
        times = each.times.tolist()
        film = torch.cat([images_of(each.data, each.states[i, :1], times[i]) for i in places])
        says = f"{word}, at t = {', '.join(f'{times[i]:.2g}' for i in places)}"
        alt = f"{columns} pictures in a row ({word}): pure noise at the left turns into an image."
        strips.append(piece([], [View([], {(): Frame(says, alt, mosaic(film, columns))})]).data)
    return HTML("".join(strips))


def noise_piece(found: dict[str, Trajectory]) -> HTML:
    """States, and below them what the network makes of each, along t; and how far that is off."""
    times = [f"{t:.3g}" for t in next(iter(found.values())).times[:-1]]
    controls = [
        Control("t", "Noise level t =", times, times[0], slides=True, plays=True),
        Control("images", "Images", list(found), next(iter(found))),
    ]
    views, curves = {}, {}
    for word, each in found.items():
        ahead, t = still_ahead(each).mean(1), each.times[:-1].cpu().numpy()
        for i, time in enumerate(times):
            state = images_of(each.data, each.states[i], t[i])
            both = torch.cat([state, images_of(each.data, each.denoised[i])])
            says = f"t = {time}. Above: the states. Below: what the network sees in them."
            alt = f"{len(state)} {word} states with noise of level {time}, and the guesses below."
            views[time, word] = Frame(says, alt, mosaic(both, len(state)))
            says = f"At t = {time} the guess still has {100 * ahead[i]:.3g} % of its way before it."
            alt = f"A curve that falls from 100 % at the left; a line marks t = {time}. {says}"
            lines = [(t, 100 * ahead), ([t[i]] * 2, [0, 100])]
            # Noise falls from left to right.
            curves[time, word] = Frame(
                says, alt, lines=lines, ranges=(around(t, log=True)[::-1], (0.0, 105.0))
            )
    follows = [control.name for control in controls]
    looks = [style("", "#0072B2", width=3), style("", "#888888", width=1)]
    layout = axes("noise level t", "way still before the guess (%)", "x")
    return piece(controls, [View(follows, views), View(follows, curves, looks, layout)])


# --- in a plane ---------------------------------------------------------------------------------


def plane_piece(found: dict[str, Trajectory], shown: int = 20) -> HTML:
    """Trajectories in the planes that fit them best, and what of a state is not in its plane."""
    first = next(iter(found.values()))
    places = np.linspace(0, len(first.times) - 1, shown + 1).round().astype(int)
    times = [f"{first.times[i]:.3g}" for i in places]
    paths = [str(i + 1) for i in range(first.states.shape[1])]
    controls = [
        Control("t", "Noise level t =", times, times[-1], slides=True),
        Control("images", "Images", list(found), next(iter(found))),
        Control("path", "Path", paths, paths[0]),
        Control("axis", "Second axis", ["enlarged", "to scale"], "enlarged"),
    ]
    flat, parts = {}, {}
    for word, each in found.items():
        plane = theory.fit_plane(each.states)
        points = plane.coordinates(each.states).cpu().numpy()
        outside = plane.split(each.states - plane.origin)[1]
        share = (theory.norm(outside) / theory.norm(each.states)).cpu().numpy()
        wide, high = (around(points[..., axis]) for axis in (0, 1))
        scale = {"enlarged": (wide, high), "to scale": (wide, wide)}
        for time, i in zip(times, places, strict=True):
            for j, path in enumerate(paths):
                says = f"{100 * share[i, j]:.2g} % of the state's norm is outside its plane."
                images = _outside(each, outside, i, j)
                alt = f"Three {word} pictures at t = {time}: a state, its projection onto the "
                alt += f"plane, and the difference. {says}"
                parts[time, word, path] = Frame(
                    f"State, its projection onto the plane, the rest times {ENLARGED}: {says}",
                    alt,
                    images,
                )
                lines = [tuple(points[:, other].T) for other in range(len(paths))]
                lines += [tuple(points[:, j].T), ([points[i, j, 0]], [points[i, j, 1]])]
                for axis, ranges in scale.items():
                    alt = f"{len(paths)} paths of {word}, each a bent line in its own plane, much "
                    alt += f"alike; path {path} has a dot at t = {time}. Second axis {axis}."
                    flat[time, word, path, axis] = Frame("", alt, lines=lines, ranges=ranges)
    looks = [style("", "#888888", width=1)] * len(paths)
    looks += [style("", "#0072B2", width=3), style("", "#D55E00", width=0, marker="circle")]
    layout = axes("first component (norm of the state)", "second component")
    names = [control.name for control in controls]
    return piece(controls, [View(names, flat, looks, layout), View(names[:3], parts)])


ENLARGED = 5  # so that the difference is seen


def _outside(found: Trajectory, outside: torch.Tensor, i: int, j: int) -> str:
    """A state, its projection, and their difference, enlarged, where grey is nothing."""
    state, left, t = found.states[i, [j]], outside[i, [j]], float(found.times[i])
    rest = (ENLARGED * left / (1 + t**2) ** 0.5 + 1) / 2
    both = [images_of(found.data, x, t) for x in (state, state - left)]
    return mosaic(torch.cat([*both, rest.cpu().float()]), 3)


# --- samplers side by side ----------------------------------------------------------------------


def samplers(dataset: str, nfes: Sequence[int]) -> pd.DataFrame:
    """Solvers plain, with AFS, and with learned steps besides; columns method, nfe, run.

    They are those of the paper's Table 9, and EDM's. ``method`` is what a reader chooses.
    """

    def name(row):
        learned = row["amed"] and row["method"] != "AMED-Solver"  # whose name says it
        return row["method"] + ", AFS" * bool(row["afs"]) + ", learned r" * learned

    planned = plans.concat(
        [plans.table(9, dataset, nfes, seeds=[0]), plans.table2(dataset, ["EDM"], nfes)]
    )
    return planned.assign(method=planned.apply(name, axis=1))[["method", "nfe", "run"]]


def gallery(cells: pd.DataFrame, found: pd.DataFrame, unit: str, start: tuple[str, str]) -> HTML:
    """The same latents by two samplers that a reader chooses, with a slider for the NFE.

    Args:
        cells: images, rows methods and columns NFE, as ``pictures.draw_all`` returns them.
        found: columns method, nfe, value, half: what is measured of them, in ``unit``.
        start: the two that are shown at first.
    """
    nfes, methods = [str(nfe) for nfe in cells.columns], list(cells.index)
    values = {
        (row.method, row.nfe): with_interval(row.value, row.half) for row in found.itertuples()
    }
    frames = {}
    for method in methods:
        for nfe in cells.columns:
            images = cells.loc[method, nfe]
            value = values.get((method, nfe))
            says = f"{unit} {value}" if value else f"{unit} not measured"
            says = f"{method}, {nfe} evaluations: {says}."
            if torch.is_tensor(images):
                alt = f"{len(images)} sampled images, two in a row. {says}"
                frame = Frame(says, alt, mosaic(images, 2))
            else:  # one transparent pixel
                says = f"{method}, {nfe} evaluations: no predictor is stored."
                frame = Frame(says, says, mosaic(torch.zeros(0, 1, 1, 1), 1))
            frames[str(nfe), method] = frame
    controls = [
        Control("nfe", "Evaluations =", nfes, nfes[1], slides=True),
        Control("left", "Left", methods, start[0]),
        Control("right", "Right", methods, start[1]),
    ]
    return piece(controls, [View(["nfe", side], frames) for side in ("left", "right")])
