"""Who does the work: this process, processes of this machine, or the workers of a Dask cluster.

Nothing here knows what is computed. ``do`` is given tasks that name the tasks they need; what they
find out they write to files, so all that travels between processes is which task is done.
"""

import heapq
import logging
import math
import os
import queue
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter

import torch
from tqdm import tqdm

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
        priority: a task of a higher one goes first.
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
        room: how many tasks to hand over at a time. One that waits at a worker would go down with
            it, and be taken for what killed it.
    """

    submit: Callable[[Task], Future]
    ask: Callable[..., list]
    room: Callable[[], float] = lambda: math.inf


def check_cluster(cluster) -> None:
    """Raise ``ValueError`` unless ``cluster`` is what ``connect`` can connect to."""
    if isinstance(cluster, Executor):
        return
    number = isinstance(cluster, int) and not isinstance(cluster, bool) and cluster >= 1
    address = isinstance(cluster, str) and re.fullmatch(r"\w+://\S+", cluster)
    require(
        cluster is None or cluster == "local" or number or bool(address),
        "cluster",
        cluster,
        "None (this process), 'local', a number of workers on this machine, the address of a Dask "
        "scheduler such as 'tcp://host:8786', or an executor of concurrent.futures",
    )


@contextmanager
def connect(cluster=None, device=None) -> Iterator[Workers]:
    """The workers of a cluster; this process with ``None``.

    Args:
        cluster: ``"local"`` starts workers on this machine, one per GPU if there are GPUs, or else
            one per core; a number, as many; the address of a Dask scheduler, its own; an executor
            of ``concurrent.futures``, what it has.
        device: what the workers compute on; decides which ``"local"`` starts.

    Raises:
        ValueError: there is no scheduler at that address.
        ImportError: Dask is not installed.
    """
    check_cluster(cluster)
    if cluster is None:
        yield Workers(_here, lambda function, *args: [function(*args)])
        return
    if isinstance(cluster, Executor):
        yield Workers(
            lambda task: cluster.submit(task.function, *task.arguments),
            lambda function, *args: [cluster.submit(function, *args).result()],
        )
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
            tqdm.write(f"Waiting for the first worker of {cluster}.", file=sys.stderr)
            client.wait_for_workers(1)
        yield _of_client(client)


def _here(task: Task) -> Future:
    future = Future()
    try:
        future.set_result(task.function(*task.arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def _of_client(client) -> Workers:
    executor = client.get_executor(pure=False)
    return Workers(
        lambda task: executor.submit(task.function, *task.arguments),
        lambda function, *args: list(client.run(function, *args).values()),
        lambda: max(1, sum(client.nthreads().values())),
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
        # A task whose worker dies is tried once more by itself, see `do`.
        "distributed.scheduler.allowed-failures": 0,
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


class Board:
    """What of many tasks is ready, in the order in which it is begun, and what has failed.

    Args:
        tasks: by their keys.
    """

    def __init__(self, tasks: dict[str, Task]):
        self.tasks = tasks
        needs = {key: [n for n in task.needs if n in tasks] for key, task in tasks.items()}
        self.dependents = {key: [] for key in tasks}
        for key, needed in needs.items():
            for each in needed:
                self.dependents[each].append(key)
        self.failed: dict[str, Exception] = {}
        self._number = {key: i for i, key in enumerate(tasks)}
        self._sorter = TopologicalSorter(needs)
        self._sorter.prepare()
        self._ready = []
        self._refill()

    def _refill(self):
        for key in self._sorter.get_ready():
            self.enter(key)

    def enter(self, key: str) -> None:
        """Have a task begun when its turn comes."""
        heapq.heappush(self._ready, (-self.tasks[key].priority, self._number[key], key))

    def next(self) -> str | None:
        """The task to begin next, which is then no longer ready."""
        return heapq.heappop(self._ready)[-1] if self._ready else None

    def done(self, key: str) -> None:
        """What waited for this task alone is ready."""
        self._sorter.done(key)
        self._refill()

    def wanted(self, key: str) -> bool:
        """Whether a task, or something that needs it, has not failed."""
        of = self.dependents[key]
        return key not in self.failed and (not of or any(each not in self.failed for each in of))

    def share(self, a: str, b: str) -> bool:
        """Whether one task needs both, as a result needs its blocks."""
        return not set(self.dependents[a]).isdisjoint(self.dependents[b])

    def fail(self, key: str, error: Exception) -> None:
        """A task has failed, and with it all that need it."""
        self.failed[key] = error
        for each in self.dependents[key]:
            if each not in self.failed:
                self.fail(each, error)


def _what_failed(future: Future) -> Exception | None:
    error = CancelledError() if future.cancelled() else future.exception()
    if isinstance(error, CancelledError):
        return RuntimeError("it was cancelled, as when the scheduler is lost")
    return error


class _Course:
    """The course of the work: which tasks run, which are suspected of killing who does them.

    Args:
        done: called with the key of a task that is done.
    """

    def __init__(self, tasks: dict[str, Task], workers: Workers, done: Callable[[str], None]):
        self.tasks, self.workers, self.done = tasks, workers, done
        self.board, self.running = Board(tasks), {}
        self.suspects, self.held, self.tried = [], [], set()
        self.finished: queue.SimpleQueue = queue.SimpleQueue()

    def start(self, key: str) -> None:
        """Hand a task over, if something still wants it."""
        if self.board.wanted(key):
            self.running[key] = self.workers.submit(self.tasks[key])
            self.running[key].add_done_callback(lambda _: self.finished.put(key))

    def begin(self, key: str) -> None:
        """Start a task, or hold it while what the same result needs is suspected."""
        if any(self.board.share(key, suspect) for suspect in self.suspects):
            self.held.append(key)
        else:
            self.start(key)

    def end_next(self) -> None:
        """Wait for a task to end, and note what became of it."""
        key = self.finished.get()
        error = _what_failed(self.running.pop(key))
        if error is None:
            self.done(key)
            self.board.done(key)
        elif not self.board.wanted(key):
            pass  # whatever became of it
        elif _died(error) and key not in self.tried:
            self.suspects.append(key)
        else:
            if _died(error):
                error = RuntimeError("the process that computes it dies, every time")
            self.board.fail(key, error)
            for each in self.running:
                if not self.board.wanted(each):
                    self.running[each].cancel()

    def try_suspect(self) -> None:
        """Try the first suspect by itself; then what was held for it may begin."""
        self.tried.add(key := self.suspects.pop(0))
        self.start(key)
        if self.running:
            self.end_next()
        while self.held:
            self.board.enter(self.held.pop())


def do(
    tasks: dict[str, Task], workers: Workers, done: Callable[[str], None]
) -> dict[str, Exception]:
    """Do all tasks, each when those it needs are done; ``done(key)`` is called after each.

    When a task fails, those that need it are not begun, nor what is needed by nothing else; all
    others go on. A task that Dask gave up because its worker died is tried again at the end, by
    itself, and has failed if that kills too; what is needed for the same waits for that.

    Returns:
        The keys of tasks that failed, or need one that did, with the error.
    """
    course = _Course(tasks, workers, done)
    try:
        while True:
            key = course.board.next() if len(course.running) < workers.room() else None
            if key is not None:
                course.begin(key)
            elif not course.running and course.suspects:
                course.try_suspect()
            elif not course.running:
                return course.board.failed
            else:
                course.end_next()
            # What is done is noted between two submissions, and awaited when nothing can start.
            while not course.finished.empty():
                course.end_next()
    finally:
        for future in course.running.values():
            future.cancel()
