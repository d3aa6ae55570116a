"""The figures of the book."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

from amedlib.study.corruptions import CORRUPTIONS, NOISE
from amedlib.study.published import DISTANCES, ROWS, nfe_name, row_names
from amedlib.study.standings import WORDS
from amedlib.study.uncertainty import estimates

LOOKS = {
    "DPM-Solver++(3M)": ("#56B4E9", "s"),
    "UniPC": ("#009E73", "D"),
    "iPNDM": ("#0072B2", "^"),
    "DDIM": ("#888888", "o"),
    "DPM-Solver-2": ("#E69F00", "v"),
    "EDM": ("#8C5A32", "P"),
    "AMED-Solver": ("#CC79A7", "*"),
    "AMED-Plugin": ("#D55E00", "X"),
    # Of the leaderboard. What is trained otherwise keeps the colour of its method.
    "best untrained": ("#777777", "o"),
    "AMED-Solver, release": ("#CC79A7", "s"),
    "AMED-Plugin, release": ("#D55E00", "s"),
    "AMED-Solver, for the end": ("#CC79A7", "p"),
    "AMED-Plugin, for the end": ("#D55E00", "P"),
    "GITS": ("#8C5A32", "D"),
    "LD3, tied times": ("#0072B2", "v"),
    "LD3": ("#0072B2", "^"),
    "LD3, soft teacher": ("#0072B2", "s"),
    "S4S": ("#E69F00", "v"),
    "S4S-Alt": ("#E69F00", "^"),
    "EPD, K = 2": ("#56B4E9", "s"),
    "EPD, K = 3": ("#56B4E9", "h"),
    "all numbers": ("#009E73", "o"),
    "all numbers, two evaluations": ("#009E73", "D"),
}


def look(method: str) -> dict:
    """Colour and marker of a method, for ``plot``."""
    colour, marker = LOOKS[method]
    return {"color": colour, "marker": marker}


def _panels(n, width=4.4, height=3.6, **options):
    # Not through pyplot, which would show the figure a second time in a notebook.
    figure = Figure(figsize=(width * n, height))
    return figure, figure.subplots(1, n, squeeze=False, **options)


def _axis_of_nfe(axes, nfes):
    axes.set_xlabel("network evaluations per sample (NFE)")
    axes.xaxis.set_major_locator(FixedLocator(sorted(nfes)))


def _log_scale(axes):
    """A logarithmic y axis, called when everything is drawn; with labels within a decade too."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0,) if high > 30 * low else (1, 1.5, 2, 3, 5, 7))
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def reach_zero(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose interval reaches zero, and so below a logarithmic axis."""
    return rows[rows["half"] >= rows["value"]] if "half" in rows else rows[:0]


def against_nfe(panels: dict[str, pd.DataFrame], ylabels, levels=None) -> Figure:
    """A panel per frame: a quality against NFE for every method, with 95 % intervals.

    An interval that reaches zero has no place on a logarithmic axis: ``reach_zero`` says which;
    there the trainings are drawn, a small ring each.

    Args:
        panels: title to frame with columns method, nfe, value and, where known, half, trainings.
        ylabels: label of each panel's y axis, with its unit.
        levels: title to (label, value) of a line across the panel.
    """
    figure, axes = _panels(len(panels))
    for (title, frame), label, ax in zip(panels.items(), ylabels, axes[0], strict=True):
        for method, rows in frame.groupby("method", sort=False):
            rows = rows.sort_values("nfe")
            beyond = reach_zero(rows)
            bars = rows["half"].mask(rows.index.isin(beyond.index)) if "half" in rows else None
            ax.errorbar(rows["nfe"], rows["value"], bars, capsize=2, label=method, **look(method))
            for row in beyond.itertuples():
                rings = look(method) | {"marker": "o", "markerfacecolor": "none", "markersize": 4}
                ax.plot([row.nfe] * len(row.trainings), row.trainings, linestyle="none", **rings)
        if levels and title in levels:
            label_of_level, level = levels[title]
            ax.axhline(level, color="#888888", linestyle=":", label=label_of_level)
        _log_scale(ax)
        _axis_of_nfe(ax, frame["nfe"].unique())
        ax.set(title=title, ylabel=label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def at_one_nfe(found: pd.DataFrame, titles, units) -> Figure:
    """Variants of methods at one NFE, the best at the top: ours left, the paper's right.

    Args:
        found: columns variant, method, paper, value, half; from ``paper.estimates``.
        titles, units: of the two panels and their axes.
    """
    found = found.sort_values("value", ascending=False).reset_index(drop=True)
    figure, axes = _panels(2, width=3.7, height=3.4, sharey=True)
    for ax, column, title, unit in zip(axes[0], ("value", "paper"), titles, units, strict=True):
        for place, row in found.iterrows():
            bar = row["half"] if column == "value" else None
            style = {"markersize": 8} | look(row["method"])
            ax.errorbar(row[column], place, xerr=bar, capsize=3, linestyle="none", **style)
        ax.set(title=title, xlabel=unit, xscale="log")
        ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_yticks(found.index, found["variant"])
    return figure


def cells_figure(number: int, measured: pd.DataFrame, unit: str) -> Figure:
    """The rows of one of Tables 3 to 13 against NFE: ours left, the paper's right.

    Rows of one kind (r, M, schedules, ...) take colours from dark to light in their order.
    """
    keys = [*ROWS[number], "nfe", "paper"]
    found = estimates(row_names(measured, number), by=keys)
    figure, axes = _panels(2)
    groups = list(found.groupby(ROWS[number], sort=False))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(groups)))
    for (names, rows), colour in zip(groups, colours, strict=True):
        rows = rows.sort_values("nfe")
        label = ", ".join(map(str, names if isinstance(names, tuple) else (names,)))
        style = {"color": colour, "marker": "o", "markersize": 4, "label": label}
        axes[0][0].errorbar(rows["nfe"], rows["value"], rows["half"], capsize=2, **style)
        axes[0][1].plot(rows["nfe"], rows["paper"], **style)
    for ax, title, label in zip(axes[0], ("ours", "the paper"), (unit, "FID"), strict=True):
        _log_scale(ax)
        _axis_of_nfe(ax, found["nfe"].unique())
        ax.set(title=title, ylabel=label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def against_loss(found: pd.DataFrame, unit: str) -> Figure:
    """Figure 8: quality against NFE, a line per method and training loss.

    Args:
        found: columns method, loss, nfe, value, half; from ``paper.estimates``.
    """
    figure, axes = _panels(1, width=5.6)
    ax = axes[0][0]
    for (method, loss), rows in found.groupby(["method", "loss"], sort=False):
        style = look(method) | {"linestyle": "--" if loss == "l2" else "-"}
        ax.errorbar(
            rows["nfe"], rows["value"], rows["half"], capsize=2, label=f"{method}, {loss}", **style
        )
    _log_scale(ax)
    _axis_of_nfe(ax, found["nfe"].unique())
    ax.set(ylabel=unit)
    ax.legend()
    return figure


def trajectory_pca_figure(curves: dict) -> Figure:
    """Figure 4: relative projection error along t, and cumulative variance of the components."""
    figure, axes = _panels(2)
    left, right = axes[0]
    t, error = np.array(curves["t"]), 100 * np.array(curves["relative_error"])
    spread = 100 * np.array(curves["relative_error_sd"])
    left.plot(t, error, color="#0072B2")
    left.fill_between(t, error - spread, error + spread, color="#0072B2", alpha=0.2, linewidth=0)
    left.axhline(8, color="#D55E00", linestyle="--", label="the paper's bound, 8 %")
    left.set_xscale("log")
    left.invert_xaxis()
    left.set(xlabel="time t (noise level)", ylabel="relative projection error (%)", ylim=(0, None))
    left.legend()
    share = 100 * np.array(curves["cumulative_variance"])
    right.plot(np.arange(1, len(share) + 1), share, "o-", color="#0072B2")
    right.yaxis.get_major_formatter().set_useOffset(False)
    right.set(xlabel="number of principal components", ylabel="cumulative variance (%)")
    return figure


def alignment(curves: dict[str, dict]) -> Figure:
    """Figure 5: relative alignment at every step (left), and the searched r_n (right)."""
    figure, axes = _panels(2)
    left, right = axes[0]
    for method, found in curves.items():
        steps = np.arange(1, len(found["r"]) + 1)
        gain = np.array(found["baseline"]) - np.array(found["searched"])
        left.plot(steps, gain, label=method, **look(method))
        right.plot(steps, found["r"], **look(method))
    left.axhline(0, color="#888888", linewidth=1)
    left.set_yscale("symlog", linthresh=0.01)
    left.margins(y=0.1)  # no marker is cut off
    left.set(ylabel="relative alignment")
    right.axhline(0.5, color="#888888", linestyle="--", linewidth=1)
    right.set(ylabel="searched r", ylim=(-0.05, 1.05))
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def learned_r_figure(panels: dict[str, dict[int, list[dict]]]) -> Figure:
    """Figure 7: r_n of every step, a panel per predictor and a line per NFE.

    Args:
        panels: title to {nfe: curves of each training seed}. The line is the mean over seeds, the
            bar their range, the band one standard deviation over samples.
    """
    figure, axes = _panels(len(panels), sharey=True)
    shades = ["#56B4E9", "#0072B2", "#CC79A7", "#D55E00", "#009E73", "#E69F00", "#757575"]
    for (title, lines), ax in zip(panels.items(), axes[0], strict=True):
        for (nfe, seeds), colour in zip(lines.items(), cycle(shades), strict=False):
            r = np.array([curves["r"] for curves in seeds])
            spread = np.mean([curves["r_sd"] for curves in seeds], axis=0)
            steps, mean = np.arange(1, r.shape[1] + 1), r.mean(0)
            bars = np.maximum([mean - r.min(0), r.max(0) - mean], 0)  # of equal r rounding is left
            ax.errorbar(steps, mean, bars, color=colour, marker="o", capsize=2, label=nfe_name(nfe))
            ax.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2)
        ax.axhline(0.5, color="#888888", linestyle="--", label="DPM-Solver-2")
        ax.set(title=title, xlabel="step", ylabel="r", ylim=(0, 1))
        ax.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def local_errors_figure(curves: dict[str, dict]) -> Figure:
    """Table 1, measured: error of one step from the solution, for every step."""
    figure, axes = _panels(1, width=6)
    ax = axes[0][0]
    for method, found in curves.items():
        ax.plot(np.arange(1, len(found["rms"]) + 1), found["rms"], label=method, **look(method))
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="step", ylabel="local error (RMS norm)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def gains_figure(panels: dict[str, pd.DataFrame], ylabels) -> Figure:
    """What AMED-Plugin's gains are made of: plain solver, with AFS, with AFS and a learned step.

    Args:
        panels: title to frame with columns solver, nfe, plain, with_afs, with_both; from
            ``audit.gains``.
        ylabels: label of each panel's y axis.
    """
    frames = list(panels.values())
    solvers = pd.concat(frames)["solver"].unique()
    nfes = sorted(pd.concat(frames)["nfe"].unique())
    figure = Figure(figsize=(8.8, 0.6 + 2.6 * len(panels)))
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    width = len(nfes) + 0.5  # of a solver's group; a place is one NFE
    places = {s: [i * width + j for j in range(len(nfes))] for i, s in enumerate(solvers)}
    learned = {**look("AMED-Plugin"), "label": "learned step (AMED-Plugin with AFS)"}
    for (title, frame), ylabel, ax in zip(panels.items(), ylabels, axes, strict=True):
        for row in frame.itertuples():
            x, colour = places[row.solver][nfes.index(row.nfe)], look(row.solver)["color"]
            ax.plot([x - 0.3, x], [row.plain, row.with_afs], color="#888888", linestyle=":")
            ax.plot([x, x + 0.3], [row.with_afs, row.with_both], color=learned["color"])
            ax.plot(x - 0.3, row.plain, "o", color=colour, markerfacecolor="none")
            ax.plot(x, row.with_afs, "o", color=colour)
            ax.plot(x + 0.3, row.with_both, learned["marker"], color=learned["color"])
        _log_scale(ax)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.set_title(title, pad=20)
        ax.set(ylabel=ylabel)
        for solver in solvers:
            centre = np.mean(places[solver])
            place = {"transform": ax.get_xaxis_transform(), "ha": "center"}
            ax.text(centre, 1.02, solver, color=look(solver)["color"], **place)
    axes[-1].set_xticks(np.concatenate(list(places.values())), nfes * len(solvers))
    axes[-1].set_xlabel("network evaluations per sample (NFE)")
    grey = {"color": "#888888", "marker": "o", "linestyle": ":"}
    axes[0].plot([], [], markerfacecolor="none", label="plain solver", **grey)
    axes[0].plot([], [], label="with AFS", **grey)
    axes[0].plot([], [], **learned)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


LOOKS_OF_DISTANCES = {
    "fd": ("#D55E00", "o"),
    "fd_pixels": ("#888888", "s"),
    "fd_joint": ("#0072B2", "^"),
}


def corruptions_figure(panels: dict[str, pd.DataFrame]) -> Figure:
    """Distances of corrupted real images, relative to pure noise: a row per frame, a column per
    corruption.

    Args:
        panels: title to a frame of ``corruptions.measure_corrupted``.
    """
    kinds = [*CORRUPTIONS]
    figure = Figure(figsize=(1.9 * len(kinds), 2.5 * len(panels) + 0.4))
    axes = figure.subplots(len(panels), len(kinds), squeeze=False, sharey="row")
    for row, (title, table) in zip(axes, panels.items(), strict=True):
        noise = table.set_index("kind").loc[NOISE]
        for ax, kind in zip(row, kinds, strict=True):
            rows = table[table["kind"] == kind].sort_values("strength")
            for metric in (name for name in DISTANCES if name in table):
                colour, marker = LOOKS_OF_DISTANCES[metric]
                style = {"color": colour, "marker": marker, "markersize": 4}
                ax.plot(range(5), rows[metric] / noise[metric], label=DISTANCES[metric], **style)
            ax.axhline(1, color="#888888", linestyle="--", linewidth=1, label="pure noise")
            ax.set_yscale("log")
            ax.set_xticks(range(5), [f"{strength:g}" for strength in rows["strength"]])
            ax.set(title=kind)
            ax.set_xlabel(CORRUPTIONS[kind].unit, fontsize=8)
        row[0].set_ylabel(f"{title}\nFD, pure noise = 1")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def effects_figure(worth: pd.DataFrame) -> Figure:
    """What each freedom multiplies FD by, a panel per NFE; of ``standings.effects``."""
    figure, axes = _panels(worth["nfe"].nunique(), width=2.6, height=2.2, sharey=True)
    for (nfe, rows), ax in zip(worth.groupby("nfe"), axes[0], strict=True):
        places = range(len(rows))[::-1]
        bars = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        ax.errorbar(rows["value"], places, xerr=bars, fmt="o", capsize=3, color="#009E73")
        ax.axvline(1, color="#888888", linestyle=":")
        ax.set(title=f"{nfe} NFE", xscale="log", xlabel="FD is multiplied by")
        ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5, 7)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(places, [WORDS[name] for name in rows["factor"]])
    return figure


def few_figure(found: pd.DataFrame, unit: str) -> Figure:
    """FD against the number of trajectories trained on, with seconds of training; a panel per NFE.

    Args:
        found: columns images, nfe, value, half, seconds.
        unit: of the y axis.
    """
    figure, axes = _panels(found["nfe"].nunique(), width=3.5, height=3)
    for (nfe, rows), ax in zip(found.groupby("nfe"), axes[0], strict=True):
        ax.errorbar(rows["images"], rows["value"], rows["half"], capsize=3, **look("all numbers"))
        for row in rows.itertuples():
            label = f"{row.seconds:.0f} s"
            ax.annotate(label, (row.images, row.value), (0, 8), textcoords="offset points")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=f"{nfe} NFE", xlabel="trajectories", ylabel=unit)
    return figure
