"""A number is a Result: what determines it (Run), how it is computed, where it is kept.

``run`` returns one Result, from the store or computed; ``run_all`` does so for many and returns a
pandas frame. A finished result is one JSON file, named by a hash of its Run, and is never computed
twice; nor is a block of its samples, which is a file until the result is saved.

Where it executes, in this process, in workers or on a cluster, changes no bit of a result: blocks
are the same everywhere, they are added up in their order, and all compute in one thread, since the
number of threads changes how sums are rounded.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from amedlib import geometry
from amedlib.checks import one_of, require
from amedlib.cluster import Task, check_cluster, connect, do
from amedlib.datasets import DATA, DATASETS, Dataset, describe, load_dataset
from amedlib.files import load_tensors, save_tensors, write_atomically
from amedlib.intermediate import TimeWise
from amedlib.metrics import Moments, jackknife_error, leave_one_out, moments_distance
from amedlib.sampling import PRECISIONS, halved, in_precision, make_latents, num_steps_for, sample
from amedlib.schedules import make_schedule
from amedlib.solvers import TwoStage, make_solver
from amedlib.training import FIRST_TRAINING_SEED, Training, train

RESULTS = DATA / "results"
BLOCKS = 10  # disjoint blocks of samples, for the jackknife


# --- Run and Result -----------------------------------------------------------------------------

# The fields of Training that a Run states itself.
_SHARED = (
    *("solver", "options", "schedule", "rho", "num_steps", "sigma_min", "sigma_max"),
    *("noise_levels", "afs", "precision"),
)


@dataclass(frozen=True)
class Run:
    """Everything that determines a number.

    Attributes:
        metric: what is measured; names a procedure, see ``PROCEDURES``.
        dataset: a name that ``load_dataset`` knows.
        solver, options: as in ``make_solver``.
        schedule, rho, sigma_min, sigma_max: as in ``make_schedule``.
        noise_levels: the model's own, for the schedule ``"discrete"``.
        precision: in which the network computes, see ``in_precision``.
        nfe: network evaluations per sample; the number of time points follows from it.
        afs: analytical first step.
        r: intermediate of fixed location: a number, or one per step, or ``"searched"``: those that
            a grid search finds (the metric ``"grid_search"``) on as many samples as a predictor
            is trained with here, none of them among those that are measured.
        predictor: learned intermediate: fields of ``Training`` that are not stated here; completed
            with what its recipe says, so that the Run names every one of them. Its ``num_steps`` is
            the Run's own unless stated: that of another Run whose predictor serves here. So may
            ``trained_on``, a data set, be another than the Run's.
        samples: number of samples.
        first_seed: sample i is drawn from seed ``first_seed + i``.
        version: of the procedure; raised by hand when its meaning changes.

    Raises:
        ValueError: a field is outside its range, or the method cannot have this NFE.
    """

    metric: str = "fd"
    dataset: str = "digits"
    solver: str = "euler"
    options: dict = field(default_factory=dict)
    schedule: str = "polynomial"
    rho: float | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    noise_levels: str | None = None
    precision: str = "float32"
    nfe: int = 5
    afs: bool = False
    r: float | tuple[float, ...] | str | None = None
    predictor: dict | None = None
    samples: int = 5000
    first_seed: int = 0
    version: int | None = None

    def __post_init__(self):
        one_of("metric", self.metric, PROCEDURES)
        one_of("precision", self.precision, PRECISIONS)
        data = describe(self.dataset)
        if PROCEDURES[self.metric].compute is quality:
            one_of(f"metric of {self.dataset!r}", self.metric, data.metrics)
        if self.version is None:
            object.__setattr__(self, "version", PROCEDURES[self.metric].version)
        for name, low, high in (
            ("samples", 2 * BLOCKS, 10**8),
            ("first_seed", 0, 10**15),
            ("nfe", 1, 1000),
            ("version", 1, 1000),
        ):
            value = getattr(self, name)
            require(
                isinstance(value, int) and low <= value <= high,
                name,
                value,
                f"a whole number of at least {low} and at most {high:,}",
            )
        require(isinstance(self.options, dict), "options", self.options, "a dictionary")
        require(isinstance(self.afs, bool), "afs", self.afs, "True or False")
        require(
            self.predictor is None or isinstance(self.predictor, dict),
            "predictor",
            self.predictor,
            "None or a dictionary",
        )
        require(
            self.metric != "endpoint_error" or self.samples <= data.endpoint_samples,
            "samples",
            self.samples,
            f"at most {data.endpoint_samples} for the endpoint error of {self.dataset!r}",
        )
        require(
            self.r is None or self.predictor is None,
            "r and predictor",
            (self.r, self.predictor),
            "given one at a time",
        )
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        if self.r is not None and self.r != "searched":
            each = self.r if isinstance(self.r, tuple) else (self.r,)
            # Nearer to the ends, differences over the step drown in rounding.
            require(
                all(isinstance(r, Real) and 0.001 <= r <= 0.999 for r in each),
                "r",
                self.r,
                "strictly between 0 and 1, from 0.001 to 0.999; one number or one per step",
            )
            TimeWise(self.r).check(self.num_steps - 1)
        if self.predictor is not None:
            known = [f.name for f in fields(Training) if f.name not in _SHARED]
            for name in self.predictor:
                one_of("a field of predictor", name, [*known, "num_steps", "trained_on"])
            one_of("trained_on of predictor", self.trained_on, DATASETS)
            full = asdict(self.training)
            if full["num_steps"] != self.num_steps:
                require(
                    full["form"] != "table",
                    "num_steps of predictor",
                    full["num_steps"],
                    f"the Run's own, {self.num_steps}, in the form 'table'",
                )
                known.append("num_steps")
            predictor = {name: full[name] for name in known}
            object.__setattr__(self, "predictor", predictor | self._elsewhere)
        self.times()

    @property
    def num_steps(self) -> int:
        """Number of time points, from the NFE."""
        solver = make_solver(self.solver, **self.options)
        middle = self.r is not None or self.predictor is not None
        if isinstance(solver, TwoStage) and solver.r is None:
            require(
                middle, "r and predictor", None, f"given, one of them, for solver {self.solver!r}"
            )
        per_call = describe(self.dataset).evaluations_per_call
        return num_steps_for(self.nfe, solver, self.afs, middle, per_call)

    @property
    def training(self) -> Training:
        """The training of the predictor."""
        shared = {name: getattr(self, name) for name in _SHARED}
        stated = {name: value for name, value in self.predictor.items() if name != "trained_on"}
        return Training(**shared | stated)

    @property
    def trained_on(self) -> str:
        """The data set that the predictor was trained on."""
        return (self.predictor or {}).get("trained_on", self.dataset)

    @property
    def _elsewhere(self) -> dict:
        """That data set, if it is another one than the Run's."""
        return {} if self.trained_on == self.dataset else {"trained_on": self.trained_on}

    def times(self) -> torch.Tensor:
        """The time points [N]."""
        return self._schedule(self.num_steps)

    def refined(self, every: int) -> torch.Tensor:
        """The time points with ``every`` steps for one."""
        return self._schedule(every * (self.num_steps - 1) + 1)

    def _schedule(self, points):
        ends = self.sigma_min, self.sigma_max
        return make_schedule(self.schedule, points, *ends, self.rho, self.noise_levels)

    def search(self) -> "Run":
        """The grid search for the r of a Run whose r is ``"searched"``."""
        images = Training(**describe(self.dataset).training | {"recipe": "paper"}).images
        fields = {"metric": "grid_search", "version": None, "r": 0.5, "samples": images}
        return Run(**(asdict(self) | fields | {"first_seed": FIRST_TRAINING_SEED}))

    @property
    def key(self) -> str:
        """A hash of all fields that differ from their defaults.

        So a field that is added later leaves the results there are where they are. A default that
        is changed is found out when a result is loaded, since its file states every field.
        """
        predictor = self.predictor and _changed(self.training) | self._elsewhere
        return _hash(_changed(self) | {"metric": self.metric, "predictor": predictor})

    def with_metric(self, metric: str) -> "Run":
        """The same, measured otherwise."""
        return Run(**(asdict(self) | {"metric": metric, "version": None}))


