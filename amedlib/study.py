"""A number is a Result: what determines it (Run), how it is computed, where it is kept.

``run`` returns one Result, from the store or computed; ``run_all`` does so for many, in this
process or through any ``concurrent.futures`` executor, and returns a pandas frame. A finished
result is one JSON file, named by a hash of its Run, and is never computed twice.
"""

import hashlib
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm.auto import tqdm

from amedlib import geometry
from amedlib.checks import one_of, require
from amedlib.datasets import DATA, Dataset, describe, load_dataset
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
            the Run's own unless stated: that of another Run whose predictor serves here.
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
        for name, low in (("samples", 2 * BLOCKS), ("first_seed", 0)):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= low,
                name,
                value,
                f"a whole number of at least {low}",
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
            TimeWise(self.r).check(self.num_steps - 1)
        if self.predictor is not None:
            known = [f.name for f in fields(Training) if f.name not in _SHARED]
            for name in self.predictor:
                one_of("a field of predictor", name, [*known, "num_steps"])
            full = asdict(self.training)
            if full["num_steps"] != self.num_steps:
                require(
                    full["form"] != "table",
                    "num_steps of predictor",
                    full["num_steps"],
                    f"the Run's own, {self.num_steps}, in the form 'table'",
                )
                known.append("num_steps")
            object.__setattr__(self, "predictor", {name: full[name] for name in known})
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
        return Training(**shared | self.predictor)

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
        predictor = self.predictor and _changed(self.training)
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
        seconds: wall time of the procedure, without training.
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
    return _folder(results_dir, run) / "predictors" / f"{_hash(_changed(run.training))}.safetensors"


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
        os.replace(path, aside)
        warnings.warn(
            f"The result file {path} cannot be used ({error}); it was set aside as {aside.name} "
            "and is computed again.",
            stacklevel=2,
        )
        return None
    return result


def save_result(result: Result, results_dir=RESULTS) -> None:
    """Write a result atomically."""
    text = json.dumps(asdict(result), indent=1, allow_nan=False)
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
    """How metrics are measured: ``compute(run, context)`` returns a ``Measured`` for each."""

    compute: Callable[["Run", "Context"], dict[str, Measured]]
    version: int


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

    def intermediate(self, run: Run):
        """What a Run says of the intermediate; trains the predictor if nobody has."""
        if run.r == "searched":
            found = load_result(run.search(), self.results_dir)
            if found is None:
                (found,) = compute(run.search(), self.results_dir, self.device, self.progress)
                save_result(found, self.results_dir)
            return TimeWise(found.curves["r"])
        if run.r is not None:
            return TimeWise(run.r)
        if run.predictor is None:
            return None
        training = run.training
        return train(
            self.data.denoiser,
            training,
            self.data.shape,
            predictor_path(run, self.results_dir),
            self.data.distances(training.loss),
            self.device,
            self.progress,
            self.data.labels,
        ).to(self.device)


def _blocks(run: Run) -> list[torch.Tensor]:
    """The seeds of a Run in equal blocks."""
    seeds = torch.arange(run.first_seed, run.first_seed + run.samples)
    return list(torch.tensor_split(seeds, BLOCKS))


def _by_block(run: Run, context: Context, measure, path: Path | None = None) -> list[dict]:
    """``measure(seeds) -> {name: Moments}`` over all samples, batch by batch, added up per block.

    With ``path``, finished blocks are kept there, and a killed run goes on from them. A batch that
    the memory does not suffice for is halved.
    """
    done = _load_blocks(path) if path else []
    seeds_of = _blocks(run)
    batch = context.data.batch
    label = f"{run.dataset}, {run.solver}, NFE {run.nfe}"
    with tqdm(total=run.samples, desc=label, leave=False, disable=not context.progress) as bar:
        bar.update(sum(len(seeds) for seeds in seeds_of[: len(done)]))
        for seeds in seeds_of[len(done) :]:
            block, first = {}, 0
            while first < len(seeds):
                part = seeds[first : first + batch].tolist()
                try:
                    found = measure(part)
                except torch.OutOfMemoryError as error:
                    batch = halved(len(part), "sampling", error)
                    continue
                for name, moments in found.items():
                    block[name] = block[name] + moments if name in block else moments
                first += len(part)
                bar.update(len(part))
            done.append(block)
            if path:
                _save_blocks(path, done)
    return done


def _save_blocks(path, blocks):
    tensors = {
        f"{i}/{name}/{part}": torch.as_tensor(getattr(moments, part))
        for i, block in enumerate(blocks)
        for name, moments in block.items()
        for part in ("count", "total", "outer")
    }
    save_tensors(path, tensors, {})


