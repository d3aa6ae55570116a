"""Appendix D: formulas against quadrature and simulation, parts of an error by identities."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi

import amedlib
from amedlib.denoisers.exact import GaussianDenoiser, GaussianMixtureDenoiser
from amedlib.geometry import accurate_solution, distance, grid_search, trajectory_pca
from amedlib.study import theory

SHAPE = (1, 4, 4)
TIMES = amedlib.make_schedule(num_steps=21)
GRID = [0.1, 0.3, 0.5, 0.7, 0.9]


def latents(count=6):
    return amedlib.make_latents(range(count), SHAPE)


def mixture():
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(5, *SHAPE, generator=generator, dtype=torch.float64)
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    return GaussianMixtureDenoiser(means, torch.full_like(means, 0.3), weights)


@pytest.fixture(scope="module")
def truth():
    refined = amedlib.make_schedule(num_steps=321)
    solver = amedlib.make_solver("unipc", thresholding=False)
    return accurate_solution(mixture(), latents(), TIMES, refined, solver)


# --- the formulas -------------------------------------------------------------------------------


def test_scaled_logistic():
    assert theory.scaled_logistic(0.0, 2.0) == 0
    assert theory.scaled_logistic(1e4, 2.0, 5.0) == pytest.approx(1.0, abs=1e-15)
    t = np.array([0.01, 0.5, 3.0])
    expected = 1.7 * (1 / (1 + np.exp(-2.5 * t)) - 1 / 2)
    np.testing.assert_allclose(theory.scaled_logistic(t, 1.7, 2.5), expected, rtol=1e-13)


def test_constants_of_the_paper():
    assert theory.paper_a((3, 32, 32)) == pytest.approx(np.sqrt(9216) / 15) == pytest.approx(6.4)
    assert theory.B == 3


def test_the_smallest_a_touches():
    t, deviation = np.array([5.0, 1.0, 0.1]), np.array([0.1, 0.4, 0.3])
    for b in (0.5, 3.0, 100.0):
        slack = theory.scaled_logistic(t, theory.smallest_a(t, deviation, b), b) - deviation
        assert slack.min() == pytest.approx(0, abs=1e-15)
        assert (slack > 1e-3).sum() == 2


@pytest.mark.parametrize("s, t", [(0.002, 0.085), (0.085, 0.97), (0.5, 5.0), (24.0, 80.0)])
@pytest.mark.parametrize("a, b", [(1.0, 3.0), (6.4, 3.0), (0.7, 40.0)])
def test_radius_against_quadrature(s, t, a, b):
    square, _ = quad(
        lambda tau: (a * (1 / (1 + np.exp(-b * tau)) - 0.5)) ** 2, s, t, epsabs=0, epsrel=1e-11
    )
    assert theory.shell_radius(s, t, a, b) ** 2 == pytest.approx(square, rel=1e-9)
    total = theory.scaled_logistic(s, a, b) + theory.scaled_logistic(t, a, b) + np.sqrt(square)
    assert theory.step_bound(s, t, a, b) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("dimension", [1, 4, 64])
def test_the_sde_ends_on_the_shell(dimension):
    """||z_s|| / (r / sqrt(d)) has a chi distribution with d degrees of freedom."""
    s, t, a, n = 0.3, 4.0, 2.0, 4000
    norms = theory.shell_norms(s, t, a, dimension=dimension, samples=n, seed=1)
    scale = theory.shell_radius(s, t, a) / np.sqrt(dimension)
    law = chi(dimension, scale=scale)
    assert norms.mean() == pytest.approx(law.mean(), abs=4 * law.std() / np.sqrt(n))
    assert norms.std(ddof=1) == pytest.approx(law.std(), rel=0.05)
    other = theory.shell_norms(s, t, a, dimension=dimension, samples=n, seed=1)
    assert (norms == other).all()


def test_concentration():
    found = theory.concentration(0.5, 5.0, 1.0, [16, 64, 256], samples=2000)
    assert (found["radius"] == theory.shell_radius(0.5, 5.0, 1.0)).all()
    np.testing.assert_allclose(found["sd"], found["thickness"], rtol=0.06)
    assert (found["mean"] - found["radius"]).abs().is_monotonic_decreasing
    np.testing.assert_allclose(found["thickness"].iloc[0] / found["thickness"].iloc[2], 4)


# --- planes -------------------------------------------------------------------------------------


def test_the_plane_is_that_of_the_principal_components(truth):
    plane = theory.fit_plane(truth)
    basis = plane.basis.flatten(2)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(2).double().expand(6, 2, 2))
    across = plane.split(truth - plane.origin)[1]
    torch.testing.assert_close(
        theory.norm(across), trajectory_pca(truth).deviation, atol=1e-9, rtol=0
    )


def test_split_and_coordinates(truth):
    plane = theory.fit_plane(truth)
    v = torch.randn(7, *truth.shape[1:], generator=torch.manual_seed(0), dtype=torch.float64)
    parallel, perpendicular = plane.split(v)
    torch.testing.assert_close(parallel + perpendicular, v)
    squares = theory.norm(parallel) ** 2 + theory.norm(perpendicular) ** 2
    torch.testing.assert_close(squares, theory.norm(v) ** 2)
    torch.testing.assert_close(plane.split(parallel)[0], parallel)
    assert plane.coordinates(plane.origin).abs().max() < 1e-12
    moved = plane.coordinates(plane.origin + v)
    torch.testing.assert_close(moved.norm(dim=-1), theory.norm(parallel))
    x = plane.coordinates(truth)
    assert (x[-1, :, 0] > x[0, :, 0]).all()  # from the start to the end
    assert (x[10, :, 1] > (x[0] + x[-1])[:, 1] / 2).all()


# --- one step -----------------------------------------------------------------------------------


def slope(x, t):
    return (x - mixture()(x, t)) / t


def test_exact_steps_by_hand(truth):
    i, (t, s) = 8, TIMES[8:10]
    h, x, e = s - t, truth[8], slope(truth[8], t)

    def ends(name, intermediate=None, **options):
        solver = amedlib.make_solver(name, **options)
        step = theory.exact_step(mixture(), truth, TIMES, i, solver, intermediate)
        return step.end, len(step.evaluations)

    def check(found, end, evaluations):
        torch.testing.assert_close(found[0], end, rtol=0, atol=1e-10)
        assert found[1] == evaluations

    check(ends("euler"), x + h * e, 1)
    r = torch.linspace(0.2, 0.8, 6, dtype=torch.float64).reshape(-1, 1, 1, 1)
    middle = s**r * t ** (1 - r)
    second = slope(x + (middle - t) * e, middle)
    check(ends("amed", theory.at(r)), x + h * second, 2)
    middle = (s * t).sqrt()
    check(ends("dpm2"), x + h * slope(x + (middle - t) * e, middle), 2)
    e1, e2, e3 = (slope(truth[i - j], TIMES[i - j]) for j in (1, 2, 3))
    check(ends("ipndm"), x + h * (55 * e - 59 * e1 + 37 * e2 - 9 * e3) / 24, 4)


def test_best_r_is_that_of_the_grid_search(truth):
    pair, times = truth[[8, 12]], TIMES[[8, 12]]
    best, errors = theory.best_r(mixture(), pair, times, GRID)
    assert errors.shape == (5, 6) and len(best.unique()) > 1
    for b in range(6):
        one = pair[:, b : b + 1]
        search = grid_search(
            mixture(), one[0] / times[0], times, amedlib.make_solver("amed"), one, GRID
        )
        torch.testing.assert_close(errors[:, b], search.errors[0], rtol=1e-9, atol=1e-12)
        assert best[b] == search.r[0]


def test_the_parts_of_an_error(truth):
    plane, pair, times = theory.fit_plane(truth), truth[[8, 12]], TIMES[[8, 12]]
    found = theory.step_errors(mixture(), pair, times, plane, GRID)
    torch.testing.assert_close(
        found.parallel**2 + found.perpendicular**2, found.error**2, rtol=1e-9, atol=0
    )
    end = theory.exact_step(
        mixture(), pair, times, 0, amedlib.make_solver("amed"), theory.at(found.r)
    ).end
    torch.testing.assert_close(distance(end, pair[1]), found.error)
    assert (found.worst > found.error).all()
    # Assumption 1 alone bounds the integral of omega, and the error across the plane with it.
    deviation = trajectory_pca(truth).deviation
    assert (found.omega <= deviation[8] + deviation[12] + 1e-12).all()
    assert (found.perpendicular <= found.omega + found.slope + 1e-12).all()


def test_the_integral_of_omega_by_quadrature(truth):
    """omega (Eq. 18) is the slope's part across the plane with its sign changed."""
    plane = theory.fit_plane(truth)
    fine = amedlib.make_schedule("polynomial", 401, TIMES[12].item(), TIMES[8].item())
    solver = amedlib.make_solver("unipc", thresholding=False)
    curve = accurate_solution(mixture(), truth[8] / TIMES[8], fine, fine, solver)
    across = torch.stack([plane.split(slope(x, t))[1] for x, t in zip(curve, fine, strict=True)])
    integral = torch.trapezoid(-across, fine, dim=0)
    found = theory.step_errors(mixture(), truth[[8, 12]], TIMES[[8, 12]], plane, GRID)
    torch.testing.assert_close(theory.norm(integral), found.omega, rtol=1e-3, atol=1e-5)


