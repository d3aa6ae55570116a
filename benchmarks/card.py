"""What a GPU is to show, the most telling first, until the time is up; resumed by the same command.

python -m benchmarks.card --estimate               what it takes; no GPU needed
python -m benchmarks.card                          into data/results
python -m benchmarks.card --into FOLDER --seconds 480 --processes 3

First the race against the released procedure, then the leaderboard on the small model of CIFAR-10,
then tables of the paper on it. All numbers are results of the store, and those there are skipped.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

import amedlib
from amedlib.checks import require
from amedlib.datasets.loaders import load_weights
from amedlib.files import write_atomically
from amedlib.study import claims, costs, leaderboard, plans, standings
from amedlib.study.execute import pending, run_all
from amedlib.study.run import Run
from amedlib.study.store import RESULTS, load_result
from amedlib.training import Training

from . import gpu
from .__main__ import machine
from .race import RELEASE, STUDENTS, Pair, count_evaluations

DATASET = "cifar10_small"
# Evaluations of the small model of CIFAR-10 in a second of one H100: what its first study took.
RATE = 15_000
RACE_SECONDS = 150
REPEATS = 3
# Either side in the same precision; and ours in half while the released side has what its authors
# use.
RACERS = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16", "released": "bfloat16"},
    "bfloat16, ours alone": {"precision": "bfloat16"},
}
RACES = [
    *product(STUDENTS, ("float32", "bfloat16")),
    ("AMED-Solver", "bfloat16, ours alone"),
]
TABLES = (3, 4, 5, 7, 9)
# To try the script: every Run so small, on the digits, three of each part, at few evaluations.
TINY = {"images": 20, "batch": 10, "passes": 1}


def tried(runs: list[Run]) -> list[Run]:
    """Some Runs of a part, made small; the grid search, which cannot be, is left out."""
    small = [
        replace(run, samples=20, predictor=run.predictor and run.predictor | TINY)
        for run in runs
        if run.r != "searched" and run.nfe <= 4
    ]
    return small[:: max(1, (len(small) - 1) // 2)]


# --- what is run --------------------------------------------------------------------------------


def tables(dataset: str) -> list[tuple[int, pd.DataFrame]]:
    """``TABLES`` and their plans, one training each: that with the fewest evaluations per claim
    first."""
    sources = claims.claims()["source"].str.split()
    found = []
    for number in TABLES:
        planned = plans.table(number, dataset, seeds=plans.SEEDS[:1])
        decided = sum(f"table{number}" in each for each in sources)
        total = sum(v for kind, v in costs.evaluations(planned).items() if kind != "features")
        found.append((total / decided, number, planned))
    return [(number, planned) for _, number, planned in sorted(found, key=lambda each: each[:2])]


def parts(tiny: bool = False) -> dict[str, list[Run]]:
    """The Runs of the leaderboard and of the tables, by the part that one may stop after."""
    dataset = "digits" if tiny else DATASET
    metrics = amedlib.describe(dataset).metrics
    found = {}

    def add(name, planned, measures):
        for kind, some in measures.items():
            runs = [run for m in some for run in standings.with_metric(planned, m)["run"]]
            found[f"{name}{kind}"] = tried(runs) if tiny else runs

    distances = [metric for metric in metrics if metric != "endpoint_error"]
    by_part = leaderboard.colour_on_gpu(dataset).groupby("part", sort=False)
    for name, planned in by_part:
        both = {"": distances, ", endpoint error": ["endpoint_error"]}
        add(f"leaderboard, {name}", planned, both)
    for number, planned in tables(dataset):
        for nfe, some in planned.groupby("nfe"):
            add(f"Table {number}, NFE {nfe}", some, {"": distances})
    return found


# --- what it takes ------------------------------------------------------------------------------


def seconds_of_race() -> float:
    """The race's calls, counted, at as many operations per second as ``RATE`` is: at most.

    Half precision takes less.
    """
    small = json.loads(load_weights("cifar10_edm.safetensors")[1]["init_kwargs"])
    each = gpu.size("cifar10")["GFLOP per evaluation"] * 1e9 / costs.evaluation_flops(small)
    batch = amedlib.describe("cifar10").training["batch"]
    bench, calls = gpu.Bench("cpu", math.inf, tiny=True), 0
    for student, _ in RACES:
        net, shape = bench.network("cifar10")
        config = Training(batch=1, images=1, **RELEASE | STUDENTS[student])
        counted = count_evaluations(Pair(net, config, shape))
        # A backward pass is taken for a call.
        calls += sum(counted[f"{side}, calls"] for side in ("ours", "official"))
        calls += 2 * (config.num_steps - 1)
    return calls * batch * (1 + REPEATS) * each / RATE


def estimate(planned: dict[str, list[Run]], results_dir) -> pd.DataFrame:
    """Evaluations that each part takes, and seconds at ``RATE``; what parts share counts once."""
    seen, rows = set(), {}
    for name, runs in planned.items():
        new = {path: n for path, n in pending(runs, results_dir).items() if path not in seen}
        seen |= set(new)
        rows[name] = {"results": missing(runs, results_dir), "evaluations": sum(new.values())}
    frame = pd.DataFrame(rows).T
    return frame.assign(seconds=frame["evaluations"] / RATE)


def missing(runs: list[Run], results_dir) -> int:
    """How many Runs have no result in the store."""
    return sum(load_result(run, results_dir) is None for run in runs)


# --- running ------------------------------------------------------------------------------------


def _in_time(deadline: float, function, *args):
    if time.time() > deadline:
        raise TimeoutError("the time is up")
    return function(*args)


class Until(Executor):
    """An executor that begins nothing after ``deadline``, a time as of ``time.time``."""

    def __init__(self, pool: Executor, deadline: float):
        self.pool, self.deadline = pool, deadline

    def submit(self, function, *args):
        return self.pool.submit(_in_time, self.deadline, function, *args)


def race(into: Path, device: str, seconds: float, tiny: bool) -> None:
    """The rows of the race that its record lacks, written after each."""
    about = machine(device)
    name = re.sub("[^a-z0-9]+", "-", about.get("card", about["processor"]).lower())
    path = into / "gpu" / f"{name}.json"
    report = json.loads(path.read_text()) if path.is_file() else {"machine": about}
    rows = [row for row in report.get("race", []) if "failed" not in row]
    bench = gpu.Bench(device, seconds, tiny)
    for student, label in RACES:
        how = {label: RACERS[label]}, (student,)
        for row in gpu.race(bench, ["cifar10"], *how, REPEATS, known=rows):
            rows.append(row)
            write_atomically(path, json.dumps(report | {"race": rows}, indent=1).encode())
            print("race:", row, flush=True)
    there = {tuple(row.get(k) for k in ("student", "variant")) for row in rows}
    left = [race for race in RACES if race not in there]
    print(f"race: {len(left)} of {len(RACES)} rows not run.", flush=True)


def study(planned: dict[str, list[Run]], into: Path, device: str, deadline: float, pool) -> list:
    """The Runs of every part; returns the errors of those that failed before the time was up."""
    errors, expected = [], estimate(planned, into)["seconds"]
    for name, runs in planned.items():
        if not missing(runs, into) or time.time() > deadline:
            continue
        left = deadline - time.time()
        print(f"{name}: about {expected[name]:.0f} s; {left:.0f} s are left.", flush=True)
        try:
            run_all(runs, into, device, progress=False, cluster=Until(pool, deadline))
        except (RuntimeError, TimeoutError) as error:
            if time.time() <= deadline:
                print(error, file=sys.stderr, flush=True)
                errors.append(error)
    for name, runs in planned.items():
        if left := missing(runs, into):
            print(f"{name}: {left} of {len(runs)} results not run.")
    return errors


def main(arguments=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--into", type=Path, default=RESULTS, help="the folder of results")
    parser.add_argument("--seconds", type=float, default=480, help="then nothing new is begun; 480")
    parser.add_argument("--processes", type=int, default=3, help="that share the card; 3")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--estimate", action="store_true", help="only say what it takes")
    parser.add_argument("--tiny", action="store_true", help="to try it, on the digits")
    given = parser.parse_args(arguments)
    require(given.processes > 0, "processes", given.processes, "a number of at least 1")
    deadline, into = time.time() + given.seconds, given.into.absolute()
    planned = parts(given.tiny)
    begun = given.tiny or (into / DATASET).exists()
    if given.estimate:
        found = estimate(planned, into if begun else RESULTS)
        found.loc["race"] = {"results": 0, "evaluations": math.nan, "seconds": seconds_of_race()}
        print(found.to_string(float_format="{:,.0f}".format))
        return 0
    if not begun:  # what is known is not computed again, and its predictors are there
        ignored = shutil.ignore_patterns("*.partial")
        shutil.copytree(RESULTS / DATASET, into / DATASET, ignore=ignored)
    race(into, given.device, min(given.seconds, RACE_SECONDS), given.tiny)
    one = ThreadPoolExecutor(1) if given.processes == 1 else None
    with one or ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        return 1 if study(planned, into, given.device, deadline, pool) else 0


if __name__ == "__main__":
    sys.exit(main())
