"""Figures and tables. One colour and marker per method everywhere; colours tell apart without red
against green (after Okabe and Ito, 2008). Figures are vector graphics on a transparent ground."""

import base64
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter
from matplotlib_inline.backend_inline import set_matplotlib_formats

from amedlib import plans
from amedlib.assets import ASSETS
from amedlib.datasets import DATA, describe
from amedlib.paper import against_baseline, estimates, with_interval

LOOKS = {
    "DPM-Solver++(3M)": ("#56B4E9", "s"),
    "UniPC": ("#009E73", "D"),
    "iPNDM": ("#0072B2", "^"),
    "DDIM": ("#888888", "o"),
    "DPM-Solver-2": ("#E69F00", "v"),
    "EDM": ("#8C5A32", "P"),
    "AMED-Solver": ("#CC79A7", "*"),
    "AMED-Plugin": ("#D55E00", "X"),
}


def use_style() -> None:
    """Vector output and a quiet style; call it once in a notebook."""
    set_matplotlib_formats("svg")
    plt.rcParams.update(
        {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 6,
            "figure.constrained_layout.use": True,
        }
    )


def look(method: str) -> dict:
    """Colour and marker of a method, for ``plot``."""
    colour, marker = LOOKS[method]
    return {"color": colour, "marker": marker}


def glue(**numbers) -> None:
    """Hand numbers to the book's prose; without the book extra this does nothing."""
    try:
        from myst_nb import glue as to_book
    except ImportError:
        return
    for name, value in numbers.items():
        to_book(name, value, display=False)


