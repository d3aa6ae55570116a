"""The figures of the book."""

import re
from itertools import cycle
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from amedlib.study.corruptions import CORRUPTIONS, NOISE
from amedlib.study.published import DISTANCES, ROWS, nfe_name, row_names, value_in_words
from amedlib.study.standings import WORDS
from amedlib.study.uncertainty import estimates

# Inches. A page of 368 pixels, as on a telephone, shrinks such a figure to a text of 9 pixels.
WIDTH = 5.4

# The one mapping from methods to colours and markers: no two methods share both.
LOOKS = {
    "DDIM": ("#888888", "o"),
    "Heun": ("#8C5A32", "o"),
    "EDM": ("#8C5A32", "P"),
    "DPM-Solver-2": ("#E69F00", "v"),
    "iPNDM": ("#0072B2", "^"),
    "iPNDM-2": ("#0072B2", "o"),
    "iPNDM-3": ("#0072B2", "D"),
    "DEIS": ("#7A6FD0", "<"),
    "DPM-Solver++(2M)": ("#56B4E9", "o"),
    "DPM-Solver++(3M)": ("#56B4E9", "s"),
    "UniPC": ("#009E73", "D"),
    "UniPC-2": ("#009E73", "o"),
    "UniPC-3": ("#009E73", "v"),
    "AMED-Solver": ("#CC79A7", "*"),
    "AMED-Plugin": ("#D55E00", "X"),
    # Of the leaderboard. What is trained otherwise keeps the colour of its method.
    "best untrained": ("#888888", "s"),
    "AMED-Solver, release": ("#CC79A7", "s"),
    "AMED-Plugin, release": ("#D55E00", "s"),
    "AMED-Solver, for the end": ("#CC79A7", "p"),
    "AMED-Plugin, for the end": ("#D55E00", "P"),
    "GITS": ("#A8842C", "D"),
    "LD3, tied times": ("#7A6FD0", "v"),
    "LD3": ("#7A6FD0", "^"),
    "LD3, soft teacher": ("#7A6FD0", "s"),
    "S4S": ("#A8842C", "v"),
    "S4S-Alt": ("#A8842C", "^"),
    "EPD, K = 2": ("#3FA9A1", "s"),
    "EPD, K = 3": ("#3FA9A1", "h"),
    "all numbers": ("#6B9E1F", "o"),
    "all numbers, two evaluations": ("#6B9E1F", "D"),
}
GREY, BLUE, ORANGE = "#888888", "#0072B2", "#D55E00"  # of what is no method
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))


def look(method: str) -> dict:
    """Colour and marker of a method, for ``plot``; "AMED-Plugin (iPNDM)" is AMED-Plugin."""
    colour, marker = LOOKS[method] if method in LOOKS else LOOKS[method.split(" (")[0]]
    return {"color": colour, "marker": marker}


def variants(method: str, n: int) -> list[dict]:
    """The looks of so many variants of one method: its own, told apart by dashes and lightness."""
    colour = np.array(to_rgb(look(method)["color"]))
    lightness = np.linspace(0, 0.4, n) if n > 2 else np.zeros(n)
    return [
        look(method) | {"color": to_hex(colour + (1 - colour) * pale), "linestyle": dashes}
        for pale, dashes in zip(lightness, cycle(DASHES), strict=False)
    ]


