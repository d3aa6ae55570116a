"""Solvers, schedules and the loop, checked against mathematics and against each other."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from toys import TinyNet

import amedlib
from amedlib.denoisers.exact import GaussianMixtureDenoiser
from amedlib.sampling import Sampler
from amedlib.schedules import SCHEDULES
from amedlib.solvers import Evaluation, dynamic_threshold

SHAPE = (1, 2, 3)
X0, SLOPE = {"thresholding": False}, {"predict_x0": False}
# Every solver at every order, and the options that change its step.
PLAIN = [
    ("euler", {}),
    ("heun", {}),
    ("dpm2", {}),
    ("dpm2", {"r": 0.3}),
    *[("ipndm", {"order": order}) for order in (1, 2, 3, 4)],
    *[("deis", {"order": o, "mode": mode}) for o in (1, 2, 3, 4) for mode in ("tab", "rhoab")],
    *[
        (name, {"order": order, **options})
        for name in ("dpmpp", "unipc")
        for order in (1, 2, 3)
        for options in ({}, X0, SLOPE, {"lower_order_final": False})
    ],
    ("unipc", {"variant": "bh1"}),
    ("unipc", {"variant": "bh1", **SLOPE}),
]


def label(value):
    if isinstance(value, dict):
        return "-".join(f"{name}={v}" for name, v in value.items())
    return None


def solver_of(name, options):
    return amedlib.make_solver(name, **options)


def mixture():
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, *SHAPE, generator=generator).double()
    stds = 0.5 + torch.rand(3, *SHAPE, generator=generator).double() / 2
    return GaussianMixtureDenoiser(means, stds, torch.tensor([0.5, 0.3, 0.2]).double())


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


# --- observed order of convergence --------------------------------------------------------------
#
# On a smooth part of the path, from sigma = 2.5 to 1, where steps are short enough that the leading
# term of the error rules. All multistep solvers start with Euler, whose first step alone leaves an
# error of second order; so their own order shows when the first steps are replaced by the truth.

HIGH, LOW, POINTS = 2.5, 1.0, (17, 33, 65)


class Path:
    """The mixture's ODE, solved by SciPy's eighth-order Runge-Kutta in log t."""

    def __init__(self):
        self.denoiser = mixture()
        self.latents = amedlib.make_latents(range(4), SHAPE).double()
        self.solved = {}

    def truth(self, times):
        """The solution at ``times``, [N, B, C, H, W]."""

        def slope(log_t, x):
            x = torch.from_numpy(x).reshape(self.latents.shape)
            return (x - self.denoiser(x, math.exp(log_t))).flatten().numpy()

        log_t = times.log().numpy()
        x = (self.latents * times[0]).flatten().numpy()
        out = solve_ivp(slope, log_t[[0, -1]], x, "DOP853", t_eval=log_t, rtol=3e-13, atol=1e-13)
        return torch.from_numpy(out.y.T.copy()).reshape(-1, *self.latents.shape)

    def error(self, solver, points, schedule, intermediate, true_start):
        if schedule not in self.solved:
            name, rho = schedule
            finest = amedlib.make_schedule(name, max(POINTS), LOW, HIGH, rho)
            self.solved[schedule] = finest, self.truth(finest)
        every = (max(POINTS) - 1) // (points - 1)
        times, truth = (values[::every] for values in self.solved[schedule])
        sampler = Sampler(self.denoiser, truth[0], times, solver, intermediate=intermediate)
        for i in range(points - 1):
            sampler.advance()
            if true_start and i + 1 < solver.order:
                sampler.x = truth[i + 1]
                # What a corrector will start from.
                sampler.history[-1] = replace(sampler.history[-1], x=truth[i])
        sampler.finish()
        return (sampler.x - truth[-1]).square().sum((1, 2, 3)).mean().sqrt().item()

    def order(self, solver, schedule=("polynomial", 7.0), intermediate=None, true_start=True):
        """Regression slope of log error against log step."""
        errors = [self.error(solver, n, schedule, intermediate, true_start) for n in POINTS]
        return -np.polyfit(np.log([n - 1 for n in POINTS]), np.log(errors), 1)[0]


@pytest.fixture(scope="module")
def path():
    return Path()


CONSTANT_STEPS = ("polynomial", 1.0)


@pytest.mark.parametrize(
    "name, options, order",
    [
        ("euler", {}, 1),
        ("heun", {}, 2),
        ("dpm2", {}, 2),
        ("dpm2", {"r": 0.3}, 2),
        *[("deis", {"order": o, "mode": m}, o) for o in (2, 3, 4) for m in ("rhoab", "tab")],
        ("dpmpp", {"order": 1, **X0}, 1),
        ("dpmpp", {"order": 2, "lower_order_final": False, **X0}, 2),
        ("dpmpp", {"order": 2, "lower_order_final": False, **SLOPE}, 2),
        # The released formula of the third order has half of its highest term; the error that is
        # left is of second order, with a small constant.
        ("dpmpp", {"order": 3, "lower_order_final": False, **X0}, 2),
        ("dpmpp", {"order": 3, "lower_order_final": False, **SLOPE}, 2),
        # The corrector adds one order to UniPC's predictor ...
        *[
            ("unipc", {"order": o, "variant": v, "lower_order_final": False, **kind}, o + 1)
            for o in (1, 2, 3)
            for v in ("bh1", "bh2")
            for kind in (X0, SLOPE)
        ],
        # ... but a last step of order 1 alone has an error of second order.
        ("unipc", {"order": 2, **X0}, 2),
        ("unipc", {"order": 3, **X0}, 2),
        ("dpmpp", {"order": 2, **X0}, 2),
    ],
    ids=label,
)
def test_order_of_convergence(path, name, options, order):
    assert path.order(solver_of(name, options)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_has_its_order_for_equal_steps_only(path, order):
    solver = amedlib.make_solver("ipndm", order=order)
    assert path.order(solver, CONSTANT_STEPS) == pytest.approx(order, abs=0.25)
    # Its weights are those of equal steps; elsewhere the steps' ratio costs all above order 2.
    assert path.order(solver) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize(
    "name, options",
    [("ipndm", {"order": 4}), ("deis", {"order": 4, "mode": "rhoab"}), ("dpmpp", {"order": 3})],
    ids=label,
)
def test_the_first_step_limits_a_multistep_solver_to_order_2(path, name, options):
    options = options | (X0 if name == "dpmpp" else {})
    assert path.order(solver_of(name, options), true_start=False) == pytest.approx(2, abs=0.4)


def test_amed_has_order_2_at_the_middle_and_1_elsewhere(path):
    """At r = 0.5 the slope is that of the geometric mean of the times: the midpoint rule."""
    amed = amedlib.make_solver("amed")
    for r, order in ((0.5, 2), (0.4, 1), (0.6, 1)):
        intermediate = amedlib.TimeWise(r)
        assert path.order(amed, intermediate=intermediate) == pytest.approx(order, abs=0.25)


# --- coefficients by quadrature -----------------------------------------------------------------

T_HISTORY, T_NEXT = (40.0, 9.0, 2.0, 0.6), 0.05


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("mode", ["tab", "rhoab"])
def test_deis_coefficients_by_quadrature(mode, order):
    """The integral over sigma of each Lagrange polynomial, in sigma or in the VP time."""
    # sigma(tau)^2 = exp(beta_d tau^2 / 2 + beta_min tau) - 1 through sigma(0.001) = 0.002 and
    # sigma(1) = 80, which the official code fixes.
    tau = np.array([1e-3, 1.0])
    beta = np.linalg.solve(np.stack([tau**2 / 2, tau], 1), np.log1p(np.array([0.002, 80.0]) ** 2))

    def variable(sigma):
        if mode == "rhoab":
            return sigma
        return np.roots([beta[0] / 2, beta[1], -np.log1p(sigma**2)]).max()

    times = T_HISTORY[-order:]
    ours = amedlib.make_solver("deis", order=order, mode=mode).coefficients(
        [torch.tensor(t, dtype=torch.float64) for t in reversed(times)],
        torch.tensor(T_NEXT, dtype=torch.float64),
    )
    nodes = [variable(t) for t in reversed(times)]
    for j, node in enumerate(nodes):

        def basis(sigma, j=j, node=node):
            u = variable(sigma)
            return math.prod((u - v) / (node - v) for i, v in enumerate(nodes) if i != j)

        integral, _ = quad(basis, times[-1], T_NEXT, epsabs=1e-13, epsrel=1e-12)
        assert float(ours[j]) == pytest.approx(integral, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_integrates_its_polynomial(order, predict_x0):
    """Order 2 takes a line at the middle of the step, order 3 half of a parabola's last term."""
    x, t, start, end = 1.5, T_HISTORY[-1], -math.log(T_HISTORY[-1]), -math.log(T_NEXT)
    slope, second = (-1.3 if order > 1 else 0.0), (0.4 if order == 3 else 0.0)

    def model(log_snr, share=1.0):
        d = log_snr - start
        return 0.7 + slope * d + share * second * d**2

    def integrand(log_snr):
        sign = 1 if predict_x0 else -1
        taken = model((start + end) / 2) if order == 2 else model(log_snr, 0.5)
        return math.exp(sign * log_snr) * taken

    def tensor(value):
        return torch.full((1, 1, 1, 1), value, dtype=torch.float64)

    history = [
        Evaluation(tensor(x), tensor(time), tensor(model(-math.log(time)))) for time in T_HISTORY
    ]
    solver = amedlib.make_solver("dpmpp", order=order, predict_x0=predict_x0)
    ours = solver.step(history, tensor(T_NEXT), order)
    integral, _ = quad(integrand, start, end, epsrel=1e-13)
    # x/t grows by the integral of exp(lambda) D, x by that of the slope over sigma.
    expected = T_NEXT * (x / t + integral) if predict_x0 else x - integral
    assert ours.item() == pytest.approx(expected, rel=1e-11)


