"""Running a study: what it needs is made once, block by block, here or in workers."""

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import asdict
from datetime import UTC, datetime
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from amedlib import checks
from amedlib.checks import require
from amedlib.compute import best_device, one_thread
from amedlib.datasets.entries import describe
from amedlib.datasets.loaders import load_dataset
from amedlib.files import check_writable, load_tensors, save_tensors, write_atomically
from amedlib.study.cluster import Task, Workers, check_cluster, connect, do
from amedlib.study.forecast import PARTS, forecast, rate
from amedlib.study.procedures import PROCEDURES, Context, make_block, qualities, solve_block
from amedlib.study.run import BLOCKS, FRECHET, OF_SAMPLES, Result, Run
from amedlib.study.store import (
    RESULTS,
    Block,
    code_fingerprint,
    device_name,
    fingerprint_of,
    is_whole_predictor,
    is_whole_solution,
    kept_block,
    load_block,
    load_result,
    predictor_path,
    result_path,
    save_block,
    save_result,
    solution_key,
    solution_path,
    unfinished,
    versions,
)
from amedlib.study.uncertainty import estimate
from amedlib.training import train

# The bar that shows the work of this process, in evaluations.
_BAR: ContextVar[tqdm | None] = ContextVar("_BAR", default=None)


def _finish_predictor(run: Run, context: Context) -> None:
    data, path, bar = context.data, predictor_path(run, context.results_dir), _BAR.get()
    if is_whole_predictor(path):
        return
    if run.trained_on != run.dataset:
        data = load_dataset(run.trained_on, context.device)
    with one_thread():
        train(
            data.denoiser,
            run.training,
            data.shape,
            path,
            data.distances(run.training.loss),
            context.device,
            context.progress if bar is None else lambda: bar.update(_of_batch(run)),
            data.labels,
        )


