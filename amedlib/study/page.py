"""What a page of the book needs beside tables and figures: style, captions, numbers for prose."""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from pandas.io.formats.style import Styler

from amedlib.checks import require
from amedlib.comparison import Comparison
from amedlib.datasets.entries import Entry, describe
from amedlib.study import claims, figures, openings, plans, tables, verdicts
from amedlib.study.execute import measure, run
from amedlib.study.parameters import check
from amedlib.study.published import ROWS, across_nfe, called, published, row_names
from amedlib.study.run import Result, Run
from amedlib.study.sentences import listed
from amedlib.study.store import load_result
from amedlib.study.uncertainty import (
    Estimate,
    against_baseline,
    estimates,
    with_interval,
)

GREY = "#757575"  # readable on the book's light page and on its dark one


def use_style() -> None:
    """Vector output, a description beside it, and a quiet style; call it once in a notebook."""
    set_matplotlib_formats("svg")
    if shell := get_ipython():
        plain = shell.display_formatter.formatters["text/plain"]
        plain.for_type(Figure, lambda figure, printer, _: printer.text(figures.in_words(figure)))
    plt.rcParams.update(
        {
            **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor"], GREY),
            **dict.fromkeys(["xtick.color", "ytick.color"], GREY),
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10.4,  # with `figures.WIDTH`, nothing is below 9 pixels on a page
            "axes.titlesize": "medium",
            "axes.formatter.min_exponent": 9,  # 0.01, whose power of ten would be small print
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


def begin(
    namespace: dict, parameters: str, metrics: Sequence[str] = ()
) -> tuple[Entry | None, dict]:
    """What every page begins with: the style, and a check of the notebook's parameters.

    Arguments and errors as of ``parameters.check``.

    Returns:
        The entry of the data set, where one is named, and those of the parameters that say where
        and how it is run, for ``execute.measure`` or ``pictures.draw_all``.
    """
    use_style()
    check(namespace, parameters, metrics)
    names = [name.rstrip("?") for name in parameters.split()]
    where = ("results_dir", "device", "cluster", "train")
    how = {name: namespace[name] for name in where if name in names}
    dataset = namespace["dataset"] if "dataset" in names else None
    return None if dataset is None else describe(dataset), how


def glue(**numbers) -> None:
    """Hand numbers to the book's prose; without the book extra this does nothing."""
    try:
        from myst_nb import glue as to_book
    except ImportError:
        return
    for name, value in numbers.items():
        to_book(name, value, display=False)


def embedded(figure: Figure) -> HTML:
    """A figure as it can be glued into another page, which takes no vector graphics but in HTML."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    data, alt = base64.b64encode(file.getvalue()).decode(), escape(figures.in_words(figure))
    return HTML(f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">')


def caption(text: str) -> None:
    """Show a caption below a figure or table."""
    display(Markdown(f"*{text}*"))


def cells_caption(number: int, dataset: str, measured: pd.DataFrame) -> None:
    """The caption of ``cells_table``: what was measured, on how many samples, how often trained."""
    data, first = describe(dataset), measured["result"].iloc[0].run
    what = f"{data.feature_distance_name} of {first.samples} samples to {data.reference_name}"
    if first.metric == "endpoint_error":
        what = f"Endpoint error of {first.samples} samples (root mean square distance to the ODE's "
        what += "own solution)"
    times = times_trained(measured, number)
    trained = trainings_in_words(times)
    one = " A cell with one training has an interval without the noise of training."
    one *= bool((times == 1).any())
    theirs = describe(published(f"table{number}")["dataset"].iloc[0]).title
    text = (
        f"Table {number} on {data.title}: {what}, lower is better, with 95 % intervals; best of "
        f"ours in bold. Trainings of learned steps: {trained or 'none'}.{one}"
    )
    place = "Below ours, small," if measured["nfe"].nunique() > 4 else "Beside ours"
    fid = f" {place} the paper's FID on {theirs}."
    caption(text + fid * (first.metric != "endpoint_error"))


def times_trained(measured: pd.DataFrame, number: int | None = None) -> pd.Series:
    """How often the learned steps of every cell were trained, by name and NFE.

    Args:
        number: of a table, whose rows then have its names, not those of methods alone.
    """
    seeds: dict[tuple[str, int, str], set[int]] = {}
    named = measured if number is None else row_names(measured, number)
    for _, row in named.iterrows():
        what = row["result"].run
        if what.predictor:
            name = row["method"] if number is None else openings.row_in_words(number, row)
            same = replace(what, predictor=what.predictor | {"seed": 0})
            seeds.setdefault((name, what.nfe, same.key), set()).add(what.predictor["seed"])
    cells = pd.MultiIndex.from_tuples([key[:2] for key in seeds], names=["name", "nfe"])
    return pd.Series(map(len, seeds.values()), cells, dtype=int)


def how_often(measured: pd.DataFrame) -> str:
    """How often the learned steps of a frame's cells were trained: "3 or 5 trainings"."""
    counts = sorted(set(times_trained(measured)))
    return f"{' or '.join(map(str, counts))} trainings" if counts else "no training"


def trainings_in_words(times: pd.Series) -> str:
    """How often most cells were trained, and which were more or less often; or nothing.

    Args:
        times: of ``times_trained``.
    """
    if times.empty:
        return ""
    most = times.mode()[0]
    said = [str(most)]
    for count, cells in times[times != most].reset_index(name="times").groupby("times"):
        each = [
            f"“{name}” at {listed(rows['nfe'].astype(str).tolist())}"
            for name, rows in cells.groupby("name", sort=False)
        ]
        said.append(f"but {count} of {'; '.join(each)}")
    return ", ".join(said)


def measure_cells(
    number: int, dataset: str, nfes, seeds, n_samples, metric="fd", **how
) -> pd.DataFrame:
    """Measure one of Tables 3 to 13.

    Args:
        number, dataset, nfes, seeds, n_samples, metric: as in ``plans.table``.
        how: of ``begin``.

    Returns:
        The plan with its results, and the other stored trainings of its cells.
    """
    measured = measure(plans.table(number, dataset, nfes, seeds, n_samples, metric), **how)
    return claims.every_training(measured, how["results_dir"])


def open_table(
    number: int, dataset: str, nfes, seeds, n_samples, **how
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure one of Tables 3 to 13 and begin its page with what was found.

    Args:
        number, dataset, nfes, seeds, n_samples, how: as in ``measure_cells``.

    Returns:
        What ``measure_cells`` does, and the paper's claims about it, of ``claims.judge``.
    """
    measured = measure_cells(number, dataset, nfes, seeds, n_samples, **how)
    judged = claims.judge(f"table{number}", measured, how["results_dir"])
    openings.of_table(number, measured, judged, describe(dataset).feature_distance_name)
    return measured, judged


def show_cells(number: int, dataset: str, measured: pd.DataFrame, figure=False, fold=False) -> None:
    """Show one of Tables 3 to 13 with its caption, and before it a figure if asked.

    Args:
        number, dataset: the table, and what it was measured on.
        measured: of ``measure_cells``.
        fold: whether the table opens on a click only.
    """
    metric = measured["result"].iloc[0].run.metric
    unit = "endpoint error" if metric != "fd" else describe(dataset).feature_distance_name
    if figure:
        display(figures.cells_figure(number, measured, unit))
    table = tables.cells_table(number, measured, unit)
    display(folded(f"Table {number} by {unit}", table) if fold else table)
    cells_caption(number, dataset, measured)


def folded(summary: str, table: Styler) -> HTML:
    """A long table, which opens on a click."""
    return tables.folded(summary, table.to_html())


def show_claims(judged: pd.DataFrame) -> None:
    """Show what a page says of each claim of the paper, and the comparisons behind it."""
    if len(judged):
        display_found(verdicts.of_a_page(judged))
    display(tables.verdict_table(judged))


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


def gpu_reports(results_dir: Path) -> dict[str, dict]:
    """What ``python -m benchmarks gpu`` wrote, by machine; empty where it was not run."""
    return {path.stem: benchmarks(path) for path in sorted((results_dir / "gpu").glob("*.json"))}


def gains_in_words(found: dict[str, Comparison]) -> tuple[str, str]:
    """What training gained on some models and how long it took, a sentence each.

    Args:
        found: by the model's name, each with one trained sampler, called "trained".
    """
    ratios = {name: each.ratio("trained") for name, each in found.items()}
    better = sum(high < 1 for _, _, high in ratios.values())
    first = next(iter(found.values()))
    *parts, last = (
        f"{ratio:.2f} ({low:.2f} to {high:.2f}) on {name}"
        for name, (ratio, low, high) in ratios.items()
    )
    gained = (
        f"At {first['trained'].nfe} evaluations the trained sampler beats all "
        f"{len(first.rows) - 1} untrained ones on {better} of {len(found)} models: the error at "
        f"the end, as a fraction of the best untrained one's with its 95 % interval, is "
        f"{', '.join(parts)} and {last}."
    )
    *seconds, last = (f"{each['trained'].sampler.seconds:.0f}" for each in found.values())
    return gained, f"Training the samplers took {', '.join(seconds)} and {last} seconds on a CPU."


def trainings_drawn(ours: pd.DataFrame) -> str:
    """A sentence for captions of ``figures.against_nfe``: where trainings stand for an interval.

    It begins with a space, to end a caption; it is empty where there are none.
    """
    rows = [f"{row.method} at NFE {row.nfe}" for row in figures.reach_zero(ours).itertuples()]
    if not rows:
        return ""
    return f" Where an interval reaches zero, rings show the trainings: {', '.join(rows)}."


def limits(dataset: str, n_samples: int, metric: str = "fd", **how) -> str:
    """Sentences for captions: the limit of the model, and the floor where one is known."""
    limit = run(plans.limit_run(dataset, n_samples, metric), **how)
    text = (
        f"EDM with {limit.run.nfe} NFE solves the ODE almost exactly and reaches "
        f"{limit.value:.3g}: the limit of the model, which was trained on these images too."
    )
    if describe(dataset).floor:
        floor = run(plans.floor_runs(dataset)[metric], **how)
        if "images" in floor.curves:
            n = floor.curves["images"][0]
            return f"{text} Floor, {n:,} real images that are not among those: {floor.value:.3g}."
    return text


def without_afs(planned: pd.DataFrame) -> str:
    """A sentence for captions on the rows that have AFS in Table 2, but not at these NFE.

    It begins with a space, to end a caption; it is empty where there are none.

    Args:
        planned: columns method, run.
    """
    rows = [
        row
        for row in planned.itertuples()
        if plans.METHODS[row.method].afs and describe(row.run.dataset).afs and not row.run.afs
    ]
    if not rows:
        return ""
    nfes = ", ".join(map(str, sorted({row.run.nfe for row in rows})))
    names = ", ".join(dict.fromkeys(row.method for row in rows))
    return f" At NFE {nfes} without AFS, with which their NFE is odd: {names}."


def from_store(what: Run, results_dir: Path) -> Result:
    """A result that a page shows and does not compute.

    Raises:
        ValueError: the store does not have it.
    """
    found = load_result(what, results_dir)
    allowed = f"a store that has the results of {what.dataset!r}, which this page does not compute"
    require(found is not None, "results_dir", str(results_dir), allowed)
    return found


def how_they_compare(dataset: str) -> str:
    """A sentence for captions: what our distance and the paper's have to do with each other."""
    if describe(dataset).feature_distance_name == "FID":
        return "Both are FID: values compare."
    return "That is another distance: compare the order, not the values."


def _slug(text: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", text)


def plugin_numbers(measured: pd.DataFrame, endpoint: pd.DataFrame) -> dict[str, str]:
    """Numbers of ``plans.plugin`` for the book's prose: values and differences with intervals."""
    numbers = {}
    for metric, frame in (("fd", measured), ("endpoint", endpoint)):
        for row in estimates(frame, by=("variant",)).itertuples():
            numbers[f"plugin_{metric}_{_slug(row.variant)}"] = with_interval(row.value, row.half)
        for baseline, short in (("iPNDM", "plain"), ("iPNDM, AFS", "afs")):
            for variant, found in against_baseline(frame, baseline).items():
                low, high = found.interval
                name = f"plugin_{metric}_{_slug(variant)}_vs_{short}"
                numbers[name] = with_interval(found.value, (high - low) / 2)
    return numbers


def headline_numbers(ours: pd.DataFrame, judged: pd.DataFrame, nfe: int = 5) -> dict[str, str]:
    """Numbers for the first page: quality at one NFE and at all, counts of corrected verdicts."""
    numbers = {
        f"table2_{row.method}": with_interval(row.value, row.half)
        for row in ours[ours["nfe"] == nfe].itertuples()
    }
    numbers |= {
        f"table2_{row.method}_{row.nfe}": with_interval(row.value, row.half)
        for row in ours.itertuples()
    }
    for claim, group in judged.groupby("id"):
        counts = group["verdict"].value_counts()
        numbers[f"table2_{claim}_holds"] = str(counts.get("holds", 0))
        numbers[f"table2_{claim}_fails"] = str(counts.get("does not hold", 0))
        numbers[f"table2_{claim}_all"] = str(len(group))
    return numbers


def command_of(notebook: str, dataset: str) -> str:
    """The command that runs a page on a data set, for captions."""
    return (
        f"`papermill notebooks/{notebook}.ipynb out.ipynb --stderr-file - -p dataset {dataset} "
        "-p device cuda`"
    )


def not_run(number: int, on: str):
    """A table of the paper that was not run: its numbers, and what would run it on its data."""
    rows = row_names(published(f"table{number}"), number)
    frame = across_nfe(rows, ROWS[number], "value")
    display(frame.style.format("{:.4g}", na_rep="–"))
    theirs = describe(rows["dataset"].iloc[0]).title
    caption(
        f"Table {number}: the paper's FID on {theirs}. Not run here. On a GPU: "
        f"{command_of('not_run', on)}"
    )


# --- what a page found, in sentences --------------------------------------------------------------


def display_found(sentences: str | list[str]) -> None:
    """Show what a page found, as a list if there are several sentences."""
    several = not isinstance(sentences, str)
    display(Markdown("\n".join(f"- {each}" for each in sentences) if several else sentences))


def results_of(measured: pd.DataFrame, **cell) -> list[Result]:
    """The results of one cell, by the values of columns."""
    rows = measured
    for name, value in cell.items():
        rows = rows[rows[name] == value]
    return rows["result"].tolist()


def differences_in_words(found: dict[str, Estimate], unit: str) -> list[str]:
    """Paired differences in sentences: better, worse, or undecided, corrected for their number."""
    said = []
    corrected = claims.holm([each.p_value for each in found.values()])
    words = {"holds": "better", "does not hold": "worse", "undecided": "undecided"}
    for (what, each), p_value in zip(found.items(), corrected, strict=True):
        low, high = each.interval
        word = words[claims.verdict(each.value, p_value)]
        value = with_interval(each.value, (high - low) / 2)
        said.append(f"{what}: **{word}** (difference of {unit} {value}).")
    return said


def single_steps_in_words(frames: dict[str, pd.DataFrame]) -> list[str]:
    """Per schedule, at which NFE AMED-Solver has the lowest mean of the single-step solvers.

    Args:
        frames: schedule to measured rows of ``plans.on_schedule``.
    """
    said, single = [], ("AMED-Solver", "DDIM", "DPM-Solver-2", "EDM")
    for schedule, frame in frames.items():
        means = estimates(frame[frame["method"].isin(single)])
        first = means.loc[means.groupby("nfe")["value"].idxmin()]
        each = [f"{row.method} at NFE {row.nfe}" for row in first.itertuples()]
        name = called(schedule)
        said.append(f"Best of the single-step solvers on the {name} schedule: {', '.join(each)}.")
    return said


def components_in_words(result: Result) -> tuple[str, str]:
    """How many directions a trajectory needs, in two sentences; of the metric
    ``"trajectory_pca"``."""
    one, two = (f"{100 * share:.4f} %" for share in result.curves["cumulative_variance"][:2])
    return (
        f"Two directions explain {two} of the variance along a trajectory; one alone explains "
        f"{one}.",
        f"Outside the plane of the two a state has at most {100 * result.value:.2g} % of its norm, "
        "in the mean over trajectories.",
    )


def parts_in_words(errors: pd.DataFrame) -> tuple[str, str]:
    """Which solver ends a step nearest to the solution, and which in the plane alone.

    Args:
        errors: a row per solver; columns the error, and its parts along the plane and across it.
    """
    name, plane, rest = errors.columns
    whole, along = errors[name].idxmin(), errors[plane].idxmin()
    first = f"{whole} ends the step nearest to the solution, {errors[name].min():.3f} from it."
    if whole == along:
        return first, f"In the plane it is nearest too, {errors[plane].min():.3f} from it."
    parts = [
        f"{errors[part][along]:.3f} against {errors[part][whole]:.3f}" for part in (plane, rest)
    ]
    return first, (
        f"In the plane {along} is nearer ({parts[0]}), but across the plane, which the picture "
        f"does not show, it is farther off ({parts[1]})."
    )


def search_in_words(curves: dict[str, dict]) -> str:
    """What the greedy search does to the end of the trajectory; curves of ``"grid_search"``."""
    ends = {name: (c["baseline"][-1], c["searched"][-1]) for name, c in curves.items()}
    worse = [f"{name} ({a:.3f} to {b:.3f})" for name, (a, b) in ends.items() if b > a]
    better = [name for name, (a, b) in ends.items() if b <= a]
    text = "A greedy search for r brings the end nearer to the solution for "
    text += listed(better) if better else "no solver"
    if worse:
        text += f", and takes it farther away for {listed(worse)}"
    return f"{text}."
