"""The leaderboard: every sampler of the library and of the field, on the same latents."""

from dataclasses import replace
from itertools import product

import pandas as pd

from amedlib import comparison
from amedlib.checks import different
from amedlib.comparison import SCHEDULES
from amedlib.datasets.entries import describe
from amedlib.recipes import PRESETS, makes_second_evaluation
from amedlib.sampling import num_steps_for
from amedlib.solvers import make_solver
from amedlib.study import plans
from amedlib.study.rows import METHODS, MORE_SEEDS, SEEDS, Row, runs_of

NFES = tuple(range(3, 11))
# What no sampler is judged on: the best of the untrained is chosen here.
CHOICE = {"first_seed": 10_000, "n_samples": 2_000}

UNTRAINED = {name: Row(*how) for name, how in comparison.UNTRAINED.items()}


def _row(base: str, schedule: str = "polynomial", **predictor) -> Row:
    """A row of Table 2 that is trained otherwise."""
    found = METHODS[base]
    return replace(found, schedule=schedule, predictor=found.predictor | predictor)


def _free(preset: str, solver: str = "ipndm", **predictor) -> Row:
    """A learned table, on iPNDM of order 4 unless on another solver."""
    options = {"order": 4} if solver == "ipndm" else {}
    return Row(solver, options, afs=True, learned=True, predictor=PRESETS[preset] | predictor)


_TWICE = {"freedoms": ("times", "network_times", "r", "coefficients")}
LEARNED = {
    "AMED-Solver": METHODS["AMED-Solver"],
    "AMED-Plugin": METHODS["AMED-Plugin"],
    "AMED-Solver, release": _row("AMED-Solver", "time_uniform", recipe="release", scale_time=0.0),
    "AMED-Plugin, release": _row("AMED-Plugin", recipe="release", scale_time=0.2),
    "AMED-Solver, for the end": _row("AMED-Solver", objective="endpoint"),
    "AMED-Plugin, for the end": _row("AMED-Plugin", objective="endpoint"),
    "GITS": _free("gits"),
    "LD3, tied times": _free("ld3", freedoms=("times",)),
    "LD3": _free("ld3"),
    "LD3, soft teacher": _free("ld3", soft=0.5),
    "S4S": _free("s4s"),
    "S4S-Alt": _free("s4s-alt"),
    "EPD, K = 2": _free("epd", "amed"),
    "EPD, K = 3": _free("epd", "amed", points=3),
    "all numbers": _free("all"),
    "all numbers, two evaluations": _free("all", **_TWICE),
}


# What one may have or want, with the samplers that are then open to one; all of ``UNTRAINED`` need
# nothing.
NEEDS = {
    "no training": (),
    "a minute of training": tuple(n for n in LEARNED if not n.startswith(("AMED", "EPD"))),
    "a network on the bottleneck": tuple(n for n in LEARNED if n.startswith("AMED")),
    "evaluations side by side": tuple(n for n in LEARNED if n.startswith("EPD")),
}


def can_have(row: Row, nfe: int, dataset: str) -> bool:
    """Whether a method can make this number of evaluations."""
    middle = row.learned and makes_second_evaluation(**row.predictor)
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
    first_seed: int = 0,
    schedule: str | None = None,
    **predictor,
) -> pd.DataFrame:
    """The Runs of learned samplers; columns as of ``untrained``, a row per training seed.

    With AFS, but where two evaluations a step make an even NFE.

    Args:
        schedule: for all of them; ``None`` gives each its own.
        predictor: fields of ``Training`` for all of them.
    """
    planned = []
    for name, nfe in product(names, different("nfes", nfes)):
        row = LEARNED[name]
        row = replace(row, afs=True, schedule=schedule or row.schedule)
        afs = can_have(row, nfe, dataset)
        row = replace(row, afs=afs)
        cell = {"method": name, "schedule": row.schedule, "afs": afs, "nfe": nfe}
        for run in runs_of(dataset, row, nfe, seeds, n_samples, first_seed=first_seed, **predictor):
            planned.append(cell | {"run": run})
    return pd.DataFrame(planned)


# Where three trainings on the digits differ so much that little can be told, two more are made.
WIDE = {"EPD, K = 3": (3, 5), "AMED-Solver, release": (7,)}


def more_trainings(nfes=NFES, n_samples: int | None = None) -> pd.DataFrame:
    """Two more trainings of each sampler of ``WIDE``; columns as of ``learned``."""
    at = {name: [nfe for nfe in wide if nfe in nfes] for name, wide in WIDE.items()}
    plans = [
        learned("digits", (name,), some, MORE_SEEDS, n_samples) for name, some in at.items() if some
    ]
    return pd.concat([pd.DataFrame(), *plans], ignore_index=True)


