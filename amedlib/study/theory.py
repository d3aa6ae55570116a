"""Appendix D: how far trajectories leave their plane, and what that says of one AMED step.

Times are noise levels, so times and states have the same unit. Distances are Euclidean norms of
whole images, as in ``geometry.py``.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from amedlib.checks import require
from amedlib.geometry import distance
from amedlib.intermediate import Intermediate
from amedlib.sampling import Sampler, check_inputs
from amedlib.solvers import Evaluation, Solver, make_solver

B = 3.0  # the paper's b


def paper_a(shape: Sequence[int]) -> float:
    """The paper's a = sqrt(3 d) / 15, where d is the number of elements of a state of ``shape``."""
    return float(np.sqrt(3 * prod(shape)) / 15)


def scaled_logistic(t, a: float, b: float = B):
    """Eq. 16: f(t) = a (1 / (1 + exp(-b t)) - 1/2); 0 at t = 0 and a/2 for large t."""
    return a * (expit(b * np.asarray(t, dtype=float)) - 0.5)


def smallest_a(t, deviation, b: float = B) -> float:
    """The smallest a with which f bounds ``deviation`` at every one of the times ``t`` > 0."""
    return float(np.max(np.asarray(deviation) / scaled_logistic(t, 1.0, b)))


def shell_radius(s, t, a: float, b: float = B):
    """Eq. 23: r(s, t), the square root of the integral of f^2 from s to t >= s.

    With g = f / sqrt(d), the end of the SDE (Eq. 17) has variance r^2 / d in each of d dimensions.
    """
    ends = [expit(-b * np.asarray(time, dtype=float)) + b * np.asarray(time) / 4 for time in (s, t)]
    return a * np.sqrt(np.maximum(ends[1] - ends[0], 0) / b)  # rounding may leave less than zero


def step_bound(s, t, a: float, b: float = B):
    """Eq. 28: f(s) + f(t) + r(s, t), the bound on the error of one AMED step from t to s."""
    return scaled_logistic(s, a, b) + scaled_logistic(t, a, b) + shell_radius(s, t, a, b)


def shell_norms(
    s: float,
    t: float,
    a: float,
    b: float = B,
    dimension: int = 64,
    samples: int = 1000,
    steps: int = 50,
    seed: int = 0,
) -> np.ndarray:
    """Norms of z_s, [samples], by simulation of the SDE dz = f / sqrt(d) dw (Eq. 17) from z_t = 0.

    The Euler-Maruyama method with g in the middle of each of ``steps`` equal steps.
    """
    generator = np.random.default_rng(seed)
    width = (t - s) / steps
    g = scaled_logistic(s + width * (np.arange(steps) + 0.5), a, b) / np.sqrt(dimension)
    z = np.zeros((samples, dimension))
    for value in g:
        z += value * np.sqrt(width) * generator.standard_normal(z.shape)
    return np.linalg.norm(z, axis=1)


def concentration(
    s: float, t: float, a: float, dimensions: Sequence[int], b: float = B, **how
) -> pd.DataFrame:
    """Lemma 1 by simulation: a row per dimension d; ``how`` goes to ``shell_norms``.

    Columns: radius, Eq. 23; mean and sd of ||z_s|| over the simulated samples; thickness, the
    limit r / sqrt(2 d) of the standard deviation of a chi distribution, for large d.
    """
    require(0 <= s < t, "s", s, f"from 0 to below t = {t:g}")
    radius, rows = shell_radius(s, t, a, b), {}
    for d in dimensions:
        norms = shell_norms(s, t, a, b, d, **how)
        rows[d] = {
            "radius": radius,
            "mean": norms.mean(),
            "sd": norms.std(ddof=1),
            "thickness": radius / np.sqrt(2 * d),
        }
    return pd.DataFrame(rows).T.rename_axis("d")


