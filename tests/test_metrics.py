"""Frechet distance against closed forms and reference values; moments; the jackknife."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from amedlib.metrics import (
    Moments,
    feature_distance,
    frechet_distance,
    jackknife_error,
    leave_one_out,
    moments_distance,
)

RNG = np.random.default_rng(0)


def test_reference_vectors():
    with np.load(Path(__file__).parent / "golden/fid.npz", allow_pickle=False) as data:
        a, b = Moments.of(data["features_a"]), Moments.of(data["features_b"])
        np.testing.assert_allclose(a.covariance, data["sigma_a"], rtol=1e-9, atol=1e-11)
        assert moments_distance(a, b) == pytest.approx(float(data["fid"]), rel=1e-8)
        assert abs(moments_distance(a, a)) < 1e-6
        given = [data[k] for k in ("mu_a", "sigma_a", "mu_b", "sigma_b")]
        assert frechet_distance(*given) == pytest.approx(float(data["fid"]), rel=1e-8)


def test_commuting_covariances_have_a_closed_form():
    rotation = np.linalg.qr(RNG.normal(size=(7, 7)))[0]
    p, q = RNG.uniform(0.1, 2, 7), RNG.uniform(0.1, 2, 7)
    mu, nu = RNG.normal(size=(2, 7))
    exact = ((mu - nu) ** 2).sum() + ((np.sqrt(p) - np.sqrt(q)) ** 2).sum()
    value = frechet_distance(mu, rotation * p @ rotation.T, nu, rotation * q @ rotation.T)
    assert value == pytest.approx(exact, rel=1e-10)


def test_general_covariances_agree_with_the_definition_by_sqrtm():
    a, b = RNG.normal(size=(2, 40, 9))
    s, t = np.cov(a.T), np.cov(b.T)
    exact = np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert frechet_distance(np.zeros(9), s, np.zeros(9), t) == pytest.approx(exact, rel=1e-8)


def test_singular_covariances_stay_real():
    features = RNG.normal(size=(5, 30))  # rank 4 in 30 dimensions
    value = moments_distance(Moments.of(features), Moments.of(features + 1))
    assert value == pytest.approx(30, rel=1e-6)


def test_moments_add_and_subtract():
    x = RNG.normal(size=(50, 4)).astype(np.float32)
    whole = Moments.of(torch.from_numpy(x))
    parts = [Moments.of(x[:13]), Moments.of(x[13:20]), Moments.of(x[20:])]
    np.testing.assert_allclose(
        (parts[0] + parts[1] + parts[2]).covariance, np.cov(x.T.astype(np.float64)), rtol=1e-12
    )
    np.testing.assert_allclose((whole - parts[1]).mean, np.r_[x[:13], x[20:]].mean(0), rtol=1e-5)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = RNG.normal(size=20)
    value, replicates = leave_one_out([np.array([v, 1.0]) for v in x], lambda s: s[0] / s[1])
    assert value == pytest.approx(x.mean())
    assert jackknife_error(replicates) == pytest.approx(x.std(ddof=1) / np.sqrt(20))


def test_feature_distance():
    x, y = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    double = feature_distance(lambda images: 2 * images.flatten(1))
    torch.testing.assert_close(double(x, y), 4 * ((x - y) ** 2).sum((1, 2, 3)))


@pytest.mark.parametrize(
    "arguments",
    [
        ([0.0], [[1.0]], [0.0, 0.0], [[1.0]]),
        ([0.0], [1.0], [0.0], [1.0]),
        ([np.nan], [[1.0]], [0.0], [[1.0]]),
    ],
)
def test_bad_statistics_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(*arguments)
