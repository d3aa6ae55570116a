"""DPM-Solver++ and UniPC against the schedulers of diffusers, on the same denoiser and levels.

Where the definitions coincide the results are equal to rounding. Where they do not, a test says
what is different and how much: these differences are of definition, and none of them is an error.

diffusers makes its tables of noise levels in single precision; the tests put ours in their place,
except where the tables are the question.
"""

import diffusers
import numpy as np
import pytest
import torch

import amedlib
from amedlib.denoisers.exact import GaussianMixtureDenoiser
from amedlib.sampling import Sampler

SHAPE = (1, 2, 3)
LATENTS = amedlib.make_latents(range(4), SHAPE).double()
EDM = diffusers.EDMDPMSolverMultistepScheduler
DPM = diffusers.DPMSolverMultistepScheduler
UNIPC = diffusers.UniPCMultistepScheduler
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _mixture():
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, *SHAPE, generator=generator).double()
    stds = 0.5 + torch.rand(3, *SHAPE, generator=generator).double() / 2
    return GaussianMixtureDenoiser(means, stds, torch.tensor([0.5, 0.3, 0.2]).double())


DENOISER = _mixture()


def ours(name, times, **options):
    solver = amedlib.make_solver(name, **{"thresholding": False} | options)
    return amedlib.sample(DENOISER, LATENTS, times, solver)


def run(scheduler, steps, sigmas=None):
    """Final state x = x_0 + t n of a scheduler; ``sigmas``: its table, one more than steps."""
    scheduler.set_timesteps(steps)
    if sigmas is not None:
        scheduler.sigmas = sigmas
    t = scheduler.sigmas.double()
    edm = isinstance(scheduler, EDM)
    # the state is x itself, or x / sqrt(1 + t^2) in the other two
    scale = torch.ones_like(t) if edm else (1 + t**2).rsqrt()
    x = LATENTS * t[0] * scale[0]
    for i, timestep in enumerate(scheduler.timesteps):
        denoised = DENOISER(x / scale[i], t[i])
        if edm:  # takes the raw output F of EDM's network, D = c_skip x + c_out F
            c_skip = 0.25 / (t[i] ** 2 + 0.25)
            output = (denoised - c_skip * x) / (0.5 * t[i] / (t[i] ** 2 + 0.25).sqrt())
        elif scheduler.config.prediction_type == "sample":
            output = denoised
        else:
            output = (x / scale[i] - denoised) / t[i]
        x = scheduler.step(output, timestep, x).prev_sample
    return x / scale[-1]


def theirs(cls, times, order, **options):
    sigmas = {"sigma_min": times[-1].item(), "sigma_max": times[0].item()} if cls is EDM else {}
    defaults = {"final_sigmas_type": "sigma_min"}
    if cls is not EDM:
        defaults["prediction_type"] = "sample"
    scheduler = cls(solver_order=order, **sigmas, **defaults | options)
    return run(scheduler, len(times) - 1, times)