def embedded(figure: Figure, alt: str) -> HTML:
    """A figure as it can be glued into another page, which takes no vector graphics but in HTML."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    data = base64.b64encode(file.getvalue()).decode()
    return HTML(f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">')


def caption(text: str) -> None:
    """Show a caption below a figure or table."""
    display(Markdown(f"*{text}*"))


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


def against_nfe(panels: dict[str, pd.DataFrame], ylabels, levels=None) -> Figure:
    """A panel per frame: a quality against NFE for every method, with 95 % intervals.

    Args:
        panels: title to frame with columns method, nfe, value and, where known, half.
        ylabels: label of each panel's y axis, with its unit.
        levels: title to (label, value) of a line across the panel.
    """
    figure, axes = _panels(len(panels))
    for (title, frame), label, ax in zip(panels.items(), ylabels, axes[0], strict=True):
        for method, rows in frame.groupby("method", sort=False):
            rows = rows.sort_values("nfe")
            bars = rows["half"] if "half" in rows else None
            ax.errorbar(rows["nfe"], rows["value"], bars, capsize=2, label=method, **look(method))
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


def comparison_table(ours: pd.DataFrame, paper: pd.DataFrame | None = None, unit="FD"):
    """Methods against NFE: ours with its 95 % interval, the paper's beside it where it has one.

    Args:
        ours: columns method, nfe, value, half.
        paper: columns method, nfe, paper.
        unit: what ours is called, in the heading.
    """
    cells, best = {}, []
    for nfe, rows in ours.groupby("nfe"):
        rows = rows.set_index("method")
        key = (f"NFE {nfe}", unit)
        cells[key] = {m: with_interval(r["value"], r["half"]) for m, r in rows.iterrows()}
        best.append((rows["value"].idxmin(), key))
        if paper is not None:
            values = paper[paper["nfe"] == nfe].set_index("method")["paper"]
            cells[f"NFE {nfe}", "paper"] = {
                m: f"{values[m]:.4g}" for m in rows.index if m in values
            }
    frame = pd.DataFrame(cells).reindex(ours["method"].unique()).fillna("–")
    frame.index.name = None
    bold = pd.DataFrame("", frame.index, frame.columns)
    for method, key in best:
        bold.loc[method, key] = "font-weight: bold"
    return frame.style.apply(lambda _: bold, axis=None)


# What tells the rows of a table apart, in the columns of `plans.KEY`, with the words of the page.
ROWS = {
    3: ["strategy"],
    4: ["teacher"],
    5: ["schedule", "method"],
    6: ["method", "r"],
    7: ["M"],
    8: ["method", "AFS"],
    9: ["method", "AFS", "AMED"],
    10: ["method", "AFS", "AMED"],
    11: ["method"],
    12: ["method"],
    13: ["guidance", "method"],
}
WORDS = {
    "grid_search": "grid search (time-wise)",
    "time_wise": "AMED-Solver (time-wise)",
    "sample_wise": "AMED-Solver (sample-wise)",
    "time_uniform": "uniform",
    "logsnr": "logSNR",
}


def _row_names(frame, number):
    """The frame with columns for the rows of a table, in words."""
    marks = {True: "✓", False: "✗"}
    frame = frame.assign(AFS=frame["afs"].map(marks), AMED=frame["amed"].map(marks))
    return frame.assign(
        **{
            name: [
                "–"
                if pd.isna(v)
                else WORDS.get(v, f"{v:g}" if name in ("r", "M", "guidance") else v)
                for v in col
            ]
            for name, col in frame[ROWS[number]].items()
        }
    )


def cells_table(number: int, measured: pd.DataFrame, unit: str):
    """One of Tables 3 to 13: ours with its 95 % interval, the paper's number beside it.

    At more than four NFE the paper's number stands below ours, in small print.

    Args:
        measured: columns ``plans.KEY``, ``paper`` and ``result``.
        unit: what ours is called, in the heading.
    """
    keys = [*ROWS[number], "nfe", "paper"]
    found = estimates(_row_names(measured, number), by=keys).sort_values("nfe", kind="stable")
    best = found.groupby("nfe")["value"].idxmin()
    ours = [with_interval(row.value, row.half) for row in found.itertuples()]
    theirs = found["paper"].map("{:.4g}".format)
    if found["nfe"].nunique() > 4:
        columns = {unit: [f"{a}<br><small>{b}</small>" for a, b in zip(ours, theirs, strict=True)]}
    else:
        columns = {unit: ours, "paper": theirs}
    found = found.assign(**columns, nfe="NFE " + found["nfe"].astype(str))
    order = [(nfe, whose) for nfe in found["nfe"].unique() for whose in columns]
    shape = {"index": ROWS[number], "columns": "nfe", "sort": False, "aggfunc": "first"}
    frame = found.pivot_table(values=list(columns), **shape).swaplevel(axis=1)[order]
    bold = found.assign(**dict.fromkeys(columns, "")).astype(dict.fromkeys(columns, object))
    bold.loc[best, unit] = "font-weight: bold"
    bold = bold.pivot_table(values=list(columns), **shape).swaplevel(axis=1)[order]
    frame, bold = (each.reindex(frame.index) for each in (frame, bold))
    if len(columns) == 1:
        frame, bold = (each.droplevel(1, axis=1) for each in (frame, bold))
    shown = [name if name in ("AFS", "AMED") else None for name in ROWS[number]]
    frame.index.names = bold.index.names = shown
    frame.columns.names = bold.columns.names = [None] * frame.columns.nlevels
    return frame.fillna("–").style.apply(lambda _: bold.fillna(""), axis=None)


def cells_caption(number: int, dataset: str, measured: pd.DataFrame) -> None:
    """The caption of ``cells_table``: what was measured, on how many samples, how often trained."""
    data, first = describe(dataset), measured["result"].iloc[0].run
    what = f"{data.feature_distance_name} of {first.samples} samples to {data.reference_name}"
    if first.metric == "endpoint_error":
        what = f"Endpoint error of {first.samples} samples (root mean square distance to the ODE's "
        what += "own solution)"
    runs = [result.run for result in measured["result"] if result.run.predictor]
    seeds = {nfe: len({r.predictor["seed"] for r in runs if r.nfe == nfe}) for nfe in measured.nfe}
    trained = ", ".join(f"{n} at NFE {nfe}" for nfe, n in sorted(seeds.items()) if n)
    one = " With one training its noise is not in the interval." if 1 in seeds.values() else ""
    theirs = describe(plans.published(f"table{number}")["dataset"].iloc[0]).title
    caption(
        f"Table {number} on {data.title}: {what}, lower is better, with 95 % intervals; best of "
        f"ours in bold. Trainings of learned steps: {trained or 'none'}.{one} Beside or "
        f"below them the paper's FID on {theirs}."
    )


def not_run(number: int, dataset: str, on: str):
    """A table of the paper that was not run on a data set: its numbers, and what would run it."""
    rows = _row_names(plans.published(f"table{number}"), number)
    frame = rows.assign(nfe="NFE " + rows["nfe"].astype(str)).pivot_table(
        index=ROWS[number], columns="nfe", values="value", aggfunc="first", sort=False
    )
    frame = frame[sorted(frame, key=lambda name: int(name.split()[1]))]
    frame.index.names = [None] * len(ROWS[number])
    frame.columns.name = None
    display(frame.style.format("{:.4g}", na_rep="–"))
    theirs = describe(rows["dataset"].iloc[0]).title
    caption(
        f"Table {number}: the paper's FID on {theirs}. Not run on {describe(dataset).title}; to "
        f"run it: `papermill notebooks/table{number}.ipynb out.ipynb -p dataset {on}`"
    )


def cells_figure(number: int, measured: pd.DataFrame, unit: str) -> Figure:
    """The rows of one of Tables 3 to 13 against NFE: ours left, the paper's right.

    Rows of one kind (r, M, schedules, ...) take colours from dark to light in their order.
    """
    keys = [*ROWS[number], "nfe", "paper"]
    found = estimates(_row_names(measured, number), by=keys)
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


def entries_table(entries):
    """Declared data sets with their settings, a row each."""
    rows = {
        entry.name: {
            "title": entry.title,
            "shape": "x".join(map(str, entry.shape)),
            "noise levels": f"{entry.sigma_min:.3g} to {entry.sigma_max:.4g}",
            "schedule": entry.schedule or "–",
            "plugin on": entry.plugin,
            "AFS": "✓" if entry.afs else "✗",
            "guidance": "–" if entry.guidance is None else f"{entry.guidance:g}",
            "loss": entry.training.get("loss", "l2"),
            "batch": entry.training.get("batch", 128),
            "samples": entry.samples,
            "precision": entry.precision,
            "evaluations per call": entry.evaluations_per_call,
        }
        for entry in entries
    }
    return pd.DataFrame(rows).T.style


def assets_table(entries):
    """The files of data sets: size, licence, where from, and whether a checksum is published."""
    names = dict.fromkeys(name for entry in entries for name in entry.assets)
    rows = {
        name: {
            "size": f"{asset.size / 1e6:,.0f} MB" if asset.size else "–",
            "licence": asset.licence,
            "checksum": (asset.checksum or "–").split(":")[0],
            "from": asset.urls[0].split("/")[2],
        }
        for name, asset in ((name, ASSETS[name]) for name in names)
    }
    return pd.DataFrame(rows, index=["size", "licence", "checksum", "from"]).T.style


def benchmarks(path: Path) -> dict:
    """What ``python -m benchmarks all --output path`` wrote: the machine, and a frame per part.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(
            f"There are no measurements in {path}: python -m benchmarks all --output {path}"
        )
    report = json.loads(path.read_text())
    return {k: v if k == "machine" else pd.DataFrame(v) for k, v in report.items()}


