"""Frechet distances from additive moments, their uncertainty, and perceptual distances."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import LinAlgError, cholesky, eigh
from torch.nn import functional

from amedlib.checks import one_of, require


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
        """Moments of features [n, d], an array or a tensor, computed where the tensor is."""
        features = torch.as_tensor(features).detach().double()
        total, outer = features.sum(0), features.T @ features
        return cls(len(features), total.cpu().numpy(), outer.cpu().numpy())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    def __mul__(self, factors: np.ndarray) -> "Moments":
        """Moments of the vectors times ``factors`` [d], each component by its own."""
        return Moments(self.count, self.total * factors, self.outer * np.outer(factors, factors))

    @property
    def mean(self) -> np.ndarray:
        """[d]."""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """[d, d], with n - 1 in the denominator."""
        require(self.count > 1, "the number of samples", self.count, "at least 2 for a covariance")
        return (self.outer - np.outer(self.total, self.total) / self.count) / (self.count - 1)


def _factor(matrix):
    """F with F F^T = matrix, symmetric and positive semidefinite."""
    try:
        return cholesky(matrix, lower=True)
    except LinAlgError:  # singular, as with fewer samples than features
        values, vectors = eigh(matrix)
        return vectors * np.sqrt(np.clip(values, 0, None))


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Squared Frechet distance of two Gaussians, as FID is defined (Heusel et al., 2017).

    ``|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)``. The trace of the root is taken from
    the eigenvalues of F^T S2 F, where S1 = F F^T: a symmetric matrix with those of S1 S2. No square
    root of a nonsymmetric product is needed, so nothing complex arises.

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
    factor = _factor(sigma1)
    product = eigh(factor.T @ sigma2 @ factor, eigvals_only=True)
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


# LPIPS's names of the networks, and torchvision's.
_BACKBONES = {"vgg": "vgg16", "alex": "alexnet"}


def _enlarged(images, side):
    size = [max(side, length) for length in images.shape[2:]]
    return functional.interpolate(images, size=size, mode="bilinear")


def lpips_distance(net: str = "vgg", backbone: Path | str | None = None) -> Callable:
    """LPIPS (Zhang et al., 2018) through the package lpips: images in [-1, 1], twice, to [B].

    Images are [B, 3, H, W], or [B, 1, H, W] for grey ones. Sides under 224 are enlarged to 224,
    bilinearly: the paper says nothing of it, but consistency models (Song et al., 2023) and later
    code of the paper's authors do so. All is computed in float32; gradients reach both arguments.

    Args:
        net: ``"vgg"`` (VGG16) or ``"alex"`` (AlexNet).
        backbone: torchvision's file of that network's weights; ``None`` downloads it, once, into
            torch's own cache.

    Raises:
        ImportError: the ``paper`` extra is not installed.
        OSError: the weights cannot be downloaded, or torch's copy of them is damaged.
        ValueError: ``net`` is another one, or ``backbone`` does not hold its weights.
    """
    try:
        import lpips
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            "LPIPS needs the packages of the paper extra: pip install 'amedlib[paper]'."
        ) from error
    one_of("net", net, _BACKBONES)
    published = get_model_weights(_BACKBONES[net]).DEFAULT
    # lpips would unpickle the weights of the backbone: it makes random ones, replaced below.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    try:
        if backbone is None:
            weights = published.get_state_dict(check_hash=True, weights_only=True, progress=False)
        else:
            weights = torch.load(backbone, map_location="cpu", weights_only=True)
        # lpips cuts torchvision's layers into slices: "slice2.5.weight" is "features.5.weight"
        names = {name: "features." + name.split(".", 1)[1] for name in model.net.state_dict()}
        model.net.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
    except Exception as error:  # whatever a network or a damaged file can raise
        reason = type(error).__name__
        if backbone is None:
            raise OSError(
                f"The weights of {_BACKBONES[net]} for LPIPS could not be downloaded or read "
                f"({reason}); give a copy of {published.url} as backbone."
            ) from error
        raise ValueError(
            f"The file {backbone} does not hold torchvision's {_BACKBONES[net]} weights ({reason})."
        ) from error
    model.requires_grad_(False)

    def distance(x, y):
        x, y = (_enlarged(images.float(), 224) for images in (x, y))
        return model.to(x.device)(x, y).flatten()

    return distance
