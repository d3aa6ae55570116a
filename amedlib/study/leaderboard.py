"""The leaderboard: every sampler of the library and of the field, under the same conditions."""

from dataclasses import replace
from itertools import product

import pandas as pd

from amedlib.checks import different
from amedlib.datasets.entries import describe
from amedlib.recipes import PRESETS
from amedlib.sampling import num_steps_for
from amedlib.solvers import make_solver
from amedlib.study.rows import METHODS, SCHEDULES, SEEDS, Row, runs_of

NFES = tuple(range(3, 11))
# What no sampler is judged on: the best of the untrained is chosen here.
CHOICE = {"first_seed": 10_000, "n_samples": 2_000}

UNTRAINED = {
    "DDIM": Row("euler"),
    "Heun": Row("heun"),
    "DPM-Solver-2": Row("dpm2"),
    "iPNDM-2": Row("ipndm", {"order": 2}),
    "iPNDM-3": Row("ipndm", {"order": 3}),
    "iPNDM": Row("ipndm", {"order": 4}),
    "DEIS": Row("deis", {"order": 4}),
    "DPM-Solver++(2M)": Row("dpmpp", {"order": 2}),
    "DPM-Solver++(3M)": Row("dpmpp", {"order": 3}),
    "UniPC-2": Row("unipc", {"order": 2}),
    "UniPC-3": Row("unipc", {"order": 3}),
}


def _row(base: str, **predictor) -> Row:
    """A row of Table 2 that is trained otherwise."""
    found = METHODS[base]
    fields = {"solver": found.solver, "options": found.options, "afs": True, "learned": True}
    return Row(**fields, predictor=found.predictor | predictor)


def _free(preset: str, solver: str = "ipndm", **predictor) -> Row:
    """A learned table, on iPNDM of order 4 unless on another solver."""
    options = {"order": 4} if solver == "ipndm" else {}
    return Row(solver, options, afs=True, learned=True, predictor=PRESETS[preset] | predictor)


_TWICE = {"freedoms": ("times", "network_times", "r", "coefficients")}
LEARNED = {
    "AMED-Solver": METHODS["AMED-Solver"],
    "AMED-Plugin": METHODS["AMED-Plugin"],
    "AMED-Solver, for the end": _row("AMED-Solver", objective="endpoint"),
    "AMED-Plugin, for the end": _row("AMED-Plugin", objective="endpoint"),
    "LD3, tied times": _free("ld3", freedoms=("times",)),
    "LD3": _free("ld3"),
    "S4S": _free("s4s"),
    "S4S-Alt": _free("s4s-alt"),
    "EPD, K = 2": _free("epd", "amed"),
    "EPD, K = 3": _free("epd", "amed", points=3),
    "all numbers": _free("all"),
    "all numbers, two evaluations": _free("all", **_TWICE),
}


def can_have(row: Row, nfe: int, dataset: str) -> bool:
    """Whether a method can make this number of evaluations."""
    freedoms = row.predictor.get("freedoms", ("r",))
    middle = row.learned and (row.predictor.get("form") != "table" or "r" in freedoms)
    per_call = describe(dataset).evaluations_per_call
    try:
        num_steps_for(nfe, make_solver(row.solver, **row.options), row.afs, middle, per_call)
    except ValueError:
        return False
    return True


def untrained(
    dataset: str = "digits", nfes=NFES, n_samples: int | None = None, first_seed: int = 0
) -> pd.DataFrame:
    """The Runs of every solver, with AFS and without, on three schedules.

    Returns:
        Columns method, schedule, afs, nfe, run. A solver of two evaluations a step has with AFS
        odd NFE, without even ones.
    """
    planned = []
    for (name, row), schedule, afs in product(UNTRAINED.items(), SCHEDULES, (False, True)):
        each = replace(row, schedule=schedule, afs=afs)
        for nfe in different("nfes", nfes):
            if can_have(each, nfe, dataset):
                (run,) = runs_of(dataset, each, nfe, (0,), n_samples, first_seed=first_seed)
                cell = {"method": name, "schedule": schedule, "afs": afs, "nfe": nfe}
                planned.append(cell | {"run": run})
    return pd.DataFrame(planned)


def learned(
    dataset: str = "digits",
    names=tuple(LEARNED),
    nfes=NFES,
    seeds=SEEDS,
    n_samples: int | None = None,
    schedule: str | None = None,
    **predictor,
) -> pd.DataFrame:
    """The Runs of learned samplers; columns as of ``untrained``, a row per training seed.

    With AFS, but where two evaluations a step make an even NFE.

    Args:
        schedule: in the place of a method's own.
        predictor: fields of ``Training`` for all of them.
    """
    planned = []
    for name, nfe in product(names, different("nfes", nfes)):
        row = LEARNED[name]
        row = replace(row, schedule=schedule or row.schedule)
        afs = can_have(replace(row, afs=True), nfe, dataset)
        row = replace(row, afs=afs)
        cell = {"method": name, "schedule": row.schedule, "afs": afs, "nfe": nfe}
        for run in runs_of(dataset, row, nfe, seeds, n_samples, **predictor):
            planned.append(cell | {"run": run})
    return pd.DataFrame(planned)


# On colour without a GPU: half precision, fewer samples and trajectories, for every sampler alike.
ON_CPU = {"precision": "bfloat16", "samples": 2_000}
FEW = {"images": 32, "m": 4, "passes": 4}


def colour(nfes=(3, 5), seeds=SEEDS) -> pd.DataFrame:
    """What a CPU can do of the leaderboard on ``cifar10_small``; columns as of ``untrained``.

    The predictors of the AMED rows were trained in single precision on a GPU, and sample so.
    """
    dataset = "cifar10_small"
    plain = untrained(dataset, nfes, ON_CPU["samples"])
    plain = plain[
        plain["afs"] & plain["method"].isin(COLOUR) & (plain["schedule"] != "time_uniform")
    ]
    tables = ("LD3", "all numbers", "all numbers, two evaluations")
    few = learned(dataset, tables, nfes, seeds, ON_CPU["samples"], **FEW)
    half = pd.concat([plain, few], ignore_index=True)
    half["run"] = [replace(run, **ON_CPU) for run in half["run"]]
    single = [
        plain[plain["method"].eq("iPNDM") & plain["schedule"].eq("polynomial")],
        learned(dataset, ("AMED-Solver", "AMED-Plugin"), nfes, seeds[:1], ON_CPU["samples"]),
    ]
    both = pd.concat([half, *single], ignore_index=True)
    return both.assign(precision=[run.precision for run in both["run"]])


COLOUR = ("iPNDM", "DPM-Solver++(3M)", "UniPC-3")
