"""The geometry of sampling trajectories: how flat they are, and how close a solver stays to them.

Distances are Euclidean norms of whole images, sqrt(sum over C, H, W), as in the paper.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from amedlib.checks import require
from amedlib.intermediate import TimeWise
from amedlib.sampling import Sampler, check_inputs, sample
from amedlib.solvers import Solver, make_solver


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of images: [..., C, H, W] twice to [...], float64."""
    return (x.to(torch.float64) - y.to(torch.float64)).flatten(-3).norm(dim=-1)


def rms_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Root mean square over samples of their distance: [..., B, C, H, W] twice to [...]."""
    return distance(x, y).square().mean(-1).sqrt()


class TrajectoryPCA(NamedTuple):
    """How well a few principal components describe each trajectory.

    Attributes:
        relative_error: ||x_t - x~_t|| / ||x_t|| (Fig. 4a), [N, B].
        deviation: ||x_t - x~_t|| (Fig. 10), [N, B].
        cumulative_variance: share of the variance along t that the first 1..K components explain
            (Fig. 4b), [K, B] with K = min(N, 10).
    """

    relative_error: torch.Tensor
    deviation: torch.Tensor
    cumulative_variance: torch.Tensor


@torch.no_grad()
def trajectory_pca(trajectory: torch.Tensor, components: int = 2) -> TrajectoryPCA:
    """PCA of each sample's own trajectory (Sec. 3.1): x~_t is x_t projected onto its components.

    Args:
        trajectory: states at N >= 2 times, [N, B, C, H, W].
        components: dimension of the subspace, from 1 to N.

    Raises:
        ValueError: an argument is outside its range, or the trajectory is not finite.
    """
    require(
        trajectory.ndim == 5 and len(trajectory) >= 2 and trajectory.numel() > 0,
        "trajectory",
        tuple(trajectory.shape),
        "of shape [N, B, C, H, W] with at least two time points and one sample",
    )
    require(bool(torch.isfinite(trajectory).all()), "trajectory", "a value that is not", "finite")
    points = len(trajectory)
    require(
        isinstance(components, int) and 1 <= components <= points,
        "components",
        components,
        f"a whole number from 1 to the number of time points, {points}",
    )
    x = trajectory.to(torch.float64).flatten(2).transpose(0, 1)  # [B, N, CHW]
    centred = x - x.mean(1, keepdim=True)
    # The eigenvectors of the N x N Gram matrix are the left singular vectors of the trajectory: the
    # cost hardly depends on the number of pixels.
    eigenvalues, vectors = torch.linalg.eigh(centred @ centred.mT)
    eigenvalues, top = eigenvalues.clamp(min=0).flip(1), vectors.flip(2)[..., :components]
    # Not from the other eigenvalues: their rounding error is that of the largest one.
    deviation = (centred - top @ (top.mT @ centred)).norm(dim=2)
    share = eigenvalues.cumsum(1) / eigenvalues.sum(1, keepdim=True)
    return TrajectoryPCA((deviation / x.norm(dim=2)).T, deviation.T, share[:, :10].T)


def _check_truth(truth, times):
    require(
        truth.ndim == 5 and len(truth) == len(times),
        "truth",
        list(truth.shape),
        f"of shape [N, B, C, H, W] with N = {len(times)}, the number of time points",
    )


class GridSearch(NamedTuple):
    """Result of ``grid_search``. The relative alignment of Fig. 5 is ``baseline - searched``.

    Distances that decide are those of the state as stepped to; ``baseline`` and ``searched`` are
    those of the states of ``sample``, which for UniPC are the corrected ones.

    Attributes:
        r: the r kept for each interval, [N-1].
        errors: mean distance to the truth for every r that was tried, [N-1, len(grid)].
        baseline: mean distance ||x^B - x^G|| at times[1:], with r = 0.5 throughout, [N-1].
        searched: the same for the searched trajectory, [N-1].
    """

    r: torch.Tensor
    errors: torch.Tensor
    baseline: torch.Tensor
    searched: torch.Tensor


def _advanced(sampler, intermediate, known):
    """A copy of a sampler, one interval on."""
    trial = sampler.fork()
    trial.intermediate = intermediate
    trial.advance(known)
    return trial


def _search_interval(samplers, truth, candidates):
    """Every candidate is tried on one interval.

    Args:
        samplers: of the parts of the samples.
        truth: their states at the end of the interval, one per part.

    Returns:
        The mean distance for every candidate, and the samplers, one interval on with the best.
    """
    first, total, known = samplers[0], 0.0, []
    t_cur, free = first.times[first.interval], first.afs and first.interval == 0
    for sampler, end in zip(samplers, truth, strict=True):
        # One evaluation at t_cur serves every r.
        known.append(None if free else (sampler.denoiser(sampler.x, t_cur, sampler.labels), None))
        trials = [_advanced(sampler, r, known[-1]) for r in candidates]
        total += torch.stack([distance(trial.x, end).sum() for trial in trials])
    errors = total / sum(map(len, truth))
    best = int(errors.argmin())
    # The trials of the last part are at hand; those of the others were too many to keep.
    again = zip(samplers[:-1], known[:-1], strict=True)
    return errors, [*(_advanced(s, candidates[best], d) for s, d in again), trials[best]]


def _mean_distances(denoiser, parts, times, solver, afs, r):
    """Mean distance to the truth at times[1:] with a table of r, [N-1]."""
    total = 0.0
    for latents, truth, labels in parts:
        run = denoiser, latents, times, solver, afs, TimeWise(r), labels
        total += distance(sample(*run, trajectory=True).trajectory, truth)[1:].sum(1)
    return total / sum(len(latents) for latents, *_ in parts)


@torch.no_grad()
def grid_search(
    denoiser,
    latents: torch.Tensor,
    times: torch.Tensor,
    solver: Solver,
    truth: torch.Tensor,
    grid: Sequence[float],
    afs: bool = False,
    labels: torch.Tensor | None = None,
    batch: int | None = None,
) -> GridSearch:
    """Greedy search of one r per interval for all samples together (Fig. 5, and Table 3).

    From where the searched trajectory stands, with its history, every r of the grid is tried; the
    one that ends nearest to the truth, in the mean over samples, is kept.

    Args:
        denoiser, latents, times, solver, afs, labels: as in ``sample``.
        truth: [N, B, C, H, W], truth[i] at times[i]; see ``accurate_solution``.
        grid: values of r, strictly between 0 and 1.
        batch: how many samples are tried at once; all unless given.

    Raises:
        ValueError: an argument is not of the form above.
    """
    times = torch.as_tensor(times, dtype=torch.float64, device=latents.device)
    candidates = [TimeWise(float(r)) for r in grid]
    require(len(candidates) > 0, "grid", list(grid), "at least one r")
    check_inputs(denoiser, latents, times, solver, candidates[0])
    _check_truth(truth, times)
    given, shape = list(truth.shape[1:]), list(latents.shape)
    require(given == shape, "the truth's samples", given, f"{shape}")
    batch = len(latents) if batch is None else batch
    some = [slice(first, first + batch) for first in range(0, len(latents), batch)]
    parts = [(latents[i], truth[:, i], None if labels is None else labels[i]) for i in some]
    samplers = [
        Sampler(denoiser, x.to(torch.float64) * times[0], times, solver, afs, candidates[0], y)
        for x, _, y in parts
    ]
    errors = []
    for i in range(1, len(times)):
        found, samplers = _search_interval(samplers, [ends[i] for _, ends, _ in parts], candidates)
        errors.append(found)
    r = [float(grid[int(found.argmin())]) for found in errors]
    baseline, searched = (
        _mean_distances(denoiser, parts, times, solver, afs, each) for each in (0.5, r)
    )
    return GridSearch(torch.tensor(r, dtype=torch.float64), torch.stack(errors), baseline, searched)


@torch.no_grad()
def local_errors(
    denoiser,
    truth: torch.Tensor,
    times: torch.Tensor,
    solver: Solver,
    intermediate=None,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Local error of a solver that looks back on nothing (Table 1): one step from truth[i].

    Args:
        denoiser, times, intermediate, labels: as in ``sample``.
        truth: [N, B, C, H, W], truth[i] at times[i].
        solver: a single-step solver, or one of order 1 without a corrector.

    Returns:
        Root mean square distance of the step's end to truth[i+1], [N-1], float64.

    Raises:
        ValueError: an argument is not of the form above.
    """
    times = torch.as_tensor(times, dtype=torch.float64, device=truth.device)
    _check_truth(truth, times)
    check_inputs(denoiser, truth[0], times, solver, intermediate)
    require(
        solver.single_step or solver.memory == 1,
        "solver",
        solver,
        "a single-step solver, or one that remembers one evaluation only",
    )
    sampler = Sampler(denoiser, truth[0], times, solver, intermediate=intermediate, labels=labels)
    errors = []
    for start, end in pairwise(truth):
        sampler.x = start.to(torch.float64)
        sampler.advance()
        errors.append(rms_distance(sampler.x, end))
    return torch.stack(errors)


