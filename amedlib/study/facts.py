"""Claims that are no comparison of two cells of a table: how each is tested."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from amedlib.datasets.entries import describe
from amedlib.metrics import jackknife_error
from amedlib.schedules import make_schedule
from amedlib.study import audit, plans
from amedlib.study.corruptions import ordered_below
from amedlib.study.costs import costs_of_choice
from amedlib.study.published import published
from amedlib.study.theory import paper_a, scaled_logistic
from amedlib.study.uncertainty import Estimate
from amedlib.training import Training


def _exact(value: float) -> Estimate:
    """A difference that has no sampling error."""
    return Estimate(float(value), 0.0, None, 1, 0)


# Of a test that would be passed without what it tests.
NO_POWER = Estimate(np.nan, 0.0, None, 1, 0)


def _fact(true: bool) -> Estimate:
    return _exact(-1.0 if true else 1.0)


def _measured(cells: pd.DataFrame) -> list[dict]:
    return [row for row in cells.to_dict("records") if row["results"]]


def _degradation(cells, results_dir):
    """FID at the least NFE over that at the most: of single-step solvers above multistep ones.

    Where both are beyond noise at the least NFE (``corruptions.ordered_below``) it has no power.
    """

    def growth(method):
        few, many = (rows[method, nfe][0] for nfe in ends)
        ratio = np.array([few.value, *few.replicates]) / [many.value, *many.replicates]
        return ratio

    rows = {(row["method"], row["nfe"]): row["results"] for row in _measured(cells)}
    ends = min(cells["nfe"]), max(cells["nfe"])
    found = []
    for single in ("DPM-Solver-2", "EDM"):
        for multi in ("DPM-Solver++(3M)", "UniPC", "iPNDM"):
            if all((method, nfe) in rows for method in (single, multi) for nfe in ends):
                value, *replicates = growth(multi) - growth(single)
                few = [rows[name, ends[0]][0] for name in (single, multi)]
                each = Estimate(value, jackknife_error(replicates), None, 1, few[0].run.samples)
                if min(result.value for result in few) > ordered_below(few[0].run):
                    each = NO_POWER
                found.append((f"growth of {multi}", f"of {single}", np.nan, each))
    return found


def _plane_variance(cells, results_dir):
    """Two components explain more than 99 % of the variance along a trajectory.

    Where one does so alone a line would pass, and the test has no power.
    """
    found = []
    for row in _measured(cells):
        curves, n = row["results"][0].curves, row["results"][0].run.samples
        one, share = curves["cumulative_variance"][:2]
        each = Estimate(0.99 - share, curves["cumulative_variance_sd"][1] / np.sqrt(n), None, 1, n)
        what = "share of two components"
        if one > 0.99:
            each, what = NO_POWER, f"{what}; one alone has {100 * one:.5g} %"
        found.append(("99 %", what, np.nan, each))
    return found


def _plane_bound(cells, results_dir):
    """The distance from the plane is below f(t) of Eq. 16, at the t where it exceeds it most."""
    found = []
    for row in _measured(cells):
        result = row["results"][0]
        curves, n = result.curves, result.run.samples
        t, a = np.array(curves["t"]), paper_a(describe(result.run.dataset).shape)
        excess = np.array(curves["deviation"]) - scaled_logistic(t, a)
        worst = int(excess.argmax())
        error = curves["deviation_sd"][worst] / np.sqrt(n)
        each = Estimate(float(excess[worst]), error, None, 1, n)
        found.append(("distance from the plane", f"f(t) at t = {t[worst]:.3g}", np.nan, each))
    return found


def _alignment(cells, results_dir):
    """Of every solver: the searched r ends most steps nearer to the solution than r = 0.5."""
    found = []
    for row in _measured(cells):
        curves = row["results"][0].curves
        nearer = np.less(curves["searched"], curves["baseline"])
        share = f"share of {row['name']}'s {len(nearer)} steps that end nearer"
        found.append(("half", share, np.nan, _exact(0.5 - nearer.mean())))
    return found


def _of_two_stage(cells, statistic):
    curves = {row["method"]: row["results"][0].curves for row in _measured(cells)}
    names = ("AMED-Solver", "DPM-Solver-2")
    if not all(name in curves for name in names):
        return []
    return [(*names, np.nan, _exact(np.subtract(*(statistic(curves[name]) for name in names))))]


def _end_alignment(cells, results_dir):
    """Distance to the solution at the end, with searched r: AMED-Solver, DPM-Solver-2."""
    return _of_two_stage(cells, lambda curves: curves["searched"][-1])


def _stable_r(cells, results_dir):
    """Standard deviation over the steps of the searched r: AMED-Solver, DPM-Solver-2."""
    return _of_two_stage(cells, lambda curves: np.std(curves["r"]))


def _spread_of_r(cells, results_dir):
    """The standard deviation of r between samples is below a tenth of r, at every step."""
    found = []
    for row in _measured(cells):
        if row["method"] != "AMED-Solver":
            continue
        ratios = [np.max(np.divide(r.curves["r_sd"], r.curves["r"])) for r in row["results"]]
        n, seeds = row["results"][0].run.samples, len(ratios)
        sampling = np.mean(ratios) / np.sqrt(2 * (n - 1))  # of a normal standard deviation
        training = np.std(ratios, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
        each = Estimate(float(np.mean(ratios)) - 0.1, sampling, training, seeds, n)
        found.append(("sd / mean of r", "0.1", row["nfe"], each))
    return found


def _minutes(cells, results_dir):
    measured = cells.explode("results").rename(columns={"results": "result"})
    measured = measured.dropna(subset="result")
    if measured.empty:
        return {}
    costs = costs_of_choice(measured, results_dir)["minutes"]
    return {(strategy, nfe): row[nfe] for strategy, row in costs.iterrows() for nfe in costs}


def _search_minutes(cells, results_dir):
    """Minutes to learn r against those to search it."""
    minutes = _minutes(cells, results_dir)
    return [
        (strategy.replace("_", " "), "grid search", nfe, _exact(value - searched))
        for (strategy, nfe), value in minutes.items()
        for searched in [minutes.get(("grid_search", nfe), np.nan)]
        if strategy != "grid_search" and np.isfinite(value - searched)
    ]


def _training_minutes(cells, results_dir):
    """Training takes 20 minutes at most."""
    return [
        ("minutes of training", "20", nfe, _exact(value - 20))
        for (strategy, nfe), value in _minutes(cells, results_dir).items()
        if strategy == "sample_wise" and np.isfinite(value)
    ]


def _overhead(cells, results_dir):
    """The predictor adds less than 5 % of the time of sampling; from the benchmarks."""
    path = Path(results_dir) / "benchmarks.json"
    if not path.is_file():
        return []
    timed = pd.DataFrame(json.loads(path.read_text())["sampling"])
    share = "outside the network, %"
    shares = timed.pivot_table(index="solver", columns="intermediate", values=share)
    return [
        (f"predictor on {solver}, % of time", "5", np.nan, _exact(added - 5))
        for solver, added in (shares["predictor"] - shares["none"]).dropna().items()
    ]


def _counted(cells, results_dir):
    """Every method makes as many evaluations as are asked for, those with a learned step too."""
    return [
        (row["name"], "evaluations asked for", row["nfe"], _fact(found == {row["nfe"]}))
        for row in _measured(cells)
        for found in [{result.nfe for result in row["results"]}]
    ]


def _limit_of_schedules(cells, results_dir):
    """The distance of the polynomial schedule to logSNR falls as 1 / rho."""
    logsnr = make_schedule("logsnr", 6)
    far = {
        rho: float((make_schedule("polynomial", 6, rho=rho) / logsnr - 1).abs().max())
        for rho in (1e2, 1e3, 1e4)
    }
    return [
        (f"10 × distance at rho = {10 * rho:g}", f"1.1 × at {rho:g}", np.nan, _exact(each))
        for rho in (1e2, 1e3)
        for each in [10 * far[10 * rho] - 1.1 * far[rho]]
    ]


def _first_interval(cells, results_dir):
    """The first interval of sampling is longer on logSNR than on the other schedules."""
    found = []
    for points in range(4, 11):
        first = {
            name: float(times[0] - times[1])
            for name in plans.SCHEDULES
            for times in [make_schedule(name, points)]
        }
        for other in ("polynomial", "time_uniform"):
            each = _exact(first[other] - first["logsnr"])
            found.append((f"{other.replace('_', ' ')}, N = {points}", "logsnr", np.nan, each))
    return found


def _headline_rows(cells, results_dir):
    """At five evaluations AMED-Plugin is the paper's best on the data sets of its abstract."""
    frame = published("table2")
    named = frame["dataset"].isin(("cifar10", "imagenet64", "lsun_bedroom"))
    frame = frame[(frame["nfe"] == 5) & named]
    best = frame.loc[frame.groupby("dataset")["value"].idxmin()]
    return [
        (row.method, f"best of {row.dataset}", 5, _fact(row.method == "AMED-Plugin (iPNDM)"))
        for row in best.itertuples()
    ]