def _panels(n, height=3.0, columns=2, **options):
    """A figure with so many panels, row by row, each so high; and their axes in one list."""
    columns = min(n, columns)
    rows = -(-n // columns)
    # Not through pyplot, which would show the figure a second time in a notebook.
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes[n:]:
        ax.set_axis_off()
    return figure, list(axes[:n])


def legend_below(figure: Figure, ax) -> None:
    """The legend of one panel, below all of them, for which the figure grows."""
    found = zip(*ax.get_legend_handles_labels(), strict=True)
    found = {label: handle for handle, label in sorted(found, key=lambda each: each[1] == RINGS)}
    labels, handles = list(found), list(found.values())
    columns = 3 if max(map(len, labels)) < 18 else 2 if max(map(len, labels)) < 32 else 1
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _title(ax, text):
    ax.set_title(fill(text, 28))


def _axis_of_nfe(axes, nfes):
    axes.set_xlabel("evaluations per sample (NFE)")
    axes.xaxis.set_major_locator(FixedLocator(sorted(nfes)))


def _log_scale(axes):
    """A logarithmic y axis, called when everything is drawn; with labels within a decade too."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    several = np.floor(np.log10(high)) > np.ceil(np.log10(low))  # powers of ten
    subs = (1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1.0,) if several else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def reach_zero(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose interval reaches zero, and so below a logarithmic axis."""
    return rows[rows["half"] >= rows["value"]] if "half" in rows else rows[:0]


RINGS = "trainings (interval reaches 0)"


def _with_bars(ax, rows: pd.DataFrame, style: dict) -> None:
    """A quality against NFE with its intervals; of one that reaches zero, which has no place on a
    logarithmic axis, the trainings, a small ring each."""
    rows = rows.sort_values("nfe")
    beyond = reach_zero(rows)
    bars = rows["half"].mask(rows.index.isin(beyond.index)) if "half" in rows else None
    ax.errorbar(rows["nfe"], rows["value"], bars, capsize=2, **style)
    ring = {"marker": "o", "markerfacecolor": "none", "markersize": 4, "linestyle": "none"}
    ring |= {"color": style["color"], "label": RINGS, "zorder": 5}
    for row in beyond.itertuples():
        ax.plot([row.nfe] * len(row.trainings), row.trainings, **ring)


def against_nfe(panels: dict[str, pd.DataFrame], ylabels, levels=None, sharey=False) -> Figure:
    """A panel per frame: a quality against NFE for every method, with 95 % intervals.

    Args:
        panels: title to frame with columns method, nfe, value and, where known, half, trainings;
            and, where a method has several lines, variant: their names.
        ylabels: label of each panel's y axis, with its unit.
        levels: title to (label, value) of a line across the panel.
        sharey: whether the panels have one y axis.
    """
    figure, axes = _panels(len(panels), sharey=sharey)
    for (title, frame), label, ax in zip(panels.items(), ylabels, axes, strict=True):
        for method, of_method in frame.groupby("method", sort=False):
            lines = of_method.get("variant", pd.Series("", of_method.index))
            lines = list(of_method.groupby(lines, sort=False))
            for (variant, rows), style in zip(lines, variants(method, len(lines)), strict=True):
                _with_bars(ax, rows, style | {"label": ", ".join(filter(None, (method, variant)))})
        if levels and title in levels:
            label_of_level, level = levels[title]
            ax.axhline(level, color=GREY, linestyle=":", label=label_of_level)
        _log_scale(ax)
        _axis_of_nfe(ax, frame["nfe"].unique())
        _title(ax, title)
        ax.set(ylabel=label)
    legend_below(figure, axes[0])
    return figure


def dots(panels: dict[str, pd.DataFrame], units) -> Figure:
    """A row per variant, in the order of the frames, and a panel per frame.

    Args:
        panels: title to frame with columns variant, method, value and, where known, half.
        units: label of each panel's axis.
    """
    names = list(dict.fromkeys(name for frame in panels.values() for name in frame["variant"]))
    size = {"height": 0.7 + 0.45 * len(names), "columns": 3}
    figure, axes = _panels(len(panels), **size, sharey=True)
    for (title, frame), unit, ax in zip(panels.items(), units, axes, strict=True):
        for _, row in frame.iterrows():
            place = names.index(row["variant"])
            style = {"markersize": 8} | look(row["method"])
            bar = row.get("half")
            ax.errorbar(row["value"], place, xerr=bar, capsize=3, linestyle="none", **style)
        ax.set(title=fill(title, 20), xlabel=fill(unit, 20))
        if not len(reach_zero(frame)) and frame["value"].max() > 4 * frame["value"].min():
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_xlim(left=0)
            ax.xaxis.set_major_locator(MaxNLocator(5 if len(panels) < 3 else 3))
        ax.xaxis.set_major_formatter("{x:g}")
    axes[0].set_yticks(range(len(names)), [fill(name, 26) for name in names])
    axes[0].invert_yaxis()
    return figure


def cells_figure(number: int, measured: pd.DataFrame, unit: str) -> Figure:
    """The rows of one of Tables 3 to 13 against NFE: ours left, and the paper's FID beside our FD.

    Rows of one method (of several r, M, schedules, ...) have its colour and marker.
    """
    rows = row_names(measured, number).assign(whose=measured["method"])
    found = estimates(rows, by=[*dict.fromkeys(["whose", *ROWS[number]]), "nfe", "paper"])
    compared = measured["result"].iloc[0].run.metric == "fd"
    figure, axes = _panels(2) if compared else _panels(1, height=3.8)
    for method, of_method in found.groupby("whose", sort=False):
        groups = list(of_method.groupby(ROWS[number], sort=False))
        for (names, rows), style in zip(groups, variants(method, len(groups)), strict=True):
            style |= {"label": _row_label(number, names)}
            _with_bars(axes[0], rows, style)
            if compared:
                axes[1].plot("nfe", "paper", data=rows.sort_values("nfe"), **style)
    for ax, title, label in zip(axes, ("ours", "the paper"), (unit, "FID"), strict=False):
        _log_scale(ax)
        _axis_of_nfe(ax, found["nfe"].unique())
        ax.set(title=title if compared else "", ylabel=label)
    legend_below(figure, axes[0])
    return figure


def _row_label(number: int, names: tuple) -> str:
    """What a row of a table is called in a legend: ``DPM-Solver-2, r = 0.3``, ``DDIM, AFS``."""
    each = zip(ROWS[number], names, strict=True)
    told = [{"✓": name, "✗": "–"}.get(v, value_in_words(name, v)) for name, v in each]
    return ", ".join(text for text in told if text != "–")


def trajectory_pca_figure(curves: dict) -> Figure:
    """Figure 4: relative projection error along t, and cumulative variance of the components."""
    figure, (left, right) = _panels(2)
    t, error = np.array(curves["t"]), 100 * np.array(curves["relative_error"])
    spread = 100 * np.array(curves["relative_error_sd"])
    left.plot(t, error, color=BLUE)
    left.fill_between(t, error - spread, error + spread, color=BLUE, alpha=0.2, linewidth=0)
    left.axhline(8, color="#D55E00", linestyle="--", label="the paper's bound, 8 %")
    left.set_xscale("log")
    left.invert_xaxis()
    left.set(xlabel="time t (noise level)", ylim=(0, None))
    left.set(ylabel="relative projection error (%)")
    share = 100 * np.array(curves["cumulative_variance"])
    right.plot(np.arange(1, len(share) + 1), share, "o-", color=BLUE)
    right.yaxis.get_major_formatter().set_useOffset(False)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="principal components", ylabel="cumulative variance (%)")
    legend_below(figure, left)
    return figure


