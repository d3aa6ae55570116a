"""The one loop (Algorithm 2): any schedule, solver and intermediate; AFS, NFE, trajectories."""

import bisect
import copy
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from amedlib import checks
from amedlib.checks import flag, is_whole, require, whole
from amedlib.compute import best_device, check_precision
from amedlib.intermediate import Intermediate, TimeWise, directions
from amedlib.solvers import Evaluation, Solver, TwoStage


@dataclass(frozen=True)
class Sample:
    """What ``sample`` returns.

    Attributes:
        x: final states [B, ...], float64.
        trajectory: states at all time points [N, B, ...], or ``None``.
        nfe: network evaluations per sample, counted.
        parallel_nfe: the same, where evaluations that are made side by side count as one.
    """

    x: torch.Tensor
    trajectory: torch.Tensor | None
    nfe: int
    parallel_nfe: int


def make_latents(seeds: Iterable[int], shape: tuple[int, ...], device="cpu") -> torch.Tensor:
    """Unit normal latents, [N] + shape, float32, of N seeds; one generator per seed.

    So sample i is the same image in every batch and on every device.

    Raises:
        ValueError: a seed is no whole number from 0 to 2^63 - 1, the shape is none, or there is no
            such device.
    """
    require(isinstance(seeds, Iterable), "seeds", seeds, "a list or a range of whole numbers")
    seeds = [whole("a seed", seed, 0, 2**63 - 1) for seed in seeds]
    shape = checks.shape("shape", shape)
    device = best_device(device)
    # Dtype and device are named everywhere, whatever the defaults of the process are.
    latents = torch.empty(len(seeds), *shape, dtype=torch.float32, device="cpu")
    generator = torch.Generator("cpu")
    for row, seed in zip(latents, seeds, strict=True):
        torch.randn(
            shape,
            generator=generator.manual_seed(seed),
            out=row,
            dtype=torch.float32,
            device="cpu",
        )
    return latents.to(device)


def make_classes(seeds: Iterable[int], classes: int, device="cpu") -> torch.Tensor:
    """Random classes, one-hot [N, classes] float32; as with latents, one generator per seed.

    The seeds are moved far away from those of the latents, which would otherwise be drawn from the
    same random bits.
    """
    generator = torch.Generator("cpu")
    drawn = [
        torch.randint(classes, (), generator=generator.manual_seed(10**16 + seed), device="cpu")
        for seed in seeds
    ]
    return torch.nn.functional.one_hot(torch.stack(drawn), classes).float().to(device)


