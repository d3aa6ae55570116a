"""Frechet distance against closed forms and reference values; moments; the jackknife."""

import re
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


def test_one_dimension_is_the_textbook_formula():
    for m, s, n, t in RNG.uniform(0, 3, (20, 4)):
        found = frechet_distance([m], [[s**2]], [n], [[t**2]])
        assert found == pytest.approx((m - n) ** 2 + (s - t) ** 2, rel=1e-9, abs=1e-12)


def test_covariances_of_rank_one_have_a_closed_form():
    for d in (2, 5, 40):
        u, v = RNG.normal(size=(2, d))
        exact = u @ u + v @ v - 2 * abs(u @ v)
        zero = np.zeros(d)
        found = frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
        assert found == pytest.approx(exact, rel=1e-12, abs=1e-12)
    # the second one has variance only where the first has none
    found = frechet_distance([0, 0], [[4, 0], [0, 0]], [0, 0], [[0, 0], [0, 9]])
    assert found == pytest.approx(13, rel=1e-12)


def test_either_order_gives_the_same():
    a, b = (np.cov(x.T) for x in RNG.normal(size=(2, 6, 9)))
    mu, nu = RNG.normal(size=(2, 9))
    there, back = frechet_distance(mu, a, nu, b), frechet_distance(nu, b, mu, a)
    assert there == pytest.approx(back, rel=1e-12)


def test_singular_covariances_stay_real():
    features = RNG.normal(size=(5, 30))  # rank 4 in 30 dimensions
    value = moments_distance(Moments.of(features), Moments.of(features + 1))
    assert value == pytest.approx(30, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-100, 1, 1e4, 1e100])
@pytest.mark.parametrize(("count", "d"), [(3, 4), (20, 300), (400, 30)])
def test_equal_moments_are_not_apart(count, d, scale):
    """Roots of eigenvalues that are rounding gave -5.6e-4 here."""
    moments = Moments.of(scale * RNG.normal(size=(count, d)))
    spread = np.trace(moments.covariance)
    assert 0 <= moments_distance(moments, moments) <= 1e-12 * spread
    nothing = np.zeros(d), np.zeros((d, d))
    assert frechet_distance(*nothing, *nothing) == 0


@pytest.mark.parametrize("offset", [0, 1e4, 1e8])
def test_a_large_mean_takes_no_digits(offset):
    # multiples of 2^-20, so that the offset is added without rounding
    x, y = np.round(RNG.normal(size=(2, 200, 3)) * 2**20) / 2**20
    y = y + [0.5, 0.0, 1.0]
    expected = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    parts = [Moments.of(part + offset) for part in np.split(x, [7, 90, 91])]
    whole = sum(parts[1:], start=parts[0])
    np.testing.assert_allclose(whole.covariance, np.cov(x.T), rtol=1e-6, atol=1e-9)
    assert moments_distance(whole, Moments.of(y + offset)) == pytest.approx(expected, rel=1e-6)


def test_moments_add_up():
    x = RNG.normal(size=(50, 4)).astype(np.float32)
    parts = [Moments.of(x[:13]), Moments.of(torch.from_numpy(x[13:20])), Moments.of(x[:19:-1])]
    whole, y = parts[0] + parts[1] + parts[2], x.astype(np.float64)
    assert whole.count == 50
    np.testing.assert_allclose(whole.mean, y.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(y.T), rtol=1e-12)
    np.testing.assert_allclose(whole.total, y.sum(0), rtol=1e-12)
    np.testing.assert_allclose(whole.outer, y.T @ y, rtol=1e-12)
    again = Moments.from_sums(whole.count, whole.total, whole.outer)
    np.testing.assert_allclose(again.covariance, whole.covariance, rtol=1e-12)


@pytest.mark.parametrize(
    "features",
    [np.zeros(5), np.zeros((0, 5)), np.zeros((5, 0)), torch.zeros(2, 3, 4), 1.0, "x", [[1], [2, 3]]]
    + [np.zeros((3, 2), complex), torch.zeros(3, 2, dtype=torch.complex64), None],
)
def test_features_of_another_form_are_refused(features):
    with pytest.raises(ValueError, match="features must be"):
        Moments.of(features)


def test_moments_of_other_features_do_not_add_up():
    with pytest.raises(ValueError, match="the shapes of two means must be the same"):
        _ = Moments.of(np.zeros((3, 4))) + Moments.of(np.zeros((3, 1)))


