"""The paper's tables: its numbers, the Runs that measure ours, and the comparison of both."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pandas as pd

from amedlib.checks import one_of, require
from amedlib.datasets import DATA, load_dataset
from amedlib.study import Estimate, Run, difference, estimate, run_all

NFES = (3, 5, 7, 9)
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
        published: its name in the paper's tables, where it differs.
    """

    solver: str
    options: dict = field(default_factory=dict)
    schedule: str = "polynomial"
    afs: bool = False
    learned: bool = False
    predictor: dict = field(default_factory=dict)
    published: str | None = None


# Table 2, with the settings of Sec. 4.1 and Appendix B: orders, schedules, AFS where NFE is odd.
METHODS = {
    "DPM-Solver++(3M)": Method("dpmpp", {"order": 3}, "logsnr"),
    "UniPC": Method("unipc", {"order": 3}, "logsnr"),
    "iPNDM": Method("ipndm", {"order": 4}),
    "DDIM": Method("euler"),
    "DPM-Solver-2": Method("dpm2", afs=True),
    "EDM": Method("heun", afs=True),
    "AMED-Solver": Method("amed", afs=True, learned=True),
    "AMED-Plugin": Method(
        "ipndm", {"order": 4}, afs=True, learned=True, published="AMED-Plugin (iPNDM)"
    ),
}
SINGLE_STEP = ("DDIM", "DPM-Solver-2", "EDM")
SCHEDULES = ("polynomial", "logsnr", "time_uniform")


def plan(
    dataset: str = "digits",
    methods=tuple(METHODS),
    nfes=NFES,
    seeds=SEEDS,
    n_samples: int = 5000,
    schedule: str | None = None,
    metric: str = "fd",
    **predictor,
) -> pd.DataFrame:
    """The Runs of a table: a row per method, NFE and training seed.

    Args:
        schedule: for every method; ``None`` gives each the one that the paper uses for it.
        predictor: fields of ``Training`` for all learned methods, such as ``recipe``.

    Returns:
        Columns method, nfe, schedule, run.

    Raises:
        ValueError: an argument is outside its range, or a method cannot have an NFE.
    """
    one_of("schedule", schedule, (None, *SCHEDULES))
    require(len(nfes) > 0 and len(seeds) > 0, "nfes and seeds", (nfes, seeds), "not empty")
    data = load_dataset(dataset)
    rows = []
    for name in methods:
        one_of("method", name, METHODS)
        method = METHODS[name]
        options = method.options | data.solver_options.get(method.solver, {})
        for nfe in nfes:
            for seed in seeds if method.learned else [None]:
                learned = method.predictor | predictor | {"seed": seed}
                what = Run(
                    metric,
                    dataset,
                    method.solver,
                    options,
                    schedule or method.schedule,
                    sigma_min=data.sigma_min,
                    sigma_max=data.sigma_max,
                    nfe=nfe,
                    afs=method.afs,
                    predictor=learned if method.learned else None,
                    samples=n_samples,
                )
                rows.append({"method": name, "nfe": nfe, "schedule": what.schedule, "run": what})
    return pd.DataFrame(rows)


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


def paper_values(table: str, dataset: str) -> pd.DataFrame:
    """The paper's numbers for our rows of a table: columns method, nfe, paper."""
    frame = published(table)
    frame = frame[frame["dataset"] == dataset]
    ours = {method.published or name: name for name, method in METHODS.items()}
    frame = frame.assign(method=frame["method"].map(ours))
    return frame.dropna(subset="method").rename(columns={"value": "paper"})[
        ["method", "nfe", "paper"]
    ]


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
