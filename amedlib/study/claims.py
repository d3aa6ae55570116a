"""The paper's claims against measured results: comparisons, verdicts, the ledger."""

from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import pandas as pd

from amedlib.datasets.entries import DATASETS, Entry, describe
from amedlib.datasets.files import DATA
from amedlib.study import plans
from amedlib.study.corruptions import ordered_below
from amedlib.study.facts import PER_CELL, TESTS
from amedlib.study.noise import can_be_checked, doubt, pooled_noise, training_noise
from amedlib.study.published import published
from amedlib.study.run import Result
from amedlib.study.sentences import gap, pairs
from amedlib.study.store import RESULTS, load_result
from amedlib.study.uncertainty import Estimate, difference, estimate, with_interval

# --- verdicts -----------------------------------------------------------------------------------

PRINTED = [f"table{number}" for number in range(2, 14)]
# A printed number counts as reached within this part of it.
WITHIN = 0.05


@lru_cache
def claims() -> pd.DataFrame:
    """What the paper claims, a row per claim; ``data/paper/claims.csv``.

    Columns: id; kind; source (tables and figures whose runs test it); place, sentence, note;
    datasets and nfe that it is about (separated by spaces; no nfe: all); and the test. That is
    either ``test``, the name of a function, or a comparison: ``better`` and ``worse`` are pandas
    queries over the columns of the plan, of which ``better_pick`` and ``worse_pick`` keep the
    best or the worst; ``same`` lists expressions over the columns in which both must agree; and
    better - ``factor`` x worse is claimed to be below ``limit``. Without ``worse`` that is a bound,
    and in a claim of the kind "value" the limit is what the paper prints. ``universal``: "yes"
    where the claim is of every comparison ("every solver", "the best of all").
    """
    frame = pd.read_csv(DATA / "paper" / "claims.csv", dtype={"nfe": str})
    text = frame.select_dtypes(exclude="number").columns
    return frame.fillna(dict.fromkeys(text, "") | {"factor": 1.0, "limit": 0.0})


def _measured_on(source: str, dataset: str) -> Entry:
    """What a table is run on: a data set, or for Table 13 the same with guidance."""
    guided = f"{dataset}_guidance_2"  # one of its scales
    return describe(guided if source == "table13" and guided in DATASETS else dataset)


def _is_about(claim: dict, source: str, dataset: str) -> bool:
    """Whether a data set can test a claim: digits stand for CIFAR-10, but not for its FID."""
    name = dataset if claim["kind"] == "value" else _measured_on(source, dataset).paper
    return not claim["datasets"] or name in claim["datasets"].split()


def stored(planned: pd.DataFrame, results_dir=RESULTS) -> pd.DataFrame:
    """A plan with what the store holds: ``result`` is ``None`` where it holds none."""
    results = [load_result(what, results_dir) for what in planned["run"]]
    return planned.assign(result=pd.Series(results, planned.index, dtype=object))


def stored_tables(dataset: str, metric: str, results_dir=RESULTS) -> dict[str, pd.DataFrame]:
    """What the store holds of Tables 2 to 9, whose trainings say how much trainings differ."""
    planned = {name: _planned(name, dataset, metric) for name in PRINTED[:8]}
    return {name: stored(p, results_dir) for name, p in planned.items() if p is not None}


def known_noise(
    dataset: str, tables: dict[str, pd.DataFrame], metric: str, results_dir=RESULTS
) -> pd.DataFrame:
    """``training_noise`` of ``stored_tables``; with the digits' where its own cannot be checked."""
    noise = training_noise(tables.values())
    if dataset != "digits" and not can_be_checked(noise):
        digits = training_noise(stored_tables("digits", metric, results_dir).values())
        noise = digits if noise.empty else pd.concat([noise, digits], ignore_index=True)
    return noise


def holm(p_values) -> np.ndarray:
    """P values adjusted for their number by Holm's step-down method (1979); NaN does not count."""
    p = np.asarray(p_values, dtype=np.float64)
    factors = np.arange(np.isfinite(p).sum(), 0, -1)
    order = np.argsort(p, kind="stable")[: len(factors)]  # NaN comes last
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted


def verdict(difference: float, p_value: float) -> str:
    """Whether a difference that is claimed to be negative is so, at the 5 % level.

    Of a test without power (``facts.NO_POWER``) there is no difference to judge.
    """
    if np.isnan(difference):
        return "no power"
    if p_value >= 0.05:
        return "undecided"
    return "holds" if difference < 0 else "does not hold"


def overall(verdicts, made: int | None = None, universal: bool = False) -> str:
    """One word for many comparisons.

    *holds* if more than half of them hold and none fails, *does not hold* if more than half fail
    and none holds, *mixed* if some hold and some fail, *not run* if there are none, else
    *undecided*. A universal claim holds only if all do, and does not if one fails; where none
    fails but some were not run, it is *partly tested*. It has *no power* if none of its tests has.

    Args:
        made: how many comparisons the claim makes, run or not; all were run unless given.
    """
    verdicts = list(verdicts)
    holds, fails = verdicts.count("holds"), verdicts.count("does not hold")
    made = len(verdicts) if made is None else made
    if not verdicts:
        return "not run"
    if set(verdicts) == {"no power"}:
        return "no power"
    if universal and fails:
        return "does not hold"
    if holds and fails:
        return "mixed"
    if universal and made > len(verdicts):
        return "partly tested"
    if universal and holds == made:
        return "holds"
    if not universal and 2 * max(holds, fails) > len(verdicts):
        return "holds" if holds else "does not hold"
    return "undecided"


_TELLING = "method loss strategy teacher r M schedule guidance afs amed".split()


def _names(cells: pd.DataFrame) -> list[str]:
    """What cells are called: by the fewest columns that tell them apart, apart from the NFE."""
    columns, groups = ["method"], cells["method"].nunique()
    for column in _TELLING[1:]:
        if column in cells and len(cells[[*columns, column]].drop_duplicates()) > groups:
            columns.append(column)
            groups = len(cells[columns].drop_duplicates())
    if len(columns) > 1 and cells["method"].nunique() == 1:
        columns = columns[1:]
    words = {"r": "r = {:g}", "M": "M = {:g}", "guidance": "guidance {:g}"}
    flags = {"afs": "AFS", "amed": "AMED"}
    names = []
    for row, method in zip(cells[columns].to_dict("records"), cells["method"], strict=True):
        parts = [
            flags[name] if name in flags else words.get(name, "{}").format(value)
            for name, value in row.items()
            if pd.notna(value) and value is not False
        ]
        names.append(", ".join(parts).replace("_", " ") or method)
    return names


def _trainings(results, results_dir) -> list[Result]:
    """The results of one cell; of what was trained once, those of other stored seeds besides."""
    found = list({result.run.key: result for result in results if result is not None}.values())
    if len(found) == 1 and found[0].run.predictor is not None:
        what = found[0].run
        seeds = [what.predictor | {"seed": n} for n in plans.SEEDS + plans.MORE_SEEDS]
        more = (load_result(replace(what, predictor=each), results_dir) for each in seeds)
        found = [result for result in more if result is not None] or found
    return found


def every_training(measured: pd.DataFrame, results_dir=RESULTS) -> pd.DataFrame:
    """Measured rows, and those of other seeds where a cell was trained once and more are stored.

    So a table shows the numbers that its claims are judged by.
    """
    keys, rows = [name for name in measured if name not in ("run", "result")], []
    for _, group in measured.groupby(keys, sort=False, dropna=False):
        same = group.iloc[0].to_dict()
        found = _trainings(group["result"], results_dir)
        rows += [same | {"run": result.run, "result": result} for result in found]
    return pd.DataFrame(rows, columns=measured.columns)


def _cells(measured: pd.DataFrame, results_dir) -> pd.DataFrame:
    """A row per cell of a table: its columns, name, results over training seeds, mean value.

    Where a table is run with one seed, but others are in the store for another table, all count. A
    result that the table has twice counts once.
    """
    keys = [name for name in measured if name not in ("run", "result", "paper")]
    rows = []
    for key, group in measured.groupby(keys, sort=False, dropna=False):
        results = _trainings(group["result"], results_dir)
        value = np.mean([result.value for result in results]) if results else np.nan
        rows.append(dict(zip(keys, key, strict=True)) | {"results": results, "value": value})
    cells = pd.DataFrame(rows)
    return cells.assign(name=_names(cells))


