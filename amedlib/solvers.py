"""The solver family: how one step is taken from the evaluations so far.

Every solver is a small frozen dataclass with ``step(history, t_next, order, scale)``. It never
calls the network: the loop in ``sampling.py`` evaluates, and hands over a short history, newest
last. So an AMED-Plugin is no solver of its own. It is the same solver stepping twice, once to the
intermediate time s and once on to t_next, and times may differ from sample to sample.

The ODE is dx/dt = e(x, t) with the slope e = (x - D(x; t)) / t (Eq. 6).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch

from amedlib.checks import flag, is_number, one_of, require, whole
from amedlib.schedules import vp_coefficients


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser, as a solver remembers it.

    Attributes:
        x: the state [B, C, H, W] from which the next step starts.
        t: its time, a 0-dimensional tensor or [B, 1, 1, 1].
        output: what the solver extrapolates: the slope, or the denoised image.
        order, scale: of the step that was taken from here; order 0 before there is one.
    """

    x: torch.Tensor
    t: torch.Tensor
    output: torch.Tensor
    order: int = 0
    scale: torch.Tensor | float = 1.0

    def detached(self) -> "Evaluation":
        """The same, cut off from the autograd graph."""
        x, t, output = self.x.detach(), self.t.detach(), self.output.detach()
        scale = self.scale.detach() if torch.is_tensor(self.scale) else self.scale
        return Evaluation(x, t, output, self.order, scale)


History = Sequence[Evaluation]