def _changed(record) -> dict:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(record)
    }
    return {name: value for name, value in asdict(record).items() if value != defaults[name]}


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """A measured number and where it comes from.

    Attributes:
        run: what was asked for.
        value: the number.
        replicates: its values with one of the disjoint blocks of samples left out in turn; empty
            where the procedure has no sampling error.
        curves: what belongs to the number and is more than one number, as named lists.
        nfe: evaluations per sample, counted.
        seconds: of computation, the blocks' added up; without training, search and the ODE's
            solution, which Runs share.
        device, versions, fingerprint, created: where, with what, by which code and weights, when.
    """

    run: Run
    value: float
    replicates: list[float]
    curves: dict[str, list]
    nfe: int
    seconds: float
    device: str
    versions: dict[str, str]
    fingerprint: str
    created: str

    @property
    def error(self) -> float:
        """Standard error of the value from sampling (block jackknife); 0 without replicates."""
        return jackknife_error(self.replicates) if self.replicates else 0.0


# --- the store ----------------------------------------------------------------------------------


def _folder(results_dir, run: Run) -> Path:
    return Path(results_dir) / run.dataset


def result_path(run: Run, results_dir=RESULTS) -> Path:
    """Where the result of a Run is kept."""
    return _folder(results_dir, run) / f"{run.metric}-{run.key}.json"


def predictor_path(run: Run, results_dir=RESULTS) -> Path:
    """Where the predictor of a Run is kept; Runs of one training share it."""
    folder = Path(results_dir) / run.trained_on / "predictors"
    return folder / f"{_hash(_changed(run.training))}.safetensors"


def load_result(run: Run, results_dir=RESULTS) -> Result | None:
    """The stored result, or ``None``. A file that cannot be read is set aside with a warning."""
    path = result_path(run, results_dir)
    try:
        content = json.loads(path.read_bytes())
        content["run"] = Run(**content["run"])
        result = Result(**content)
        if result.run != run or not np.isfinite(result.value):
            raise ValueError("it holds the result of another run, or no number")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        aside = path.with_suffix(".corrupt")
        check_writable(path.parent)
        os.replace(path, aside)
        warnings.warn(
            f"The result file {path} cannot be used ({error}); it was set aside as {aside.name} "
            "and is computed again.",
            stacklevel=2,
        )
        return None
    return result


