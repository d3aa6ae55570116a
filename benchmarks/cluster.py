"""How a study speeds up with its number of workers: measured on this machine, and simulated."""

import heapq
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from amedlib.checks import require
from amedlib.files import load_tensors
from amedlib.study import costs, execute, plans, procedures, published, store
from amedlib.study.cluster import Board, local_cluster
from amedlib.study.execute import run_all
from amedlib.study.run import BLOCKS, Run
from amedlib.study.store import RESULTS, load_result, predictor_path

from . import gpu


def rows(workers=(1, 2), samples=2000, repeats=3):
    """Blocks per second of the digits with workers of one thread each; the start is not counted."""
    runs = [Run("fd", "digits_uncentred", nfe=nfe, samples=samples) for nfe in (3, 4, 5, 6)]
    seconds = {}
    for number in workers:
        with local_cluster(number, "cpu") as there, tempfile.TemporaryDirectory() as folder:
            how = {"device": "cpu", "progress": False, "cluster": there.scheduler_address}
            # Every worker has imported and loaded what it needs before the clock starts.
            run_all([replace(each, samples=200) for each in runs], Path(folder) / "first", **how)
            times = []
            for i in range(repeats):
                start = time.perf_counter()
                run_all(runs, Path(folder) / str(i), **how)
                times.append(time.perf_counter() - start)
        seconds[number] = min(times)
        yield {
            "workers": number,
            "seconds": seconds[number],
            "blocks/s": len(runs) * BLOCKS / seconds[number],
            "times one worker": seconds[workers[0]] / seconds[number],
        }


def recorded(dataset: str = "digits", results_dir=RESULTS):
    """The tasks of a whole study, and the seconds that each took where it was computed.

    A block took a tenth of what is stored of its result; parts of the ODE's solution, which stores
    no time, what `plans.accuracy_run` took per evaluation.

    Raises:
        ValueError: a result or predictor of the study is not in the store.
    """
    tasks = {}
    with tempfile.TemporaryDirectory() as empty:  # where nothing is done yet
        for what in plans.whole_study(dataset):
            tasks |= execute._tasks(execute._leader(what), Path(empty), "cpu", "simulated")
    accuracy = plans.accuracy_run(dataset)
    points = store.SOLUTION["num_steps"] - 1
    each = load_result(accuracy, results_dir).seconds / (accuracy.samples * points * 1.5)
    seconds = {}
    for key, task in tasks.items():
        finish, what = task.arguments[:2]
        if finish is execute._finish_predictor:
            seconds[key] = float(load_tensors(predictor_path(what, results_dir))[1]["seconds"])
        elif finish is execute._finish_solution_block:
            seconds[key] = each * points * what.samples / BLOCKS
        elif finish is execute._finish_solution:
            seconds[key] = 0.0
        else:
            result = load_result(what, results_dir)
            require(result is not None, "the store", f"one without {what}", "a whole study")
            split = procedures.PROCEDURES[what.metric].measure is not None
            is_block = finish is execute._finish_block
            seconds[key] = result.seconds * (1 / BLOCKS if is_block else 0.0 if split else 1.0)
    return tasks, seconds


def makespan(tasks, seconds, workers: int) -> float:
    """Seconds from the first task to the last, in the order of `study.cluster.do`."""
    number = {key: i for i, key in enumerate(tasks)}
    board, running, now = Board(tasks), [], 0.0
    while True:
        while len(running) < workers and (key := board.next()) is not None:
            heapq.heappush(running, (now + seconds[key], number[key], key))
        if not running:
            return now
        now, _, key = heapq.heappop(running)
        board.done(key)


def longest_chain(tasks, seconds) -> tuple[float, list[str]]:
    """The chain of tasks, each needed by the next, that takes longest; no cluster is faster."""
    ends: dict[str, tuple[float, list[str]]] = {}
    for key, task in tasks.items():  # what a task needs stands before it
        before = max((ends[n] for n in task.needs if n in ends), default=(0.0, []))
        ends[key] = before[0] + seconds[key], [*before[1], key]
    return max(ends.values())


def _called(task) -> str:
    finish, what = task.arguments[:2]
    if finish is execute._finish_predictor:
        training = what.training
        return f"training on {training.images:,} images, {training.num_steps} time points"
    if finish in (execute._finish_solution_block, execute._finish_solution):
        return "block of the ODE's solution"
    return "block of a Run" if procedures.PROCEDURES[what.metric].measure else what.metric


def counted(seeds=plans.SEEDS):
    """The tasks of the paper's Tables 2 to 13, and the seconds of each at ``costs.reached``.

    Evaluations and their floating point operations are counted, see `costs` and `gpu.size`; one in
    training costs what it does in sampling, Inception and LPIPS cost nothing. Data sets whose
    network `gpu.NETWORKS` does not have are left out.
    """
    rates = costs.assumed(pd.DataFrame(gpu.sizes()), costs.reached())
    tasks, seconds = {}, {}
    with tempfile.TemporaryDirectory() as empty:  # where nothing is done yet
        for number in range(2, 14):
            for dataset in published.published(f"table{number}")["dataset"].unique():
                if dataset in rates:
                    for what in costs.planned_table(number, dataset, seeds=seeds)["run"]:
                        leader = execute._leader(what)
                        tasks |= execute._tasks(leader, Path(empty), "cpu", "simulated")
    for key, task in tasks.items():
        what = task.arguments[1]
        seconds[key] = execute.evaluations_of(task) / rates[what.dataset]["sampling"]
    return tasks, seconds


def simulate(dataset: str = "digits", workers=(1, 8, 64, 512), results_dir=RESULTS):
    """Speed-up and efficiency of the whole study by the number of workers, from recorded times."""
    yield from _speed_up(f"{dataset}, recorded", *recorded(dataset, results_dir), workers)


def simulate_paper(workers=(1, 8, 64, 512)):
    """The same of the paper's tables on its own data sets, from counted operations."""
    yield from _speed_up(f"paper, counted, {costs.reached()} TFLOP/s", *counted(), workers)


def _speed_up(name, tasks, seconds, workers):
    total = sum(seconds.values())
    longest, chain = longest_chain(tasks, seconds)
    steps = [key for key in chain if seconds[key] > 0]
    named = ", then ".join(f"{_called(tasks[key])} ({seconds[key]:.0f} s)" for key in steps)
    for number in workers:
        span = makespan(tasks, seconds, number)
        yield {
            "study": name,
            "workers": number,
            "tasks": len(tasks),
            "hours": span / 3600,
            "speed-up": total / span,
            "efficiency": total / span / number,
            "shortest possible, hours": max(longest, total / number) / 3600,
            "limited by": f"longest chain: {named}" if longest > total / number else "workers",
        }