def test_what_is_left_out_leaves_no_rounding_behind():
    """Sums less a block keep nothing of the others, where that block is the largest by far."""
    x = [1.0, 2.0, 3.0, 1e20]
    value, replicates = leave_one_out(x, float)
    assert value == 1e20 and replicates[3] == 6.0
    blocks = [Moments.of(scale * RNG.normal(size=(9, 3))) for scale in (1, 1, 1, 1e12)]
    _, replicates = leave_one_out(blocks, lambda m: float(np.trace(m.covariance)))
    rest = blocks[0] + blocks[1] + blocks[2]
    assert replicates[3] == pytest.approx(np.trace(rest.covariance), rel=1e-12)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = RNG.normal(size=20)
    value, replicates = leave_one_out([np.array([v, 1.0]) for v in x], lambda s: s[0] / s[1])
    assert value == pytest.approx(x.mean())
    assert jackknife_error(replicates) == pytest.approx(x.std(ddof=1) / np.sqrt(20))


def test_feature_distance():
    x, y = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    double = feature_distance(lambda images: 2 * images.flatten(1))
    torch.testing.assert_close(double(x, y), 4 * ((x - y) ** 2).sum((1, 2, 3)))


ONE = np.eye(2)
ROTATED = np.array([[1, 2], [2, 1]])  # eigenvalues 3 and -1


@pytest.mark.parametrize(
    ("sigma", "reason"),
    [
        ([[1, 0.5], [0, 1]], "sigma2 must be symmetric; 'asymmetry 0.5' was given"),
        ([[1, 1e-5], [-1e-5, 1]], "sigma2 must be symmetric"),
        (-ONE, "sigma2 must be a covariance, positive semidefinite"),
        (ROTATED, "sigma2 must be a covariance, positive semidefinite"),
        ([[0, 1], [1, 0]], "sigma2 must be a covariance, positive semidefinite"),
        ([[0, 0], [0, -1e-30]], "sigma2 must be a covariance, positive semidefinite"),
        ([[1, 0], [0, -1e-5]], "sigma2 must be a covariance, positive semidefinite"),
        (ONE * np.nan, "sigma2 must be finite"),
        ([[1, 0], [0, np.inf]], "sigma2 must be finite"),
        (ONE + 1e-9j, "sigma2 must be an array of real numbers"),
        (torch.eye(2, dtype=torch.complex64), "sigma2 must be an array of real numbers"),
        (ONE.astype(object), "sigma2 must be an array of real numbers"),
        (ONE.astype(bool), "sigma2 must be an array of real numbers"),
        (ONE.astype(str), "sigma2 must be an array of real numbers"),
        ([[1], [0, 1]], "sigma2 must be an array of real numbers"),
        (None, "sigma2 must be an array of real numbers"),
        (np.eye(3), "the shapes of mu1, sigma1, mu2, sigma2 must be"),
        (np.ones(2), "the shapes of mu1, sigma1, mu2, sigma2 must be"),
        (ONE[None], "the shapes of mu1, sigma1, mu2, sigma2 must be"),
        (1.0, "the shapes of mu1, sigma1, mu2, sigma2 must be"),
    ],
)
def test_what_is_no_covariance_is_refused(sigma, reason):
    mu = [0.0, 0.0]
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        frechet_distance(mu, ONE, mu, sigma)
    assert "\n" not in str(caught.value)
    reason = reason if "shapes" in reason else reason.replace("sigma2", "sigma1")
    with pytest.raises(ValueError, match=re.escape(reason)):
        frechet_distance(mu, sigma, mu, ONE)


@pytest.mark.parametrize(
    "arguments",
    [
        ([0.0], [[1.0]], [0.0, 0.0], [[1.0]]),
        ([0.0], [1.0], [0.0], [1.0]),
        ([np.nan], [[1.0]], [0.0], [[1.0]]),
        (0.0, [[1.0]], 0.0, [[1.0]]),
        ([], [[]], [], [[]]),
        ([1j], [[1.0]], [0.0], [[1.0]]),
    ],
)
def test_bad_statistics_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(*arguments)


@pytest.mark.parametrize("d", [3, 500])
def test_covariances_in_single_precision_are_covariances(d):
    """Singular and strongly correlated ones too, whose small eigenvalues are rounding."""
    mixed = RNG.normal(size=(d, 2)) @ RNG.normal(size=(2, 100))
    rows = torch.from_numpy(np.maximum(mixed.T, 0)).float()
    single, double = rows.T.cov(), rows.double().T.cov()
    mean = torch.zeros(d, requires_grad=True)
    found = frechet_distance(mean, single, mean, double)
    assert 0 <= found <= 1e-5 * float(double.trace())
