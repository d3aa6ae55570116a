"""The paper's tables: its numbers, the Runs that measure ours, and the comparison of both."""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pandas as pd

from amedlib.checks import one_of, require
from amedlib.datasets import DATA, describe
from amedlib.study import Estimate, Run, difference, estimate, run_all

SEEDS = (0, 1, 2)


@lru_cache
def published(table: str) -> pd.DataFrame:
    """The paper's numbers of one table, tidy; from ``data/paper``.

    Raises:
        ValueError: no such table has been transcribed.
    """
    one_of("table", table, sorted(p.stem for p in (DATA / "paper").glob("table*.csv")))
    return pd.read_csv(DATA / "paper" / f"{table}.csv", dtype={"table": str})


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        solver, options: as in ``make_solver``.
        schedule: the one that the paper uses for it.
        afs: whether the paper uses AFS for it in Table 2.
        learned: whether an intermediate step is learned.
        predictor: fields of ``Training`` that this row sets.
    """

    solver: str
    options: dict = field(default_factory=dict)
    schedule: str = "polynomial"
    afs: bool = False
    learned: bool = False
    predictor: dict = field(default_factory=dict)


# Table 2, with the settings of Sec. 4.1 and Appendix B: orders, schedules, AFS where NFE is odd.
METHODS = {
    "DPM-Solver++(3M)": Method("dpmpp", {"order": 3}, "logsnr"),
    "UniPC": Method("unipc", {"order": 3}, "logsnr"),
    "iPNDM": Method("ipndm", {"order": 4}),
    "DDIM": Method("euler"),
    "DPM-Solver-2": Method("dpm2", afs=True),
    "EDM": Method("heun", afs=True),
    "AMED-Solver": Method("amed", afs=True, learned=True),
    # M = 2: with M = 1 the teacher makes just the student's number of evaluations (`plugin.ipynb`).
    "AMED-Plugin": Method("ipndm", {"order": 4}, afs=True, learned=True, predictor={"m": 2}),
}
# The first version of the paper, whose tables these are, is the default.
RECIPE = {"recipe": "paper"}
SCHEDULES = ("polynomial", "logsnr", "time_uniform")


def methods(dataset: str) -> dict[str, Method]:
    """The methods of Table 2 with what the paper says of them on a data set.

    There AMED-Plugin may be on another solver, all methods on one schedule, and none with AFS.
    """
    data = describe(dataset)
    base = METHODS[data.plugin]
    plugin = replace(
        METHODS["AMED-Plugin"], solver=base.solver, options=base.options, schedule=base.schedule
    )
    return {
        name: replace(
            method, schedule=data.schedule or method.schedule, afs=method.afs and data.afs
        )
        for name, method in (METHODS | {"AMED-Plugin": plugin}).items()
    }


def _run(dataset, method: Method, nfe, samples, metric="fd", **fields) -> Run:
    """The Run of a method on a data set; ``fields`` go before what method and data set say."""
    data = describe(dataset)
    samples = data.samples if samples is None else samples
    if metric == "endpoint_error":
        samples = min(samples, data.endpoint_samples)
    return Run(
        **{
            "metric": metric,
            "dataset": dataset,
            "solver": method.solver,
            "options": method.options | data.solver_options.get(method.solver, {}),
            "schedule": method.schedule,
            "sigma_min": data.sigma_min,
            "sigma_max": data.sigma_max,
            "noise_levels": data.noise_levels,
            "precision": data.precision,
            "nfe": nfe,
            "samples": samples,
        }
        | fields
    )


def plan_table2(
    dataset: str = "digits",
    names=tuple(METHODS),
    nfes=None,
    seeds=SEEDS,
    n_samples: int | None = None,
    schedule: str | None = None,
    metric: str = "fd",
    **predictor,
) -> pd.DataFrame:
    """The Runs of Table 2: a row per method, NFE and training seed.

    Args:
        names: of methods.
        nfes, n_samples: those of the paper's tables on this data set unless given.
        schedule: for every method; ``None`` gives each the one that the paper uses for it.
        predictor: fields of ``Training`` for all learned methods, such as ``recipe``.

    Returns:
        Columns method, nfe, schedule, run.

    Raises:
        ValueError: an argument is outside its range, or a method cannot have an NFE.
    """
    one_of("schedule", schedule, (None, *SCHEDULES))
    data = describe(dataset)
    nfes = data.nfes if nfes is None else nfes
    require(len(nfes) > 0 and len(seeds) > 0, "nfes and seeds", (nfes, seeds), "not empty")
    rows = []
    for name in names:
        one_of("method", name, METHODS)
        method = methods(dataset)[name]
        for nfe in nfes:
            for seed in seeds if method.learned else [None]:
                learned = RECIPE | data.training | method.predictor | predictor | {"seed": seed}
                what = _run(
                    dataset,
                    method,
                    nfe,
                    n_samples,
                    metric,
                    schedule=schedule or method.schedule,
                    afs=method.afs,
                    predictor=learned if method.learned else None,
                )
                rows.append({"method": name, "nfe": nfe, "schedule": what.schedule, "run": what})
    return pd.DataFrame(rows)


def plan_table1(dataset: str = "digits", seeds=SEEDS, n_samples: int = 1000) -> pd.DataFrame:
    """Local errors of the single-step solvers over five steps; columns method, nfe, run."""
    training = RECIPE | describe(dataset).training
    rows = []
    for name in ("DDIM", "EDM", "DPM-Solver-2", "AMED-Solver"):
        method = methods(dataset)[name]
        nfe = (5 if name == "DDIM" else 10) * describe(dataset).evaluations_per_call
        for seed in seeds if method.learned else [None]:
            learned = training | {"seed": seed} if method.learned else None
            what = _run(dataset, method, nfe, n_samples, "local_error", predictor=learned)
            rows.append({"method": name, "nfe": nfe, "run": what})
    return pd.DataFrame(rows)


def plan_figure4(dataset: str = "digits", n_samples: int = 1000) -> pd.DataFrame:
    """PCA of trajectories of EDM's sampler with 80 NFE; columns method, nfe, run."""
    nfe = 80 * describe(dataset).evaluations_per_call
    what = _run(dataset, METHODS["EDM"], nfe, n_samples, "trajectory_pca")
    return pd.DataFrame([{"method": "EDM", "nfe": nfe, "run": what}])


