"""How a number is measured: a procedure for every metric."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from amedlib import geometry
from amedlib.checks import require
from amedlib.compute import halved, in_batches, in_precision
from amedlib.datasets.entries import describe
from amedlib.datasets.loaders import Dataset
from amedlib.files import load_tensors
from amedlib.intermediate import TimeWise
from amedlib.metrics import Moments, leave_one_out, moments_distance
from amedlib.sampling import make_latents, sample
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver
from amedlib.study import store
from amedlib.study.run import BLOCKS, Run
from amedlib.study.store import Block, device_name, load_result, predictor_path, solution_path
from amedlib.trained import load_predictor


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
        measure: ``measure(run, context)`` returns a function that takes seeds of some samples and
            returns their ``Moments`` by name, and the NFE; they are added up in blocks. ``None``:
            there are no blocks.
    """

    compute: Callable[["Run", "Context", list["Block"]], dict[str, Measured]]
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

    def sample(self, run: Run, seeds, times, solver, afs=False, intermediate=None, **rest):
        """``sample`` for these seeds."""
        denoiser, latents = self.denoiser(run), self.latents(seeds)
        labels = self.labels(seeds)
        return sample(denoiser, latents, times, solver, afs, intermediate, labels, **rest)

    def intermediate(self, run: Run):
        """What a Run says of the intermediate; a search or predictor is read from the store."""
        if run.r == "searched":
            return TimeWise(load_result(run.search(), self.results_dir).curves["r"])
        if run.r is not None:
            return TimeWise(run.r)
        if run.predictor is None:
            return None
        data = self.data if run.trained_on == run.dataset else None
        predictor = load_predictor(
            predictor_path(run, self.results_dir), run.training, data and data.denoiser
        )
        if run.training.num_steps != run.num_steps:  # the Run says that it serves elsewhere
            predictor.trained_for = None
        return predictor.to(self.device)


def blocks_of(run: Run) -> list[torch.Tensor]:
    """The seeds of a Run in equal blocks."""
    seeds = torch.arange(run.first_seed, run.first_seed + run.samples)
    return list(torch.tensor_split(seeds, BLOCKS))


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
    moments, nfe = add_up(blocks_of(run)[index].tolist(), context.data.batch, measure)
    for name, found in moments.items():
        require(bool(np.isfinite(found.mean).all()), f"{name} of samples", "NaN or inf", "finite")
    return Block(moments, nfe, time.perf_counter() - start, device_name(context.device))


def _root_mean_square(moments: Moments) -> float:
    return float(np.sqrt(moments.mean @ moments.mean + np.trace(moments.scatter) / moments.count))


def qualities(run: Run) -> list[str]:
    """What is said of the samples of a Run.

    The endpoint error is left out where there are more samples than the data set keeps the ODE's
    solutions for.
    """
    data = describe(run.dataset)
    few = run.samples <= data.endpoint_samples
    return [metric for metric in data.metrics if metric != "endpoint_error" or few]


def _measure_quality(run: Run, context: Context) -> Callable:
    data, metrics = context.data, qualities(run)
    frechet = [metric for metric in metrics if metric != "endpoint_error"]
    solver, times = run.make_solver(), run.times()
    intermediate = context.intermediate(run)
    solution = accurate_endpoints(run, context) if "endpoint_error" in metrics else None

    def measure(seeds):
        out = context.sample(run, seeds, times, solver, run.afs, intermediate)
        images = data.to_images(out.x) if frechet else None
        found = {name: Moments.of(data.features_of[name](images)) for name in frechet}
        if solution is not None:
            rows = [seed - run.first_seed for seed in seeds]
            distances = geometry.distance(out.x.cpu(), solution[rows])
            found["endpoint_error"] = Moments.of(distances[:, None])
        return found, out.nfe

    return measure


