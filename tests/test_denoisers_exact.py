"""The exact denoisers against quadrature, autograd of the density and an ODE integrator."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from amedlib.denoisers.exact import GaussianDenoiser, GaussianMixtureDenoiser


def mixture(k=3, shape=(1, 1, 1), seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, k)
    means, stds = rng.normal(size=(k, *shape)), rng.uniform(0.1, 0.6, (k, *shape))
    return [torch.from_numpy(a) for a in (means, stds, weights / weights.sum())]


@pytest.mark.parametrize("t", [0.05, 0.7, 9.0])
def test_mixture_is_the_posterior_mean_by_quadrature(t):
    means, stds, weights = mixture()
    x = 0.4

    def joint(x0):
        prior = sum(
            w * stats.norm.pdf(x0, m, s)
            for m, s, w in zip(means.flatten(), stds.flatten(), weights, strict=True)
        )
        return prior * stats.norm.pdf(x, x0, t)

    grid = {
        "limit": 400,
        "epsabs": 1e-14,
        "epsrel": 1e-12,
        "points": [x, *means.flatten().tolist()],
    }
    evidence, _ = integrate.quad(joint, -8, 8, **grid)
    moment, _ = integrate.quad(lambda x0: x0 * joint(x0), -8, 8, **grid)
    denoiser = GaussianMixtureDenoiser(means, stds, weights)
    got = denoiser(torch.full((1, 1, 1, 1), x, dtype=torch.float64), t)
    assert got.item() == pytest.approx(moment / evidence, rel=1e-9)


@pytest.mark.parametrize("t", [0.02, 1.0, 80.0])
def test_mixture_obeys_tweedie(t):
    """D = x + t^2 grad log p(x; t), with p from torch's own distributions."""
    means, stds, weights = mixture(k=4, shape=(2, 3, 3))
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.manual_seed(1))
    x.requires_grad_()
    scales = (stds**2 + t**2).sqrt()
    components = torch.distributions.Independent(torch.distributions.Normal(means, scales), 3)
    choice = torch.distributions.Categorical(probs=weights)
    density = torch.distributions.MixtureSameFamily(choice, components)
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    got = GaussianMixtureDenoiser(means, stds, weights)(x, t)
    torch.testing.assert_close(got, x + t**2 * score, rtol=1e-9, atol=1e-9)


def test_one_component_is_the_gaussian():
    means, stds, _ = mixture(k=1, shape=(3, 4, 4))
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.manual_seed(2))
    t = torch.rand(6, 1, 1, 1, dtype=torch.float64, generator=torch.manual_seed(3)) + 0.1
    single = GaussianMixtureDenoiser(means, stds, torch.ones(1))
    gaussian = GaussianDenoiser(means[0], stds[0])
    torch.testing.assert_close(single(x, t), gaussian(x, t), rtol=1e-13, atol=1e-13)


def test_solution_solves_the_ode():
    means, stds, _ = mixture(k=1, shape=(1, 2, 2))
    denoiser = GaussianDenoiser(means[0], stds[0])
    start = 5 * torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=torch.manual_seed(4))

    def slope(t, y):
        x = torch.from_numpy(y).reshape(1, 1, 2, 2)
        return ((x - denoiser(x, t)) / t).flatten().numpy()

    solved = integrate.solve_ivp(
        slope, (5.0, 0.01), start.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13
    )
    exact = denoiser.solution(start, 5.0, 0.01)
    np.testing.assert_allclose(solved.y[:, -1], exact.flatten().numpy(), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_levels_per_sample_and_dtype(dtype):
    means, stds, weights = mixture(k=2, shape=(1, 2, 2))
    x = torch.randn(3, 1, 2, 2, dtype=dtype, generator=torch.manual_seed(5))
    t = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    for denoiser in (
        GaussianDenoiser(means[0], stds[0]),
        GaussianMixtureDenoiser(means, stds, weights),
    ):
        together = denoiser(x, t)
        assert together.dtype == dtype
        alone = torch.cat([denoiser(x[i : i + 1], t[i].item()) for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_bad_input_is_named():
    means, stds, weights = mixture(k=2, shape=(1, 2, 2))
    with pytest.raises(ValueError, match="std must be of the shape"):
        GaussianDenoiser(means[0], stds)
    with pytest.raises(ValueError, match="mean must be of shape"):
        GaussianDenoiser(means, stds)
    with pytest.raises(ValueError, match="stds must be finite and not negative"):
        GaussianMixtureDenoiser(means, -stds, weights)
    with pytest.raises(ValueError, match="weights must be positive with sum 1"):
        GaussianMixtureDenoiser(means, stds, 2 * weights)
    with pytest.raises(ValueError, match="weights must be of shape"):
        GaussianMixtureDenoiser(means, stds, weights[:1])
    with pytest.raises(ValueError, match="means must be of shape"):
        GaussianMixtureDenoiser(means[0], stds[0], weights)
    with pytest.raises(ValueError, match="t must be one number"):
        GaussianDenoiser(means[0], stds[0])(torch.zeros(3, 1, 2, 2), torch.ones(2))
