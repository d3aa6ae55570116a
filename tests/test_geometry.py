"""Geometry of trajectories, against scikit-learn's PCA, closed forms and plain re-runs."""

import pytest
import torch
from sklearn.decomposition import PCA
from toys import TinyNet

import amedlib
from amedlib.denoisers.exact import GaussianDenoiser, GaussianMixtureDenoiser
from amedlib.geometry import (
    accurate_solution,
    distance,
    grid_search,
    local_errors,
    rms_distance,
    trajectory_pca,
)

SHAPE = (1, 4, 4)
TIMES = amedlib.make_schedule(num_steps=6)
TRUTH_TIMES = amedlib.make_schedule(num_steps=41)


def latents(count=6, shape=SHAPE, first=0):
    return amedlib.make_latents(range(first, first + count), shape)


def gaussian():
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(SHAPE, generator=generator).double()
    return GaussianDenoiser(mean, 0.2 + torch.rand(SHAPE, generator=generator).double())


def mixture():
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(5, *SHAPE, generator=generator).double()
    stds = 0.2 + torch.rand(5, *SHAPE, generator=generator).double() / 2
    return GaussianMixtureDenoiser(means, stds, torch.full((5,), 0.2, dtype=torch.float64))


def exact(denoiser, latents, times):
    x = latents.double() * times[0]
    return torch.stack([denoiser.solution(x, times[0], t) for t in times])


# --- PCA ----------------------------------------------------------------------------------------


def random_trajectory():
    return torch.randn(7, 3, 2, 3, 4, generator=torch.manual_seed(0), dtype=torch.float64)


def real_trajectory():
    return amedlib.sample(
        mixture(), latents(), TRUTH_TIMES, amedlib.make_solver("heun"), trajectory=True
    ).trajectory


@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize("make", [random_trajectory, real_trajectory])
def test_pca_agrees_with_scikit_learn(make, components):
    trajectory = make()
    ours = trajectory_pca(trajectory, components)
    for b in range(trajectory.shape[1]):
        x = trajectory[:, b].flatten(1).numpy()
        pca = PCA(components, svd_solver="full").fit(x)
        deviation = torch.from_numpy(x - pca.inverse_transform(pca.transform(x))).norm(dim=1)
        norm = torch.from_numpy(x).norm(dim=1)
        kept = min(len(x), 10)
        full = PCA(svd_solver="full").fit(x).explained_variance_ratio_[:kept].cumsum()
        close = {"rtol": 0, "atol": 1e-10}
        torch.testing.assert_close(ours.deviation[:, b], deviation, **close)
        torch.testing.assert_close(ours.relative_error[:, b], deviation / norm, **close)
        torch.testing.assert_close(ours.cumulative_variance[:, b], torch.from_numpy(full), **close)


def test_pca_of_a_plane_curve_needs_two_components():
    t = torch.linspace(0, 3, 30, dtype=torch.float64)[:, None, None, None, None]
    a, b, c = torch.randn(3, 1, 5, 3, 4, 4, generator=torch.manual_seed(1), dtype=torch.float64)
    out = trajectory_pca(a + t.sin() * b + t.cos() * c)
    assert out.deviation.max() < 1e-12
    assert out.cumulative_variance[0].max() < 0.99
    torch.testing.assert_close(out.cumulative_variance[1], torch.ones(5).double())


# --- accurate solution, local errors ------------------------------------------------------------


def test_accurate_solution_meets_the_closed_form_at_every_time():
    denoiser, z = gaussian(), latents()
    truth = exact(denoiser, z, TIMES)
    errors = [
        rms_distance(
            accurate_solution(
                denoiser, z, TIMES, amedlib.make_schedule(num_steps=5 * k + 1), batch=4
            ),
            truth,
        )
        for k in (16, 32)
    ]
    assert errors[0][0] == errors[1][0] == 0
    assert errors[1].max() < 2e-3
    # Heun is of second order: half the step, a quarter of the error.
    torch.testing.assert_close(
        errors[0][1:] / errors[1][1:], torch.full((5,), 4.0).double(), rtol=0.05, atol=0
    )


def test_accurate_solution_is_the_sampler_on_the_refined_schedule():
    solver = amedlib.make_solver("unipc", thresholding=False)
    denoiser, z = mixture(), latents()
    ours = accurate_solution(denoiser, z, TIMES, TRUTH_TIMES, solver, batch=4)
    out = amedlib.sample(denoiser, z, TRUTH_TIMES, solver, trajectory=True)
    torch.testing.assert_close(ours, out.trajectory[::8], rtol=0, atol=1e-12)