def plan_figure5(dataset: str = "digits", n_samples: int = 500) -> pd.DataFrame:
    """Greedy grid search on r with N = 6 for every solver; columns method, nfe, run."""
    rows = []
    for name in ("DPM-Solver++(3M)", "UniPC", "iPNDM", "DDIM", "DPM-Solver-2", "AMED-Solver"):
        nfe = 10 * describe(dataset).evaluations_per_call
        fields = {"schedule": "polynomial", "r": 0.5}
        what = _run(dataset, METHODS[name], nfe, n_samples, "grid_search", **fields)
        rows.append({"method": name, "nfe": nfe, "run": what})
    return pd.DataFrame(rows)


def plan_figure7(
    dataset: str = "digits", nfes=None, seeds=SEEDS, n_samples: int = 1000
) -> pd.DataFrame:
    """Learned r per step, of the predictors of Table 2; columns method, nfe, schedule, run."""
    learned = [name for name, method in METHODS.items() if method.learned]
    return plan_table2(dataset, learned, nfes, seeds, n_samples, metric="learned_r")


def plan_centring(nfes=(3, 5, 7), n_samples: int = 5000) -> pd.DataFrame:
    """Solvers with and without AFS, on digits centred or not; columns method, data, nfe, run.

    A two-stage solver's NFE is one less with AFS; a row keeps the number of its time points.
    """
    rows = []
    for name in ("DDIM", "iPNDM", "DPM-Solver++(3M)"):
        for afs in (False, True):
            for dataset, label in (("digits", "centred"), ("digits_uncentred", "not centred")):
                for nfe in nfes:
                    what = _run(dataset, METHODS[name], nfe, n_samples, afs=afs)
                    method = f"{name}, AFS" if afs else name
                    rows.append({"method": method, "data": label, "nfe": nfe, "run": what})
    return pd.DataFrame(rows)