def save_result(result: Result, results_dir=RESULTS) -> None:
    """Write a result atomically, a field per line."""
    rows = [f'"{name}": {json.dumps(v, allow_nan=False)}' for name, v in asdict(result).items()]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    write_atomically(result_path(result.run, results_dir), text.encode())


def check_writable(results_dir) -> None:
    """Raise ``ValueError`` unless files can be made in ``results_dir``."""
    try:
        Path(results_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"results_dir must be a folder that can be written; {str(results_dir)!r} was given "
            f"({error.strerror})."
        ) from error


# --- what is the same for all results of a process -----------------------------------------------


@lru_cache
def code_fingerprint() -> str:
    """A hash of the library's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@lru_cache
def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {"python": platform.python_version()} | packages


def best_device(device: str | None) -> str:
    """The device that is asked for; with ``None`` the GPU, if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache
def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{model or platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


@contextmanager
def one_thread():
    """One thread in this process, for PyTorch and for what NumPy and SciPy call."""
    before = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


# --- procedures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a procedure returns for one metric; see ``Result``."""

    value: float
    replicates: list[float] = field(default_factory=list)
    curves: dict[str, list] = field(default_factory=dict)
    nfe: int = 0


@dataclass(frozen=True)
class Procedure:
    """How metrics are measured.

    Attributes:
        compute: ``compute(run, context, blocks)`` returns a ``Measured`` for each.
        version: see ``Run``.
        measure: ``measure(run, context)`` returns a function that takes seeds of some samples and
            returns their ``Moments`` by name, and the NFE; they are added up in blocks. ``None``:
            there are no blocks.
    """

    compute: Callable[["Run", "Context", list["Block"]], dict[str, Measured]]
    version: int
    measure: Callable[["Run", "Context"], Callable] | None = None


@dataclass(frozen=True)
class Context:
    """Where a procedure works."""

    data: Dataset
    results_dir: Path
    device: str
    progress: bool

    def denoiser(self, run: Run) -> Callable:
        return in_precision(self.data.denoiser, run.precision)

    def latents(self, seeds) -> torch.Tensor:
        return make_latents(seeds, self.data.shape, self.device)

    def labels(self, seeds) -> torch.Tensor | None:
        return self.data.labels and self.data.labels(seeds)

    def sample(
        self, run: Run, seeds, times, solver, afs=False, intermediate=None, name="samples", **rest
    ):
        """``sample`` for these seeds.

        Raises:
            ValueError: a sample is not finite; says in which step of ``name`` it ceased to be.
        """
        denoiser, latents = self.denoiser(run), self.latents(seeds)
        given = denoiser, latents, times, solver, afs, intermediate, self.labels(seeds)
        out = sample(*given, **rest)
        if not bool(torch.isfinite(out.x).all()):
            states = sample(*given, trajectory=True).trajectory
            n = int(torch.isfinite(states).flatten(1).all(1).sum())  # of N are finite
            raise ValueError(
                f"{name} must be finite; NaN or inf arose in step {n} of {len(times) - 1}, "
                f"from t = {times[n - 1]:.4g} to {times[n]:.4g}."
                if n < len(times)
                else f"{name} must be finite; NaN or inf arose once, and not when tried again."
            )
        return out

    def intermediate(self, run: Run):
        """What a Run says of the intermediate; trains the predictor if nobody has."""
        if run.r == "searched":
            _finish(run.search(), self)
            return TimeWise(load_result(run.search(), self.results_dir).curves["r"])
        if run.r is not None:
            return TimeWise(run.r)
        if run.predictor is None:
            return None
        training, data = run.training, self.data
        if run.trained_on != run.dataset:
            data = load_dataset(run.trained_on, self.device)
        with one_thread():
            return train(
                data.denoiser,
                training,
                data.shape,
                predictor_path(run, self.results_dir),
                data.distances(training.loss),
                self.device,
                self.progress,
                data.labels,
            ).to(self.device)


def _blocks(run: Run) -> list[torch.Tensor]:
    """The seeds of a Run in equal blocks."""
    seeds = torch.arange(run.first_seed, run.first_seed + run.samples)
    return list(torch.tensor_split(seeds, BLOCKS))


class Block(NamedTuple):
    """What one block of samples adds to a Run's numbers, and what it took."""

    moments: dict[str, Moments]
    nfe: int
    seconds: float
    device: str


def in_batches(seeds: list[int], batch: int, work: Callable) -> Iterator:
    """``work(part)`` of one part of the seeds after the other; halved if the memory is too small.

    Raises:
        RuntimeError: the memory does not suffice for a single sample.
    """
    first = 0
    while first < len(seeds):
        part = seeds[first : first + batch]
        try:
            found = work(part)
        except torch.OutOfMemoryError as error:
            batch = halved(len(part), "sampling", error)
            continue
        yield found
        first += len(part)


def add_up(seeds: list[int], batch: int, measure: Callable) -> tuple[dict[str, Moments], int]:
    """The moments of all samples, batch by batch, and the NFE; ``measure`` as of ``Procedure``."""
    moments: dict[str, Moments] = {}
    nfe = 0
    for found, nfe in in_batches(seeds, batch, measure):  # noqa: B007
        for name, new in found.items():
            moments[name] = moments[name] + new if name in moments else new
    return moments, nfe


def make_block(run: Run, context: Context, index: int) -> Block:
    """Measure the samples of one block."""
    measure = PROCEDURES[run.metric].measure(run, context)
    start = time.perf_counter()
    moments, nfe = add_up(_blocks(run)[index].tolist(), context.data.batch, measure)
    for name, found in moments.items():
        require(bool(np.isfinite(found.total).all()), f"{name} of samples", "NaN or inf", "finite")
    return Block(moments, nfe, time.perf_counter() - start, _device_name(context.device))


def _load_block(path: Path) -> Block | None:
    """A block that is kept; ``None`` if there is none, or none that can be read."""
    try:
        tensors, metadata = load_tensors(path)
    except ValueError:
        return None
    moments = {
        name.removesuffix("/count"): Moments(
            int(tensors[name]),
            *(tensors[name.replace("/count", part)].numpy() for part in ("/total", "/outer")),
        )
        for name in tensors
        if name.endswith("/count")
    }
    return Block(moments, **json.loads(metadata["block"]))


def _save_block(path: Path, block: Block) -> None:
    tensors = {
        f"{name}/{part}": torch.as_tensor(getattr(moments, part))
        for name, moments in block.moments.items()
        for part in ("count", "total", "outer")
    }
    about = {name: value for name, value in block._asdict().items() if name != "moments"}
    save_tensors(path, tensors, {"block": json.dumps(about)})


def _root_mean_square(moments: Moments) -> float:
    return float(np.sqrt(np.trace(moments.outer) / moments.count))


def _qualities(run: Run) -> list[str]:
    """What is said of the samples of a Run.

    The endpoint error is left out where there are more samples than the data set keeps the ODE's
    solutions for.
    """
    data = describe(run.dataset)
    few = run.samples <= data.endpoint_samples
    return [metric for metric in data.metrics if metric != "endpoint_error" or few]


def _measure_quality(run: Run, context: Context) -> Callable:
    data, metrics = context.data, _qualities(run)
    solver, times = make_solver(run.solver, **run.options), run.times()
    intermediate = context.intermediate(run)
    solution = accurate_endpoints(run, context) if "endpoint_error" in metrics else None

    def measure(seeds):
        out = context.sample(run, seeds, times, solver, run.afs, intermediate)
        found = {}
        if "fd" in metrics:
            images = data.to_images(out.x)
            found["fd"] = Moments.of(data.features(images))
        if "fd_pixels" in metrics:
            found["fd_pixels"] = Moments.of(images.flatten(1))
        if solution is not None:
            rows = [seed - run.first_seed for seed in seeds]
            distances = geometry.distance(out.x.cpu(), solution[rows])
            found["endpoint_error"] = Moments.of(distances[:, None])
        return found, out.nfe

    return measure


def quality(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
    """All that can be said of one set of samples: FD of features and of pixels, endpoint error."""
    measured = {}
    for metric in _qualities(run):
        statistic = _root_mean_square
        if metric != "endpoint_error":
            statistic = partial(moments_distance, b=context.data.reference[metric])
        value, replicates = leave_one_out([block.moments[metric] for block in blocks], statistic)
        measured[metric] = Measured(value, replicates, nfe=blocks[0].nfe)
    return measured


# The ODE's own solution. `endpoint_accuracy` measures how far it moves with half the steps.
SOLUTION = {"solver": "unipc", "options": {"order": 3, "thresholding": False}, "num_steps": 129}


def _solve(run: Run, context: Context, seeds, points: int) -> torch.Tensor:
    times = make_schedule("logsnr", points, run.sigma_min, run.sigma_max)
    solver = make_solver(SOLUTION["solver"], **SOLUTION["options"])
    return context.sample(run, seeds, times, solver, name="the ODE's accurate solutions").x


def _solution(run: Run) -> list:
    """What determines the ODE's solution from a Run's latents."""
    what = [SOLUTION, run.sigma_min, run.sigma_max, run.first_seed, run.samples]
    return what + [run.precision] * (run.precision != "float32")


def solution_path(run: Run, results_dir=RESULTS) -> Path:
    """Where the ODE's solution from a Run's latents is kept; Runs with the same latents share it.

    In half precision, whose rounding is below the solution's own accuracy (`endpoint_accuracy`);
    made in blocks, as a result is.
    """
    return _folder(results_dir, run) / "endpoints" / f"{_hash(_solution(run))}.safetensors"


def _solve_block(run: Run, context: Context, index: int) -> torch.Tensor:
    points = SOLUTION["num_steps"]

    def solve(seeds):
        return _solve(run, context, seeds, points).half().cpu()

    return torch.cat(list(in_batches(_blocks(run)[index].tolist(), context.data.batch, solve)))


def accurate_endpoints(run: Run, context: Context) -> torch.Tensor:
    """The ODE's solution at sigma_min from a Run's latents, [samples, C, H, W], float64."""
    _finish_solution(run, context)
    return load_tensors(solution_path(run, context.results_dir))[0]["x"].double()


def _measure_accuracy(run: Run, context: Context) -> Callable:
    fine, coarse = SOLUTION["num_steps"], SOLUTION["num_steps"] // 2 + 1

    def measure(seeds):
        x, y = (_solve(run, context, seeds, points) for points in (fine, coarse))
        return {"distance": Moments.of(geometry.distance(x, y)[:, None])}, fine - 1

    return measure


def endpoint_accuracy(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
    """Root mean square distance of the accurate endpoints to those with half the steps."""
    distances = [block.moments["distance"] for block in blocks]
    value, replicates = leave_one_out(distances, _root_mean_square)
    return {"endpoint_accuracy": Measured(value, replicates, nfe=blocks[0].nfe)}


def floor(run: Run, context: Context, blocks=()) -> dict[str, Measured]:
    """Distance of a random half of the real reference images to the other half, over 20 splits.

    Where moments of other real images are shipped in their place: of these to the reference.
    """
    images, held_out = context.data.real_images, context.data.held_out
    if held_out is not None:
        measured = {}
        for metric, parts in held_out.items():
            statistic = partial(moments_distance, b=context.data.reference[metric])
            curves = {"images": [sum(part.count for part in parts)]}
            measured[f"floor_{metric}"] = Measured(*leave_one_out(parts, statistic), curves)
        return measured
    require(images is not None, "dataset", run.dataset, "one that has its real images at hand")
    n = len(images) // 2
    features = {"fd": context.data.features(images), "fd_pixels": images.flatten(1)}
    measured = {}
    for metric, rows in features.items():
        values = []
        for split in range(20):
            order = torch.randperm(
                len(images), generator=torch.Generator().manual_seed(run.first_seed + split)
            )
            a, b = (Moments.of(rows[part]) for part in (order[:n], order[n : 2 * n]))
            values.append(moments_distance(a, b))
        curves = {"splits": values, "images per half": [n]}
        measured[f"floor_{metric}"] = Measured(float(np.mean(values)), curves=curves)
    return measured


def _curve_blocks(blocks, name, statistic):
    """Value and replicates of a statistic of the mean of a vector; and its sum over the blocks."""
    moments = [block.moments[name] for block in blocks]
    return *leave_one_out(moments, lambda m: float(statistic(m.mean))), _sum(moments)


def _sum(values):
    first, *rest = values
    return sum(rest, start=first)


def _deviation(moments: Moments) -> list[float]:
    """Standard deviations over samples."""
    return np.sqrt(np.diag(moments.covariance).clip(0)).tolist()


def _measure_pca(run: Run, context: Context) -> Callable:
    solver, times = make_solver(run.solver, **run.options), run.times()

    def measure(seeds):
        out = context.sample(run, seeds, times, solver, run.afs, trajectory=True)
        pca = geometry.trajectory_pca(out.trajectory)
        return {name: Moments.of(rows.T) for name, rows in pca._asdict().items()}, out.nfe

    return measure


def trajectory_pca(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
    """Figure 4: the largest relative projection error along t, in the mean over trajectories."""
    value, replicates, _ = _curve_blocks(blocks, "relative_error", np.max)
    curves = {"t": run.times().tolist()}
    for name in blocks[0].moments:
        whole = _sum(block.moments[name] for block in blocks)
        curves[name] = whole.mean.tolist()
        curves[f"{name}_sd"] = _deviation(whole)
    return {"trajectory_pca": Measured(value, replicates, curves, blocks[0].nfe)}


# The grid of Table 3: 0.02 to 0.98.
GRID = tuple(round(0.02 * i, 2) for i in range(1, 50))


def grid_search(run: Run, context: Context, blocks=()) -> dict[str, Measured]:
    """Figure 5: relative alignment with the best r of a grid, in the mean over the steps."""
    denoiser, times = context.denoiser(run), run.times()
    seeds = torch.cat(_blocks(run)).tolist()
    latents, labels = context.latents(seeds), context.labels(seeds)
    # The paper's ground truth: Heun with 80 NFE (Sec. 3.3).
    refined = run.refined(-(-40 // (run.num_steps - 1)))
    solver = make_solver(run.solver, **run.options)
    batch, found = context.data.batch, None
    while found is None:
        try:
            truth = geometry.accurate_solution(
                denoiser, latents, times, refined, labels=labels, batch=batch
            )
            found = geometry.grid_search(
                denoiser, latents, times, solver, truth, GRID, run.afs, labels, batch
            )
        except torch.OutOfMemoryError as error:
            batch = halved(batch, "the grid search", error)
    curves = {name: values.tolist() for name, values in found._asdict().items()}
    curves |= {"t": run.times().tolist(), "grid": list(GRID)}
    value = float((found.baseline - found.searched).mean())
    return {"grid_search": Measured(value, curves=curves, nfe=run.nfe)}


def _measure_local_error(run: Run, context: Context) -> Callable:
    solver, intermediate = make_solver(run.solver, **run.options), context.intermediate(run)
    times, denoiser = run.times(), context.denoiser(run)
    accurate = make_solver(SOLUTION["solver"], **SOLUTION["options"])
    refined = run.refined(40)

    def measure(seeds):
        latents, labels = context.latents(seeds), context.labels(seeds)
        truth = geometry.accurate_solution(denoiser, latents, times, refined, accurate, labels)
        errors = geometry.local_errors(denoiser, truth, times, solver, intermediate, labels)
        # Mean squares add up over batches; errors are already root mean squares of this one.
        total = len(seeds) * errors.square().cpu().numpy()
        return {"square": Moments(len(seeds), total, np.zeros(()))}, run.nfe

    return measure


def local_error(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
    """Table 1: root mean square error of one step from the solution, in the mean over the steps."""
    value, replicates, whole = _curve_blocks(blocks, "square", lambda m: np.sqrt(m).mean())
    curves = {"t": run.times().tolist(), "rms": np.sqrt(whole.mean).tolist()}
    return {"local_error": Measured(value, replicates, curves, run.nfe)}


def _measure_r(run: Run, context: Context) -> Callable:
    predictor, solver = context.intermediate(run), make_solver(run.solver, **run.options)

    def measure(seeds):
        rows = []

        def listen(*args):
            out = predictor(*args)
            rows.append(out.r.detach().reshape(-1).expand(len(seeds)))
            return out

        listen.uses_bottleneck = predictor.uses_bottleneck
        out = context.sample(run, seeds, run.times(), solver, run.afs, listen)
        return {"r": Moments.of(torch.stack(rows, dim=1))}, out.nfe

    return measure


def learned_r(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
    """Figure 7: the largest r_n over the steps, in the mean over samples; r of every step.

    Beside r stands the loss of every step, in the mean over the last ten batches of training.
    """
    log = load_tensors(predictor_path(run, context.results_dir))[0]["log"]
    value, replicates, whole = _curve_blocks(blocks, "r", np.max)
    curves = {
        "t": run.times().tolist(),
        "r": whole.mean.tolist(),
        "r_sd": _deviation(whole),
        "loss": log[-10:, :, 0].mean(0).tolist(),
    }
    return {"learned_r": Measured(value, replicates, curves, run.nfe)}


def _measure_first_slope(run: Run, context: Context) -> Callable:
    denoiser, t = context.denoiser(run), run.times()[0]

    def measure(seeds):
        x = t * context.latents(seeds).double()
        with torch.no_grad():
            slope = (x - denoiser(x, t, context.labels(seeds))) / t
        cosine = torch.cosine_similarity(slope.flatten(1), x.flatten(1))
        return {"distance": Moments.of(1 - cosine[:, None])}, 1

    return measure


def first_slope(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
    """What the analytical first step neglects: 1 - cos of the angle between the slope at t_N and
    x_N, in the mean over samples."""
    value, replicates, _ = _curve_blocks(blocks, "distance", np.max)
    return {"first_slope": Measured(value, replicates, nfe=1)}


PROCEDURES = {
    "fd": Procedure(quality, 1, _measure_quality),
    "fd_pixels": Procedure(quality, 1, _measure_quality),
    "endpoint_error": Procedure(quality, 1, _measure_quality),
    "endpoint_accuracy": Procedure(endpoint_accuracy, 1, _measure_accuracy),
    "floor_fd": Procedure(floor, 1),
    "floor_fd_pixels": Procedure(floor, 1),
    "trajectory_pca": Procedure(trajectory_pca, 1, _measure_pca),
    "grid_search": Procedure(grid_search, 1),
    "local_error": Procedure(local_error, 1, _measure_local_error),
    "learned_r": Procedure(learned_r, 1, _measure_r),
    "first_slope": Procedure(first_slope, 1, _measure_first_slope),
}


# --- running ------------------------------------------------------------------------------------

# A result, a solution of the ODE and a predictor are files that tasks make, see `_tasks`. A task is
# a function of a Run and a context that returns when its file is there, whoever made it.


def _kept(path: Path, fingerprint: str, index: int) -> Path:
    """Where the index-th block of a file is kept until the file is made.

    Blocks of other code or weights have other names: they do not mix.
    """
    origin = _hash([BLOCKS, fingerprint])
    return _unfinished(path) / f"{index}-{origin}.safetensors"


def _unfinished(path: Path) -> Path:
    """The folder of what belongs to a file that is not finished."""
    return path.with_suffix(".blocks.partial")


def _fingerprint(data: Dataset) -> str:
    return f"code {code_fingerprint()}, weights {data.fingerprint}"


def _finish_predictor(run: Run, context: Context) -> None:
    context.intermediate(run)


def _finish_solution_block(run: Run, context: Context, index: int) -> torch.Tensor | None:
    path = solution_path(run, context.results_dir)
    if path.is_file():
        return None
    kept = _kept(path, _fingerprint(context.data), index)
    try:
        return load_tensors(kept)[0]["x"]
    except ValueError:  # there is none, or none that can be read
        block = _solve_block(run, context, index)
        save_tensors(kept, {"x": block}, {})
        return block


def _finish_solution(run: Run, context: Context) -> None:
    path = solution_path(run, context.results_dir)
    blocks = [_finish_solution_block(run, context, i) for i in range(BLOCKS)]
    if not path.is_file():
        save_tensors(path, {"x": torch.cat(blocks)}, {"what": json.dumps(_solution(run))})
    shutil.rmtree(_unfinished(path), ignore_errors=True)


def _finish_block(run: Run, context: Context, index: int) -> Block | None:
    path = result_path(run, context.results_dir)
    if path.is_file():
        return None
    kept = _kept(path, _fingerprint(context.data), index)
    block = _load_block(kept)
    if block is None:
        block = make_block(run, context, index)
        _save_block(kept, block)
    return block


def _finish(run: Run, context: Context) -> None:
    """Join the blocks of a Run, of which those that are missing are made, and save its results."""
    path = result_path(run, context.results_dir)
    if load_result(run, context.results_dir) is None:
        number = BLOCKS if PROCEDURES[run.metric].measure else 0
        blocks = [_finish_block(run, context, i) for i in range(number)]
        for result in [] if path.is_file() else _results(run, context, blocks):
            save_result(result, context.results_dir)
    shutil.rmtree(_unfinished(path), ignore_errors=True)


def _results(run: Run, context: Context, blocks: list[Block]) -> list[Result]:
    """The result of a Run, and of what comes with it at no cost."""
    start = time.perf_counter()
    measured = PROCEDURES[run.metric].compute(run, context, blocks)
    seconds = time.perf_counter() - start + sum(block.seconds for block in blocks)
    for metric, found in measured.items():
        require(bool(np.isfinite(found.value)), f"the value of {metric}", found.value, "finite")
    devices = {block.device for block in blocks} or {_device_name(context.device)}
    return [
        Result(
            run.with_metric(metric),
            **asdict(found),
            seconds=round(seconds, 3),
            device=", ".join(sorted(devices)),
            versions=_versions(),
            fingerprint=_fingerprint(context.data),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for metric, found in measured.items()
    ]


def _context(run: Run, results_dir, device, progress=False) -> Context:
    device = best_device(device)
    return Context(load_dataset(run.dataset, device), Path(results_dir), device, progress)


def _work(finish: Callable, run: Run, results_dir: Path, device, *index: int) -> None:
    """What a worker is called with."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    problem = _hindrance(results_dir)
    if problem:
        raise ValueError(problem)
    _look_again(results_dir)
    finish(run, _context(run, results_dir, device), *index)


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

    def add(path, finish, *index, needs=(), priority=1):
        if not path.is_file():
            arguments = finish, what, results_dir, device, *index
            tasks[str(path)] = Task(_work, arguments, tuple(map(str, needs)), priority)
        return path

    def add_blocks(path, finish, **how):
        kept = [_kept(path, fingerprint, i) for i in range(BLOCKS)]
        return [add(each, finish, i, **how) for i, each in enumerate(kept)]

    needs, path = [], result_path(what, results_dir)
    if what.r == "searched":
        tasks |= _tasks(what.search(), results_dir, device, fingerprint)
        needs.append(result_path(what.search(), results_dir))
    if what.predictor is not None:
        needs.append(add(predictor_path(what, results_dir), _finish_predictor))
    procedure = PROCEDURES[what.metric]
    if procedure.compute is quality and "endpoint_error" in _qualities(what):
        solution = solution_path(what, results_dir)
        if not solution.is_file():
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
    context = _context(run, results_dir, device, progress)
    with one_thread():
        number = BLOCKS if PROCEDURES[run.metric].measure else 0
        return _results(run, context, [make_block(run, context, i) for i in range(number)])


def _complete(runs: list[Run], results_dir, device, progress, cluster, executor):
    """Results by key; Runs whose computation failed, with the error; and how many there were."""
    check_cluster(cluster)
    results_dir = Path(results_dir).absolute()
    results = {what.key: load_result(what, results_dir) for what in runs}
    missing = {what.key: what for what in runs if results[what.key] is None}
    if not missing:
        return results, [], 0
    check_writable(results_dir)
    # A data set whose files cannot be had is found out before any work starts.
    here = cluster is None and executor is None
    fingerprints = {}
    for name in {what.dataset for what in missing.values()}:
        data = load_dataset(name, best_device(device) if here else "cpu")
        fingerprints[name] = _fingerprint(data)
        if any(what.metric == "fd" for what in missing.values()):
            _ = data.reference
    # Runs that differ in the metric only are computed together, as the first of them.
    groups: dict[str, list[Run]] = {}
    for what in missing.values():
        groups.setdefault(_leader(what).key, []).append(what)
    tasks, of = {}, {}
    for key, group in groups.items():
        leader = _leader(group[0])
        first = group[0] if load_result(leader, results_dir) else leader
        of[key] = result_path(first, results_dir)
        tasks |= _tasks(first, results_dir, device, fingerprints[first.dataset])
    with one_thread(), connect(cluster, executor, device) as workers:
        with tempfile.NamedTemporaryFile(dir=results_dir, prefix=".seen") as mark:
            name, code = Path(mark.name).name, code_fingerprint()
            for problem in workers.ask(_hindrance, results_dir, name, code):
                if problem:
                    raise ValueError(problem)
        with tqdm(total=len(tasks), desc="blocks and trainings", disable=not progress) as bar:
            failed = do(tasks, workers, bar.update)
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
        write_atomically(_unfinished(path) / "failed.txt", f"{error}\n".encode())
    except OSError:  # the disk may be what failed
        pass


def run(
    what: Run, results_dir=RESULTS, device=None, progress=True, cluster=None, executor=None
) -> Result:
    """One number: from the store, or computed and stored. Arguments as of ``run_all``.

    Raises:
        ValueError: an argument is not of that form, or the data set's files cannot be used.
    """
    results, failures, _ = _complete([what], results_dir, device, progress, cluster, executor)
    for _, error in failures:
        raise error
    return results[what.key]


def run_all(
    runs: Sequence[Run],
    results_dir=RESULTS,
    device: str | None = None,
    executor: Executor | None = None,
    progress=True,
    cluster: str | int | None = None,
) -> pd.DataFrame:
    """Many numbers: a row per Run, in the given order, with all fields and the Result itself.

    What is missing from the store is computed, block by block; what Runs share, predictors, grid
    searches and solutions of the ODE, once.

    Args:
        results_dir: the store; a folder that all workers see.
        device: what is computed on; the GPU, if there is one, unless given.
        executor: any ``concurrent.futures`` executor that does the work.
        cluster: workers that do the work: ``None``, this process; ``"local"``, processes of this
            machine, one per GPU or else one per core; a number, as many; the address of a Dask
            scheduler, its workers.

    Raises:
        ValueError: an argument is not of that form, a data set's files cannot be used, or a worker
            does not see ``results_dir``.
        RuntimeError: some Runs failed; all others are in the store.
    """
    runs = list(runs)
    results, failures, number = _complete(runs, results_dir, device, progress, cluster, executor)
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
    names = describe(what.dataset).metrics if procedure is quality else PROCEDURES
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


# --- uncertainty --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over training seeds, with its two sources of uncertainty kept apart.

    Attributes:
        value: the mean.
        sampling_error: standard error from the finite number of samples (block jackknife).
        training_error: standard error from the finite number of trained predictors; ``None`` where
            nothing was trained, NaN where there is one seed only and it is not known.
        seeds: number of trained predictors, at least 1.
        samples: samples per number.
        pooled: degrees of freedom of a training error that was taken from other predictors;
            ``None`` where it was not.
    """

    value: float
    sampling_error: float
    training_error: float | None
    seeds: int
    samples: int
    pooled: int | None = None

    @property
    def _variances(self) -> tuple[float, float]:
        """Of sampling and of training; an unknown one is left out."""
        training = (self.training_error or 0.0) ** 2
        return self.sampling_error**2, 0.0 if np.isnan(training) else training

    @property
    def degrees_of_freedom(self) -> float:
        """After Welch and Satterthwaite; infinite for a value without uncertainty."""
        a, b = self._variances
        of_training = self.pooled or self.seeds - 1
        below = a**2 / (BLOCKS - 1) + (b**2 / of_training if b else 0.0)
        return (a + b) ** 2 / below if below else np.inf

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval (Student's t)."""
        half = stats.t.ppf(0.975, self.degrees_of_freedom) * np.sqrt(sum(self._variances))
        return float(self.value - half), float(self.value + half)

    @property
    def p_value(self) -> float:
        """Of the hypothesis that the true value is zero: two-sided, Student's t.

        One where the noise of training is not known; zero for a value without uncertainty.
        """
        if self.training_error is not None and np.isnan(self.training_error):
            return 1.0
        error = np.sqrt(sum(self._variances))
        if error == 0:
            return float(self.value == 0)
        return float(2 * stats.t.sf(abs(self.value) / error, self.degrees_of_freedom))


def _combine(groups: list[list[Result]], weights: list[float], noise=None) -> Estimate:
    everything = [result for group in groups for result in group]
    samples = {result.run.samples for result in everything}
    require(
        len(samples) == 1, "the numbers of samples", sorted(samples), "the same, to be compared"
    )
    means = [np.mean([result.value for result in group]) for group in groups]
    replicates = sum(
        weight * np.mean([result.replicates for result in group], axis=0)
        for weight, group in zip(weights, groups, strict=True)
    )
    variance, seeds, pooled = 0.0, [], []
    for weight, group in zip(weights, groups, strict=True):
        if group[0].run.predictor is None:
            continue
        seeds.append(len(group))
        values = [result.value for result in group]
        known = noise(group[0].run) if noise and len(group) == 1 else None
        if known:
            spread = (known[0] * values[0]) ** 2
            pooled.append(known[1])
        else:
            spread = np.var(values, ddof=1) / len(values) if len(values) > 1 else np.nan
        variance += weight**2 * spread
    few = [n - 1 for n in seeds if n > 1]
    return Estimate(
        float(np.dot(weights, means)),
        jackknife_error(replicates) if np.size(replicates) else 0.0,
        float(np.sqrt(variance)) if seeds else None,
        min(seeds, default=1),
        samples.pop(),
        min(pooled + few) if pooled else None,
    )


def estimate(results: list[Result], noise=None) -> Estimate:
    """The mean of results that differ in the training seed only; ``noise`` as in ``difference``."""
    return _combine([results], [1], noise)


def difference(
    a: list[Result],
    b: list[Result],
    factor: float = 1.0,
    noise: Callable[[Run], tuple[float, int] | None] | None = None,
) -> Estimate:
    """Paired difference a - factor b on the same latents; each a list over training seeds.

    Args:
        noise: for a predictor that was trained once, its relative standard deviation over training
            seeds and the degrees of freedom of that number, from elsewhere; ``None``: not known.

    Raises:
        ValueError: the numbers of samples or the latents differ.
    """
    latents = {(r.run.dataset, r.run.metric, r.run.first_seed) for r in a + b}
    require(
        len(latents) == 1,
        "dataset, metric and latents",
        sorted(latents),
        "the same for a paired difference",
    )
    return _combine([a, b], [1, -factor], noise)
