"""Pictures: images in tables, steps of solvers in a plane, the network g_phi, Appendix D."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from tqdm import tqdm

from amedlib.checks import require
from amedlib.comparison import Comparison
from amedlib.intermediate import Predictor
from amedlib.sampling import sample
from amedlib.study.execute import context_of, make_predictors, prepare
from amedlib.study.figures import BLUE, GREY, WIDTH, legend_below, look
from amedlib.study.run import Run
from amedlib.study.store import RESULTS, predictor_path
from amedlib.study.theory import Plane, Step
from amedlib.trained import TrainedSampler

# --- images -------------------------------------------------------------------------------------


def draw(
    what: Run, seeds: Sequence[int], results_dir=RESULTS, device=None, train=False
) -> torch.Tensor | None:
    """The images that a Run's method makes of these seeds, [B, C, H, W] in [0, 1].

    ``None`` where its predictor is not stored and ``train`` does not say to train it.
    """
    if what.predictor is not None and not train:
        if not predictor_path(what, results_dir).is_file():
            return None
    context = context_of(what, results_dir, device, progress=True)
    prepare(what, context)
    data = context.data
    images = data.to_images(
        sample(
            context.denoiser(what),
            context.latents(seeds),
            what.times(),
            what.make_solver(),
            what.afs,
            context.intermediate(what),
            context.labels(seeds),
        ).x
    ).cpu()
    return fractions(images)


def fractions(images: torch.Tensor) -> torch.Tensor:
    """Images as a data set has them, bytes or in [-1, 1], in [0, 1]."""
    return images / 255 if images.dtype == torch.uint8 else (images + 1) / 2


def draw_all(planned: pd.DataFrame, seeds: Sequence[int], **how) -> tuple[pd.DataFrame, str]:
    """Images of a plan, rows methods and columns NFE, and a sentence on what is left out.

    The sentence begins with a space, to end a caption; it is empty where nothing is.

    Args:
        planned: columns method, nfe, run, with a row per cell; from ``plans``.
        how: ``results_dir``, ``device`` and ``train``, see ``draw``.

    Returns:
        A frame of tensors [B, C, H, W]; a method without any image has no row.
    """
    if how.get("train"):
        make_predictors(planned["run"], how.get("results_dir", RESULTS), how.get("device"))
    bar = tqdm(planned["run"], desc="cells drawn")
    drawn = planned.assign(images=[draw(what, seeds, **how) for what in bar])
    absent = drawn[[images is None for images in drawn["images"]]]
    left_out = [
        f"{method} at NFE {', '.join(map(str, rows['nfe']))}"
        for method, rows in absent.groupby("method", sort=False)
    ]
    text = f" Left out, since no predictor is stored: {'; '.join(left_out)}." if left_out else ""
    drawn = drawn.drop(absent.index)
    cells = drawn.pivot(index="method", columns="nfe", values="images")
    return cells.reindex(drawn["method"].unique()), text


def strip(images: torch.Tensor, size: int = 64) -> np.ndarray:
    """Images [B, C, H, W] side by side with nothing between them, [h, w, RGBA] in [0, 1].

    Small images are enlarged to about ``size`` pixels by whole factors, so that pixels stay sharp.
    """
    factor = max(1, size // images.shape[-1])
    images = images.expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    gap = max(2, images.shape[-1] // 16)
    opaque = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    row = torch.cat(list(torch.nn.functional.pad(opaque, (0, gap))), dim=2)[..., :-gap]
    return row.clamp(0, 1).permute(1, 2, 0).numpy()


def image_table(cells: pd.DataFrame, titles: Sequence[str], what: str) -> Figure:
    """Images in a table: a strip per cell, a row per method below its name, a column per title.

    Args:
        cells: tensors [B, C, H, W], or ``None``; rows methods.
        titles: of the columns.
        what: the images are of, for who does not see them.
    """
    require(cells.size > 0, "cells", tuple(cells.shape), "a table with at least one image")
    strips = cells.map(lambda images: strip(images) if torch.is_tensor(images) else None)
    high, wide = next(s for row in strips.to_numpy() for s in row if s is not None).shape[:2]
    rows, columns = cells.shape
    height = WIDTH / columns * high / wide + 0.3  # inches, with the name
    figure = Figure(figsize=(WIDTH, height * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, name in enumerate(cells.index):
        for j, (ax, title) in enumerate(zip(axes[i], titles, strict=True)):
            if strips.iloc[i, j] is not None:
                ax.imshow(strips.iloc[i, j], interpolation="none")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_title(name if j == 0 else "", loc="left", pad=3)
            if i == 0:  # above the name, and apart from it
                at = {"xycoords": "axes fraction", "textcoords": "offset points"}
                ax.annotate(title, (0, 1), (0, 20), weight="bold", **at)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
    count = next(len(images) for images in cells.to_numpy().flat if torch.is_tensor(images))
    heads = f"Columns: {', '.join(titles)}. " if columns > 1 else f"{titles[0]}. " * bool(titles[0])
    figure.set_label(
        f"Sampled images, {what}: in every row the same {count} latents. {heads}"
        f"Rows: {'; '.join(cells.index)}."
    )
    return figure


def compared_images(found: Comparison, denoiser, count: int, shape: tuple[int, ...]) -> Figure:
    """Samples from the same latents: best untrained, trained, accurate; and how far off they are.

    Args:
        found: of ``amedlib.compare`` on the denoiser.
        count: how many latents, the first of the comparison.
        shape: of a sample as an image, (C, H, W) in [-1, 1].
    """
    latents, solution = found.latents[:count], found.solution[:count]
    trained = [row for row in found.rows if isinstance(row.sampler, TrainedSampler)]
    rows = {
        f"best untrained: {found.best.name}": found.best.sampler,
        trained[0].name: trained[0].sampler,
    }
    drawn = {name: each.sample(denoiser, latents).x for name, each in rows.items()}
    factor = max(1, round(0.3 / found.best.error))  # so that the difference of the best is seen
    shown = {name: fractions(x) for name, x in (drawn | {"accurate solution": solution}).items()}
    shown |= {
        f"{name.partition(':')[0]} less accurate, times {factor}": 0.5 + factor * (x - solution) / 2
        for name, x in drawn.items()
    }
    cells = pd.DataFrame({"": {name: x.reshape(-1, *shape) for name, x in shown.items()}})
    return image_table(cells, [""], "by three samplers, and how far two of them are off")


# --- one step of each solver ---------------------------------------------------------------------


def steps_in_plane(plane: Plane, curve: torch.Tensor, times, steps: dict[str, Step]) -> Figure:
    """Figure 2: where one step of each solver leads, seen in the plane of the solution.

    A dashed line follows each slope that the solver uses, from the start of the step for its whole
    length; a solid one leads to where the solver ends. Crosses are where it evaluates in the step.

    Args:
        plane: of one trajectory.
        curve: the solution from the start of the step to its end, [N, 1, C, H, W].
        times: where the step starts and ends, [2].
        steps: method to its step, of one sample.
    """

    def flat(*states):
        return plane.coordinates(torch.stack(states))[:, 0].T.cpu().numpy()

    solution = flat(*curve)
    figure = Figure(figsize=(WIDTH, 2.7 * len(steps)), layout="constrained")
    axes = figure.subplots(len(steps), 1, sharex=True, sharey=True)
    for (method, step), letter, ax in zip(steps.items(), "abcd", axes, strict=True):
        colour = look(method)["color"]
        ax.plot(*solution, color="#888888", linewidth=5, alpha=0.4, label="solution")
        newest_first = reversed(step.evaluations)
        for e, dashes in zip(newest_first, ("--", ":", "-.", (0, (6, 3))), strict=False):
            ray = flat(curve[0], curve[0] + (times[1] - times[0]) * e.output)
            label = f"slope at t = {float(e.t):.3g}"
            ax.plot(*ray, color=colour, linestyle=dashes, linewidth=1.2, label=label)
            if e.t <= times[0]:
                ax.plot(*flat(e.x), "x", color="#757575", markeredgewidth=2)
        ax.plot(*flat(curve[0], step.end), color=colour)
        ax.plot(*flat(step.end), "o", color="#D00000", markersize=8, label="end of the step")
        ax.plot(*solution[:, -1:], "o", color="#757575", markersize=11, fillstyle="none")
        ax.set_title(f"({letter}) {method}")
        ax.legend(loc="upper left")
    figure.supxlabel("first principal coordinate (norm of the state)", fontsize="medium")
    figure.supylabel("second principal coordinate (norm of the state)", fontsize="medium")
    return figure


# --- the network ---------------------------------------------------------------------------------

EDGES = {"enc": BLUE, "map": "#009E73", "fc": "#CC79A7", "": GREY}


def layers(predictor: Predictor) -> pd.DataFrame:
    """The layers of g_phi with weights, in the order in which they work.

    Found by running the network once: columns inputs, outputs, parameters, and calls, since a layer
    may be used more than once; the index holds their names.
    """
    rows = {}

    def listen(name):
        def hook(layer, inputs, output):
            rows.setdefault(
                name,
                {
                    "inputs": inputs[0].shape[1],
                    "outputs": output.shape[1],
                    "parameters": sum(p.numel() for p in layer.parameters()),
                    "calls": 0,
                },
            )["calls"] += 1

        return hook

    hooks = [
        layer.register_forward_hook(listen(name)) for name, layer in predictor.named_children()
    ]
    predictor(0, 1.0, 0.5, None)
    for hook in hooks:
        hook.remove()
    return pd.DataFrame(rows).T


def architecture(predictors: dict[str, Predictor]) -> Figure:
    """Figure 6: the network g_phi, a panel per predictor, drawn from its own layers."""
    figure = Figure(figsize=(WIDTH, 6.8 * len(predictors)), layout="constrained")
    axes = figure.subplots(len(predictors), 1, squeeze=False)[:, 0]
    for (title, predictor), ax in zip(predictors.items(), axes, strict=True):
        _draw_network(ax, predictor)
        total = sum(p.numel() for p in predictor.parameters())
        ax.set_title(f"{title}: {total:,} weights", loc="left")
    return figure


def _box(ax, place, text, kind=""):
    """A box at a place: how far down, and how far from the right."""
    down, left = place
    corner = (-left - 0.46, -down - 0.66)
    edge = {"facecolor": "none", "edgecolor": EDGES[kind], "linewidth": 2 if kind else 1}
    ax.add_patch(FancyBboxPatch(corner, 0.92, 1.32, "round,pad=0.02", **edge))
    ax.text(-left, -down, text, ha="center", va="center")


def _layer(ax, place, layer, then=""):
    """The box of a layer, a row of ``layers``."""
    size = f"{layer['inputs']} → {layer['outputs']}{then}"
    text = f"{layer.name}\n{size}\n{layer['parameters']:,} weights"
    if layer["calls"] > 1:
        text += f"\n(used {layer['calls']} times)"
    _box(ax, place, text, layer.name.split("_")[0])


def _arrows(ax, *places):
    """From box to box."""
    style = {"arrowstyle": "-|>", "color": "#757575", "shrinkA": 0, "shrinkB": 0}
    for a, b in pairwise(places):
        ax.annotate("", (-b[1], -b[0] + 0.69), (-a[1], -a[0] - 0.69), arrowprops=style)


def _draw_network(ax, predictor):
    found = layers(predictor)
    h, w = predictor.bottleneck_size
    x = [0, 1.7, 3.4, 5.1, 6.8, 8.5, 10.2]
    _box(ax, (x[0], 3), f"bottleneck at\ntₙ₊₁: C × {h} × {w}")
    _box(ax, (x[1], 3), f"channel mean\n{h} × {w}")
    _layer(ax, (x[2], 3), found.loc["enc_layer0"], ", SiLU")
    _layer(ax, (x[3], 3), found.loc["enc_layer1"])
    joined = (x[4], 2)
    _arrows(ax, *((column, 3) for column in x[:4]), joined)

    embedding = found.loc["map_layer0"]
    times = ["tₙ₊₁", "tₙ"][: embedding["calls"]]
    lanes = [1.0, 0.0][: len(times)]
    shared = (x[2], float(np.mean(lanes)))
    for text, y in zip(times, lanes, strict=True):
        _box(ax, (x[0], y), f"time {text}")
        _box(ax, (x[1], y), f"sines, cosines\n{embedding['inputs']} numbers")
        _arrows(ax, (x[0], y), (x[1], y), shared)
    _layer(ax, shared, embedding, ", SiLU")
    _arrows(ax, shared, joined)

    outputs = [name for name in found.index if name.startswith("fc_")]
    _box(ax, joined, f"concatenation\n{found.loc['fc_r', 'inputs']} numbers")
    heads = 2 + np.arange(len(outputs))[::-1] - (len(outputs) - 1) / 2
    ranges = {
        "fc_r": "rₙ in (0, 1)",
        "fc_scale_dir": _near_one("cₙ", predictor.scale_dir),
        "fc_scale_time": _near_one("aₙ", predictor.scale_time),
    }
    for name, y in zip(outputs, heads, strict=True):
        _layer(ax, (x[5], y), found.loc[name], ", sigmoid")
        _box(ax, (x[6], y), ranges[name])
        _arrows(ax, joined, (x[5], y), (x[6], y))
    ax.set(xlim=(-3.5, 0.5 - min(lanes)), ylim=(-x[6] - 0.7, 0.7))
    ax.axis("off")


def _near_one(symbol, bound):
    return f"{symbol} in\n({1 - bound:g}, {1 + bound:g})"


# --- Appendix D ---------------------------------------------------------------------------------


def deviation(curves: dict, bounds: dict[str, np.ndarray]) -> Figure:
    """Figure 10: distance of trajectories from their plane, and functions of t that may bound it.

    Args:
        curves: of a ``trajectory_pca`` result.
        bounds: label to values at ``curves["t"]``.
    """
    figure = Figure(figsize=(WIDTH, 4))
    ax = figure.subplots()
    t, mean, sd = (np.array(curves[name]) for name in ("t", "deviation", "deviation_sd"))
    ax.plot(t, mean, color=BLUE, label="distance from the plane")
    ax.fill_between(t, mean - sd, mean + sd, color=BLUE, alpha=0.2, linewidth=0)
    for (label, values), (colour, dashes) in zip(
        bounds.items(), (("#D55E00", "--"), ("#8C5A32", ":"), ("#009E73", "-.")), strict=False
    ):
        ax.plot(t, values, color=colour, linestyle=dashes, label=label)
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel="time t (noise level)", ylabel="distance (norm of the state)")
    ax.invert_xaxis()
    legend_below(figure, ax)
    return figure


def proposition_figure(found: pd.DataFrame, bounds: dict[str, np.ndarray]) -> Figure:
    """Proposition 1: parts of the error of one AMED step, and bounds, over where steps start.

    Args:
        found: of ``theory.proposition``, for steps of one schedule.
        bounds: label to a value per step.
    """
    figure = Figure(figsize=(WIDTH, 4.8))
    ax = figure.subplots()
    for (label, values), (colour, dashes) in zip(
        bounds.items(), (("#009E73", "--"), ("#8C5A32", ":")), strict=True
    ):
        ax.plot(found["t"], values, color=colour, linestyle=dashes, marker="_", label=label)
    for column, label, colour, marker in (
        ("worst", "error with the worst r, mean", "#CC79A7", "P"),
        ("error_max", "error with the best r, largest", "#757575", "^"),
        ("error", "error with the best r, mean", "#757575", "o"),
        ("perpendicular", "its part across the plane", "#D55E00", "s"),
        ("parallel", "its part in the plane", "#0072B2", "D"),
    ):
        ax.plot(found["t"], found[column], color=colour, marker=marker, label=label)
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel="time t at which the step starts", ylabel="error (norm of the state)")
    ax.invert_xaxis()
    legend_below(figure, ax)
    return figure