def alignment(curves: dict[str, dict]) -> Figure:
    """Figure 5: relative alignment at every step (left), and the searched r_n (right)."""
    figure, (left, right) = _panels(2)
    for method, found in curves.items():
        steps = np.arange(1, len(found["r"]) + 1)
        gain = np.array(found["baseline"]) - np.array(found["searched"])
        left.plot(steps, gain, label=method, **look(method))
        right.plot(steps, found["r"], **look(method))
    left.axhline(0, color=GREY, linewidth=1)
    left.set_yscale("symlog", linthresh=0.01)
    left.margins(y=0.1)  # no marker is cut off
    left.set(ylabel="relative alignment")
    right.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    right.set(ylabel="searched r", ylim=(-0.05, 1.05))
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, left)
    return figure


def learned_r_figure(panels: dict[str, dict[int, list[dict]]]) -> Figure:
    """Figure 7: r_n of every step, a panel per predictor and a line per NFE.

    Args:
        panels: title to {nfe: curves of each training seed}. The line is the mean over seeds, the
            bar their range, the band one standard deviation over samples.
    """
    figure, axes = _panels(len(panels), height=2.6, columns=1, sharey=True)
    for (title, lines), ax in zip(panels.items(), axes, strict=True):
        looks = variants(title, len(lines))
        for (nfe, seeds), style in zip(lines.items(), looks, strict=True):
            r = np.array([curves["r"] for curves in seeds])
            spread = np.mean([curves["r_sd"] for curves in seeds], axis=0)
            steps, mean = np.arange(1, r.shape[1] + 1), r.mean(0)
            bars = np.maximum([mean - r.min(0), r.max(0) - mean], 0)  # of equal r rounding is left
            ax.errorbar(steps, mean, bars, capsize=2, label=nfe_name(nfe), **style)
            low, high = mean - spread, mean + spread
            ax.fill_between(steps, low, high, color=style["color"], alpha=0.2)
        ax.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        ax.set(title=title, xlabel="step", ylabel="r", ylim=(0, 1))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
    return figure


