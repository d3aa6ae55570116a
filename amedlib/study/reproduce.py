"""What is shipped of a data set: spot-check it, or compute all of it again; or compute the rest.

python -m amedlib.study.reproduce digits          compute all again, compare with what is shipped
python -m amedlib.study.reproduce digits --fill   compute what the store lacks of the paper's study
"""

import argparse
import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from amedlib.checks import require
from amedlib.study import plans
from amedlib.study.execute import compute, run_all
from amedlib.study.run import Result
from amedlib.study.store import RESULTS, read_result, result_files

AGAIN = RESULTS.parent.parent / "_build" / "reproduce"


def files_of_study(dataset: str, results_dir=RESULTS) -> list[Path]:
    """The files of all results of the data sets that the study of one is made on."""
    names = {what.dataset for what in plans.whole_study(dataset)}
    return [path for name in sorted(names) for path in result_files(name, results_dir)]


def stored_results(dataset: str, results_dir=RESULTS) -> list[Result]:
    """All results that the store holds of a study and of what else was measured on its data."""
    found = [read_result(path) for path in files_of_study(dataset, results_dir)]
    return [result for result in found if result is not None]


def tolerance(result: Result, retrained: bool) -> float:
    """How far a recomputed value may lie from the stored one.

    Arithmetic differs between machines in its last digits, and rounding samples to grey levels
    makes that visible: a tenth of the sampling error, or 0.2 %. A predictor that was trained again
    has lived through thousands of such differences; it may move as far as another seed would, which
    for a learned Run is taken as 15 % of the value.
    """
    learned = retrained and result.run.predictor is not None
    return max(0.1 * result.error, abs(result.value) * (0.15 if learned else 0.002), 1e-6)


def compare(pairs, retrained: bool) -> pd.DataFrame:
    """Stored and recomputed values side by side, with the tolerance and whether they agree."""
    rows = []
    for old, new in pairs:
        allowed = tolerance(old, retrained)
        rows.append(
            {
                "metric": old.run.metric,
                "solver": old.run.solver,
                "schedule": old.run.schedule,
                "NFE": old.run.nfe,
                "seed": (old.run.predictor or {}).get("seed", "–"),
                "samples": old.run.samples,
                "stored": old.value,
                "recomputed": new.value,
                "tolerance": allowed,
                "agrees": abs(new.value - old.value) <= allowed,
            }
        )
    return pd.DataFrame(rows)


def spot_check(dataset="digits", n=10, seed=None, results_dir=RESULTS, seconds=15.0, device=None):
    """Recompute ``n`` random shipped results, with the shipped predictors.

    Args:
        seed: chooses them; drawn if not given.
        seconds: results that once took longer are left out, so that a build stays short.

    Returns:
        The seed, and the frame of ``compare``.

    Raises:
        ValueError: there are fewer than ``n`` such results.
    """
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    files = files_of_study(dataset, results_dir)
    order = np.random.default_rng(seed).permutation(len(files))
    short = (r for r in (read_result(files[i]) for i in order) if r and r.seconds <= seconds)
    chosen = list(islice(short, n))
    require(len(chosen) == n, "n", n, f"at most the number of shipped results, {len(chosen)}")
    pairs = []
    for old in tqdm(chosen, desc="results recomputed"):
        again = compute(old.run, results_dir, device, progress=False)
        pairs.append((old, next(r for r in again if r.run == old.run)))
    return seed, compare(pairs, retrained=False)


def main(arguments=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("--fill", action="store_true", help="compute what the store lacks")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="on this machine")
    parser.add_argument("--cluster", help="instead of them, the address of a Dask scheduler")
    parser.add_argument("--device")
    given = parser.parse_args(arguments)
    into = RESULTS if given.fill else AGAIN
    old = {result.run.key: result for result in stored_results(given.dataset, RESULTS)}
    if not (old or given.fill):  # as where the library was installed: results stay in a clone
        parser.error(
            f"{RESULTS} has no results of {given.dataset} to compare with; --fill makes them."
        )
    cluster = given.cluster or (given.workers if given.workers > 1 else None)
    shipped = [result.run for result in old.values()]
    planned = plans.whole_study(given.dataset) if given.fill else shipped
    run_all(planned, into, given.device, cluster=cluster)
    if given.fill:
        return 0
    new = {result.run.key: result for result in stored_results(given.dataset, into)}
    frame = compare([(old[key], new[key]) for key in old], retrained=True)
    moved = frame[~frame["agrees"]]
    print(f"{len(frame)} results computed again in {into}: {len(moved)} beyond their tolerance.")
    if len(moved):
        print(moved.to_string(index=False))
    return 1 if len(moved) else 0


if __name__ == "__main__":
    sys.exit(main())