class Sampler:
    """Samples on their way along a schedule, one interval at a time.

    ``sample`` runs it to the end; training stops after each interval to compare with the teacher.
    The state is in the open: ``x``, ``history``, ``nfe`` and ``interval`` may be read, and between
    intervals replaced. ``start`` is the state at which the latest interval began.

    Args:
        denoiser: D(x; t) as a callable ``(x, t, labels=None)``. With the attribute
            ``gives_bottleneck`` it is also asked for its bottleneck (``return_bottleneck=True``). A
            call counts ``evaluations_per_call`` evaluations, one unless the denoiser says more.
        x: states at ``times[0]``, [B, ...].
        times: N descending points, float64.
        solver: from ``make_solver``.
        afs: analytical first step: the slope at ``times[0]`` is x / sqrt(1 + t^2), at no cost.
        intermediate: ``None``, or see ``intermediate.py``.
        labels: handed to the denoiser.
    """

    def __init__(self, denoiser, x, times, solver, afs=False, intermediate=None, labels=None):
        if intermediate is None and isinstance(solver, TwoStage):
            require(
                solver.r is not None,
                "intermediate",
                intermediate,
                f"given for solver {solver.name!r}, which has no location of its own",
            )
            intermediate = _fixed(solver.r)
        self.denoiser, self.solver = denoiser, solver
        self.afs, self.intermediate, self.labels = afs, intermediate, labels
        # An intermediate may have learned the times, and at which the network is evaluated.
        learned = getattr(intermediate, "schedule", None)
        self.times, self.network_times = learned(times) if learned else (times, times)
        twice = intermediate is not None and getattr(intermediate, "evaluates", True)
        self.points = 2 * len(times) - 1 if twice else len(times)
        self.x = self.start = x
        self.history: deque[Evaluation] = deque(maxlen=solver.memory)
        self.nfe = self.parallel_nfe = 0
        self.interval = 0
        self._steps = 0  # whose starts are evaluated, on the refined grid

    def _evaluate(self, t, bottleneck=False, beside=False):
        made = getattr(self.denoiser, "evaluations_per_call", 1)
        self.nfe += made
        self.parallel_nfe += 0 if beside else made
        if bottleneck and getattr(self.denoiser, "gives_bottleneck", False):
            found = self.denoiser(self.x, t, self.labels, return_bottleneck=True)
            require(
                isinstance(found, tuple) and len(found) == 2,
                "what the denoiser returns with return_bottleneck=True",
                type(found).__name__,
                "a tuple (D, bottleneck)",
            )
        else:
            found = self.denoiser(self.x, t, self.labels), None
        # Another shape would be broadcast, and samples be wrong without a word.
        if not torch.is_tensor(found[0]) or found[0].shape != self.x.shape:
            given = tuple(found[0].shape) if torch.is_tensor(found[0]) else type(found[0]).__name__
            allowed = f"a tensor of the shape of its input, {tuple(self.x.shape)}"
            require(False, "what the denoiser returns", given, allowed)
        return found

    def _remember(self, x, t, output):
        """Enter an evaluation into the history; the solver may correct the state."""
        self.history.append(Evaluation(x, t, output))
        self.x = self.solver.corrected(self.history, self._steps, self.points)
        self.history[-1] = replace(self.history[-1], x=self.x)
        self._steps += 1

    def _output(self, t, denoised):
        return self.solver.output(self.x, t, denoised.to(self.x.dtype))

    def _fitting(self, value):
        """A number for all samples, or one per sample, so that it multiplies states."""
        if not torch.is_tensor(value):
            return value
        value = value.to(self.x.dtype)
        return value.reshape(-1, *[1] * (self.x.ndim - 1)) if value.ndim else value

    def _step(self, t, scale=1.0, coefficients=()):
        order = self.solver.order_at(self._steps, self.points)
        self.history[-1] = replace(self.history[-1], order=order, scale=scale)
        self.x = self.solver.step(self.history, t, order, scale)
        differences, found = [e.output for e in reversed(self.history)], []
        for c, _ in zip(coefficients, self.history, strict=False):
            found.append(c * differences[0])
            differences = [new - old for new, old in pairwise(differences)]
        if found:
            self.x = self.x + self.solver.first_order(self.history, t, sum(found))

    def _look(self, t_cur, t_next, learned):
        """Evaluate inside the step, at points side by side if there are several."""
        found = []
        for r, scale_time in zip(learned.r, learned.scale_time, strict=True):
            # In single precision t_next^r would lose 3 % at r = 0.001.
            r = self._fitting(r)
            middle = t_next**r * t_cur ** (1 - r)
            self._step(middle)
            told = self._fitting(scale_time) * middle
            denoised, _ = self._evaluate(told, beside=bool(found))
            found.append((self.x, middle, self._output(middle, denoised)))
        if len(found) == 1:
            return self._remember(*found[0])
        weights = [self._fitting(w) for w in learned.weights]
        x, log_t, output = (
            sum(w * value for w, value in zip(weights, values, strict=True))
            for values in zip(*((x, t.log(), e) for x, t, e in found), strict=True)
        )
        return self._remember(x, log_t.exp(), output)

    def advance(self, known=None):
        """Cross one interval.

        Args:
            known: the evaluation ``(D, bottleneck)`` at the current state and time, if somebody has
                made it already; it is then neither made again nor counted.

        Returns:
            The evaluation ``(D, bottleneck)`` at ``start``; ``None`` where it was made elsewhere,
            before a corrector moved the state.
        """
        t_cur, t_next = self.times[self.interval], self.times[self.interval + 1]
        if self.solver.single_step:
            self.history.clear()
        if self.interval == 0 and self.afs:
            known = self.x - t_cur * self.x / torch.sqrt(1 + t_cur**2), None
        elif known is None:
            known = self._evaluate(self.network_times[self.interval], bottleneck=True)
        predicted = self.x
        self._remember(self.x, t_cur, self._output(t_cur, known[0]))
        self.start = self.x
        if self.intermediate is not None:
            learned = directions(self.intermediate(self.interval, t_cur, t_next, known[1]))
            if learned.r:
                self._look(t_cur, t_next, learned)
            coefficients = [self._fitting(c) for c in learned.coefficients]
            self._step(t_next, self._fitting(learned.scale_dir), coefficients)
        else:
            self._step(t_next)
        self.interval += 1
        moved = self.start is not predicted  # by a corrector: `known` belongs to another state
        return None if moved else known

    def fork(self) -> "Sampler":
        """A copy that goes on by itself."""
        other = copy.copy(self)
        other.history = self.history.copy()
        return other

    def detach(self):
        """Cut the state and the history off from the autograd graph."""
        self.x = self.x.detach()
        for i, evaluation in enumerate(self.history):
            self.history[i] = evaluation.detached()

    def finish(self):
        """Correct the final state where the solver asks for it (UniPC on very short schedules)."""
        if self.solver.corrects_after(self._steps, self.points):
            end = self.times[-1]
            self._remember(self.x, end, self._output(end, self._evaluate(end)[0]))

    def run(self, every: int = 1) -> tuple[list, list]:
        """Cross all intervals.

        Returns:
            Every so many states, the first and the last included, and what ``advance`` returned at
            each of them but the last.
        """
        states, evaluations = [], []
        for i in range(len(self.times) - 1):
            evaluated = self.advance()
            if i % every == 0:
                states.append(self.start)
                evaluations.append(evaluated)
        self.finish()
        return [*states, self.x], evaluations