def test_a_trajectory_in_a_plane_has_no_error_across():
    """Two standard deviations: the solution of the Gaussian moves in a plane."""
    std = torch.full(SHAPE, 0.3, dtype=torch.float64)
    std[0, :2] = 1.5
    denoiser = GaussianDenoiser(torch.ones(SHAPE).double(), std)
    x = latents().double() * TIMES[0]
    truth = torch.stack([denoiser.solution(x, TIMES[0], t) for t in TIMES])
    plane = theory.fit_plane(truth)
    found = theory.step_errors(denoiser, truth[[4, 12]], TIMES[[4, 12]], plane, GRID)
    assert found.perpendicular.max() < 1e-10 and found.omega.max() < 1e-10
    assert found.parallel.min() > 1e-3


def test_the_proposition_holds_where_its_first_assumption_does(truth):
    steps = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    found = theory.proposition(mixture(), truth, TIMES, steps, GRID)
    assert found["t"].tolist() == TIMES[[0, 4, 8, 12, 16]].tolist()
    assert found["s"].tolist() == TIMES[[4, 8, 12, 16, 20]].tolist()
    assert found["assumption"].between(0, 1).all()
    deviation = trajectory_pca(truth).deviation.max(1).values
    for b in (3.0, 5000.0):
        a = theory.smallest_a(TIMES, deviation, b)
        assert (found["error_max"] < theory.step_bound(found["s"], found["t"], a, b)).all()
    pair = [8, 12]
    alone = theory.step_errors(mixture(), truth[pair], TIMES[pair], theory.fit_plane(truth), GRID)
    assert found.loc[2, "parallel"] == pytest.approx(alone.parallel.mean().item())
    assert found.loc[2, "error_max"] == pytest.approx(alone.error.max().item())


def test_bad_input_is_refused(truth):
    with pytest.raises(ValueError, match="trajectory must be of shape .* at least three"):
        theory.fit_plane(truth[:2])
    with pytest.raises(ValueError, match="interval must be from 0 to 19; 20 was given"):
        theory.exact_step(mixture(), truth, TIMES, 20, amedlib.make_solver("euler"))
    with pytest.raises(ValueError, match="solver must be made by amedlib.make_solver"):
        theory.exact_step(mixture(), truth, TIMES, 2, "euler")