def local_errors_figure(curves: dict[str, dict]) -> Figure:
    """Table 1, measured: error of one step from the solution, for every step."""
    figure, (ax,) = _panels(1, height=3.8)
    for method, found in curves.items():
        ax.plot(np.arange(1, len(found["rms"]) + 1), found["rms"], label=method, **look(method))
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="step", ylabel="local error (RMS norm)")
    legend_below(figure, ax)
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
    figure, axes = _panels(len(panels), height=3.0, columns=1, sharex=True)
    width = len(nfes) + 0.5  # of a solver's group; a place is one NFE
    places = {s: [i * width + j for j in range(len(nfes))] for i, s in enumerate(solvers)}
    learned = {**look("AMED-Plugin"), "label": "learned step (AMED-Plugin with AFS)"}
    for (title, frame), ylabel, ax in zip(panels.items(), ylabels, axes, strict=True):
        for row in frame.itertuples():
            x, colour = places[row.solver][nfes.index(row.nfe)], look(row.solver)["color"]
            ax.plot([x - 0.3, x], [row.plain, row.with_afs], color=GREY, linestyle=":")
            ax.plot([x, x + 0.3], [row.with_afs, row.with_both], color=learned["color"])
            ax.plot(x - 0.3, row.plain, "o", color=colour, markerfacecolor="none")
            ax.plot(x, row.with_afs, "o", color=colour)
            ax.plot(x + 0.3, row.with_both, learned["marker"], color=learned["color"])
        _log_scale(ax)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.set_title(title, pad=32)
        ax.set(ylabel=ylabel)
        for solver in solvers:
            centre = np.mean(places[solver])
            place = {"transform": ax.get_xaxis_transform(), "ha": "center"}
            ax.text(centre, 1.02, solver.replace("(", "\n("), color=look(solver)["color"], **place)
    axes[-1].set_xticks(np.concatenate(list(places.values())), nfes * len(solvers))
    axes[-1].set_xlabel("evaluations per sample (NFE)")
    grey = {"color": GREY, "marker": "o", "linestyle": ":"}
    axes[0].plot([], [], markerfacecolor="none", label="plain solver", **grey)
    axes[0].plot([], [], label="with AFS", **grey)
    axes[0].plot([], [], **learned)
    legend_below(figure, axes[0])
    return figure


LOOKS_OF_DISTANCES = {
    "fd": ("#D55E00", "o"),
    "fd_pixels": ("#888888", "s"),
    "fd_joint": ("#0072B2", "^"),
}


def corruptions_figure(panels: dict[str, pd.DataFrame]) -> Figure:
    """Distances of corrupted real images, relative to pure noise: a row per corruption, a column
    per frame.

    Args:
        panels: title to a frame of ``corruptions.measure_corrupted``.
    """
    height = 2.3 * len(CORRUPTIONS) + 0.4
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(len(CORRUPTIONS), len(panels), squeeze=False, sharey="col")
    for column, (title, table) in zip(axes.T, panels.items(), strict=True):
        noise = table.set_index("kind").loc[NOISE]
        for ax, (kind, about) in zip(column, CORRUPTIONS.items(), strict=True):
            rows = table[table["kind"] == kind].sort_values("strength")
            for metric in (name for name in DISTANCES if name in table):
                colour, marker = LOOKS_OF_DISTANCES[metric]
                style = {"color": colour, "marker": marker, "markersize": 4}
                ax.plot(range(5), rows[metric] / noise[metric], label=DISTANCES[metric], **style)
            ax.axhline(1, color=GREY, linestyle="--", linewidth=1, label="pure noise")
            ax.set_yscale("log")
            ax.set_xticks(range(5), [f"{strength:g}" for strength in rows["strength"]])
            ax.set(title=f"{title}: {kind}", xlabel=fill(about.unit, 30))
    figure.get_layout_engine().set(h_pad=0.12)
    figure.supylabel("FD, pure noise = 1", fontsize="medium")
    legend_below(figure, axes[0][0])
    return figure


def effects_figure(worth: pd.DataFrame) -> Figure:
    """What each freedom multiplies FD by, a panel per NFE; of ``standings.effects``."""
    figure, axes = _panels(worth["nfe"].nunique(), height=1.9, columns=1, sharex=True)
    for (nfe, rows), ax in zip(worth.groupby("nfe"), axes, strict=True):
        places = range(len(rows))[::-1]
        bars = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        ax.errorbar(rows["value"], places, xerr=bars, fmt="o", capsize=3, color=BLUE)
        ax.axvline(1, color=GREY, linestyle=":")
        ax.set(title=f"{nfe} NFE", xscale="log")
        ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5, 7)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(places, [WORDS[name] for name in rows["factor"]])
    axes[-1].set_xlabel("FD is multiplied by")
    return figure