def printed(source: str, claim: dict) -> list[float]:
    """The differences of a claim in one of the paper's tables, less what they should be below."""
    frame = published(source)
    frame = frame[(frame["unit"] == "FID") & frame["dataset"].isin(claim["datasets"].split())]
    if source == "table2":  # where it says in brackets what the plugin is on
        frame = frame.assign(method=frame["method"].str.replace(r" \(.*\)$", "", regex=True))
    found = []
    for _, cells in frame.groupby("dataset", sort=False):
        found += [gap(*pair, claim["factor"]) for pair in pairs(cells, claim)]
    return found


def _limit(claim: dict, source: str, dataset: str) -> float:
    """What a claim's difference should be below; in a claim of the kind "value" near the print."""
    if claim["kind"] != "value":
        return claim["limit"]
    (value,) = printed(source, claim | {"datasets": dataset})
    return value + WITHIN * abs(value)


def judge(source: str, measured: pd.DataFrame, results_dir=RESULTS, noise=None) -> pd.DataFrame:
    """The claims about a table or figure against measured results.

    Args:
        measured: of the plan of ``source``; from ``measure`` or ``stored``.
        results_dir: where other trainings are looked up for predictors that were trained once.
        noise: of ``known_noise``; found there unless given.

    Returns:
        A row per comparison that was measured: the claim's columns with the names of what is
        ``better`` and ``worse`` and one ``nfe``; ``difference`` (claimed to be negative), low, high
        (95 % interval), p_value, ``uncorrected`` (the verdict of that interval alone), p_holm,
        ``verdict`` (corrected for the number of rows by Holm's method), ``pooled`` (whether the
        noise of training is that of other predictors), ``made`` (how many comparisons the claim
        makes, run or not). Claims about other data are left out, and so
        are those of the kind "setting", which the ledger tests.
    """
    results = [result for result in measured["result"] if result is not None]
    rows = []
    if results:
        first, cells = results[0].run, _cells(measured, results_dir)
        once = any(len(some) == 1 and some[0].run.predictor for some in cells["results"])
        if once and noise is None:
            tables = stored_tables(first.dataset, first.metric, results_dir)
            noise = known_noise(first.dataset, tables, first.metric, results_dir)
        pooled = partial(pooled_noise, noise) if once else None
        for claim in claims().to_dict("records"):
            if (
                source in claim["source"].split()
                and claim["kind"] != "setting"
                and _is_about(claim, source, first.dataset)
            ):
                found = _judged(claim, source, cells, pooled, results_dir)
                made = _made(claim, source, first.dataset, cells, found)
                rows += [row | {"made": made} for row in found]
    return _decided(rows)


def _made(claim: dict, source: str, dataset: str, cells, found) -> int:
    """How many comparisons a claim makes, run or not: as many as in print, or as its cells give."""
    if claim["test"] in PER_CELL:
        return len(cells)
    if claim["test"]:
        return len(found)
    if source in PRINTED:
        return len(printed(source, claim | {"datasets": _measured_on(source, dataset).paper}))
    return len(pairs(cells.assign(value=0.0), claim))


def _decided(rows: list[dict]) -> pd.DataFrame:
    """Comparisons with their verdicts, corrected for the number of them."""
    columns = [*claims().columns, "difference", "low", "high", "p_value", "pooled", "powerless"]
    columns.append("made")
    judged = pd.DataFrame(rows, columns=columns)
    # What two claims compare alike is one hypothesis.
    alike = judged.groupby(["better", "worse", "nfe", "p_value"], dropna=False, sort=False)
    first = judged[~alike.cumcount().astype(bool)].index
    judged["p_holm"] = holm(judged.loc[first, "p_value"])[alike.ngroup()]
    for name, p in (("uncorrected", "p_value"), ("verdict", "p_holm")):
        words = map(verdict, judged["difference"], judged[p])
        judged[name] = judged["powerless"].map({True: "no power"}).fillna(pd.Series([*words]))
    return judged


