"""GITS: a schedule by dynamic programming over single Euler jumps (Chen et al., ICML 2024).

A teacher's trajectory on a fine grid is made once. The cost of leaving out all points between two
of its times is how far one Euler jump lands from where the trajectory goes; the cheapest path of
given length from its first to its last time is the schedule.
"""

import numpy as np
import torch

from amedlib.checks import one_of, require, whole
from amedlib.sampling import Sampler

FINE = 61  # points of the teacher's grid, as the release is launched on CIFAR-10
METRICS = ("dev", "l1", "l2")


def jump_costs(states, slopes, times, metric: str = "dev") -> torch.Tensor:
    """The mean cost of one Euler jump between any two points of trajectories.

    Args:
        states: [K, B, ...] at ``times``.
        slopes: [K-1, B, ...], with which the Euler step from each but the last goes on.
        times: [K], descending.
        metric: ``"l1"`` or ``"l2"``: distance of the jump's end from the trajectory. ``"dev"``: by
            how much more than the trajectory at that time it is away from the straight line between
            the trajectory's ends.

    Returns:
        [K, K] with the cost of the jump from i to j > i, infinite elsewhere.
    """
    one_of("metric", metric, METRICS)
    x, slopes = states.flatten(2), slopes.flatten(2)
    line = torch.nn.functional.normalize(x[-1] - x[0], dim=-1)

    def away(points):
        d = points - x[-1]
        return (d - (d * line).sum(-1, keepdim=True) * line).norm(dim=-1).mean(-1)

    costs = torch.full((len(x), len(x)), torch.inf, dtype=x.dtype, device=x.device)
    for i in range(len(x) - 1):
        jumps = x[i] + (times[i + 1 :] - times[i]).reshape(-1, 1, 1) * slopes[i]
        if metric == "dev":
            costs[i, i + 1 :] = away(jumps) - away(x[i + 1 :])
        else:
            order = {"l1": 1, "l2": 2}[metric]
            costs[i, i + 1 :] = (jumps - x[i + 1 :]).norm(p=order, dim=-1).mean(-1)
    return costs


def cheapest_path(costs, intervals: int, coefficient: float = 1.15) -> list[int]:
    """The path of so many jumps from the first to the last point that costs least in all.

    What a jump costs counts ``coefficient`` times as much for every jump before it: errors made
    early cost less, for later steps correct them in part.

    Args:
        costs: [K, K], of ``jump_costs``.
        intervals: from 1 to K-1.

    Returns:
        Indices of its points, ascending, ``intervals + 1`` of them.
    """
    costs = np.asarray(costs, np.float64)
    points = len(costs)
    whole("intervals", intervals, 1, points - 1)
    rest, choices = costs[:, -1].copy(), []  # the least cost from each point to the last
    rest[-1] = np.inf
    for _ in range(intervals - 1):
        total = costs + coefficient * rest
        choices.append(total.argmin(1))
        rest = total.min(1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, points - 1]


@torch.no_grad()
def search_schedule(
    denoiser, latents, fine_times, num_steps, solver, teacher, afs=False, labels=None, **how
) -> tuple[torch.Tensor, float]:
    """The schedule of GITS for a solver.

    With AFS a path of one jump less is searched, and one point inserted after its first: that with
    which the solver ends nearest to the teacher. The teacher then begins with AFS too.

    Args:
        denoiser, latents, labels: as of ``sample``.
        fine_times: [K], descending, the times to choose from.
        num_steps: N, from 2 (with AFS from 3) to K.
        solver: who will sample; matters with AFS alone.
        teacher: the solver that makes the trajectory on the fine grid, one evaluation a step.
        how: ``metric`` of ``jump_costs`` and ``coefficient`` of ``cheapest_path``.

    Returns:
        Time points [N] and the cost of the path.
    """
    whole("num_steps", num_steps, 2 + afs, len(fine_times))
    require(not teacher.single_step, "teacher", teacher, "a multistep solver")
    x = latents.to(torch.float64) * fine_times[0]
    states, evaluations = Sampler(denoiser, x, fine_times, teacher, afs, labels=labels).run()
    slopes = [(y - d) / t for y, (d, _), t in zip(states, evaluations, fine_times, strict=False)]
    metric, coefficient = how.get("metric", "dev"), how.get("coefficient", 1.15)
    costs = jump_costs(torch.stack(states), torch.stack(slopes), fine_times, metric).cpu()
    path = cheapest_path(costs, num_steps - 1 - afs, coefficient)
    if afs and path[1] == 1:  # it has a short first step already
        path = cheapest_path(costs, num_steps - 1, coefficient)
    elif afs:
        found = {}
        for k in range(1, path[1]):
            times = fine_times[[0, k, *path[1:]]]
            student = Sampler(denoiser, x, times, solver, afs=True, labels=labels)
            end = student.run()[0][-1]
            found[k] = (end - states[-1]).flatten(1).norm(dim=1).mean().item()
        path.insert(1, min(found, key=found.get))
    jumps = enumerate(zip(path[:-1], path[1:], strict=True))
    cost = sum(coefficient**n * costs[i, j].item() for n, (i, j) in jumps)
    return fine_times[path], cost
