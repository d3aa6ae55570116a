"""How samplers do on a model at a number of evaluations, by the error at the end of the ODE."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from scipy import stats
from tqdm import tqdm

from amedlib.checks import of_the_study, require, whole
from amedlib.checks import shape as checked_shape
from amedlib.compute import best_device, in_batches, in_precision
from amedlib.method import Method
from amedlib.recipes import noise_range
from amedlib.sampling import Sample, check_labels, make_latents, num_steps_for, sample, tensor
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver
from amedlib.trained import TrainedSampler

# Every untrained solver of the library: its name in ``make_solver``, and options.
UNTRAINED = {
    "DDIM": ("euler", {}),
    "Heun": ("heun", {}),
    "DPM-Solver-2": ("dpm2", {}),
    "iPNDM-2": ("ipndm", {"order": 2}),
    "iPNDM-3": ("ipndm", {"order": 3}),
    "iPNDM": ("ipndm", {"order": 4}),
    "DEIS": ("deis", {"order": 4}),
    "DPM-Solver++(2M)": ("dpmpp", {"order": 2}),
    "DPM-Solver++(3M)": ("dpmpp", {"order": 3}),
    "UniPC-2": ("unipc", {"order": 2}),
    "UniPC-3": ("unipc", {"order": 3}),
}
SCHEDULES = ("polynomial", "logsnr", "time_uniform")
# By what the ODE is solved accurately: intervals, and half of them to see how accurately.
ACCURATE = {"solver": "unipc", "options": {"order": 3}, "intervals": 64}
SHOWN = 12  # the best, in tables and pictures


@dataclass(frozen=True)
class Untrained:
    """A solver on a schedule that makes a known number of evaluations; it samples by itself.

    Attributes:
        method: solver, schedule, noise range, AFS.
        num_steps: N, the number of time points.
    """

    method: Method
    num_steps: int

    @property
    def times(self) -> torch.Tensor:
        """The time points [N], float64, descending."""
        return self.method.time_points(self.num_steps)

    def sample(self, denoiser, latents, labels=None, trajectory: bool = False) -> Sample:
        """``amedlib.sample`` with this method; arguments as there."""
        method = self.method
        denoiser = in_precision(denoiser, method.precision)
        solver = method.make_solver()
        how = {"afs": method.afs, "labels": labels, "trajectory": trajectory}
        return sample(denoiser, latents, self.times, solver, **how)


@dataclass(frozen=True)
class Compared:
    """A sampler in a ``Comparison``.

    Attributes:
        name: with its schedule, and AFS where it has it.
        sampler: has ``sample(denoiser, latents, labels)``: an ``Untrained`` or a
            ``TrainedSampler``.
        nfe: network evaluations per sample, counted.
        errors: of each sample [B], float64: root mean square, over its numbers, of the distance to
            the accurate solution, in the units of the data.
    """

    name: str
    sampler: Untrained | TrainedSampler
    nfe: int
    errors: torch.Tensor

    @property
    def error(self) -> float:
        """Root mean square over samples and their numbers; infinite where a sample is."""
        return self.errors.square().mean().sqrt().item()


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; ``print`` shows the best and all trained ones as a table.

    Attributes:
        rows: the samplers, best first.
        accuracy: root mean square difference of two accurate solutions, one with half as many
            steps: errors that are not far above it cannot be told from one another.
        evaluations: network evaluations per latent that all of it took, counted.
        seconds: that it took.
        latents: from which all of them started, [B, ...].
        solution: the accurate one from there, [B, ...].
    """

    rows: list[Compared]
    accuracy: float
    evaluations: int
    seconds: float
    latents: torch.Tensor
    solution: torch.Tensor

    def __getitem__(self, name: str) -> Compared:
        found = [row for row in self.rows if row.name == name]
        allowed = f"one of {', '.join(row.name for row in self.rows)}"
        require(len(found) > 0, "name", name, allowed)
        return found[0]

    @property
    def best(self) -> Compared:
        """The best of the untrained samplers."""
        return next(row for row in self.rows if isinstance(row.sampler, Untrained))

    def ratio(self, name: str, other: str | None = None) -> tuple[float, float, float]:
        """By what the error of a sampler is multiplied, against the best untrained or another.

        Returns:
            The ratio, and its 95 % interval over samples: Student's t for the logarithm by the
            delta method, the samples paired. Where ``other`` was chosen as the best on the same
            samples, the ratio is rather too large than too small.
        """
        a = self[name].errors.square()
        b = (self.best if other is None else self[other]).errors.square()
        ratio = (a.mean() / b.mean()).sqrt().item()
        spread = ((a / a.mean() - b / b.mean()) / 2).std().item() / math.sqrt(len(a))
        half = stats.t.ppf(0.975, len(a) - 1) * spread
        return ratio, ratio * math.exp(-half), ratio * math.exp(half)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'sampler':{width}}  NFE     error  x best untrained (95 %)"]
        shown = self.rows[:SHOWN]
        shown += [row for row in self.rows[SHOWN:] if isinstance(row.sampler, TrainedSampler)]
        for row in shown:
            ratio, low, high = self.ratio(row.name)
            against = f"{ratio:5.2f} ({low:.2f} to {high:.2f})"
            against = against if math.isfinite(row.error) else "not finite"
            lines.append(f"{row.name:{width}}  {row.nfe:3}  {row.error:8.4f}  {against}")
        count = len(self.rows[0].errors)
        if len(shown) < len(self.rows):
            lines.append(f"and {len(self.rows) - len(shown)} more")
        lines.append(f"Error at the end of the ODE, root mean square, {count} samples;")
        lines.append(f"the accurate solution is known to {self.accuracy:.1g}.")
        took = {row.name: getattr(row.sampler, "seconds", None) for row in shown}
        lines += [f"{name}: {spent:.0f} s of training." for name, spent in took.items() if spent]
        lines.append(f"{self.evaluations} evaluations per sample, {self.seconds:.0f} s.")
        return "\n".join(lines)

    def plot(self, number: int = SHOWN):
        """A picture of the best samplers with intervals over samples: matplotlib's axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        with of_the_study("A picture of a comparison"):
            from matplotlib import pyplot as plt
        rows = self.rows[:number][::-1]
        _, axes = plt.subplots(figsize=(7, 0.6 + 0.3 * len(rows)), layout="constrained")
        for at, row in enumerate(rows):
            ratio, low, high = self.ratio(row.name)
            untrained = isinstance(row.sampler, Untrained)
            colour, marker = ("C0", "o") if untrained else ("C1", "D")
            spread = [[ratio - low], [high - ratio]]
            axes.errorbar(ratio, at, xerr=spread, fmt=marker, color=colour, capsize=3)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_xlabel("error at the end, relative to the best untrained (95 % intervals)")
        return axes


def untrained(nfe: int, ends: dict, per_call: int = 1) -> dict[str, Untrained]:
    """Every solver of ``UNTRAINED``, on every schedule, with AFS or without, that can make ``nfe``.

    Args:
        ends: sigma_min and sigma_max.
        per_call: evaluations that a call of the denoiser counts.
    """
    found = {}
    for (name, (solver, options)), schedule, afs in product(
        UNTRAINED.items(), SCHEDULES, (False, True)
    ):
        try:
            points = num_steps_for(nfe, make_solver(solver, **options), afs, False, per_call)
        except ValueError:
            continue  # two evaluations a step make even numbers, with AFS odd ones
        method = Method(solver=solver, options=options, schedule=schedule, afs=afs, **ends)
        label = f"{name}, {schedule}{', AFS' if afs else ''}"
        found[label] = Untrained(method, points)
    require(len(found) > 0, "nfe", nfe, "one that some solver can make with this denoiser")
    return found


def _solve(denoiser, latents, ends: dict, intervals: int, labels) -> Sample:
    times = make_schedule("logsnr", intervals + 1, **ends).to(latents.device)
    solver = make_solver(ACCURATE["solver"], **ACCURATE["options"])
    return sample(denoiser, latents, times, solver, labels=labels)


def _distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each sample, [B]; infinite where it is not a number."""
    distances = (x - y).flatten(1).square().mean(1).sqrt().cpu()
    return distances.nan_to_num(nan=math.inf)