def plan_release(
    dataset: str = "digits",
    nfes=(5,),
    seeds=SEEDS,
    n_samples: int | None = None,
    metric: str = "fd",
) -> pd.DataFrame:
    """The AMED rows of Table 2 as the released code makes them; columns as of ``plan_table2``.

    Its AMED-Solver runs on the schedule time_uniform.
    """
    planned = [
        plan_table2(
            dataset,
            [name],
            nfes,
            seeds,
            n_samples,
            schedule,
            metric,
            recipe="release",
            scale_time=a,
        )
        for name, schedule, a in (("AMED-Solver", "time_uniform", 0.0), ("AMED-Plugin", None, 0.2))
    ]
    return concat(planned)


# What could keep the plugin from improving iPNDM, one change at a time from the row of Table 2; and
# the length of training for both methods.
VARIANTS = {
    "AMED-Plugin, M = 1": ("AMED-Plugin", {"m": 1}),
    "AMED-Plugin, M = 2": ("AMED-Plugin", {}),
    "AMED-Plugin, M = 4": ("AMED-Plugin", {"m": 4}),
    "AMED-Plugin, M = 2, loss on features": ("AMED-Plugin", {"loss": "features"}),
    "AMED-Plugin, M = 2, 20,000 images": ("AMED-Plugin", {"images": 20_000}),
    "AMED-Solver": ("AMED-Solver", {}),
    "AMED-Solver, 20,000 images": ("AMED-Solver", {"images": 20_000}),
}


def plan_plugin(
    dataset: str = "digits",
    nfe: int = 5,
    seeds=SEEDS,
    n_samples: int | None = None,
    metric: str = "fd",
) -> pd.DataFrame:
    """iPNDM at one NFE, plain and with AFS, and variants of its plugin; columns variant, run."""
    plain = METHODS["iPNDM"]
    rows = [
        {"variant": label, "nfe": nfe, "run": _run(dataset, plain, nfe, n_samples, metric, afs=afs)}
        for label, afs in (("iPNDM", False), ("iPNDM, AFS", True))
    ]
    for label, (method, changes) in VARIANTS.items():
        each = plan_table2(dataset, [method], [nfe], seeds, n_samples, metric=metric, **changes)
        rows += [{"variant": label, "nfe": nfe, "run": what} for what in each["run"]]
    return pd.DataFrame(rows)


PLANS = (plan_table1, plan_figure4, plan_figure5, plan_figure7)


def concat(plans) -> pd.DataFrame:
    """Several plans as one."""
    return pd.concat(plans, ignore_index=True)


def measure(planned: pd.DataFrame, **how) -> pd.DataFrame:
    """Results of a plan: its columns and ``result``; ``how`` goes to ``run_all``."""
    frame = run_all(planned["run"].tolist(), **how)
    return planned.assign(result=frame["result"].to_numpy())


def estimates(measured: pd.DataFrame, by=("method", "nfe")) -> pd.DataFrame:
    """Means over training seeds: columns ``by``, value, low, high, half and the Estimate itself."""
    rows = []
    for key, group in measured.groupby(list(by), sort=False):
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


def floor_runs(dataset: str = "digits") -> dict[str, Run]:
    """The Runs of the floors of ``"fd"`` and ``"fd_pixels"``."""
    return {metric: Run(f"floor_{metric}", dataset) for metric in ("fd", "fd_pixels")}


def limit_run(dataset: str = "digits", n_samples: int | None = None, metric: str = "fd") -> Run:
    """Heun with about 80 NFE: the ODE is all but solved, and what is left is the model's limit."""
    data = describe(dataset)
    nfe = 79 if data.afs else 80 * data.evaluations_per_call
    return _run(dataset, methods(dataset)["EDM"], nfe, n_samples, metric, afs=data.afs)