# --- the same image in every batch --------------------------------------------------------------

ONE_OF_EACH = [
    ("euler", {}),
    ("heun", {}),
    ("dpm2", {}),
    ("amed", {}),
    ("ipndm", {}),
    ("deis", {}),
    ("deis", {"mode": "rhoab"}),
    ("dpmpp", {}),
    ("dpmpp", SLOPE),
    ("unipc", {}),
    ("unipc", {"variant": "bh1", **SLOPE}),
]


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("name, options", ONE_OF_EACH, ids=label)
def test_result_does_not_depend_on_the_batch(name, options, plugin):
    net, times = TinyNet(), amedlib.make_schedule(num_steps=5)
    intermediate = amedlib.TimeWise(0.4) if name == "amed" else None
    if plugin:  # a random predictor, whose r differs from sample to sample
        with torch.random.fork_rng():
            torch.manual_seed(0)
            intermediate = amedlib.Predictor("release", (4, 4), 0.01, 0.2).double()

    def run(seeds):
        latents = amedlib.make_latents(seeds, (1, 8, 8))
        solver = solver_of(name, options)
        return amedlib.sample(net, latents, times, solver, intermediate=intermediate).x

    whole = run(range(7))
    for size in (1, 3):
        parts = [run(range(i, min(i + size, 7))) for i in range(0, 7, size)]
        close(torch.cat(parts), whole)