MARKS = {
    "holds": "✓ holds",
    "does not hold": "✗ does not hold",
    "mixed": "~ mixed",
    "undecided": "? undecided",
    "not run": "– not run",
}


def _with_caption(frame: pd.DataFrame, text: str):
    below = "caption-side: bottom; text-align: left; font-style: italic"
    styles = {"caption": below, "th.row_heading.level1": "min-width: 8em"}
    styles = [{"selector": name, "props": props} for name, props in styles.items()]
    return frame.style.set_caption(text).set_table_styles(styles)


def verdict_table(judged: pd.DataFrame):
    """Claims with the difference that tests them: rows comparisons, columns NFE.

    Args:
        judged: of ``claims.judge``.
    """
    if judged.empty:
        return Markdown("*No claim of the paper about this table can be tested on this data set.*")
    cells = []
    for row in judged.itertuples():
        alone = "" if row.uncorrected == row.verdict else f" (alone {MARKS[row.uncorrected][0]})"
        value = with_interval(row.difference, (row.high - row.low) / 2)
        cells.append(f"{MARKS[row.verdict]}{alone}<br>{value}{' †' * row.pooled}")
    rows = judged.assign(
        cell=cells,
        comparison=judged["better"] + " − " + judged["worse"],
        nfe=[f"NFE {n:.0f}" if pd.notna(n) else "all" for n in judged["nfe"]],
    )
    frame = rows.pivot_table(
        index=["sentence", "comparison"], columns="nfe", values="cell", aggfunc="first", sort=False
    ).fillna("–")
    frame = frame[sorted(frame, key=lambda name: (name == "all", int(name[4:] or 0)))]
    frame.index.names = [None, None]
    frame.columns.name = None
    text = (
        "Paired differences with half widths of their 95 % intervals; negative is what is claimed. "
        "Verdicts are corrected for the number of different comparisons by Holm's method"
    )
    if (judged["uncorrected"] != judged["verdict"]).any():
        text += '; "alone": by the interval shown'
    if judged["pooled"].any():
        text += ". † Trained once: the noise of training is that of other predictors"
    return _with_caption(frame, text + ".")