def accuracy_run(dataset: str = "digits") -> Run:
    """How far the ODE's accurate solution moves when its steps are halved."""
    nfe = 5 * describe(dataset).evaluations_per_call  # of a Run that has no method of its own
    return _run(dataset, METHODS["DDIM"], nfe, 500, "endpoint_accuracy")


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
    frame = published(table)
    frame = frame[frame["dataset"] == dataset]
    # "AMED-Plugin (iPNDM)" says what the plugin is on; `Entry.plugin` knows.
    frame = frame.assign(
        method=frame["method"].str.replace(r"^AMED-Plugin .*", "AMED-Plugin", regex=True)
    )
    return frame.rename(columns={"value": "paper"})[["method", "nfe", "paper"]]


# --- verdicts -----------------------------------------------------------------------------------


def verdict(found: Estimate) -> str:
    """Whether a difference that is claimed to be negative is so.

    *holds* or *does not hold* where the 95 % interval lies on one side of zero, else *undecided*;
    undecided too where the noise of training is not known (a single seed).
    """
    low, high = found.interval
    if found.training_error is not None and np.isnan(found.training_error):
        return "undecided"
    return "holds" if high < 0 else "does not hold" if low > 0 else "undecided"


@lru_cache
def claims(table: str) -> pd.DataFrame:
    """What the paper claims of a table: claim, place, sentence, better, worse (methods), nfe."""
    frame = pd.read_csv(DATA / "paper" / "claims.csv", dtype={"table": str})
    return frame[frame["table"] == table.removeprefix("table")].reset_index(drop=True)


def judge(table: str, measured: pd.DataFrame) -> pd.DataFrame:
    """The claims of a table against measured results.

    Args:
        measured: columns method, nfe, result; from ``measure``.

    Returns:
        A row per comparison that was measured: the claim's columns with one ``worse`` and one
        ``nfe``, ``difference`` (better minus worse, claimed to be negative), low, high, verdict.
    """
    results = {key: group["result"].tolist() for key, group in measured.groupby(["method", "nfe"])}
    rows = []
    for claim in claims(table).to_dict("records"):
        for nfe in (int(n) for n in str(claim["nfe"]).split()):
            for worse in claim["worse"].split("; "):
                pair = (claim["better"], nfe), (worse, nfe)
                if not all(key in results for key in pair):
                    continue
                found = difference(*(results[key] for key in pair))
                low, high = found.interval
                rows.append(
                    claim
                    | {
                        "worse": worse,
                        "nfe": nfe,
                        "difference": found.value,
                        "low": low,
                        "high": high,
                        "verdict": verdict(found),
                    }
                )
    return pd.DataFrame(rows)


def by_training_seed(
    dataset: str, method: str, nfe: int, seeds=SEEDS, n_samples: int = 5000, **how
) -> pd.DataFrame:
    """One method at one NFE, a row per training seed: quality, r and final loss of every step."""
    columns = {}
    for metric, n in (("fd", n_samples), ("endpoint_error", n_samples), ("learned_r", 1000)):
        planned = plan_table2(dataset, [method], [nfe], seeds, n, metric=metric)
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


def _slug(text: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", text)


def plugin_numbers(measured: pd.DataFrame, endpoint: pd.DataFrame) -> dict[str, str]:
    """Numbers of ``plan_plugin`` for the book's prose: values and differences with intervals."""
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
    """Numbers for the book's first page: quality at one NFE, counts of verdicts."""
    numbers = {
        f"table2_{row.method}": with_interval(row.value, row.half)
        for row in ours[ours["nfe"] == nfe].itertuples()
    }
    for claim, group in judged.groupby("claim"):
        counts = group["verdict"].value_counts()
        numbers[f"table2_{claim}_holds"] = str(counts.get("holds", 0))
        numbers[f"table2_{claim}_fails"] = str(counts.get("does not hold", 0))
        numbers[f"table2_{claim}_all"] = str(len(group))
    return numbers


def with_interval(value: float, half: float) -> str:
    """A number with its 95 % half width, to two digits of the latter: ``12.3 ± 1.2``."""
    if not half > 0:
        return f"{value:.4g}"
    digits = max(0, 1 - int(np.floor(np.log10(half))))
    return f"{value:.{digits}f} ± {half:.{digits}f}".replace("-", "−")