def test_latents_depend_on_their_own_seed_only():
    shape = (2, 3, 4)
    whole = amedlib.make_latents(range(20), shape)
    assert whole.shape == (20, *shape) and whole.dtype == torch.float32
    for i in (0, 7, 19):
        assert torch.equal(amedlib.make_latents([i], shape)[0], whole[i])
    assert torch.equal(amedlib.make_latents([5, 3, 5], shape), whole[[5, 3, 5]])
    assert len(whole.flatten(1).unique(dim=0)) == 20
    many = amedlib.make_latents(range(1000), shape)
    assert many.mean().abs() < 0.03 and abs(many.std() - 1) < 0.03
    correlation = np.corrcoef(many.flatten(1).numpy()[:100])
    assert np.abs(correlation - np.eye(100)).max() < 0.9


# --- counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("name, options", [*PLAIN, ("amed", {})], ids=label)
def test_evaluations_are_counted(name, options, afs, plugin):
    solver = solver_of(name, options)
    calls = []

    def denoiser(x, t, labels=None):
        calls.append(float(t))
        return x / (1 + t**2)

    for points in (2, 3, 4, 6):
        if name == "amed" and not plugin:
            continue
        calls.clear()
        times = amedlib.make_schedule(num_steps=points)
        intermediate = amedlib.TimeWise(0.5) if plugin else None
        latents = amedlib.make_latents(range(2), SHAPE)
        out = amedlib.sample(denoiser, latents, times, solver, afs, intermediate)
        steps = (points - 1) * (2 if plugin or name in ("heun", "dpm2") else 1)
        expected = steps - afs
        if name == "unipc" and steps < solver.order:
            expected += 1  # as released: too short to reach its order, it corrects the end too
        assert out.nfe == len(calls) == expected
        # The analytical first step saves the evaluation at sigma_max and no other.
        assert (80.0 in calls) == (not afs)


# --- solvers that are one and the same ----------------------------------------------------------