def _judged(claim, source, cells, noise, results_dir) -> list[dict]:
    """The comparisons of one claim, as rows."""
    if claim["test"]:
        found = TESTS[claim["test"]](cells, results_dir)
        return [_comparison(claim, *each) for each in found]
    rows = []
    for better, worse in pairs(cells, claim):
        if not better["results"] or (worse and not worse["results"]):
            continue
        limit = _limit(claim, source, better["results"][0].run.dataset)
        if worse is None:
            found, other = estimate(better["results"], noise), f"{limit:.3g}"
        else:
            found = difference(better["results"], worse["results"], claim["factor"], noise)
            times = "" if claim["factor"] == 1 else f"{claim['factor']:g} × "
            other = times + worse["name"] + (f" − {limit:.3g}" if limit else "")
        found = replace(found, value=found.value - limit)
        row = _comparison(claim, better["name"], other, better["nfe"], found)
        if worse and _powerless(found, better, worse, claim["factor"]):
            row["powerless"] = True
        rows.append(row)
    return rows


def _powerless(found: Estimate, better: dict, worse: dict, factor: float) -> bool:
    """Whether no pair of such distances could be told apart, or what is told means nothing.

    They count for Holm's correction all the same. A distance is not below 0, so a difference is at
    most the larger of the two, and borrowed noise of training can be wider than that. And FD does
    not order what is farther from the data than noise of the data's mean and covariance
    (``corruptions.ordered_below``).
    """
    low, high = found.interval
    several = better["value"], factor * worse["value"]
    lost = min(better["value"], worse["value"]) > ordered_below(better["results"][0].run)
    return lost or (found.pooled is not None and (high - low) / 2 > max(several))


def _comparison(claim: dict, better: str, worse: str, nfe, found: Estimate) -> dict:
    low, high = found.interval
    return claim | {
        "better": better,
        "worse": worse,
        "nfe": nfe,
        "difference": found.value,
        "low": low,
        "high": high,
        "p_value": np.nan if np.isnan(found.value) else found.p_value,
        "pooled": found.pooled is not None,
        "powerless": bool(np.isnan(found.value)),
    }


# --- the ledger -----------------------------------------------------------------------------------

FIRST = "fd"  # the measure that verdicts are by, as the paper's are


def measures(dataset: str) -> list[str]:
    """By what claims are judged on a data set: ``FIRST``, then what else is measured there."""
    return list(dict.fromkeys([FIRST, *describe(dataset).metrics]))


def _source(claim: dict, dataset: str) -> str:
    """Of a claim's tables the one that the paper prints for a data set, else the first."""
    sources = claim["source"].split()
    for name in sources:
        if name in PRINTED and _measured_on(name, dataset).paper in set(published(name)["dataset"]):
            return name
    return sources[0]


def _can_run(source: str, dataset: str, metric: str) -> bool:
    """Whether a data set has what a table or figure measures."""
    guided = source != "table13" or f"{dataset}_guidance_2" in DATASETS
    return guided and metric in _measured_on(source, dataset).metrics


def _planned(source: str, dataset: str, metric: str) -> pd.DataFrame | None:
    """The plan of a table or figure; ``None`` where there is none for this metric."""
    if not _can_run(source, dataset, metric):
        return None
    if source in ("table2", "figure8"):
        return getattr(plans, source)(dataset, metric=metric)
    if source in PRINTED:
        return plans.table(int(source.removeprefix("table")), dataset, metric=metric)
    own = {name: name for name in ("table1", "figure4", "figure5", "figure7")}
    own["figure10"] = "figure4"  # the same trajectories
    own["centring"] = "slope_angle"
    if source in own and metric == FIRST:
        return getattr(plans, own[source])(dataset)
    return None


def in_print(claim: dict) -> str:
    """What the paper's own tables say of a claim: in how many of its comparisons it holds."""
    sources = [name for name in claim["source"].split() if name in PRINTED]
    if claim["source"].startswith("figure"):
        return "figure"
    if claim["test"] or not claim["better"] or not sources:
        return "–"
    found = np.array([value for source in sources for value in printed(source, claim)])
    if claim["kind"] == "value":
        return ", ".join(f"{value:.4g}" for value in np.abs(found))
    ties = int((found == claim["limit"]).sum())
    text = f"{int((found < claim['limit']).sum())} of {len(found)}"
    return text + (f", {ties} as good" if ties else "")


