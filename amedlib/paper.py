"""The paper's numbers, and the comparison of ours with them."""

import re

import numpy as np
import pandas as pd

from amedlib import plans
from amedlib.datasets import describe
from amedlib.files import load_tensors
from amedlib.study import (
    Estimate,
    difference,
    estimate,
    load_result,
    predictor_path,
    run,
    run_all,
)


def measure(planned: pd.DataFrame, **how) -> pd.DataFrame:
    """Results of a plan: its columns and ``result``; ``how`` goes to ``run_all``."""
    frame = run_all(planned["run"].tolist(), **how)
    return planned.assign(result=frame["result"].to_numpy())


def estimates(measured: pd.DataFrame, by=("method", "nfe")) -> pd.DataFrame:
    """Means over training seeds: columns ``by``, value, low, high, half and the Estimate itself."""
    rows = []
    for key, group in measured.groupby(list(by), sort=False, dropna=False):
        found = estimate(group["result"].tolist())
        low, high = found.interval
        rows.append(
            dict(zip(by, key, strict=True))
            | {
                "value": found.value,
                "low": low,
                "high": high,
                "half": (high - low) / 2,
                "estimate": found,
            }
        )
    return pd.DataFrame(rows)


def limits(dataset: str, n_samples: int, metric: str = "fd", **how) -> str:
    """Sentences for captions: the limit of the model, and the floor where one is known."""
    limit = run(plans.limit_run(dataset, n_samples, metric), **how)
    text = (
        f"EDM with {limit.run.nfe} NFE, all but the solution of the ODE, reaches "
        f"{limit.value:.3g}: the limit of the model."
    )
    if describe(dataset).floor:
        floor = run(plans.floor_runs(dataset)[metric], **how)
        if "images" in floor.curves:
            n = floor.curves["images"][0]
            return f"{text} Floor, {n:,} real images that are not among those: {floor.value:.3g}."
        n = floor.curves["images per half"][0]
        text += (
            f" Floor, {n} real images against as many others: {floor.value:.3g} (fewer images make "
            "it larger, so it does not compare with the table)."
        )
    return text


def how_they_compare(dataset: str) -> str:
    """A sentence for captions: what our distance and the paper's have to do with each other."""
    if describe(dataset).feature_distance_name == "FID":
        return "Both are FID: values compare."
    return "That is another distance: compare the order, not the values."


def mean_curve(results, name: str) -> dict:
    """The curves of one method's results, with ``name`` averaged over its training seeds."""
    results = list(results)
    mean = np.mean([result.curves[name] for result in results], axis=0)
    return results[0].curves | {name: mean.tolist()}


def learned_r_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Learned r: rows method and NFE, columns steps; mean over seeds (largest sd over samples)."""
    rows = {}
    for (method, nfe), group in measured.groupby(["method", "nfe"], sort=False):
        curves = [result.curves for result in group["result"]]
        means = np.mean([c["r"] for c in curves], axis=0)
        spreads = np.max([c["r_sd"] for c in curves], axis=0)
        rows[method, f"NFE {nfe}"] = {
            f"step {i}": f"{mean:.3f} ({spread:.3f})"
            for i, (mean, spread) in enumerate(zip(means, spreads, strict=True), 1)
        }
    return pd.DataFrame(rows).T.fillna("–")


def paper_values(table: str, dataset: str) -> pd.DataFrame:
    """The paper's numbers for our rows of a table: columns method, nfe, paper."""
    frame = plans.published(table)
    frame = frame[frame["dataset"] == dataset]
    # "AMED-Plugin (iPNDM)" says what the plugin is on; `Entry.plugin` knows.
    frame = frame.assign(
        method=frame["method"].str.replace(r"^AMED-Plugin .*", "AMED-Plugin", regex=True)
    )
    return frame.rename(columns={"value": "paper"})[["method", "nfe", "paper"]]


def by_training_seed(
    dataset: str, method: str, nfe: int, seeds=plans.SEEDS, n_samples: int = 5000, **how
) -> pd.DataFrame:
    """One method at one NFE, a row per training seed: quality, r and final loss of every step."""
    columns = {}
    for metric, n in (("fd", n_samples), ("endpoint_error", n_samples), ("learned_r", 1000)):
        planned = plans.table2(dataset, [method], [nfe], seeds, n, metric=metric)
        columns[metric] = measure(planned, **how)["result"]
    rows = {}
    for i, seed in enumerate(seeds):
        curves = columns["learned_r"][i].curves
        rows[f"seed {seed}"] = {
            ("final", "FD"): columns["fd"][i].value,
            ("final", "endpoint error"): columns["endpoint_error"][i].value,
            **{("learned r", f"step {n}"): r for n, r in enumerate(curves["r"], 1)},
            **{("loss", f"step {n}"): loss for n, loss in enumerate(curves["loss"], 1)},
        }
    return pd.DataFrame(rows).T


def against_baseline(measured: pd.DataFrame, baseline: str) -> dict[str, Estimate]:
    """Paired difference of every variant to a baseline, by variant; columns variant, result."""
    results = {key: group["result"].tolist() for key, group in measured.groupby("variant")}
    return {
        key: difference(results[key], results[baseline])
        for key in measured["variant"].unique()
        if key != baseline
    }


def costs_of_choice(measured: pd.DataFrame, results_dir) -> pd.DataFrame:
    """Table 3's other half: what it costs to find r, and how much r varies between samples.

    Args:
        measured: of ``plans.table(3)``.

    Returns:
        A row per strategy; minutes of one search or training, the paper's minutes, and the largest
        standard deviation of r over a batch among the steps (last batch of training), per NFE.
    """
    theirs = plans.published("table3")
    theirs = theirs[theirs["unit"] == "min"].set_index(["strategy", "nfe"])["value"]
    rows = []
    for (strategy, nfe), group in measured.groupby(["strategy", "nfe"], sort=False):
        what = group["result"].iloc[0].run
        if what.r == "searched":
            seconds, spread = load_result(what.search(), results_dir).seconds, np.nan
        else:
            tensors, metadata = load_tensors(predictor_path(what, results_dir))
            seconds, spread = (
                float(metadata.get("seconds", "nan")),
                tensors["log"][-1, :, 2].max().item(),
            )
        row = {"minutes": seconds / 60, "paper's minutes": theirs[strategy, nfe], "sd of r": spread}
        rows.append({"strategy": strategy, "NFE": nfe} | row)
    return pd.DataFrame(rows).pivot(index="strategy", columns="NFE")


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


def headline(ours: pd.DataFrame, judged: pd.DataFrame, nfe: int = 5) -> dict[str, str]:
    """Numbers for the book's first page: quality at one NFE, counts of corrected verdicts."""
    numbers = {
        f"table2_{row.method}": with_interval(row.value, row.half)
        for row in ours[ours["nfe"] == nfe].itertuples()
    }
    for claim, group in judged.groupby("id"):
        counts = group["verdict"].value_counts()
        numbers[f"table2_{claim}_holds"] = str(counts.get("holds", 0))
        numbers[f"table2_{claim}_fails"] = str(counts.get("does not hold", 0))
        numbers[f"table2_{claim}_all"] = str(len(group))
    return numbers


def with_interval(value: float, half: float) -> str:
    """A number with its 95 % half width, to two digits of the latter: ``12.3 ± 1.2``."""
    if not half > 0:
        return f"{value:.4g}".replace("-", "−")
    digits = max(0, 1 - int(np.floor(np.log10(half))))
    return f"{value:.{digits}f} ± {half:.{digits}f}".replace("-", "−")