def _load_blocks(path) -> list[dict]:
    if not path.is_file():
        return []
    tensors, _ = load_tensors(path)
    blocks: dict[int, dict] = {}
    for name in (name for name in tensors if name.endswith("/count")):
        index, metric, _ = name.split("/")
        total, outer = (tensors[f"{index}/{metric}/{part}"].numpy() for part in ("total", "outer"))
        blocks.setdefault(int(index), {})[metric] = Moments(int(tensors[name]), total, outer)
    return [blocks[i] for i in range(len(blocks))]


def _root_mean_square(moments: Moments) -> float:
    return float(np.sqrt(np.trace(moments.outer) / moments.count))


def quality(run: Run, context: Context) -> dict[str, Measured]:
    """All that can be said of one set of samples: FD of features and of pixels, endpoint error.

    The endpoint error is left out where there are more samples than the data set keeps the ODE's
    solutions for.
    """
    data, nfe = context.data, run.nfe
    solver, times = make_solver(run.solver, **run.options), run.times()
    metrics = [
        metric
        for metric in data.metrics
        if metric != "endpoint_error" or run.samples <= data.endpoint_samples
    ]
    intermediate = context.intermediate(run)
    solution = accurate_endpoints(run, context) if "endpoint_error" in metrics else None

    def measure(seeds):
        nonlocal nfe
        out = sample(
            context.denoiser(run),
            context.latents(seeds),
            times,
            solver,
            run.afs,
            intermediate,
            context.labels(seeds),
        )
        require(bool(torch.isfinite(out.x).all()), "samples", "NaN or inf", "finite")
        nfe = out.nfe
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
        return found

    unfinished = result_path(run, context.results_dir).with_suffix(".partial")
    blocks = _by_block(run, context, measure, unfinished)
    measured = {}
    for metric in metrics:
        statistic = _root_mean_square
        if metric != "endpoint_error":
            statistic = partial(moments_distance, b=data.reference[metric])
        value, replicates = leave_one_out([block[metric] for block in blocks], statistic)
        measured[metric] = Measured(value, replicates, nfe=nfe)
    unfinished.unlink(missing_ok=True)
    return measured


# The ODE's own solution. `endpoint_accuracy` measures how far it moves with half the steps.
SOLUTION = {"solver": "unipc", "options": {"order": 3, "thresholding": False}, "num_steps": 129}


def _solve(run: Run, context: Context, seeds, points: int) -> torch.Tensor:
    times = make_schedule("logsnr", points, run.sigma_min, run.sigma_max)
    solver = make_solver(SOLUTION["solver"], **SOLUTION["options"])
    denoiser, latents = context.denoiser(run), context.latents(seeds)
    return sample(denoiser, latents, times, solver, labels=context.labels(seeds)).x


def accurate_endpoints(run: Run, context: Context) -> torch.Tensor:
    """The ODE's solution at sigma_min from a Run's latents, [samples, C, H, W], float64.

    Made once per latent set and kept, in single precision, beside the results.
    """
    what = [SOLUTION, run.sigma_min, run.sigma_max, run.first_seed, run.samples]
    what += [run.precision] * (run.precision != "float32")
    folder = _folder(context.results_dir, run) / "endpoints"
    path = folder / f"{_hash(what)}.safetensors"
    if not path.is_file():
        parts = []
        seeds = torch.cat(_blocks(run)).split(context.data.batch)
        for part in tqdm(seeds, desc="the ODE's solution", disable=not context.progress):
            parts.append(_solve(run, context, part.tolist(), SOLUTION["num_steps"]).float().cpu())
        save_tensors(path, {"x": torch.cat(parts)}, {"what": json.dumps(what)})
    return load_tensors(path)[0]["x"].double()


def endpoint_accuracy(run: Run, context: Context) -> dict[str, Measured]:
    """Root mean square distance of the accurate endpoints to those with half the steps."""
    fine, coarse = SOLUTION["num_steps"], SOLUTION["num_steps"] // 2 + 1

    def measure(seeds):
        x, y = (_solve(run, context, seeds, points) for points in (fine, coarse))
        return {"distance": Moments.of(geometry.distance(x, y)[:, None])}

    blocks = _by_block(run, context, measure)
    value, replicates = leave_one_out([b["distance"] for b in blocks], _root_mean_square)
    return {"endpoint_accuracy": Measured(value, replicates, nfe=fine - 1)}


def floor(run: Run, context: Context) -> dict[str, Measured]:
    """Distance of a random half of the real reference images to the other half, over 20 splits."""
    images = context.data.real_images
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
    """Value and replicates of a statistic of the mean of a vector."""
    return leave_one_out([b[name] for b in blocks], lambda m: float(statistic(m.mean)))