OF_AMED = tuple(name for name in LEARNED if name.startswith("AMED"))


def on_schedules(dataset: str = "digits", *args, **kwargs) -> pd.DataFrame:
    """The rows of AMED, each on every schedule; arguments and columns as of ``learned``."""
    each = [
        learned(dataset, (name,), *args, schedule=schedule, **kwargs)
        for name, schedule in product(OF_AMED, SCHEDULES)
    ]
    return pd.concat(each, ignore_index=True)


# On colour without a GPU: half precision, fewer samples and trajectories, for every sampler alike.
ON_CPU = {"precision": "bfloat16", "samples": 2_000}
FEW = {"images": 32, "m": 4, "passes": 4}


def colour(nfes=(3, 5, 7), seeds=SEEDS) -> pd.DataFrame:
    """What a CPU can do of the leaderboard on ``cifar10_small``; columns as of ``untrained``.

    The predictors of the AMED rows were trained in single precision on a GPU, and sample so.
    """
    dataset = "cifar10_small"
    plain = untrained(dataset, nfes, ON_CPU["samples"])
    plain = plain[plain["afs"] & plain["method"].isin(COLOUR)]
    tables = ("LD3", "all numbers", "all numbers, two evaluations")
    few = learned(dataset, tables, nfes, seeds, ON_CPU["samples"], **FEW)
    gits = learned(dataset, ("GITS",), nfes, seeds[:1], ON_CPU["samples"], images=FEW["images"])
    half = pd.concat([plain, few, gits], ignore_index=True)
    half["run"] = [replace(run, **ON_CPU) for run in half["run"]]
    single = [
        plain[plain["method"].eq("iPNDM") & plain["schedule"].eq("polynomial")],
        learned(dataset, ("AMED-Solver", "AMED-Plugin"), nfes, seeds[:1], ON_CPU["samples"]),
    ]
    return pd.concat([half, *single], ignore_index=True)


COLOUR = ("iPNDM", "DPM-Solver++(3M)", "UniPC-3")

# GITS for iPNDM on CIFAR-10 at 6 evaluations, as published (Chen et al., ICML 2024), ascending.
GITS_CIFAR10 = (0.002, 0.1698, 0.5666, 1.584, 3.8811, 10.9836, 80.0)


def published_schedule() -> pd.DataFrame:
    """iPNDM on ``cifar10_small`` on the schedule searched on another model, and on our three.

    Returns:
        Columns as of ``untrained``.
    """
    nfe = len(GITS_CIFAR10) - 1
    plain = untrained("cifar10_small", (nfe,), ON_CPU["samples"])
    plain = plain[plain["method"].eq("iPNDM")]
    (run,) = plain.loc[plain["schedule"].eq("polynomial") & ~plain["afs"], "run"]
    theirs = replace(run, schedule="discrete", noise_levels=GITS_CIFAR10)
    cell = {"method": "iPNDM", "schedule": "GITS, published", "afs": False, "nfe": nfe}
    found = pd.concat([plain, pd.DataFrame([cell | {"run": theirs}])], ignore_index=True)
    return found.assign(run=[replace(run, **ON_CPU) for run in found["run"]])


# On colour with a GPU. Of the untrained these first; of the learned, these are trained once.
STRONG = ("iPNDM", "DEIS", "DPM-Solver++(3M)", "UniPC-3")
ONCE = ("GITS", "LD3", "all numbers", "AMED-Solver, for the end", "AMED-Plugin, for the end")


def colour_on_gpu(dataset: str = "cifar10_small", nfes=(5, 3, 7, 9), seeds=SEEDS) -> pd.DataFrame:
    """The leaderboard on colour in full precision, samples and trajectories, what tells most first.

    Returns:
        Columns as of ``untrained``, and part: what belongs together, by which one may stop.
    """
    plain = untrained(dataset, nfes)
    plain = plain[plain["afs"]]
    strong = plain["method"].isin(STRONG)
    found = []
    for nfe in nfes:
        trained = [
            learned(dataset, ("AMED-Solver", "AMED-Plugin"), (nfe,), seeds),
            learned(dataset, ONCE, (nfe,), seeds[:1]),
        ]
        found.append(plain[strong & (plain["nfe"] == nfe)].assign(part=f"solvers, NFE {nfe}"))
        found += [each.assign(part=f"learned, NFE {nfe}") for each in trained]
    found += [
        plain[~strong & (plain["nfe"] == nfe)].assign(part=f"other solvers, NFE {nfe}")
        for nfe in nfes
    ]
    return pd.concat(found, ignore_index=True)


