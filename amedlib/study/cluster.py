"""Who does the work: this process, processes of this machine, or the workers of a Dask cluster.

Nothing here knows what is computed. ``do`` is given tasks that name the tasks they need; what they
find out they write to files, so all that travels between processes is which task is done.
"""

import heapq
import logging
import os
import queue
import re
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from amedlib.checks import require

# For processes that compute: a thread each, set before they import torch. And memory that is given
# back to the system after every layer, and taken again for the next, costs a quarter of the time.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}
PATIENCE = "30s"  # for a scheduler to answer


@dataclass(frozen=True)
class Task:
    """A piece of work.

    Attributes:
        function, arguments: what is called; to reach another process, both must pickle.
        needs: keys of the tasks that must be done before; those that ``do`` does not know are.
        priority: a task of a higher one goes first, where the executor knows priorities.
    """

    function: Callable
    arguments: tuple = ()
    needs: tuple[str, ...] = ()
    priority: int = 0


@dataclass(frozen=True)
class Workers:
    """Those who do the work.

    Attributes:
        submit: a task to a ``Future``.
        ask: calls a function with arguments in every worker there is, and returns what they say.
    """

    submit: Callable[[Task], Future]
    ask: Callable[..., list]


def check_cluster(cluster) -> None:
    """Raise ``ValueError`` unless ``cluster`` is what ``connect`` can connect to."""
    number = isinstance(cluster, int) and not isinstance(cluster, bool) and cluster >= 1
    address = isinstance(cluster, str) and re.fullmatch(r"\w+://\S+", cluster)
    require(
        cluster is None or cluster == "local" or number or bool(address),
        "cluster",
        cluster,
        "None (this process), 'local', a number of workers on this machine, or the address of a "
        "Dask scheduler such as 'tcp://host:8786'",
    )


@contextmanager
def connect(cluster=None, executor: Executor | None = None, device=None) -> Iterator[Workers]:
    """The workers of a cluster, of an executor or, with neither, this process.

    Args:
        cluster: ``"local"`` starts workers on this machine, one per GPU if there are GPUs, or else
            one per core; a number, as many; the address of a Dask scheduler, its own.
        device: what the workers compute on; decides which ``"local"`` starts.

    Raises:
        ValueError: there is no scheduler at that address.
        ImportError: Dask is not installed.
    """
    check_cluster(cluster)
    if cluster is None:
        yield _of_executor(executor) if executor else Workers(_here, lambda f, *args: [f(*args)])
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            "A cluster needs the packages of the cluster extra: pip install 'amedlib[cluster]'."
        ) from error
    if not isinstance(cluster, str) or cluster == "local":
        with (
            local_cluster(None if cluster == "local" else cluster, device) as there,
            Client(there) as it,
        ):
            yield _of_client(it)
        return
    try:
        client = Client(cluster, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cluster must be the address of a Dask scheduler; nothing that is one answered at "
            f"{cluster!r} ({type(error).__name__})."
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            tqdm.write(f"Waiting for the first worker of {cluster}.")
            client.wait_for_workers(1)
        yield _of_client(client)


def _here(task: Task) -> Future:
    future = Future()
    try:
        future.set_result(task.function(*task.arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def _of_executor(executor) -> Workers:
    return Workers(
        lambda task: executor.submit(task.function, *task.arguments),
        lambda function, *args: [executor.submit(function, *args).result()],
    )


def _of_client(client) -> Workers:
    executor = client.get_executor(pure=False)
    return Workers(
        lambda task: executor.submit(task.function, *task.arguments, priority=task.priority),
        lambda function, *args: list(client.run(function, *args).values()),
    )


@contextmanager
def local_cluster(workers: int | None, device: str | None):
    """A Dask cluster of this machine; a worker that dies is started again."""
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    host = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": ":0"}
    # Without a limit of memory: beyond one, Dask would pause or kill workers.
    common = host | {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    spec = {}
    for i in range(workers or gpus or dask.system.CPU_COUNT):
        env = {"CUDA_VISIBLE_DEVICES": _card(i % gpus)} if gpus > 1 else {}
        spec[i] = {"cls": Nanny, "options": common | {"env": env}}
    options = host | {"port": 0}
    scheduler = {"cls": Scheduler, "options": options}
    settings = {
        "distributed.nanny.pre-spawn-environ": ENVIRONMENT,
        # A task that outlives two workers is tried once more by itself, see `do`.
        "distributed.scheduler.allowed-failures": 1,
        # On a busy machine it takes its time until a worker is there again.
        "distributed.deploy.lost-worker-timeout": "1 hour",
    }
    with (
        dask.config.set(settings),
        SpecCluster(workers=spec, scheduler=scheduler, silence_logs=logging.CRITICAL) as there,
    ):
        yield there


def _card(index: int) -> str:
    """The index-th of the GPUs that this process sees, by its name for a child."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def _died(error) -> bool:
    """Whether Dask gave a task up because the workers that tried it died."""
    return type(error).__name__ == "KilledWorker"  # without importing it


def links(tasks: dict[str, Task]) -> tuple[dict[str, set[str]], dict[str, list[str]]]:
    """Of every task those that it needs and that are not done, and those that need it."""
    missing = {key: {n for n in task.needs if n in tasks} for key, task in tasks.items()}
    dependents = {key: [] for key in tasks}
    for key, needs in missing.items():
        for need in needs:
            dependents[need].append(key)
    return missing, dependents


def do(tasks: dict[str, Task], workers: Workers, done: Callable[[], None]) -> dict[str, Exception]:
    """Do all tasks, each when those it needs are done; ``done()`` is called after each.

    When a task fails, those that need it are not begun, nor what is needed by nothing else; all
    others go on. A worker that dies takes along what waits for its turn there: a task that Dask
    gave up for that is tried again at the end, by itself, and has failed if that kills too.

    Returns:
        The keys of tasks that failed, or need one that did, with the error.
    """
    number = {key: i for i, key in enumerate(tasks)}
    missing, dependents = links(tasks)
    ready, running, alone, tried, failed = [], {}, [], set(), {}
    finished: queue.SimpleQueue = queue.SimpleQueue()

    def enter(key):
        heapq.heappush(ready, (-tasks[key].priority, number[key], key))

    def wanted(key):
        of = dependents[key]
        return key not in failed and (not of or any(each not in failed for each in of))

    def fail(key, error):
        failed[key] = error
        for each in dependents[key]:
            if each not in failed:
                fail(each, error)

    def start():
        key = heapq.heappop(ready)[-1]
        if wanted(key):
            running[key] = workers.submit(tasks[key])
            running[key].add_done_callback(lambda _: finished.put(key))

    def end(key):
        future = running.pop(key)
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            done()
            for each in dependents[key]:
                missing[each].discard(key)
                if not missing[each]:
                    enter(each)
        elif not wanted(key):
            pass  # whatever became of it
        elif _died(error) and key not in tried:
            alone.append(key)
        else:
            if _died(error):
                error = RuntimeError("the process that computes it dies, every time")
            elif isinstance(error, CancelledError):
                error = RuntimeError("it was cancelled, as when the scheduler is lost")
            fail(key, error)
            for each in running:
                if not wanted(each):
                    running[each].cancel()

    for key in tasks:
        if not missing[key]:
            enter(key)
    try:
        while ready or running or alone:
            if not ready and not running:
                tried.add(alone[0])
                enter(alone.pop(0))
            if ready:
                start()
            # What is done is noted between two submissions, and awaited when nothing can start.
            while running and (not ready or not finished.empty()):
                end(finished.get())
    finally:
        for future in running.values():
            future.cancel()
    return failed