def compare(
    denoiser,
    nfe: int,
    shape: tuple[int, ...] | None = None,
    *,
    latents: torch.Tensor | None = None,
    labels=None,
    trained: dict[str, TrainedSampler] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    batch: int = 64,
    device: str | None = None,
    progress: bool = True,
) -> Comparison:
    """How all untrained samplers, and some trained ones, do on a model at ``nfe`` evaluations.

    Measured is the error at the end: how far a sample is from the accurate solution of the ODE from
    the same latent. It needs no data. Over many samplers it goes with the Frechet distance, but not
    strictly; look at the samples too.

    The cost is said before: about 11 solvers x 3 schedules x with AFS or without, ``nfe`` each, and
    two accurate solutions.

    Args:
        denoiser: a callable as in ``sample``.
        nfe: network evaluations per sample.
        shape: of one sample, for 32 latents of the seeds 0, 1, ...; the denoiser's own ``shape``
            unless given.
        latents: unit normal [B, ...], B of at least 2, instead.
        labels: as in ``sample``, one for each latent.
        trained: samplers by name, to be compared with them.
        sigma_min, sigma_max: the noise range; the denoiser's own unless given, else 0.002 and 80.
        batch: samples at a time; halved where the memory does not suffice.
        device: of the latents; the GPU unless given, if there is one.
        progress: whether the cost is said and a bar shown.

    Raises:
        ValueError: an argument does not fit, or no accurate solution is finite.
    """
    start, nfe = time.perf_counter(), whole("nfe", nfe, 1, 10**4)
    require(callable(denoiser), "denoiser", denoiser, "a callable (x, t, labels=None)")
    latents = _latents(denoiser, shape, latents, device)
    check_labels(labels, len(latents))
    ends = noise_range(denoiser, sigma_min, sigma_max)
    per_call = getattr(denoiser, "evaluations_per_call", 1)
    samplers = untrained(nfe, ends, per_call) | dict(trained or {})
    half = ACCURATE["intervals"] // 2
    planned = per_call * 3 * half + nfe * len(samplers)
    count = 0

    def run(work: Callable):
        """``work(latents, labels)`` of all parts: states [B, ...] and NFE."""
        nonlocal count
        parts = in_batches(
            list(range(len(latents))), batch, lambda rows: work(latents[rows], _some(labels, rows))
        )
        seen = list(parts)
        count += seen[0].nfe
        bar.update(seen[0].nfe)
        return torch.cat([each.x for each in seen]), seen[0].nfe

    if progress:
        say = f"compare: {len(samplers)} samplers, {planned} evaluations of {len(latents)} samples"
        print(f"{say}.", flush=True)
    with tqdm(total=planned, desc="compare", unit="NFE", disable=not progress) as bar:
        coarse, fine = (
            run(lambda x, given, n=n: _solve(denoiser, x, ends, n, given))[0]
            for n in (half, 2 * half)
        )
        accuracy = _distance(coarse, fine).square().mean().sqrt().item()
        require(math.isfinite(accuracy), "the accurate solution", accuracy, "finite")
        rows = []
        for name, sampler in samplers.items():
            try:
                x, made = run(lambda x, given, s=sampler: s.sample(denoiser, x, given))
            except ValueError:
                if name in (trained or {}):
                    raise
                x, made = torch.full_like(fine, math.nan), nfe  # this one diverges here
            rows.append(Compared(name, sampler, made, _distance(x, fine)))
    rows.sort(key=lambda row: row.error)
    seconds = time.perf_counter() - start
    return Comparison(rows, accuracy, count, seconds, latents, fine)


def _latents(denoiser, shape, latents, device) -> torch.Tensor:
    if latents is None:
        shape = getattr(denoiser, "shape", None) if shape is None else shape
        return make_latents(range(32), checked_shape("shape", shape), best_device(device))
    latents = tensor("latents", latents)
    fits = latents.ndim >= 2 and len(latents) >= 2
    require(fits, "latents", tuple(latents.shape), "a tensor [B, ...] of at least two samples")
    return latents


def _some(labels, part: list[int]):
    """The labels of some samples."""
    if isinstance(labels, dict):
        return {name: _some(each, part) for name, each in labels.items()}
    if isinstance(labels, list | tuple):
        return [labels[i] for i in part]
    return labels if labels is None else labels[part]