def _representative(found: pd.DataFrame) -> str:
    """The least favourable comparison among those nearest five evaluations."""
    if found["difference"].isna().all():
        return " − ".join(found.iloc[0][["better", "worse"]])
    away = (found["nfe"] - 5).abs()
    row = found[away.isna() | (away == away.min())].nlargest(1, "difference").iloc[0]
    half = (row["high"] - row["low"]) / 2
    at = f" at NFE {row['nfe']:.0f}" if pd.notna(row["nfe"]) else ""
    mark = doubt(row)
    return f"{row['better']} − {row['worse']}{at}: {with_interval(row['difference'], half)}{mark}"


COUNTED = {
    "holds": "holds",
    "fails": "does not hold",
    "undecided": "undecided",
    "powerless": "no power",
}


def counted(verdicts) -> dict[str, int]:
    """How many comparisons have each verdict, by the names of ``COUNTED``."""
    return {name: list(verdicts).count(word) for name, word in COUNTED.items()}


def _outcome(claim: dict, found: pd.DataFrame, made: int) -> dict:
    shown = not found.empty and claim["kind"] != "setting"
    how = made, claim["universal"] == "yes"
    return counted(found["verdict"]) | {
        "verdict": overall(found["verdict"], *how),
        "uncorrected": overall(found["uncorrected"], *how),
        "made": made,
        "example": _representative(found) if shown else "",
    }


def ledger(dataset: str = "digits", results_dir=RESULTS) -> pd.DataFrame:
    """Every claim of the paper with what the stored results of a data set say. Computes no Run.

    Returns:
        A row per claim: id, kind, place, sentence, note; source (its table or figure here);
        ``in_print`` (what the paper's tables say); and for each of ``measures`` a dict:
        verdict (``overall``, after Holm), uncorrected, the numbers of comparisons that hold, fail,
        are undecided, have no power, and are made in all, run or not, and an example.
        Without a test, or without results, the verdict is "not run".
    """
    tables = {metric: stored_tables(dataset, metric, results_dir) for metric in measures(dataset)}
    noise = {m: known_noise(dataset, frames, m, results_dir) for m, frames in tables.items()}
    known: dict[tuple, tuple] = {}

    def tested(claim, source, metric):
        """The claim's comparisons, and how many it makes in all."""
        of_samples = claim["kind"] in ("quality", "value")
        meant = _is_about(claim, source, dataset) and (metric == FIRST or of_samples)
        if not meant or not _can_run(source, dataset, metric):
            return _decided([]), 0
        if (source, metric) not in known:
            measured = tables[metric].get(source)
            if measured is None and (planned := _planned(source, dataset, metric)) is not None:
                measured = stored(planned, results_dir)
            known[source, metric] = None, None
            if measured is not None:
                judged = judge(source, measured, results_dir, noise[metric])
                known[source, metric] = _cells(measured, results_dir), judged
        cells, judged = known[source, metric]
        if claim["test"] and (cells is None or claim["kind"] == "setting"):
            found = TESTS[claim["test"]](cells, results_dir)
            judged = _decided([_comparison(claim, *each) for each in found])
        if judged is None:
            return _decided([]), 0
        found = judged[judged["id"] == claim["id"]]
        return found, _made(claim, source, dataset, cells, found)

    rows = []
    for claim in claims().to_dict("records"):
        row = claim | {"source": _source(claim, dataset), "in_print": in_print(claim)}
        for metric in tables:
            row[metric] = _outcome(claim, *tested(claim, row["source"], metric))
        rows.append(row)
    return pd.DataFrame(rows)


def page_of(source: str) -> str:
    """The notebook that shows a table or figure of the paper."""
    return "not_run" if source in ("table11", "table12") else source


def to_run(dataset: str) -> pd.DataFrame:
    """What would test the claims on the paper's other data sets.

    Returns:
        A row per data set and notebook: data set, command, claims (their ids).
    """
    tests = [
        {"data set": name, "source": _source(claim, name), "claims": claim["id"]}
        for claim in claims().to_dict("records")
        for name in claim["datasets"].split()
        if name != dataset and (claim["better"] or claim["test"])
    ]
    frame = pd.DataFrame(tests).groupby(["data set", "source"])["claims"].agg(", ".join)
    frame = frame.reset_index()
    command = "papermill notebooks/{}.ipynb out.ipynb --stderr-file - -p dataset {} -p device cuda"
    pages = frame["source"].map(page_of)
    frame["command"] = list(map(command.format, pages, frame["data set"]))
    return frame[["data set", "command", "claims"]]
