"""Frechet distances from additive moments, their uncertainty, and perceptual distances."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh

from amedlib.checks import require


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of feature vectors, in float64; they add up.

    Attributes:
        count: number of vectors.
        total: their sum, [d].
        outer: the sum of x x^T, [d, d].
    """

    count: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features) -> "Moments":
        """Moments of features [n, d], an array or a tensor."""
        features = np.asarray(features, dtype=np.float64)
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> np.ndarray:
        """[d]."""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """[d, d], with n - 1 in the denominator."""
        require(self.count > 1, "the number of samples", self.count, "at least 2 for a covariance")
        return (self.outer - np.outer(self.total, self.total) / self.count) / (self.count - 1)


def _symmetric_root(matrix):
    values, vectors = eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Squared Frechet distance of two Gaussians, as FID is defined (Heusel et al., 2017).

    ``|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)``. The trace is taken from the
    eigenvalues of a symmetric matrix: no square root of a nonsymmetric product, so nothing complex
    arises.

    Args:
        mu1, mu2: means [d].
        sigma1, sigma2: covariances [d, d], symmetric.

    Raises:
        ValueError: shapes do not fit, or an entry is not finite.
    """
    arrays = [np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2)]
    d = arrays[0].shape[-1] if arrays[0].ndim else 0
    shapes = tuple(a.shape for a in arrays)
    require(
        shapes == ((d,), (d, d)) * 2 and d > 0,
        "the shapes of mu1, sigma1, mu2, sigma2",
        shapes,
        "[d], [d, d], [d], [d, d] with one d",
    )
    require(
        all(np.isfinite(a).all() for a in arrays), "means and covariances", "NaN or inf", "finite"
    )
    mu1, sigma1, mu2, sigma2 = arrays
    root = _symmetric_root(sigma1)
    product = eigh(root @ sigma2 @ root, eigvals_only=True)
    cross = np.sqrt(np.clip(product, 0, None)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def moments_distance(a: Moments, b: Moments) -> float:
    """Frechet distance of two sets of features, from their moments."""
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def leave_one_out(blocks: Sequence, statistic: Callable) -> tuple[float, list[float]]:
    """A statistic of a sum of blocks, and of the sum without each block in turn.

    Args:
        blocks: at least two, of anything that adds and subtracts (``Moments``, numbers).
        statistic: sum of blocks to a number.
    """
    require(len(blocks) > 1, "the number of blocks", len(blocks), "at least 2")
    whole = blocks[0]
    for block in blocks[1:]:
        whole = whole + block
    return statistic(whole), [statistic(whole - block) for block in blocks]


def jackknife_error(replicates: Sequence[float]) -> float:
    """Standard error from leave-one-block-out values (block jackknife, equal blocks)."""
    values = np.asarray(replicates, dtype=np.float64)
    g = len(values)
    return float(np.sqrt((g - 1) / g * ((values - values.mean()) ** 2).sum()))


def feature_distance(features: Callable) -> Callable:
    """A perceptual distance: squared Euclidean distance of features, [B, C, H, W] twice to [B]."""

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (features(x) - features(y)).square().flatten(1).sum(1)

    return distance


def lpips_distance(net: str = "vgg") -> Callable:
    """LPIPS (Zhang et al., 2018) through the package lpips; images in [-1, 1].

    Raises:
        ImportError: the ``paper`` extra is not installed.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError(
            "LPIPS needs the packages of the paper extra: pip install 'amedlib[paper]'."
        ) from error
    model = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)

    def distance(x, y):
        return model.to(x.device)(x.float(), y.float()).flatten()

    return distance