def all_colour() -> pd.DataFrame:
    """``colour`` and ``colour_on_gpu``; columns precision and samples tell the rows apart."""
    both = pd.concat([colour(), colour_on_gpu()], ignore_index=True)
    precision, samples = zip(*[(run.precision, run.samples) for run in both["run"]], strict=True)
    return both.assign(precision=precision, samples=samples)


# --- which freedom is worth what ------------------------------------------------------------------

FACTORS = ("times", "network_times", "coefficients")


def factorial(dataset: str = "digits", nfes=(3, 5, 7, 9), seeds=SEEDS) -> pd.DataFrame:
    """iPNDM with every set of ``FACTORS`` learned, with AFS and without, by one training each.

    Returns:
        Columns of ``FACTORS`` (whether it is learned), afs, nfe, run.
    """
    planned, all_free = [], LEARNED["all numbers"]
    for nfe, afs, free in product(nfes, (False, True), product((False, True), repeat=len(FACTORS))):
        names = tuple(name for name, learned in zip(FACTORS, free, strict=True) if learned)
        row = replace(all_free, afs=afs, learned=bool(names))
        for run in runs_of(dataset, row, nfe, seeds, freedoms=names):
            planned.append(
                dict(zip(FACTORS, free, strict=True)) | {"afs": afs, "nfe": nfe, "run": run}
            )
    return pd.DataFrame(planned)


# How r is learned: for each sample by a network, or one number for all; for the step or the end.
_OF_R = {"sample by sample": {}, "shared": plans.FREE_R}


def ways_to_r(dataset: str = "digits", nfes=(5, 7), seeds=SEEDS) -> pd.DataFrame:
    """AMED-Plugin with r by sample or shared, for the step or the end; equal budgets.

    Returns:
        Columns r, objective, nfe, run.
    """
    planned = []
    for (way, fields), objective, nfe in product(_OF_R.items(), ("step", "endpoint"), nfes):
        row = METHODS["AMED-Plugin"]
        for run in runs_of(dataset, row, nfe, seeds, **fields, objective=objective):
            planned.append({"r": way, "objective": objective, "nfe": nfe, "run": run})
    return pd.DataFrame(planned)


# Adam has one learning rate for all numbers; L-BFGS finds how far each may move. 80 updates each.
OPTIMISERS = {"L-BFGS": {}} | {
    f"Adam at {rate:g}": {"optimizer": "adam", "learning_rate": rate, "batch": 64, "passes": 80}
    for rate in (0.02, 0.1, 0.4)
}


def optimisers(dataset: str = "digits", nfes=(5,), seeds=SEEDS) -> pd.DataFrame:
    """Coefficients, both kinds of times, or all of them, learned by every one of ``OPTIMISERS``.

    Returns:
        Columns method, optimiser, nfe, run.
    """
    planned = []
    for name, (how, fields), nfe in product(
        ("S4S", "LD3", "all numbers"), OPTIMISERS.items(), nfes
    ):
        for run in runs_of(dataset, LEARNED[name], nfe, seeds, **fields):
            planned.append({"method": name, "optimiser": how, "nfe": nfe, "run": run})
    return pd.DataFrame(planned)


COUNTS = (2, 4, 8, 16, 64)


def few(dataset: str = "digits", nfes=(3, 5), seeds=SEEDS) -> pd.DataFrame:
    """All numbers, learned from few trajectories; columns images, nfe, run."""
    planned = []
    for images, nfe in product(COUNTS, nfes):
        for run in runs_of(dataset, LEARNED["all numbers"], nfe, seeds, images=images):
            planned.append({"images": images, "nfe": nfe, "run": run})
    return pd.DataFrame(planned)


def transfer(nfes=(3, 5, 7), seeds=SEEDS) -> pd.DataFrame:
    """LD3 and all numbers on the digits with labels, learned there or without labels.

    Returns:
        Columns method, learned on, nfe, run.
    """
    planned, dataset = [], "digits_conditional"
    for name, nfe, where in product(("LD3", "all numbers"), nfes, (dataset, "digits")):
        for run in runs_of(dataset, LEARNED[name], nfe, seeds, trained_on=where):
            planned.append({"method": name, "learned on": where, "nfe": nfe, "run": run})
    for nfe in nfes:
        row = replace(UNTRAINED["iPNDM"], afs=True)
        (run,) = runs_of(dataset, row, nfe, (0,))
        planned.append({"method": "iPNDM", "learned on": "nothing", "nfe": nfe, "run": run})
    return pd.DataFrame(planned)