@dataclass(frozen=True)
class Solver(ABC):
    """What all solvers share; ``order`` is the highest order that a step takes."""

    order: int = 1

    # How many evaluations a step looks back on is `order`; single-step solvers forget at every t_n.
    single_step = False
    highest_order = 1

    def __post_init__(self):
        allowed = f"a whole number from 1 to {self.highest_order} for this solver"
        order = whole("order", self.order, 1, self.highest_order, allowed)
        object.__setattr__(self, "order", order)

    @property
    def memory(self) -> int:
        """How many evaluations a step needs at most."""
        return self.order

    def output(self, x: torch.Tensor, t: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """What enters the history after an evaluation D(x; t): here the slope e(x, t)."""
        return (x - denoised) / t

    def order_at(self, step: int, points: int) -> int:
        """Order of the ``step``-th step (from 1) on a grid of ``points`` time points."""
        return min(self.order, step)

    def corrects_after(self, step: int, points: int) -> bool:
        """Whether the ``step``-th step is corrected once its end has been evaluated."""
        return False

    def corrected(self, history: History, step: int, points: int) -> torch.Tensor:
        """The state at the newest evaluation, which was made at the end of the ``step``-th step."""
        return history[-1].x

    @abstractmethod
    def step(self, history: History, t_next: torch.Tensor, order: int, scale=1.0) -> torch.Tensor:
        """The state at ``t_next`` from the newest evaluation, ``history[-1]``.

        Args:
            history: at least ``order`` evaluations, newest last.
            t_next: 0-dimensional or [B, 1, 1, 1].
            order: how many evaluations to use, see ``order_at``.
            scale: c_n of the final version of the paper, multiplies what the model contributes.
        """

    def first_order(self, history: History, t_next: torch.Tensor, output) -> torch.Tensor:
        """What a step to ``t_next`` of order one would add if the evaluation had this output."""
        return (t_next - history[-1].t) * output


# --- single-step solvers: Table 1 ---------------------------------------------------------------


def _half_over_r(r):
    return 0.5 / r


def _one(r):
    return 1.0


# Table 1: the second slope's location r (in s = t_next^r t_cur^(1-r)) and its weight in the step.
TABLE_1 = {
    "heun": (1.0, _half_over_r),
    "dpm2": (0.5, _half_over_r),
    "amed": (None, _one),  # learned: the step needs an intermediate
}


@dataclass(frozen=True)
class TwoStage(Solver):
    """Heun (EDM), DPM-Solver-2 and AMED-Solver: Euler to s, then a weighted mean of two slopes.

    x_next = x + h (w e(x_s, s) + (1 - w) e(x, t)), with r and w from Table 1.
    """

    name: str = "heun"
    r: float | None = None

    single_step = True
    memory = 2

    def __post_init__(self):
        if self.r is None:
            object.__setattr__(self, "r", TABLE_1[self.name][0])
        require(
            self.r is None or is_number(self.r) and 0.001 <= self.r <= 1,
            "r",
            self.r,
            "a number in (0, 1], 1 being Heun's, and not below 0.001",
        )
        if self.r is not None:
            object.__setattr__(self, "r", float(self.r))

    def step(self, history, t_next, order, scale=1.0):
        start = history[0]
        if len(history) == 1:
            return start.x + (t_next - start.t) * start.output
        second = history[1]
        r = torch.log(start.t / second.t) / torch.log(start.t / t_next)
        weight = TABLE_1[self.name][1](r)
        slope = weight * second.output + (1 - weight) * start.output
        return start.x + scale * (t_next - start.t) * slope

    def first_order(self, history, t_next, output):
        return (t_next - history[0].t) * output


# --- linear multistep solvers: the slope is extrapolated ----------------------------------------


@dataclass(frozen=True)
class LinearMultistep(Solver):
    """x_next = x + sum_j c_j e_j over the newest ``order`` slopes; ``coefficients`` tells which."""

    @abstractmethod
    def coefficients(self, times: Sequence[torch.Tensor], t_next: torch.Tensor) -> list:
        """c_j for the slopes taken at ``times``, newest first."""

    def step(self, history, t_next, order, scale=1.0):
        newest_first = list(reversed(history))[:order]
        weights = self.coefficients([e.t for e in newest_first], t_next)
        increment = sum(c * e.output for c, e in zip(weights, newest_first, strict=True))
        return newest_first[0].x + scale * increment


ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class IPNDM(LinearMultistep):
    """Improved PNDM: Adams-Bashforth with the weights for equal steps, whatever the steps are."""

    order: int = 4
    highest_order = 4

    def coefficients(self, times, t_next):
        return [(t_next - times[0]) * weight for weight in ADAMS_BASHFORTH[len(times)]]


@dataclass(frozen=True)
class Euler(IPNDM):
    """DDIM: the first row of Table 1, and iPNDM of order 1."""

    order: int = 1
    highest_order = 1


@cache
def _quadrature(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature; copied to a device once, which waits for it.

    The integrands below are smooth in log sigma, where 32 nodes leave an error at the level of
    rounding.
    """
    nodes, weights = np.polynomial.legendre.leggauss(32)
    with torch.inference_mode(False):  # those made in it could not be used in a training
        return torch.from_numpy(nodes).to(device), torch.from_numpy(weights).to(device)


@dataclass(frozen=True)
class DEIS(LinearMultistep):
    """DEIS: the exact integral of the polynomial through the newest slopes.

    ``mode="tab"``: polynomial in the time of the VP process (with sigma from 0.002 to 80, as in the
    released code); ``mode="rhoab"``: polynomial in sigma, that is variable-step Adams-Bashforth.
    """

    order: int = 4
    mode: str = "tab"
    highest_order = 4

    def __post_init__(self):
        super().__post_init__()
        one_of("mode", self.mode, ("tab", "rhoab"))

    def _variable(self, sigma):
        if self.mode == "rhoab":
            return sigma
        beta_d, beta_min = vp_coefficients(0.002, 80.0)
        return (torch.sqrt(beta_min**2 + 2 * beta_d * torch.log1p(sigma**2)) - beta_min) / beta_d

    def coefficients(self, times, t_next):
        t_next, times = torch.as_tensor(t_next), [torch.as_tensor(t) for t in times]
        if len(times) == 1:
            return [t_next - times[0]]
        start, end = torch.log(times[0]), torch.log(t_next)
        # The quadrature's nodes along a first axis, before those of per-sample times.
        shape = [-1] + [1] * max(start.ndim, end.ndim)
        z, w = (values.to(end.dtype).reshape(shape) for values in _quadrature(end.device))
        sigma = torch.exp((start + end + (end - start) * z) / 2)
        u, nodes = self._variable(sigma), [self._variable(t) for t in times]
        differences, weight = [u - v for v in nodes], w * sigma * (end - start) / 2
        result = []
        for j, node in enumerate(nodes):
            # Lagrange's polynomial; its denominator has no quadrature's axis and comes last.
            above = math.prod(d for i, d in enumerate(differences) if i != j)
            below = math.prod(node - v for i, v in enumerate(nodes) if i != j)
            result.append((weight * above).sum(0) / below)
        return result


# --- multistep solvers in lambda = -log t: exponential integrators -------------------------------


def dynamic_threshold(denoised: torch.Tensor, quantile: float = 0.995) -> torch.Tensor:
    """Clip every image to its own bound ``s = max(1, quantile of |x|)`` and divide by s.

    As DPM-Solver++ uses it, meant for data in [-1, 1]; [B, C, H, W] in and out.
    """
    magnitude = denoised.abs().flatten(1)
    # The quantile with linear interpolation; torch.quantile refuses large batches.
    below, fraction = divmod(quantile * (magnitude.shape[1] - 1), 1)
    largest = magnitude.topk(magnitude.shape[1] - int(below), dim=1).values
    bound = torch.lerp(largest[:, -1], largest[:, -2], fraction) if fraction else largest[:, -1]
    bound = bound.clamp(min=1).reshape(-1, *[1] * (denoised.ndim - 1))
    return denoised.clamp(-bound, bound) / bound


@dataclass(frozen=True)
class ExponentialMultistep(Solver):
    """What DPM-Solver++ and UniPC share; options default to the released code's, one excepted.

    The linear part of the ODE is solved exactly, and the rest extrapolated in lambda: the denoised
    image (``predict_x0=True``) or the slope (``False``).

    ``lower_order_final`` lowers the order at the end of the schedule. ``thresholding`` applies
    ``dynamic_threshold`` to the denoised image, which belongs to data in [-1, 1] (the released code
    always does); it has no effect with ``predict_x0=False``.
    """

    order: int = 3
    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = False
    highest_order = 3

    def __post_init__(self):
        super().__post_init__()
        for name in ("predict_x0", "lower_order_final", "thresholding"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))

    def output(self, x, t, denoised):
        if not self.predict_x0:
            return super().output(x, t, denoised)
        return dynamic_threshold(denoised) if self.thresholding else denoised

    def order_at(self, step, points):
        if step < self.order:
            return step
        return min(self.order, points - step) if self.lower_order_final else self.order

    def _linear_part(self, current, t_next):
        """(carry, gain, h, hh): x_next = carry - gain (expm1(hh) m_0 + higher terms).

        h is the step in lambda; hh is its sign-adjusted twin, -h for images and h for slopes.
        """
        h = torch.log(current.t / t_next)
        if self.predict_x0:
            return t_next / current.t * current.x, 1.0, h, -h
        return current.x, t_next, h, h

    @abstractmethod
    def _higher_terms(self, history, h, hh):
        """What the evaluations before the newest add to (expm1(hh) m_0)."""

    def first_order(self, history, t_next, output):
        _, gain, _, hh = self._linear_part(history[-1], t_next)
        return -gain * torch.expm1(hh) * output

    def step(self, history, t_next, order, scale=1.0):
        history = list(history)[-order:]
        carry, gain, h, hh = self._linear_part(history[-1], t_next)
        terms = torch.expm1(hh) * history[-1].output + self._higher_terms(history, h, hh)
        return carry - scale * gain * terms


def _log_ratio(evaluation, current):
    """lambda at an evaluation minus lambda at the current time; negative for older ones."""
    return torch.log(current.t / evaluation.t)


@dataclass(frozen=True)
class DPMpp(ExponentialMultistep):
    """DPM-Solver++ (multistep, Lu et al., 2022), order 1 to 3, by divided differences in lambda."""

    def _higher_terms(self, history, h, hh):
        phi_1 = torch.expm1(hh)
        if len(history) == 1:
            return 0.0
        m0, m1 = history[-1], history[-2]
        r0 = -_log_ratio(m1, m0) / h
        first = (m0.output - m1.output) / r0
        if len(history) == 2:
            return 0.5 * phi_1 * first
        m2 = history[-3]
        r1 = -_log_ratio(m2, m1) / h
        older = (m1.output - m2.output) / r1
        second = (first - older) / (r0 + r1)
        first = first + r0 * second
        phi_2 = phi_1 / hh - 1
        phi_3 = phi_2 / hh - 0.5
        return phi_2 * first + phi_3 * second


@dataclass(frozen=True)
class UniPC(ExponentialMultistep):
    """UniPC (Zhao et al., 2023), order 1 to 3: predictor and a corrector without evaluations.

    The corrector of step n uses the evaluation at the predicted end, which is also the first
    evaluation of step n+1. ``variant`` is the function B(h): ``"bh1"`` or ``"bh2"``.
    """

    variant: str = "bh2"

    def __post_init__(self):
        super().__post_init__()
        one_of("variant", self.variant, ("bh1", "bh2"))

    @property
    def memory(self):
        return self.order + 1

    def corrects_after(self, step, points):
        # As released: in the last interval the corrector is off, unless the order is still rising.
        return step < self.order or step < points - 1

    def _weighted_differences(self, ratios, differences, hh):
        """B(h) sum_j rho_j D_j, where rho solves sum_j rho_j r_j^(k-1) = b_k for k = 1..J."""
        phi = torch.expm1(hh)
        bound = hh if self.variant == "bh1" else phi
        if len(ratios) == 1:  # one difference alone has the weight 1/2, as in the original code
            return bound * 0.5 * differences[0]
        right = []
        for k in range(1, len(ratios) + 1):
            phi = phi / hh - 1 / math.factorial(k)
            right.append(phi * math.factorial(k) / bound)
        ratios = torch.stack(torch.broadcast_tensors(*[r + 0 * hh for r in ratios]), dim=-1)
        powers = torch.arange(len(right), device=ratios.device)[:, None]
        matrix = ratios[..., None, :] ** powers
        # The form that does not wait for a GPU to report whether the matrix was singular.
        weights, _ = torch.linalg.solve_ex(matrix, torch.stack(right, dim=-1)[..., None])
        weights = weights[..., 0]
        return bound * sum(weights[..., j] * d for j, d in enumerate(differences))

    def _higher_terms(self, history, h, hh, new=None):
        current = history[-1]
        older = history[-2::-1]
        ratios = [_log_ratio(e, current) / h for e in older]
        differences = [(e.output - current.output) / r for e, r in zip(older, ratios, strict=True)]
        if new is not None:
            ratios.append(torch.ones_like(h))
            differences.append(new - current.output)
        return self._weighted_differences(ratios, differences, hh) if ratios else 0.0

    def corrected(self, history, step, points):
        if step == 0 or not self.corrects_after(step, points):
            return history[-1].x
        *history, newest = history
        scale = history[-1].scale
        history = history[-history[-1].order :]
        carry, gain, h, hh = self._linear_part(history[-1], newest.t)
        terms = torch.expm1(hh) * history[-1].output
        terms = terms + self._higher_terms(history, h, hh, new=newest.output)
        return carry - scale * gain * terms


SOLVERS = {
    "euler": Euler,
    "heun": TwoStage,
    "dpm2": TwoStage,
    "ipndm": IPNDM,
    "deis": DEIS,
    "dpmpp": DPMpp,
    "unipc": UniPC,
    "amed": TwoStage,
}


def canonical_options(name: str, options: dict) -> dict:
    """The same options of ``make_solver`` in the one form that equal solvers share.

    An order is always stated, any other option where it is not the default.

    Raises:
        ValueError: as ``make_solver``.
    """
    solver = make_solver(name, **options)
    if isinstance(solver, TwoStage):
        default = TABLE_1[name][0]
        return {} if solver.r == default else {"r": float(solver.r)}
    if name == "euler":
        return {}
    return {
        option.name: getattr(solver, option.name)
        for option in fields(solver)
        if option.name == "order" or getattr(solver, option.name) != option.default
    }


def make_solver(name: str, **options) -> Solver:
    """A solver by name, with its options.

    ========  ===========================================================================
    name      options (defaults are what the released code does, except for thresholding)
    ========  ===========================================================================
    euler     none; also known as DDIM
    heun      none; EDM's solver, here also in the last interval
    dpm2      ``r=0.5``, the location of the second evaluation, in (0, 1]
    ipndm     ``order=4``, 1 to 4
    deis      ``order=4``, 1 to 4; ``mode="tab"`` or ``"rhoab"``
    dpmpp     ``order=3``, 1 to 3; ``predict_x0``, ``lower_order_final``, ``thresholding``
    unipc     as dpmpp, and ``variant="bh2"`` or ``"bh1"``
    amed      none; needs an intermediate when it samples
    ========  ===========================================================================

    Raises:
        ValueError: unknown name or option, or an option outside its range.
    """
    one_of("solver", name, SOLVERS)
    cls = SOLVERS[name]
    allowed = {"dpm2": ["r"], "heun": [], "amed": [], "euler": []}.get(
        name, [field.name for field in fields(cls)]
    )
    for option in options:
        require(
            option in allowed,
            f"options of solver {name!r}",
            option,
            "among " + ", ".join(allowed) if allowed else "none",
        )
    if cls is TwoStage:
        options["name"] = name
    return cls(**options)