def few_figure(found: pd.DataFrame, unit: str) -> Figure:
    """FD against the number of trajectories trained on, with seconds of training; a panel per NFE.

    Args:
        found: columns images, nfe, value, half, seconds.
        unit: of the y axis.
    """
    figure, axes = _panels(found["nfe"].nunique())
    for (nfe, rows), ax in zip(found.groupby("nfe"), axes, strict=True):
        bars = np.minimum(rows["half"], rows["value"]), rows["half"]  # no distance is below zero
        ax.errorbar(rows["images"], rows["value"], bars, capsize=3, **look("all numbers"))
        for row in rows.itertuples():
            place, above = (row.images, row.value + row.half), {"textcoords": "offset points"}
            ax.annotate(f"{row.seconds:.0f} s", place, (0, 3), ha="center", **above)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(rows["images"]))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.margins(0.1)
        ax.set(title=f"{nfe} NFE", xlabel="trajectories", ylabel=unit, ylim=(0, None))
    return figure


def agreement_figure(found: pd.DataFrame, unit: str) -> Figure:
    """FD against endpoint error, a point per sampler and a panel per NFE.

    Args:
        found: columns nfe, learned (whether something is), fd, endpoint.
        unit: of FD.
    """
    figure, axes = _panels(found["nfe"].nunique(), height=2.6)
    kinds = {False: (BLUE, "o", "untrained"), True: (ORANGE, "^", "learned")}
    for (nfe, rows), ax in zip(found.groupby("nfe"), axes, strict=True):
        for learned, (color, marker, label) in kinds.items():
            some = rows[rows["learned"] == learned]
            ax.plot(some["endpoint"], some["fd"], marker, color=color, alpha=0.7, label=label)
        ax.set(title=f"{nfe} NFE", xlabel="endpoint error", ylabel=unit, xscale="log")
        wide = np.ptp(np.log10(rows["endpoint"])) > 2  # then 2 and 5 have no room
        ax.xaxis.set_major_locator(LogLocator(10, subs=(1,) if wide else (1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        _log_scale(ax)
    legend_below(figure, axes[0])
    return figure


def overhead_figure(sampling: pd.DataFrame, aim: float = 2.0) -> Figure:
    """The share of time that solvers spend outside the network, with learned steps and without.

    Args:
        sampling: of ``benchmarks``, a row per solver and intermediate.
        aim: a share, in per cent, that is drawn as a line.
    """
    figure, (ax,) = _panels(1, height=3.0)
    solvers = sampling["solver"].unique().tolist()[::-1]
    kinds = {"none": (BLUE, "o", "plain"), "predictor": (ORANGE, "s", "with learned steps")}
    for kind, (color, marker, label) in kinds.items():
        rows = sampling[sampling["intermediate"] == kind]
        places = [solvers.index(name) for name in rows["solver"]]
        ax.plot(rows["outside the network, %"], places, marker, color=color, label=label)
    ax.axvline(aim, color=GREY, linestyle=":")
    ax.set_yticks(range(len(solvers)), solvers)
    ax.set(xlim=(0, None), xlabel="time outside the network (% of the time of a batch)")
    legend_below(figure, ax)
    return figure


def in_words(figure: Figure) -> str:
    """What a figure shows, for who does not see it: panels, their axes, rows, and what is drawn.

    A figure that says so itself has it as its label.
    """
    if figure.get_label():
        return figure.get_label()
    panels, rows, drawn = [], [], []
    for ax in figure.axes:
        titles = ax.get_title() or ax.get_title("left")
        title, x, y = (" ".join(t.split()) for t in (titles, ax.get_xlabel(), ax.get_ylabel()))
        axes = " against ".join(filter(None, [y, x])) if ax.axison else ""
        panels.append(": ".join(filter(None, [title, axes])))
        up = -1 if ax.yaxis_inverted() else 1
        ticks = sorted(ax.get_yticklabels(), key=lambda tick: -up * tick.get_position()[1])
        rows += [tick.get_text() for tick in ticks if re.match("[A-Za-z]", tick.get_text())]
        drawn += ax.get_legend_handles_labels()[1]
        drawn += ["images"] if ax.images else []
        drawn += [text.get_text() for text in ax.texts] if not ax.axison else []
    told = [". ".join(dict.fromkeys(filter(None, panels)))]
    for name, words in (("Rows from the top", rows), ("Drawn", drawn)):
        words = dict.fromkeys(filter(None, (" ".join(each.split()) for each in words)))
        told += [f"{name}: {'; '.join(words)}"] if words else []
    return ". ".join(filter(None, told)) + "."