def difference(a, b):
    """Relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(params=["polynomial", "logsnr"])
def schedule(request):
    return lambda points: amedlib.make_schedule(request.param, points)


# --- where the definitions coincide --------------------------------------------------------------


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_equals_edm_dpm_solver(schedule, order, lower_order_final):
    """``solver_type="midpoint"`` and ``algorithm_type="dpmsolver++"``, the defaults there."""
    option = {"lower_order_final": lower_order_final}
    for points in (2, 4, 6, 15):
        times = schedule(points)
        expected = theirs(EDM, times, order, **option)
        assert difference(ours("dpmpp", times, order=order, **option).x, expected) < 1e-13


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_dpmpp_equals_dpm_solver_multistep(schedule, order, predict_x0):
    """To single precision, in which this scheduler takes its steps whatever the state's dtype.

    Our ``predict_x0=False`` is its ``algorithm_type="dpmsolver"``.
    """
    kind = {"algorithm_type": "dpmsolver++" if predict_x0 else "dpmsolver"}
    kind["prediction_type"] = "sample" if predict_x0 else "epsilon"
    for points in (4, 6, 15):
        times = schedule(points)
        expected = theirs(DPM, times, order, **kind)
        found = ours("dpmpp", times, order=order, predict_x0=predict_x0).x
        assert 1e-10 < difference(found, expected) < 1e-5


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_unipc_multistep(schedule, order, variant, predict_x0, lower_order_final):
    """As long as there are at least as many intervals as the order."""
    option = {"lower_order_final": lower_order_final, "predict_x0": predict_x0}
    for points in (order + 1, 6, 20):
        times = schedule(points)
        expected = theirs(UNIPC, times, order, solver_type=variant, **option)
        found = ours("unipc", times, order=order, variant=variant, **option)
        assert difference(found.x, expected) < 1e-11
        assert found.nfe == points - 1


def test_dynamic_thresholding_equals_theirs_without_upper_bound(schedule):
    """Their ``sample_max_value`` is 1 by default, and that turns it into clipping to [-1, 1]."""
    times = schedule(6)
    found = ours("dpmpp", times, order=3, thresholding=True).x
    unbounded = theirs(EDM, times, 3, thresholding=True, sample_max_value=1e9)
    assert difference(found, unbounded) < 1e-12
    clipped = theirs(EDM, times, 3, thresholding=True)
    assert 0.01 < difference(found, clipped) < 1
    solver = amedlib.make_solver("dpmpp", order=3, thresholding=False)
    out = amedlib.sample(lambda x, t, labels: DENOISER(x, t).clamp(-1, 1), LATENTS, times, solver)
    assert difference(out.x, clipped) < 1e-12


# --- where they do not ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3])
def test_from_15_steps_on_they_lower_no_order(order):
    """Their DPM-Solver's ``lower_order_final`` counts below 15 steps only; UniPC's always."""
    times = amedlib.make_schedule("polynomial", 16)
    expected = theirs(EDM, times, order, lower_order_final=True)
    found = ours("dpmpp", times, order=order, lower_order_final=False).x
    assert difference(found, expected) < 1e-13
    lowered = ours("dpmpp", times, order=order, lower_order_final=True).x
    assert 1e-3 < difference(lowered, expected) < 0.1


def test_third_order_on_three_points():
    """The last step is of order 2 in the released code (and here), of order 1 there."""
    times = amedlib.make_schedule("polynomial", 3)
    expected = theirs(EDM, times, 3)
    assert difference(ours("dpmpp", times, order=1).x, expected) < 1e-13
    assert 0.1 < difference(ours("dpmpp", times, order=3).x, expected) < 1


@pytest.mark.parametrize(("order", "points"), [(2, 2), (3, 2), (3, 3)])
def test_unipc_with_fewer_intervals_than_its_order(order, points):
    """The released code (and ours) then evaluates at the end once more, and corrects; they do not.

    Before that correction the states are equal.
    """
    times = amedlib.make_schedule("polynomial", points)
    expected = theirs(UNIPC, times, order, lower_order_final=False)
    options = {"order": order, "lower_order_final": False, "thresholding": False}
    sampler = Sampler(DENOISER, LATENTS * times[0], times, amedlib.make_solver("unipc", **options))
    for _ in range(points - 1):
        sampler.advance()
    assert difference(sampler.x, expected) < 1e-11
    sampler.finish()
    assert sampler.nfe == points
    assert 1e-3 < difference(sampler.x, expected) < 1


@pytest.mark.parametrize("cls", [EDM, UNIPC])
def test_final_step_to_zero(cls):
    """``final_sigmas_type="zero"``, their default, appends a step to t = 0: x becomes D(x; t_1).

    That costs an evaluation, and the order is lowered for that step instead of the one before it.
    """
    times = amedlib.make_schedule("polynomial", 6)
    extended = torch.cat([times, torch.zeros(1).double()])
    expected = theirs(cls, extended, 2, final_sigmas_type="zero")
    name = "dpmpp" if cls is EDM else "unipc"
    found = ours(name, times, order=2, lower_order_final=False)
    assert difference(DENOISER(found.x, times[-1]), expected) < 1e-11
    # near t = 0.002 the step itself is small
    assert 1e-6 < difference(found.x, expected) < 1e-2


def test_karras_table_ends_twice():
    """``final_sigmas_type="sigma_min"`` repeats the last level: one evaluation for nothing.

    n steps are then the n points of ours, and the order is lowered where nothing happens.
    """
    scheduler = EDM(solver_order=2, final_sigmas_type="sigma_min")
    expected = run(scheduler, 6)
    table = scheduler.sigmas.double()
    assert len(table) == 7
    assert table[-2].item() == pytest.approx(table[-1].item(), rel=1e-6)
    times = amedlib.make_schedule("polynomial", 6)
    # single precision: 80 is 79.99998
    torch.testing.assert_close(table[:-1], times, rtol=1e-6, atol=0)
    found = ours("dpmpp", times, order=2, lower_order_final=False)
    assert difference(found.x, expected) < 1e-5
    assert found.nfe == 5 < len(scheduler.timesteps)


@pytest.mark.parametrize("cls", [DPM, UNIPC])
def test_discrete_table(cls):
    """Spacing "linspace" to sigma_min is our discrete schedule, with time steps rounded."""
    sizes = {}
    for points in (4, 10, 6):
        scheduler = cls(**LEVELS, timestep_spacing="linspace", final_sigmas_type="sigma_min")
        scheduler.set_timesteps(points - 1)
        table = scheduler.sigmas.double()
        times = amedlib.make_schedule("discrete", points, table[-1].item(), table[0].item())
        sizes[points] = (table / times - 1).abs().max().item()
    # 999 is divisible by 3 and by 9; what is left is single precision, worst at low levels
    assert max(sizes[4], sizes[10]) < 1e-4
    # 999 / 5 = 199.8 becomes 200
    assert 1e-4 < sizes[6] < 5e-3


def test_sampling_on_their_own_discrete_table():
    """The whole way through their public interface, with nothing replaced."""
    for cls, name, order in ((DPM, "dpmpp", 3), (UNIPC, "unipc", 3)):
        options = {"solver_order": order, "prediction_type": "sample", **LEVELS}
        scheduler = cls(**options, timestep_spacing="linspace", final_sigmas_type="sigma_min")
        expected = run(scheduler, 9)
        low, high = (scheduler.sigmas[i].item() for i in (-1, 0))
        found = ours(name, amedlib.make_schedule("discrete", 10, low, high), order=order).x
        assert np.isfinite(low) and difference(found, expected) < 1e-4