def ledger(claims: pd.DataFrame):
    """The ledger: a claim per row with its mark here and in the paper, and where the evidence is.

    Args:
        claims: rows of ``claims.ledger``.
    """

    def outcome(found):
        run = found["holds"] + found["fails"] + found["undecided"]
        lines = [MARKS[found["verdict"]]]
        if run:
            counts = f"✓ {found['holds']}, ✗ {found['fails']}, ? {found['undecided']}"
            rest = f" of {found['made']}" if run < found["made"] else ""
            lines += [f"<small>{counts}{rest}</small>", f"<small>{found['example']}</small>"]
        return "<br>".join(lines)

    def evidence(source):
        page = DATA.parent / "notebooks" / f"{source}.ipynb"
        return f'<a href="{source}.html">{source}</a>' if page.is_file() else source

    frame = pd.DataFrame(
        {
            "claim": [
                f"{row.sentence}<br><small>{row.place}. {row.note}</small>"
                for row in claims.itertuples()
            ],
            "here": claims["fd"].map(outcome).tolist(),
            "here, endpoint error": claims["endpoint_error"].map(outcome).tolist(),
            "in the paper's tables": claims["in_print"].tolist(),
            "evidence": claims["source"].map(evidence).tolist(),
        },
        index=claims["id"].tolist(),
    )
    wrapped = {"text-align": "left", "vertical-align": "top", "white-space": "normal"}
    style = frame.style.set_properties(**wrapped)
    return style.set_properties(subset=["claim"], **{"min-width": "14em"})


def crossed_table(found: pd.DataFrame, rows: list[str], columns: list[str]):
    """Estimates with their 95 % intervals, crossed by columns of the frame."""
    cells = [
        with_interval(r.value, r.half) for r in found[["value", "half"]].itertuples(index=False)
    ]
    frame = found.assign(cell=cells).pivot_table(
        index=rows, columns=columns, values="cell", aggfunc="first", sort=False
    )
    frame.index.names = [None] * len(rows)
    return frame.fillna("–").style


def variants_table(frames: dict[str, pd.DataFrame], baselines: list[str]):
    """Variants against baselines: for every frame the value and the paired differences.

    Args:
        frames: heading to frame with columns variant, result; from ``paper.measure``.
        baselines: variants to take differences to.
    """
    cells = {}
    for heading, frame in frames.items():
        values = estimates(frame, by=("variant",)).set_index("variant")
        cells[heading, "value"] = {
            variant: with_interval(row.value, row.half) for variant, row in values.iterrows()
        }
        for baseline in baselines:
            found = against_baseline(frame, baseline)
            cells[heading, f"minus {baseline}"] = {
                variant: with_interval(e.value, (e.interval[1] - e.interval[0]) / 2)
                for variant, e in found.items()
            }
    order = next(iter(frames.values()))["variant"].unique()
    return pd.DataFrame(cells).reindex(order).fillna("–").style


def trajectory_pca(curves: dict) -> Figure:
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
    left.set(ylabel="relative alignment (norm of the state)")
    right.axhline(0.5, color="#888888", linestyle="--", linewidth=1)
    right.set(ylabel="searched r", ylim=(0, 1))
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def learned_r(panels: dict[str, dict[int, list[dict]]]) -> Figure:
    """Figure 7: r_n of every step, a panel per predictor and a line per NFE.

    Args:
        panels: title to {nfe: curves of each training seed}. The line is the mean over seeds, the
            bar their range, the band one standard deviation over samples.
    """
    figure, axes = _panels(len(panels), sharey=True)
    shades = ["#56B4E9", "#0072B2", "#CC79A7", "#D55E00"]
    for (title, lines), ax in zip(panels.items(), axes[0], strict=True):
        for (nfe, seeds), colour in zip(lines.items(), shades, strict=False):
            r = np.array([curves["r"] for curves in seeds])
            spread = np.mean([curves["r_sd"] for curves in seeds], axis=0)
            steps, mean = np.arange(1, r.shape[1] + 1), r.mean(0)
            bars = [mean - r.min(0), r.max(0) - mean]
            ax.errorbar(steps, mean, bars, color=colour, marker="o", capsize=2, label=f"NFE {nfe}")
            ax.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2)
        ax.axhline(0.5, color="#888888", linestyle="--", label="DPM-Solver-2")
        ax.set(title=title, xlabel="step", ylabel="r", ylim=(0, 1))
        ax.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def local_errors(curves: dict[str, dict]) -> Figure:
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


def gains(panels: dict[str, pd.DataFrame], ylabels) -> Figure:
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