def quality(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
    """All that can be said of one set of samples: Frechet distances, and the endpoint error."""
    measured = {}
    for metric in qualities(run):
        statistic = _root_mean_square
        if metric != "endpoint_error":
            statistic = partial(moments_distance, b=context.data.reference[metric])
        value, replicates = leave_one_out([block.moments[metric] for block in blocks], statistic)
        measured[metric] = Measured(value, replicates, nfe=blocks[0].nfe)
    return measured


def _solve(run: Run, context: Context, seeds, points: int) -> torch.Tensor:
    times = make_schedule("logsnr", points, run.sigma_min, run.sigma_max)
    solver = make_solver(store.SOLUTION["solver"], **store.SOLUTION["options"])
    return context.sample(run, seeds, times, solver).x


def solve_block(run: Run, context: Context, index: int) -> torch.Tensor:
    points = store.SOLUTION["num_steps"]

    def solve(seeds):
        return _solve(run, context, seeds, points).half().cpu()

    return torch.cat(list(in_batches(blocks_of(run)[index].tolist(), context.data.batch, solve)))


def accurate_endpoints(run: Run, context: Context) -> torch.Tensor:
    """The ODE's solution at sigma_min from a Run's latents, [samples, C, H, W], float64."""
    return load_tensors(solution_path(run, context.results_dir))[0]["x"].double()


def _measure_accuracy(run: Run, context: Context) -> Callable:
    fine, coarse = store.SOLUTION["num_steps"], store.SOLUTION["num_steps"] // 2 + 1

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
    held_out, real_images = context.data.held_out, context.data.real_images
    if held_out is not None:
        measured = {}
        for metric, parts in held_out.items():
            statistic = partial(moments_distance, b=context.data.reference[metric])
            curves = {"images": [sum(part.count for part in parts)]}
            measured[f"floor_{metric}"] = Measured(*leave_one_out(parts, statistic), curves)
        return measured
    require(real_images is not None, "dataset", run.dataset, "one that has its real images at hand")
    images = real_images()
    n = len(images) // 2
    measured = {}
    for metric, features in context.data.features_of.items():
        rows, values = features(images), []
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
    solver, times = run.make_solver(), run.times()

    def measure(seeds):
        out = context.sample(run, seeds, times, solver, run.afs, trajectory=True)
        pca = geometry.trajectory_pca(out.trajectory)
        return {name: Moments.of(rows.T) for name, rows in pca._asdict().items()}, out.nfe

    return measure


def projection_error(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
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


def relative_alignment(run: Run, context: Context, blocks=()) -> dict[str, Measured]:
    """Figure 5: relative alignment with the best r of a grid, in the mean over the steps."""
    denoiser, times = context.denoiser(run), run.times()
    seeds = torch.cat(blocks_of(run)).tolist()
    latents, labels = context.latents(seeds), context.labels(seeds)
    # The paper's ground truth: Heun with 80 NFE (Sec. 3.3).
    refined = run.refined(-(-40 // (run.num_steps - 1)))
    solver = run.make_solver()
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
    solver, intermediate = run.make_solver(), context.intermediate(run)
    times, denoiser = run.times(), context.denoiser(run)
    accurate = make_solver(store.SOLUTION["solver"], **store.SOLUTION["options"])
    refined = run.refined(40)

    def measure(seeds):
        latents, labels = context.latents(seeds), context.labels(seeds)
        truth = geometry.accurate_solution(denoiser, latents, times, refined, accurate, labels)
        errors = geometry.local_errors(denoiser, truth, times, solver, intermediate, labels)
        # Mean squares add up over batches; errors are already root mean squares of this one, whose
        # scatter is not known.
        mean = errors.square().cpu().numpy()
        return {"square": Moments(len(seeds), mean, np.full((len(mean),) * 2, np.nan))}, run.nfe

    return measure


def local_error(run: Run, context: Context, blocks: list[Block]) -> dict[str, Measured]:
    """Table 1: root mean square error of one step from the solution, in the mean over the steps."""
    value, replicates, whole = _curve_blocks(blocks, "square", lambda m: np.sqrt(m).mean())
    curves = {"t": run.times().tolist(), "rms": np.sqrt(whole.mean).tolist()}
    return {"local_error": Measured(value, replicates, curves, run.nfe)}


def _measure_r(run: Run, context: Context) -> Callable:
    predictor, solver = context.intermediate(run), run.make_solver()

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
    "fd": Procedure(quality, _measure_quality),
    "fd_pixels": Procedure(quality, _measure_quality),
    "fd_joint": Procedure(quality, _measure_quality),
    "endpoint_error": Procedure(quality, _measure_quality),
    "endpoint_accuracy": Procedure(endpoint_accuracy, _measure_accuracy),
    "floor_fd": Procedure(floor),
    "floor_fd_pixels": Procedure(floor),
    "floor_fd_joint": Procedure(floor),
    "trajectory_pca": Procedure(projection_error, _measure_pca),
    "grid_search": Procedure(relative_alignment),
    "local_error": Procedure(local_error, _measure_local_error),
    "learned_r": Procedure(learned_r, _measure_r),
    "first_slope": Procedure(first_slope, _measure_first_slope),
}