def trajectory_pca(run: Run, context: Context) -> dict[str, Measured]:
    """Figure 4: the largest relative projection error along t, in the mean over trajectories."""
    solver, times = make_solver(run.solver, **run.options), run.times()
    nfe = run.nfe

    def measure(seeds):
        nonlocal nfe
        out = sample(
            context.denoiser(run),
            context.latents(seeds),
            times,
            solver,
            run.afs,
            labels=context.labels(seeds),
            trajectory=True,
        )
        nfe = out.nfe
        pca = geometry.trajectory_pca(out.trajectory)
        return {name: Moments.of(rows.T) for name, rows in pca._asdict().items()}

    blocks = _by_block(run, context, measure)
    value, replicates = _curve_blocks(blocks, "relative_error", np.max)
    curves = {"t": times.tolist()}
    for name in blocks[0]:
        whole = _sum(b[name] for b in blocks)
        curves[name] = whole.mean.tolist()
        curves[f"{name}_sd"] = np.sqrt(np.diag(whole.covariance).clip(0)).tolist()
    return {"trajectory_pca": Measured(value, replicates, curves, nfe)}


def _sum(values):
    first, *rest = values
    return sum(rest, start=first)


# The grid of Table 3: 0.02 to 0.98.
GRID = tuple(round(0.02 * i, 2) for i in range(1, 50))