def run(solver, times, **options):
    latents = amedlib.make_latents(range(4), SHAPE)
    return amedlib.sample(mixture(), latents, times, solver, **options)


@pytest.mark.parametrize("afs", [False, True])
def test_euler_by_another_name(afs):
    times, denoiser = amedlib.make_schedule(num_steps=7), mixture()
    x = amedlib.make_latents(range(4), SHAPE).double() * 80
    for i, (t, t_next) in enumerate(pairwise(times)):
        slope = x / (1 + t**2).sqrt() if afs and i == 0 else (x - denoiser(x, t)) / t
        x = x + (t_next - t) * slope
    for name, options in (
        ("euler", {}),
        ("ipndm", {"order": 1}),
        ("deis", {"order": 1, "mode": "tab"}),
        ("deis", {"order": 1, "mode": "rhoab"}),
        ("dpmpp", {"order": 1, **SLOPE}),
        ("dpmpp", {"order": 1, **X0}),
    ):
        close(run(solver_of(name, options), times, afs=afs).x, x)


def test_two_stage_solvers_are_rows_of_table_1():
    times = amedlib.make_schedule(num_steps=6)
    heun, dpm2 = amedlib.make_solver("heun"), amedlib.make_solver("dpm2", r=0.3)
    close(run(amedlib.make_solver("dpm2", r=1.0), times).x, run(heun, times).x)
    close(
        run(amedlib.make_solver("dpm2"), times, intermediate=amedlib.TimeWise(0.3)).x,
        run(dpm2, times).x,
    )
    table = amedlib.TimeWise([0.3] * 5)
    assert torch.equal(
        run(dpm2, times, intermediate=table).x,
        run(dpm2, times, intermediate=amedlib.TimeWise(0.3)).x,
    )


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize(
    "name, options", [c for c in PLAIN if c[0] not in ("heun", "dpm2")], ids=label
)
def test_a_plugin_is_the_solver_on_the_refined_schedule(name, options, afs):
    refined = amedlib.make_schedule(num_steps=9)
    t_cur, middle, t_next = refined[:-2:2], refined[1::2], refined[2::2]
    r = (torch.log(t_cur / middle) / torch.log(t_cur / t_next)).tolist()
    solver = solver_of(name, options)
    plain = run(solver, refined, afs=afs, trajectory=True)
    plugin = run(solver, refined[::2], afs=afs, intermediate=amedlib.TimeWise(r), trajectory=True)
    close(plugin.trajectory, plain.trajectory[::2], 1e-10)
    assert plugin.nfe == plain.nfe


def test_trajectory_begins_with_the_noise_and_ends_with_the_result():
    times = amedlib.make_schedule(num_steps=5)
    latents = amedlib.make_latents(range(4), SHAPE)
    for name, options in ONE_OF_EACH:
        intermediate = amedlib.TimeWise(0.5) if name == "amed" else None
        out = run(solver_of(name, options), times, intermediate=intermediate, trajectory=True)
        assert out.trajectory.shape == (5, 4, *SHAPE) and out.x.dtype == torch.float64
        assert torch.equal(out.trajectory[0], latents.double() * 80)
        assert torch.equal(out.trajectory[-1], out.x)


@pytest.mark.parametrize("pixels", [(1, 8, 8), (3, 7, 5), (1, 1, 1), (3, 20, 20)])
def test_dynamic_threshold_against_torch_quantile(pixels):
    x = 3 * torch.randn(5, *pixels, generator=torch.Generator().manual_seed(0)).double()
    bound = x.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)[:, None, None, None]
    expected = torch.minimum(torch.maximum(x, -bound), bound) / bound
    close(dynamic_threshold(x), expected)


# --- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_descend_between_the_ends_that_were_asked_for(name):
    low, high = (0.03, 14.0) if name == "discrete" else (0.002, 80.0)
    for points in (2, 3, 17, 200):
        times = amedlib.make_schedule(name, points, low, high)
        assert times.shape == (points,) and times.dtype == torch.float64
        assert times[0] == high and times[-1] == low and (times.diff() < 0).all()