def _of_batch(run: Run) -> float:
    """Evaluations of one batch of training."""
    training = run.training
    return PARTS["trainings"][0](run) / (training.passes * -(-training.images // training.batch))


def _finish_solution_block(run: Run, context: Context, index: int) -> torch.Tensor | None:
    path = solution_path(run, context.results_dir)
    if path.is_file():
        return None
    kept = kept_block(path, fingerprint_of(context.data), index)
    try:
        return load_tensors(kept)[0]["x"]
    except ValueError:  # there is none, or none that can be read
        block = solve_block(run, context, index)
        with suppress(FileNotFoundError):  # another study has just finished, and tidied up
            save_tensors(kept, {"x": block}, {})
        return block


def _finish_solution(run: Run, context: Context) -> None:
    path = solution_path(run, context.results_dir)
    if not is_whole_solution(path):
        blocks = [_finish_solution_block(run, context, i) for i in range(BLOCKS)]
    if not path.is_file():
        save_tensors(path, {"x": torch.cat(blocks)}, {"what": json.dumps(solution_key(run))})
    shutil.rmtree(unfinished(path), ignore_errors=True)


def _finish_block(run: Run, context: Context, index: int) -> Block | None:
    path = result_path(run, context.results_dir)
    if path.is_file():
        return None
    kept = kept_block(path, fingerprint_of(context.data), index)
    block = load_block(kept)
    if block is None:
        block = make_block(run, context, index)
        with suppress(FileNotFoundError):  # another study has just finished, and tidied up
            save_block(kept, block)
    return block


def _finish(run: Run, context: Context) -> None:
    """Join the blocks of a Run, of which those that are missing are made, and save its results."""
    path = result_path(run, context.results_dir)
    if load_result(run, context.results_dir) is None:
        number = BLOCKS if PROCEDURES[run.metric].measure else 0
        blocks = [_finish_block(run, context, i) for i in range(number)]
        for result in [] if path.is_file() else _results(run, context, blocks):
            # A metric that was added later does not replace what is stored of the others.
            if load_result(result.run, context.results_dir) is None:
                save_result(result, context.results_dir)
    shutil.rmtree(unfinished(path), ignore_errors=True)


def prepare(run: Run, context: Context) -> None:
    """Make the search or the predictor that a Run needs; what is in the store stays as it is."""
    if run.r == "searched":
        _finish(run.search(), context)
    if run.predictor is not None:
        _finish_predictor(run, context)


def _prepare_all(run: Run, context: Context) -> None:
    prepare(run, context)
    if run.metric in OF_SAMPLES and "endpoint_error" in qualities(run):
        _finish_solution(run, context)


def _results(run: Run, context: Context, blocks: list[Block]) -> list[Result]:
    """The result of a Run, and of what comes with it at no cost."""
    start = time.perf_counter()
    measured = PROCEDURES[run.metric].compute(run, context, blocks)
    seconds = time.perf_counter() - start + sum(block.seconds for block in blocks)
    for metric, found in measured.items():
        require(bool(np.isfinite(found.value)), f"the value of {metric}", found.value, "finite")
    devices = {block.device for block in blocks} or {device_name(context.device)}
    return [
        Result(
            run.with_metric(metric),
            **asdict(found),
            seconds=round(seconds, 3),
            device=", ".join(sorted(devices)),
            versions=versions(),
            fingerprint=fingerprint_of(context.data),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for metric, found in measured.items()
    ]


def context_of(run: Run, results_dir, device, progress=False) -> Context:
    require(isinstance(run, Run), "run", run, "an amedlib.Run")
    device = best_device(device)
    results_dir = checks.path("results_dir", results_dir)
    return Context(load_dataset(run.dataset, device), results_dir, device, progress)


def _work(finish: Callable, run: Run, results_dir: Path, device, *index: int) -> None:
    """What a worker is called with."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    problem = _hindrance(results_dir)
    if problem:
        raise ValueError(problem)
    _look_again(results_dir)
    finish(run, context_of(run, results_dir, device), *index)


def _hindrance(results_dir: Path, mark: str = "", code: str | None = None) -> str | None:
    """Why a worker cannot share in a study; ``None`` if it can.

    Args:
        mark: the name of a file that was just made in ``results_dir``.
        code: fingerprint of the code that the study runs.
    """
    host = socket.gethostname()
    if not (results_dir / mark).exists():
        return (
            f"results_dir must be a folder that all machines see; {str(results_dir)!r} was given, "
            f"and a worker on {host} does not see it."
        )
    if code not in (None, code_fingerprint()):
        return (
            "All workers must have the same amedlib; that of a worker on "
            f"{host} has the fingerprint {code_fingerprint()}, not {code}."
        )
    return None


def _look_again(results_dir: Path) -> None:
    """Make a network file system ask what is in the store; it remembers what was not there."""
    for _ in os.walk(results_dir):
        pass


def _tasks(what: Run, results_dir: Path, device, fingerprint: str) -> dict[str, Task]:
    """The tasks that lead to the result of a Run, by the path of the file that each makes.

    Those that other tasks wait for go first. What is there already is no task.
    """
    tasks: dict[str, Task] = {}

    def add(path, finish, *index, needs=(), priority=1, there=Path.is_file):
        if not there(path):
            arguments = finish, what, results_dir, device, *index
            tasks[str(path)] = Task(_work, arguments, tuple(map(str, needs)), priority)
        return path

    def add_blocks(path, finish, **how):
        kept = [kept_block(path, fingerprint, i) for i in range(BLOCKS)]
        return [add(each, finish, i, **how) for i, each in enumerate(kept)]

    needs, path = [], result_path(what, results_dir)
    if what.r == "searched":
        tasks |= _tasks(what.search(), results_dir, device, fingerprint)
        needs.append(result_path(what.search(), results_dir))
    if what.predictor is not None:
        predictor = predictor_path(what, results_dir)
        needs.append(add(predictor, _finish_predictor, there=is_whole_predictor))
    procedure = PROCEDURES[what.metric]
    if what.metric in OF_SAMPLES and "endpoint_error" in qualities(what):
        solution = solution_path(what, results_dir)
        if not is_whole_solution(solution):
            add(solution, _finish_solution, needs=add_blocks(solution, _finish_solution_block))
        needs.append(solution)
    if procedure.measure:
        needs += add_blocks(path, _finish_block, needs=needs, priority=0)
    add(path, _finish, needs=needs)
    return tasks


def compute(run: Run, results_dir=RESULTS, device=None, progress=True) -> list[Result]:
    """Compute a Run, whatever the store holds; also what comes with it at no cost.

    A predictor, a search or a solution of the ODE that it needs is taken from the store, or made
    and kept there.
    """
    context = context_of(run, results_dir, device, progress)
    with one_thread():
        _prepare_all(run, context)
        number = BLOCKS if PROCEDURES[run.metric].measure else 0
        return _results(run, context, [make_block(run, context, i) for i in range(number)])


def _part(task: Task) -> str | None:
    """Which of ``PARTS`` a task is; ``None`` if it evaluates nothing."""
    finish, what, *_ = task.arguments
    names = {
        _finish_predictor: "trainings",
        _finish_solution_block: "solutions of the ODE",
        _finish_block: "sets of samples",
    }
    return "grid searches" if what.metric == "grid_search" else names.get(finish)


def evaluations_of(task: Task) -> float:
    """Evaluations of the network in a task of a study."""
    part = _part(task)
    return PARTS[part][0](task.arguments[1]) if part else 0


def _rate(run: Run, results_dir: Path, device) -> float:
    """Evaluations per second in a worker; NaN if that cannot be found out."""
    torch.set_num_threads(1)
    try:
        return rate(run, context_of(run, results_dir, device))
    except Exception:  # what keeps the work from being done is said there
        return nan


def _do(tasks: dict[str, Task], workers: Workers, progress, here: bool) -> dict[str, Exception]:
    """Do all tasks, after saying what they are and about how long they take.

    Args:
        here: whether this process does them.
    """
    if not progress:
        return do(tasks, workers, lambda key: None)
    parts = [(_part(task), task.arguments[1]) for task in tasks.values() if _part(task)]
    where = next(iter(tasks.values())).arguments[2:4]
    some = {what.dataset: what for _, what in parts}
    rates = {name: sum(workers.ask(_rate, what, *where)) or nan for name, what in some.items()}
    if parts:
        print(f"\n{forecast(parts, rates)}", file=sys.stderr, flush=True)
    weights, finished = {key: evaluations_of(task) for key, task in tasks.items()}, 0.0

    def done(key):
        nonlocal finished
        finished += weights[key]
        bar.update(finished - bar.n)

    how = {"desc": "evaluations", "unit": "", "unit_scale": True, "mininterval": 1}
    with tqdm(total=sum(weights.values()), **how) as bar:
        token = _BAR.set(bar if here else None)
        try:
            return do(tasks, workers, done)
        finally:
            _BAR.reset(token)


def make_predictors(runs: Iterable[Run], results_dir=RESULTS, device=None) -> None:
    """Train those predictors of Runs that the store lacks, in this process."""
    results_dir, tasks = checks.path("results_dir", results_dir).absolute(), {}
    for what in runs:
        if what.predictor is not None and not is_whole_predictor(predictor_path(what, results_dir)):
            arguments = _finish_predictor, what, results_dir, device
            tasks[str(predictor_path(what, results_dir))] = Task(_work, arguments)
    if not tasks:
        return
    check_writable(results_dir, "results_dir")
    with one_thread(), connect() as workers:
        for error in _do(tasks, workers, True, True).values():
            raise error


def _plan(missing: Iterable[Run], results_dir: Path, device, fingerprints: dict[str, str]):
    """The Runs that are computed together, by a key; the paths of their results, and the tasks.

    Runs that differ in the metric only are computed together, as the first of them.
    """
    groups: dict[str, list[Run]] = {}
    for what in missing:
        groups.setdefault(_leader(what).key, []).append(what)
    tasks, of = {}, {}
    for key, group in groups.items():
        leader = _leader(group[0])
        first = group[0] if load_result(leader, results_dir) else leader
        of[key] = result_path(first, results_dir)
        tasks |= _tasks(first, results_dir, device, fingerprints[first.dataset])
    return groups, of, tasks


def pending(runs: Iterable[Run], results_dir=RESULTS) -> dict[str, float]:
    """Network evaluations that Runs still take, by the file that each piece of work makes.

    What the store has is left out; what Runs share is there once.
    """
    results_dir = checks.path("results_dir", results_dir).absolute()
    missing = {what.key: what for what in runs if load_result(what, results_dir) is None}
    names = {what.dataset for what in missing.values()}
    fingerprints = {name: fingerprint_of(load_dataset(name, "cpu")) for name in names}
    _, _, tasks = _plan(missing.values(), results_dir, "cpu", fingerprints)
    return {path: evaluations_of(task) for path, task in tasks.items()}


def _complete(runs: list[Run], results_dir, device, progress, cluster):
    """Results by key; Runs whose computation failed, with the error; and how many there were."""
    check_cluster(cluster)
    for what in runs:
        require(isinstance(what, Run), "run", what, "an amedlib.Run")
    if cluster is None:  # the workers of one may have other devices
        device = best_device(device)
    results_dir = checks.path("results_dir", results_dir).absolute()
    results = {what.key: load_result(what, results_dir) for what in runs}
    missing = {what.key: what for what in runs if results[what.key] is None}
    if not missing:
        return results, [], 0
    check_writable(results_dir, "results_dir")
    # A data set whose files cannot be had is found out before any work starts.
    fingerprints = {}
    for name in {what.dataset for what in missing.values()}:
        data = load_dataset(name, device if cluster is None else "cpu")
        fingerprints[name] = fingerprint_of(data)
        asked = {what.metric for what in missing.values() if what.dataset == name}
        if asked & {*FRECHET}:
            _ = data.reference
    groups, of, tasks = _plan(missing.values(), results_dir, device, fingerprints)
    with one_thread(), connect(cluster, device) as workers:
        with tempfile.NamedTemporaryFile(dir=results_dir, prefix=".seen") as mark:
            name, code = Path(mark.name).name, code_fingerprint()
            for problem in workers.ask(_hindrance, results_dir, name, code):
                if problem:
                    raise ValueError(problem)
        failed = _do(tasks, workers, progress, cluster is None)
    _look_again(results_dir)
    for what in missing.values():
        results[what.key] = load_result(what, results_dir)
    failures = []
    for key, group in groups.items():
        if any(results[what.key] is None for what in group):
            error = failed.get(str(of[key])) or RuntimeError("its result is not in results_dir")
            failures.append((group[0], error))
            _mark_failed(of[key], error)
    return results, failures, len(groups)


def _mark_failed(path: Path, error: Exception) -> None:
    """Say beside the blocks of a Run why it failed; its next attempt takes that away."""
    try:
        write_atomically(unfinished(path) / "failed.txt", f"{error}\n".encode())
    except OSError:  # the disk may be what failed
        pass


def run(what: Run, results_dir=RESULTS, device=None, progress=True, cluster=None) -> Result:
    """One number: from the store, or computed and stored. Arguments as of ``run_all``.

    Raises:
        ValueError: an argument is not of that form, or the data set's files cannot be used.
    """
    results, failures, _ = _complete([what], results_dir, device, progress, cluster)
    for _, error in failures:
        raise error
    return results[what.key]


def run_all(
    runs: Iterable[Run],
    results_dir=RESULTS,
    device: str | None = None,
    progress=True,
    cluster: str | int | Executor | None = None,
) -> pd.DataFrame:
    """Many numbers: a row per Run, in the given order, with all fields and the Result itself.

    What is missing from the store is computed, block by block; what Runs share, predictors, grid
    searches and solutions of the ODE, once.

    Args:
        results_dir: the store; a folder that all workers see.
        device: what is computed on; the GPU, if there is one, unless given.
        cluster: workers that do the work: ``None``, this process; ``"local"``, processes of this
            machine, one per GPU or else one per core; a number, as many; the address of a Dask
            scheduler, its workers; an executor of ``concurrent.futures``.

    Raises:
        ValueError: an argument is not of that form, a data set's files cannot be used, or a worker
            does not see ``results_dir``.
        RuntimeError: some Runs failed; all others are in the store.
    """
    require(isinstance(runs, Iterable), "runs", runs, "a list of Runs")
    runs = list(runs)
    results, failures, number = _complete(runs, results_dir, device, progress, cluster)
    if failures:
        named = [
            f"{_name(what)}: {str(error).rstrip('.') or type(error)}" for what, error in failures
        ]
        more = f"; and {len(named) - 5} more" if len(named) > 5 else ""
        raise RuntimeError(
            f"{len(failures)} of {number} computations failed, all others are stored: "
            f"{'; '.join(named[:5])}{more}."
        ) from failures[0][1]
    return pd.DataFrame([_row(results[what.key]) for what in runs])


def _name(what: Run) -> str:
    seed = "" if what.predictor is None else f", training seed {what.predictor['seed']}"
    return f"{what.dataset}, {what.solver}, NFE {what.nfe}{seed} ({result_path(what).name})"


def _leader(what: Run) -> Run:
    """The Run of the first metric that the same procedure measures on this data set."""
    procedure = PROCEDURES[what.metric].compute
    names = describe(what.dataset).metrics if what.metric in OF_SAMPLES else PROCEDURES
    return what.with_metric(next(n for n in names if PROCEDURES[n].compute is procedure))


def _row(result: Result) -> dict:
    row = asdict(result.run)
    row["seed"] = (row["predictor"] or {}).get("seed")
    low, high = estimate([result]).interval
    return row | {
        "value": result.value,
        "low": low,
        "high": high,
        "seconds": result.seconds,
        "nfe_counted": result.nfe,
        "result": result,
    }


def measure(planned: pd.DataFrame, **how) -> pd.DataFrame:
    """Results of a plan: its columns and ``result``; ``how`` goes to ``run_all``."""
    frame = run_all(planned["run"].tolist(), **how)
    return planned.assign(result=frame["result"].to_numpy() if len(frame) else [])