def grid_search(run: Run, context: Context) -> dict[str, Measured]:
    """Figure 5: relative alignment with the best r of a grid, in the mean over the steps."""
    denoiser, times = context.denoiser(run), run.times()
    seeds = torch.cat(_blocks(run)).tolist()
    latents, labels = context.latents(seeds), context.labels(seeds)
    # The paper's ground truth: Heun with 80 NFE (Sec. 3.3).
    refined = run.refined(-(-40 // (run.num_steps - 1)))
    truth = geometry.accurate_solution(
        denoiser, latents, times, refined, labels=labels, batch=context.data.batch
    )
    solver = make_solver(run.solver, **run.options)
    found = geometry.grid_search(denoiser, latents, times, solver, truth, GRID, run.afs, labels)
    curves = {name: values.tolist() for name, values in found._asdict().items()}
    curves |= {"t": run.times().tolist(), "grid": list(GRID)}
    value = float((found.baseline - found.searched).mean())
    return {"grid_search": Measured(value, curves=curves, nfe=run.nfe)}


def local_error(run: Run, context: Context) -> dict[str, Measured]:
    """Table 1: root mean square error of one step from the solution, in the mean over the steps."""
    solver, intermediate = make_solver(run.solver, **run.options), context.intermediate(run)
    times, denoiser = run.times(), context.denoiser(run)
    accurate = make_solver(SOLUTION["solver"], **SOLUTION["options"])
    refined = run.refined(40)

    def measure(seeds):
        latents, labels = context.latents(seeds), context.labels(seeds)
        truth = geometry.accurate_solution(denoiser, latents, times, refined, accurate, labels)
        errors = geometry.local_errors(denoiser, truth, times, solver, intermediate, labels)
        # Mean squares add up over batches; errors are already root mean squares of this one.
        return {
            "square": Moments(len(seeds), len(seeds) * errors.square().cpu().numpy(), np.zeros(()))
        }

    blocks = _by_block(run, context, measure)
    value, replicates = _curve_blocks(blocks, "square", lambda square: np.sqrt(square).mean())
    whole = _sum(b["square"] for b in blocks)
    curves = {"t": times.tolist(), "rms": np.sqrt(whole.mean).tolist()}
    return {"local_error": Measured(value, replicates, curves, run.nfe)}


def learned_r(run: Run, context: Context) -> dict[str, Measured]:
    """Figure 7: the largest r_n over the steps, in the mean over samples; r of every step.

    Beside r stands the loss of every step, in the mean over the last ten batches of training.
    """
    predictor, solver = context.intermediate(run), make_solver(run.solver, **run.options)
    log = load_tensors(predictor_path(run, context.results_dir))[0]["log"]

    def measure(seeds):
        rows = []

        def listen(*args):
            out = predictor(*args)
            rows.append(out.r.detach().reshape(-1).expand(len(seeds)))
            return out

        listen.uses_bottleneck = predictor.uses_bottleneck
        sample(
            context.denoiser(run),
            context.latents(seeds),
            run.times(),
            solver,
            run.afs,
            listen,
            context.labels(seeds),
        )
        return {"r": Moments.of(torch.stack(rows, dim=1))}

    blocks = _by_block(run, context, measure)
    value, replicates = _curve_blocks(blocks, "r", np.max)
    whole = _sum(b["r"] for b in blocks)
    curves = {
        "t": run.times().tolist(),
        "r": whole.mean.tolist(),
        "r_sd": np.sqrt(np.diag(whole.covariance).clip(0)).tolist(),
        "loss": log[-10:, :, 0].mean(0).tolist(),
    }
    return {"learned_r": Measured(value, replicates, curves, run.nfe)}


PROCEDURES = {
    "fd": Procedure(quality, version=1),
    "fd_pixels": Procedure(quality, version=1),
    "endpoint_error": Procedure(quality, version=1),
    "endpoint_accuracy": Procedure(endpoint_accuracy, version=1),
    "floor_fd": Procedure(floor, version=1),
    "floor_fd_pixels": Procedure(floor, version=1),
    "trajectory_pca": Procedure(trajectory_pca, version=1),
    "grid_search": Procedure(grid_search, version=1),
    "local_error": Procedure(local_error, version=1),
    "learned_r": Procedure(learned_r, version=1),
}


# --- running ------------------------------------------------------------------------------------


def compute(run: Run, results_dir=RESULTS, device=None, progress=True) -> list[Result]:
    """Compute a Run, whatever the store holds; also what comes with it at no cost."""
    device = best_device(device)
    data = load_dataset(run.dataset, device)
    context = Context(data, Path(results_dir), device, progress)
    start = time.perf_counter()
    if run.predictor is not None or run.r == "searched":  # not part of the Run's seconds
        context.intermediate(run)
        start = time.perf_counter()
    measured = PROCEDURES[run.metric].compute(run, context)
    seconds = time.perf_counter() - start
    return [
        Result(
            run.with_metric(metric),
            **asdict(value),
            seconds=round(seconds, 3),
            device=_device_name(device),
            versions=_versions(),
            fingerprint=f"code {code_fingerprint()}, weights {data.fingerprint}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for metric, value in measured.items()
    ]


def run(what: Run, results_dir=RESULTS, device=None, progress=True) -> Result:
    """One number: from the store, or computed and stored.

    Raises:
        ValueError: ``results_dir`` cannot be written, or the data set's files cannot be used.
    """
    stored = load_result(what, results_dir)
    if stored is not None:
        return stored
    check_writable(results_dir)
    found = {}
    for result in compute(what, results_dir, device, progress):
        save_result(result, results_dir)
        found[result.run.metric] = result
    return found[what.metric]


def _run_in_worker(what, results_dir, device):
    torch.set_num_threads(1)
    return run(what, results_dir, device, progress=False)


def run_all(
    runs: Sequence[Run],
    results_dir=RESULTS,
    device: str | None = None,
    executor: Executor | None = None,
    progress=True,
) -> pd.DataFrame:
    """Many numbers: a row per Run, in the given order, with all fields and the Result itself.

    What is missing from the store is computed, in this process or, with ``executor``, wherever it
    runs its tasks. A failure is raised after all other Runs have finished.
    """
    runs = list(runs)
    results = {what.key: load_result(what, results_dir) for what in runs}
    missing = {what.key: what for what in runs if results[what.key] is None}
    if missing:
        check_writable(results_dir)
    # A data set whose files cannot be had is found out before any work starts.
    for name in {what.dataset for what in missing.values()}:
        data = load_dataset(name, "cpu" if executor else best_device(device))
        if any(what.metric == "fd" for what in missing.values()):
            _ = data.reference
    # Runs that differ in the metric only are computed together, so one of them goes first.
    groups: dict[str, list[Run]] = {}
    for what in missing.values():
        groups.setdefault(what.with_metric(_leader(what)).key, []).append(what)
    failures = []
    with tqdm(total=len(missing), desc="runs", disable=not progress or not missing) as bar:
        if executor is None:
            outcomes = ((group, None) for group in groups.values())
        else:
            futures = {
                executor.submit(_run_in_worker, group[0], results_dir, device): group
                for group in groups.values()
            }
            outcomes = ((futures[future], future) for future in as_completed(futures))
        for group, future in outcomes:
            try:
                if future is not None:
                    future.result()
                for what in group:
                    results[what.key] = run(what, results_dir, device, progress)
            except Exception as error:
                failures.append((group[0], error))
            bar.update(len(group))
    if failures:
        what, error = failures[0]
        raise RuntimeError(
            f"{len(failures)} of {len(groups)} computations failed; the first was {what}: {error}"
        ) from error
    return pd.DataFrame([_row(results[what.key]) for what in runs])


def _leader(what: Run) -> str:
    """The first metric that the same procedure measures on this data set."""
    procedure = PROCEDURES[what.metric].compute
    names = describe(what.dataset).metrics if procedure is quality else PROCEDURES
    return next(name for name in names if PROCEDURES[name].compute is procedure)


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