def _one_teacher(cells, results_dir):
    """AMED-Solver's numbers of Table 2 are those of one teacher of Table 4, DPM-Solver-2."""
    found = audit.best_of_ablation(audit.cells()).query("table == 2 and ablation == 4")
    return [
        (f"teacher {row.choice}", "DPM-Solver-2", row.nfe, _fact(row.choice == "DPM-Solver-2"))
        for row in found[found["choice"] != ""].itertuples()
    ]


def _teacher_evaluations(cells, results_dir):
    """A teacher makes more evaluations than its student: with M = 1 and 2, with AFS and without."""
    found = []
    for method in (plans.METHODS[name] for name in ("DPM-Solver++(3M)", "iPNDM", "AMED-Solver")):
        for m, afs in product((1, 2), (True, False)):
            config = Training(method.solver, method.options, num_steps=4, afs=afs, m=m)
            calls = 2 if config.teacher_solver().single_step else 1
            student = 2 * (config.num_steps - 1) - afs
            teacher = calls * (len(config.teacher_times()) - 1)
            name = f"student {method.solver}" + ", AFS" * afs
            found.append((name, f"teacher, M = {m}", student, _fact(student < teacher)))
    return found


def _printed_twice(cells, results_dir):
    """Numbers that the paper prints in two tables for one experiment are equal."""
    return [
        (
            f"{row.dataset}, {row.row}, Table {row.table_a}",
            f"Table {row.table_b}",
            row.nfe,
            _fact(row.difference == 0),
        )
        for row in audit.repeated_cells(audit.cells()).itertuples()
    ]


# Tests that make one comparison of every cell, measured or not.
PER_CELL = ("counted", "alignment", "plane_variance", "plane_bound")

# Each function takes the cells of its source and the folder of results, and returns comparisons:
# what is better, what is worse, NFE, and the Estimate of a difference that is claimed to be
# negative.
TESTS = {
    "degradation": _degradation,
    "plane_variance": _plane_variance,
    "plane_bound": _plane_bound,
    "alignment": _alignment,
    "end_alignment": _end_alignment,
    "stable_r": _stable_r,
    "spread_of_r": _spread_of_r,
    "search_minutes": _search_minutes,
    "training_minutes": _training_minutes,
    "overhead": _overhead,
    "counted": _counted,
    "limit_of_schedules": _limit_of_schedules,
    "first_interval": _first_interval,
    "headline_rows": _headline_rows,
    "one_teacher": _one_teacher,
    "teacher_evaluations": _teacher_evaluations,
    "printed_twice": _printed_twice,
}