def test_local_error_by_hand_and_its_order():
    denoiser, z = gaussian(), latents()
    errors = {}
    for name in ("euler", "heun", "dpm2"):
        errors[name] = []
        for points in (33, 65):
            times = amedlib.make_schedule("polynomial", points, 0.5, 3.0)
            truth = exact(denoiser, z, times)
            ours = local_errors(denoiser, truth, times, amedlib.make_solver(name))
            assert ours.shape == (points - 1,)
            errors[name].append(ours[:: (points - 1) // 32].mean())
        if name == "euler":
            slope = (truth[0] - denoiser(truth[0], times[0])) / times[0]
            step = truth[0] + (times[1] - times[0]) * slope - truth[1]
            assert ours[0] == pytest.approx(step.square().sum((1, 2, 3)).mean().sqrt().item())
    order = {name: torch.log2(a / b).item() for name, (a, b) in errors.items()}
    assert order == pytest.approx({"euler": 2, "heun": 3, "dpm2": 3}, abs=0.1)


def test_local_error_with_intermediates():
    """A plugin that predicts r = 0.5 is the table 0.5; the table is read at the right step."""
    denoiser, z = TinyNet(), latents(shape=(1, 8, 8))
    truth = accurate_solution(denoiser, z, TIMES, TRUTH_TIMES)
    amed, dpm2 = amedlib.make_solver("amed"), amedlib.make_solver("dpm2")
    table = amedlib.TimeWise([0.3, 0.4, 0.5, 0.6, 0.7])
    whole = local_errors(denoiser, truth, TIMES, amed, table)
    for i, r in enumerate(table.table):
        part = local_errors(denoiser, truth[i : i + 2], TIMES[i : i + 2], amed, amedlib.TimeWise(r))
        torch.testing.assert_close(part[0], whole[i], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        local_errors(denoiser, truth, TIMES, dpm2, amedlib.TimeWise(0.5)),
        local_errors(denoiser, truth, TIMES, dpm2),
    )
    predictor = amedlib.Predictor("paper", (4, 4), scale_dir=0.0).double()
    assert local_errors(denoiser, truth, TIMES, amed, predictor).shape == (5,)


# --- grid search --------------------------------------------------------------------------------

GRID = [0.2, 0.35, 0.5, 0.65, 0.8]


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize(
    "name, options",
    [
        ("euler", {}),
        ("amed", {}),
        ("dpm2", {}),
        ("ipndm", {}),
        ("dpmpp", {"thresholding": False}),
        ("unipc", {"thresholding": False}),
    ],
)
def test_grid_search_against_plain_runs(name, options, afs):
    """Every error is that of a run with this table up to here, and the best one is kept."""
    solver = amedlib.make_solver(name, **options)
    denoiser, z = mixture(), latents()
    times = amedlib.make_schedule(num_steps=4)
    truth = accurate_solution(denoiser, z, times, amedlib.make_schedule(num_steps=61))
    out = grid_search(denoiser, z, times, solver, truth, GRID, afs)
    assert out.r.tolist() == [GRID[i] for i in out.errors.argmin(1)]

    def errors(table):
        run = amedlib.sample(
            denoiser, z, times, solver, afs, amedlib.TimeWise(table), trajectory=True
        )
        return distance(run.trajectory, truth)[1:].mean(1)

    torch.testing.assert_close(out.baseline, errors([0.5] * 3), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.searched, errors(out.r.tolist()), rtol=1e-12, atol=0)
    if name == "unipc":  # its trajectory holds corrected states; the search sees predicted ones
        torch.testing.assert_close(out.errors[-1].min(), out.searched[-1], rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(out.errors.min(1).values, out.searched, rtol=1e-12, atol=0)
        assert out.searched[0] <= out.baseline[0]
        for j, r in enumerate(GRID):
            table = [*out.r[:2].tolist(), r]
            torch.testing.assert_close(errors(table)[-1], out.errors[-1, j], rtol=1e-12, atol=0)


def test_grid_search_evaluates_once_for_all_r():
    net, grid = TinyNet(), [0.3, 0.5, 0.7]
    z, times = latents(2, (1, 8, 8)), amedlib.make_schedule(num_steps=4)
    truth = accurate_solution(net, z, times, times)
    for afs in (False, True):
        net.images = 0
        grid_search(net, z, times, amedlib.make_solver("ipndm"), truth, grid, afs)
        search, runs = (1 + len(grid)) * 3 - afs, 2 * (2 * 3 - afs)
        assert net.images == 2 * (search + runs)


# --- bad input ----------------------------------------------------------------------------------


def test_bad_input_is_refused():
    denoiser, z, heun = gaussian(), latents(), amedlib.make_solver("heun")
    truth = exact(denoiser, z, TIMES)

    def refused(message, function, *args, **options):
        with pytest.raises(ValueError, match=message):
            function(*args, **options)

    refused(r"trajectory must be of shape \[N, B, C, H, W\]", trajectory_pca, truth[0])
    refused("trajectory must be finite", trajectory_pca, truth * torch.nan)
    refused("components must be .* from 1 to .* 6; 7 was given", trajectory_pca, truth, 7)
    search = (denoiser, z, TIMES, heun)
    refused("grid must be at least one r", grid_search, *search, truth, [])
    refused("r must be strictly between 0 and 1; 1.0", grid_search, *search, truth, [0.5, 1.0])
    refused("truth must be .* N = 6", grid_search, *search, truth[1:], GRID)
    refused("samples must be", grid_search, *search, truth[:, 1:], GRID)
    refused("times must be", local_errors, denoiser, truth, TIMES.flip(0), heun)
    multistep = amedlib.make_solver("ipndm")
    refused("solver must be a single-step", local_errors, denoiser, truth, TIMES, multistep)
    solve = (accurate_solution, denoiser, z, TIMES)
    refused("refined must be 6 given times", *solve, amedlib.make_schedule(num_steps=12))
    refused("refined must be 6 given times", *solve, amedlib.make_schedule("logsnr", 11))
    refused("batch must be a whole number of at least 1; 0", *solve, TIMES, batch=0)