def norm(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of images: [..., C, H, W] to [...], float64."""
    return distance(x, torch.zeros_like(x))


class Plane(NamedTuple):
    """A plane for every trajectory of a batch.

    Attributes:
        origin: mean of the trajectory, [B, C, H, W].
        basis: two orthonormal directions, [B, 2, C, H, W].
    """

    origin: torch.Tensor
    basis: torch.Tensor

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Coordinates [..., B, 2] of the projections of states [..., B, C, H, W]."""
        return ((x.double() - self.origin).unsqueeze(-4) * self.basis).sum((-3, -2, -1))

    def split(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Parts of displacements [..., B, C, H, W] parallel and perpendicular to the plane."""
        along = (v.double().unsqueeze(-4) * self.basis).sum((-3, -2, -1), keepdim=True)
        parallel = (along * self.basis).sum(-4)
        return parallel, v - parallel


def fit_plane(trajectory: torch.Tensor) -> Plane:
    """The plane of each trajectory's first two principal components, as ``trajectory_pca`` has it.

    Args:
        trajectory: [N, B, C, H, W], N >= 3.

    The first direction points from the start to the end, the second one from the straight line
    between them to the trajectory's middle; so pictures of it have one orientation.
    """
    require(
        trajectory.ndim == 5 and len(trajectory) >= 3,
        "trajectory",
        tuple(trajectory.shape),
        "of shape [N, B, C, H, W] with at least three time points",
    )
    x = trajectory.double()
    origin = x.mean(0)
    centred = (x - origin).transpose(0, 1).flatten(2)  # [B, N, CHW]
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:, :2]
    points = centred @ basis.mT  # [B, N, 2]
    start, middle, end = points[:, 0], points[:, len(x) // 2], points[:, -1]
    signs = torch.stack([(end - start)[:, 0], (middle - (start + end) / 2)[:, 1]], dim=1)
    basis = basis * torch.where(signs < 0, -1.0, 1.0).unsqueeze(2)
    return Plane(origin, basis.unflatten(2, x.shape[2:]))


class Step(NamedTuple):
    """One step of a solver: the evaluations that it used, newest last, and where it ends."""

    evaluations: list[Evaluation]
    end: torch.Tensor


@torch.no_grad()
def exact_step(
    denoiser, truth, times, interval: int, solver: Solver, intermediate=None, labels=None
) -> Step:
    """One step of a solver from the exact solution; a multistep solver's history is exact as well.

    Args:
        denoiser, times, solver, intermediate, labels: as in ``sample``.
        truth: [N, B, C, H, W], the solution at ``times``.
        interval: from 0; the step goes from ``times[interval]`` to the next time.
    """
    times = torch.as_tensor(times, dtype=torch.float64, device=truth.device)
    check_inputs(denoiser, truth[0], times, solver, intermediate)
    require(0 <= interval < len(times) - 1, "interval", interval, f"from 0 to {len(times) - 2}")
    sampler = Sampler(denoiser, truth[0], times, solver, intermediate=intermediate, labels=labels)
    for state in truth[: interval + 1]:
        sampler.x = state
        sampler.advance()
    return Step(list(sampler.history), sampler.x)


def at(r: torch.Tensor):
    """An intermediate at r, one number or one per sample."""
    return lambda step, t_cur, t_next, bottleneck: Intermediate(r.reshape(-1, 1, 1, 1))


def best_r(denoiser, truth, times, grid: Sequence[float], labels=None):
    """For every sample, the r with which one step of AMED-Solver ends nearest to the solution.

    Args:
        denoiser, labels: as in ``sample``.
        truth, times: two states [2, B, C, H, W] of the solution, and their times [2].
        grid: values of r, strictly between 0 and 1.

    Returns:
        The best r, [B], and the distance to the solution for every r, [len(grid), B].
    """
    grid = torch.as_tensor(grid, dtype=torch.float64, device=truth.device)
    solver = make_solver("amed")
    ends = (exact_step(denoiser, truth, times, 0, solver, at(r), labels).end for r in grid)
    errors = torch.stack([distance(end, truth[1]) for end in ends])
    return grid[errors.argmin(0)], errors


class StepErrors(NamedTuple):
    """What the proof of Proposition 1 adds up, for one AMED step with the best r; each [B].

    Attributes:
        r: the best r.
        error: distance of the step's end to the solution.
        parallel, perpendicular: norms of the error's parts along and across the plane.
        slope: norm of the perpendicular part of (s - t) e(x_m, m), the left side of Eq. 21.
        omega: norm of the integral of omega (Eq. 18), which is the difference of x~ - x at s and t.
        worst: the largest distance over the grid of r.
    """

    r: torch.Tensor
    error: torch.Tensor
    parallel: torch.Tensor
    perpendicular: torch.Tensor
    slope: torch.Tensor
    omega: torch.Tensor
    worst: torch.Tensor


def step_errors(denoiser, truth, times, plane: Plane, grid: Sequence[float]) -> StepErrors:
    """One AMED step from the exact solution, taken apart along and across the trajectory's plane.

    Args:
        denoiser: as in ``sample``.
        truth, times: two states [2, B, C, H, W] of the solution, and their times t > s, [2].
        plane: of the trajectory that they are on.
        grid: values of r, strictly between 0 and 1, of which each sample gets its best.
    """
    r, errors = best_r(denoiser, truth, times, grid)
    step = exact_step(denoiser, truth, times, 0, make_solver("amed"), at(r))
    parts = plane.split(step.end - truth[1])
    across = plane.split(truth - plane.origin)[1]
    return StepErrors(
        r,
        errors.min(0).values,
        *map(norm, parts),
        norm(plane.split(step.end - truth[0])[1]),
        norm(across[1] - across[0]),
        errors.max(0).values,
    )


def proposition(
    denoiser, truth, times, intervals: Sequence[tuple[int, int]], grid: Sequence[float]
) -> pd.DataFrame:
    """The parts of Proposition 1 for several steps, a row for each.

    Args:
        denoiser, grid: as in ``step_errors``.
        truth, times: whole trajectories [N, B, C, H, W] and their times [N].
        intervals: steps as pairs of indices into ``times``, start before end.

    Returns:
        Columns t and s; those of ``StepErrors``, means over samples; error_max, the largest error;
        assumption, the share of samples for which Eq. 21 is true.
    """
    plane, rows = fit_plane(truth), []
    for start, end in intervals:
        pair = [start, end]
        found = step_errors(denoiser, truth[pair], times[pair], plane, grid)
        means = {name: value.mean().item() for name, value in found._asdict().items()}
        extremes = {
            "error_max": found.error.max().item(),
            "assumption": (found.slope <= found.omega).double().mean().item(),
        }
        rows.append({"t": times[start].item(), "s": times[end].item()} | means | extremes)
    return pd.DataFrame(rows)