def test_logsnr_is_the_limit_of_the_polynomial_schedule():
    logsnr, polynomial = amedlib.make_schedule("logsnr"), amedlib.make_schedule(rho=1e6)
    torch.testing.assert_close(polynomial, logsnr, rtol=1e-3, atol=0)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ddim", {}, "solver must be one of 'euler', .*; 'ddim' was given"),
        ("euler", {"order": 2}, "options of solver 'euler' must be none; 'order' was given"),
        ("ipndm", {"mode": "tab"}, "options of solver 'ipndm' must be among order; 'mode'"),
        ("ipndm", {"order": 5}, "order must be a whole number from 1 to 4 .*; 5 was given"),
        ("deis", {"order": 0}, "order must be a whole number from 1 to 4 .*; 0 was given"),
        ("dpmpp", {"order": 4}, "order must be a whole number from 1 to 3 .*; 4 was given"),
        ("unipc", {"order": 2.5}, "order must be a whole number from 1 to 3 .*; 2.5 was given"),
        ("deis", {"mode": "ab"}, "mode must be one of 'tab', 'rhoab'; 'ab' was given"),
        ("unipc", {"variant": "bh3"}, "variant must be one of 'bh1', 'bh2'; 'bh3' was given"),
        ("dpm2", {"r": 0.0}, r"r must be a number in \(0, 1\].*; 0.0 was given"),
        ("dpm2", {"r": 1.5}, r"r must be a number in \(0, 1\].*; 1.5 was given"),
        ("dpm2", {"r": math.nan}, r"r must be a number in \(0, 1\].*; nan was given"),
    ],
)
def test_bad_solvers_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        amedlib.make_solver(name, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "karras"}, "schedule must be one of 'polynomial', .*; 'karras' was given"),
        ({"num_steps": 1}, "num_steps must be .* at least 2 time points; 1 was given"),
        ({"num_steps": 5.0}, "num_steps must be .*; 5.0 was given"),
        ({"sigma_min": 80.0}, r"0 < sigma_min < sigma_max; \(80.0, 80.0\) was given"),
        ({"sigma_min": -1.0}, r"0 < sigma_min < sigma_max; \(-1.0, 80.0\) was given"),
        ({"sigma_max": math.inf}, "sigma_min and sigma_max must be finite"),
        ({"sigma_min": math.nan}, "sigma_min and sigma_max must be finite"),
        ({"rho": 0.0}, "rho must be a positive number; 0.0 was given"),
        ({"name": "discrete"}, "sigma_min must be between the model's .*; 0.002 was given"),
        ({"name": "discrete", "sigmas": [3.0, 1.0]}, "sigmas must be an ascending list"),
        ({"name": "discrete", "sigmas": [0.001, 1, 1, 90]}, "sigmas must be an ascending list"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        amedlib.make_schedule(**arguments)


@pytest.mark.parametrize("r", [0.0, 1.0, -0.5, [0.5, 1.5], [], math.nan])
def test_bad_tables_are_refused(r):
    with pytest.raises(ValueError, match="r must be strictly between 0 and 1"):
        amedlib.TimeWise(r)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"denoiser": None}, "denoiser must be a callable"),
        ({"solver": "euler"}, "solver must be made by amedlib.make_solver; 'euler' was given"),
        ({"latents": torch.ones(3)}, r"latents must be a tensor \[B, ...\] .*; \(3,\) was given"),
        ({"latents": torch.ones(0, 1, 8, 8)}, r"latents must be .*; \(0, 1, 8, 8\) was given"),
        ({"times": [1.0]}, "times must be at least two positive time points in descending order"),
        ({"times": [1.0, 2.0]}, r"times must be .* descending order; \[1.0, 2.0\] was given"),
        ({"times": [2.0, 2.0]}, r"times must be .* descending order; \[2.0, 2.0\] was given"),
        ({"times": [2.0, 1.0, 0.0]}, "times must be .* positive"),
        ({"times": [2.0, -1.0]}, "times must be .* positive"),
        ({"times": [math.inf, 1.0]}, "times must be"),
        ({"times": [[2.0, 1.0]]}, "times must be"),
        ({"solver": amedlib.make_solver("amed")}, "intermediate must be given for solver 'amed'"),
        (
            {"intermediate": amedlib.TimeWise([0.5, 0.5])},
            "the length of r must be the number of steps, 5; 2 was given",
        ),
        (
            {"intermediate": amedlib.Predictor()},
            "denoiser must be one that gives its bottleneck, which this intermediate uses",
        ),
    ],
)
def test_bad_input_of_sample_is_refused(arguments, message):
    arguments = {
        "denoiser": mixture(),
        "latents": torch.ones(2, 1, 8, 8),
        "times": amedlib.make_schedule(num_steps=6),
        "solver": amedlib.make_solver("euler"),
    } | arguments
    with pytest.raises(ValueError, match=message):
        amedlib.sample(**arguments)