def tensor(name: str, given, dtype=None) -> torch.Tensor:
    """Numbers as a tensor."""
    try:
        return torch.as_tensor(given, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        require(False, name, given, "a tensor or an array of numbers")


def check_labels(labels, batch: int):
    if isinstance(labels, np.ndarray):
        labels = tensor("labels", labels)
    if labels is None:
        return None
    if isinstance(labels, dict):  # several kinds of labels, by name
        return {name: check_labels(each, batch) for name, each in labels.items()}
    listed = isinstance(labels, list | tuple) and all(
        isinstance(each, str) or is_whole(each) for each in labels
    )
    fits = (listed or torch.is_tensor(labels) and labels.ndim > 0) and len(labels) == batch
    given = tuple(labels.shape) if torch.is_tensor(labels) else labels
    allowed = f"None, a tensor [{batch}, ...] or a list of {batch} strings or whole numbers"
    require(fits, "labels", given, allowed)
    return labels


def _fixed(r: float) -> Callable[..., Intermediate]:
    return lambda step, t_cur, t_next, bottleneck: Intermediate(r)


def check_inputs(denoiser, latents, times, solver, intermediate) -> None:
    """Raise ``ValueError`` for what ``sample`` cannot work with."""
    require(callable(denoiser), "denoiser", denoiser, "a callable (x, t, labels=None)")
    check_precision(denoiser)
    require(isinstance(solver, Solver), "solver", solver, "made by amedlib.make_solver")
    require(
        latents.ndim >= 2 and latents.numel() > 0 and not latents.is_complex(),
        "latents",
        tuple(latents.shape) if not latents.is_complex() else "a complex tensor",
        "a tensor [B, ...] with at least one sample",
    )
    require(
        times.ndim == 1
        and len(times) >= 2
        and bool(torch.isfinite(times).all())
        and bool((times.diff() < 0).all())
        and times[-1] > 0,
        "times",
        times.tolist(),
        "at least two positive time points in descending order",
    )
    require(
        intermediate is None or callable(intermediate),
        "intermediate",
        intermediate,
        "None or a callable, such as TimeWise or a Predictor",
    )
    _check_intermediate(denoiser, times, solver, intermediate)


def _check_intermediate(denoiser, times, solver, intermediate) -> None:
    """That it fits the denoiser, and was trained for this solver and number of steps."""
    if getattr(intermediate, "uses_bottleneck", False):
        require(
            getattr(denoiser, "gives_bottleneck", False),
            "denoiser",
            denoiser,
            "one that gives its bottleneck, which this intermediate uses",
        )
        expected = getattr(intermediate, "bottleneck_size", None)
        found = getattr(denoiser, "bottleneck_size", None)
        require(
            None in (expected, found) or tuple(found) == tuple(expected),
            "the denoiser's bottleneck_size",
            found,
            f"what the predictor was made for, {expected}",
        )
    if hasattr(intermediate, "check"):
        intermediate.check(len(times) - 1)
    record = getattr(intermediate, "trained_for", None)
    if record is not None:
        found = f"{solver} on {len(times)} time points"
        wanted = f"{record.make_solver()} on {record.num_steps} time points"
        require(
            found == wanted,
            "solver and times",
            found,
            f"those that the predictor was trained for, {wanted} (to use it elsewhere all the "
            "same, set its trained_for to None)",
        )


@torch.no_grad()
def sample(
    denoiser,
    latents: torch.Tensor,
    times: torch.Tensor,
    solver: Solver,
    afs: bool = False,
    intermediate=None,
    labels: torch.Tensor | None = None,
    trajectory: bool = False,
) -> Sample:
    """Solve the ODE from ``latents * times[0]`` down to ``times[-1]`` (Algorithm 2).

    The state is float64 throughout; the denoiser computes in its own precision.

    Args:
        denoiser: D(x; t), a callable ``(x, t, labels=None)`` that returns a tensor of the shape of
            x, [B, ...]; t is a 0-dimensional tensor or [B, 1, ...].
        latents: unit normal [B, ...], any trailing shape; a tensor, or a NumPy array.
        times: N descending time points, from ``make_schedule``.
        solver: from ``make_solver``.
        afs: analytical first step, saves one evaluation.
        intermediate: ``None`` for the plain solver; ``TimeWise`` or a ``Predictor`` for AMED-Solver
            and AMED-Plugin.
        labels: handed to the denoiser; a tensor [B, ...], a list of B strings or numbers, or a
            dictionary of such.
        trajectory: keep the states at all N time points.

    Raises:
        ValueError: an argument is not of the form above, or samples become NaN or infinite; the
            sentence says in which step.
    """
    latents = tensor("latents", latents)
    times = tensor("times", times, torch.float64).to(latents.device)
    afs, trajectory = flag("afs", afs), flag("trajectory", trajectory)
    check_inputs(denoiser, latents, times, solver, intermediate)
    labels = check_labels(labels, len(latents))
    x = latents.to(torch.float64) * times[0]
    sampler = Sampler(denoiser, x, times, solver, afs, intermediate, labels)
    states, finite = [], []
    for _ in range(len(times) - 1):
        sampler.advance()
        finite.append(torch.isfinite(sampler.x).all())  # read at the end: a GPU need not wait
        if trajectory:  # the state at the interval's start, corrected where the solver corrects
            states.append(sampler.start)
    sampler.finish()
    if not bool(torch.isfinite(sampler.x).all()):
        _say_where(latents, times, finite)
    if trajectory:
        states.append(sampler.x)
    return Sample(
        sampler.x, torch.stack(states) if trajectory else None, sampler.nfe, sampler.parallel_nfe
    )


def _say_where(latents, times, finite) -> None:
    """Raise ``ValueError`` with the step in which samples ceased to be finite."""
    require(bool(torch.isfinite(latents).all()), "latents", "NaN or inf", "finite")
    n = next((i for i, good in enumerate(finite, 1) if not good), len(finite))
    raise ValueError(
        f"Samples must be finite; NaN or inf arose in step {n} of {len(finite)}, "
        f"from t = {times[n - 1]:.4g} to {times[n]:.4g}."
    )


@cache
def num_steps_for(
    nfe: int, solver: Solver, afs: bool = False, intermediate: bool = False, per_call: int = 1
) -> int:
    """The number of time points with which a method makes ``nfe`` evaluations, found by counting.

    Where two numbers do (UniPC on a very short schedule), the larger.

    Args:
        intermediate: whether an intermediate step is taken.
        per_call: evaluations that a call of the denoiser counts; two with classifier-free guidance.

    Raises:
        ValueError: the method cannot have this NFE; the sentence says which it can have.
    """
    nfe = whole("nfe", nfe, 1, 10**6)
    middle = TimeWise(0.5) if intermediate else None

    @cache
    def count(points: int) -> int:
        times = torch.linspace(1.0, 0.5, points, dtype=torch.float64, device="cpu")
        one = torch.ones(1, 1, device="cpu")
        out = sample(lambda x, t, labels=None: x, one, times, solver, afs, middle)
        return per_call * out.nfe

    # More points never make fewer evaluations: the largest number that makes at most `nfe`.
    fitting = range(2, nfe // per_call + 4)
    points = 1 + bisect.bisect_right(fitting, nfe, key=count)
    if points >= 2 and count(points) == nfe:
        return points
    around = {count(n) for n in range(max(2, points - 4), points + 6)} - {0}
    nearest = sorted(around, key=lambda n: abs(n - nfe))[:8]
    possible = ", ".join(map(str, sorted(nearest)))
    how = "with" if afs else "without"
    require(False, "nfe", nfe, f"one that this method can have {how} AFS ({possible}, ...)")