@torch.no_grad()
def accurate_solution(
    denoiser,
    latents: torch.Tensor,
    times: torch.Tensor,
    refined: torch.Tensor,
    solver: Solver | None = None,
    labels: torch.Tensor | None = None,
    batch: int = 256,
) -> torch.Tensor:
    """The ODE's solution at ``times``, from a solver that runs on a refined schedule.

    The paper's ground truth (Fig. 5) for N = 6 is Heun with 80 NFE:
    ``times = make_schedule(num_steps=6)`` and ``refined = make_schedule(num_steps=41)``. The error
    of a solution is estimated by its ``rms_distance`` to one with twice as many steps.

    Args:
        denoiser, latents, times, labels: as in ``sample``.
        refined: k (N - 1) + 1 descending time points, every k-th of which is one of ``times``; for
            instance the same schedule with more points.
        solver: Heun unless given.
        batch: how many samples are solved at once.

    Returns:
        [N, B, C, H, W], float64.

    Raises:
        ValueError: an argument is not of the form above.
    """
    solver = make_solver("heun") if solver is None else solver
    times = torch.as_tensor(times, dtype=torch.float64, device=latents.device)
    refined = torch.as_tensor(refined, dtype=torch.float64, device=latents.device)
    for schedule in (times, refined):
        check_inputs(denoiser, latents, schedule, solver, None)
    every, rest = divmod(len(refined) - 1, len(times) - 1)
    require(
        rest == 0 and bool(torch.isclose(refined[::every], times, rtol=1e-6, atol=0).all()),
        "refined",
        refined.tolist(),
        f"{len(times)} given times with equally many points between them",
    )
    require(isinstance(batch, int) and batch >= 1, "batch", batch, "a whole number of at least 1")
    parts = []
    for first in range(0, len(latents), batch):
        x = latents[first : first + batch].to(torch.float64) * refined[0]
        some = None if labels is None else labels[first : first + batch]
        states, _ = Sampler(denoiser, x, refined, solver, labels=some).run(every)
        parts.append(torch.stack(states))
    return torch.cat(parts, dim=1)
