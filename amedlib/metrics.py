"""Frechet distances from additive moments, their uncertainty, and perceptual distances."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import LinAlgError, cholesky, svdvals
from scipy.linalg.lapack import dpstrf
from torch.nn import functional

from amedlib.checks import one_of, require

#: How far from symmetric and positive semidefinite rounding, in single precision too, can bring a
#: covariance, as a part of its norm: the largest sum of a row's magnitudes.
ROUNDING = 1e-6


def _real(name: str, given) -> np.ndarray:
    """Real numbers of any kind as a new array in float64."""
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):  # rows of different lengths, for example
        array = np.array(None)
    require(array.dtype.kind in "fiu", name, given, "an array of real numbers")
    return np.array(array, np.float64, order="C")


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of feature vectors, in float64; they add up.

    Sums of x and x x^T would do so too, but lose the digits of the covariance where the mean is
    large (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983).

    Attributes:
        count: number of vectors.
        mean: [d].
        scatter: the sum of (x - mean) (x - mean)^T, [d, d].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features) -> "Moments":
        """Moments of features [n, d], an array or a tensor, computed where the tensor is.

        Raises:
            ValueError: they are of another shape, none, or no real numbers.
        """
        if not isinstance(features, torch.Tensor):
            features = torch.from_numpy(_real("features", features))
        shape = tuple(features.shape)
        require(len(shape) == 2 and 0 not in shape, "the shape of features", shape, "[n, d]")
        require(not features.is_complex(), "features", features.dtype, "real")
        features = features.detach().double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean.cpu().numpy(), (centred.T @ centred).cpu().numpy())

    @classmethod
    def from_sums(cls, count: int, total, outer) -> "Moments":
        """Moments from sums of x, [d], and of x x^T, [d, d]."""
        return cls(count, total / count, outer - np.outer(total, total) / count)

    def __add__(self, other: "Moments") -> "Moments":
        sizes = self.mean.shape, other.mean.shape
        require(sizes[0] == sizes[1], "the shapes of two means", sizes, "the same")
        count, apart = self.count + other.count, other.mean - self.mean
        between = self.count * other.count / count * np.outer(apart, apart)
        return Moments(
            count,
            self.mean + other.count / count * apart,
            self.scatter + other.scatter + between,
        )

    def __mul__(self, factors: np.ndarray) -> "Moments":
        """Moments of the vectors times ``factors`` [d], each component by its own."""
        return Moments(self.count, factors * self.mean, np.outer(factors, factors) * self.scatter)

    @property
    def total(self) -> np.ndarray:
        """The sum of x, [d]."""
        return self.count * self.mean

    @property
    def outer(self) -> np.ndarray:
        """The sum of x x^T, [d, d]."""
        return self.scatter + self.count * np.outer(self.mean, self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """[d, d], with n - 1 in the denominator."""
        require(self.count > 1, "the number of samples", self.count, "at least 2 for a covariance")
        return self.scatter / (self.count - 1)


def require_covariance(name: str, matrix: np.ndarray) -> None:
    """Raise ``ValueError`` unless a finite matrix [d, d] is a covariance, up to ``ROUNDING``."""
    tolerance = ROUNDING * np.linalg.norm(matrix, np.inf)
    asymmetry = np.abs(matrix - matrix.T).max()
    require(asymmetry <= tolerance, name, f"asymmetry {asymmetry:.2g}", "symmetric")
    try:  # faster than eigenvalues
        cholesky(matrix + (tolerance + np.finfo(float).tiny) * np.eye(len(matrix)), lower=True)
    except LinAlgError:
        raise ValueError(
            f"{name} must be a covariance, positive semidefinite; a matrix with negative "
            "eigenvalues was given."
        ) from None


def _factor(matrix):
    """F [d, rank] with F F^T = matrix, positive semidefinite: Cholesky with pivots.

    Directions whose variance is rounding are left out: the square root of the rounding, which is
    what a factor would have of them, is not small.
    """
    factor, pivots, rank, _ = dpstrf(matrix, lower=1)
    rows = np.empty((len(matrix), rank))
    rows[pivots - 1] = np.tril(factor[:, :rank])
    return rows


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Squared Frechet distance of two Gaussians, as FID is defined (Heusel et al., 2017).

    ``|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)``. The trace of the root is the sum of
    the singular values of F1^T F2, where S = F F^T. No square root of a nonsymmetric product is
    needed, so nothing complex arises; and no root of an eigenvalue that is rounding, so equal
    arguments give zero to rounding, singular ones too.

    Args:
        mu1, mu2: means [d].
        sigma1, sigma2: covariances [d, d].

    Returns:
        The distance, 0 or more.

    Raises:
        ValueError: shapes do not fit, an entry is not a finite real number, or a covariance is not
            symmetric and positive semidefinite up to ``ROUNDING``.
    """
    given = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    arrays = {name: _real(name, each) for name, each in given.items()}
    d = len(arrays["mu1"]) if arrays["mu1"].ndim else 0
    shapes = tuple(a.shape for a in arrays.values())
    require(
        shapes == ((d,), (d, d)) * 2 and d > 0,
        "the shapes of mu1, sigma1, mu2, sigma2",
        shapes,
        "[d], [d, d], [d], [d, d] with one d",
    )
    for name, array in arrays.items():
        require(bool(np.isfinite(array).all()), name, "NaN or inf", "finite")
    mu1, sigma1, mu2, sigma2 = arrays.values()
    require_covariance("sigma1", sigma1)
    require_covariance("sigma2", sigma2)
    cross = svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    found = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(0.0, float(found))


def moments_distance(a: Moments, b: Moments) -> float:
    """Frechet distance of two sets of features, from their moments."""
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def leave_one_out(blocks: Sequence, statistic: Callable) -> tuple[float, list[float]]:
    """A statistic of a sum of blocks, and of the sum without each block in turn.

    Args:
        blocks: at least two, of anything that adds up (``Moments``, numbers).
        statistic: sum of blocks to a number.
    """
    require(len(blocks) > 1, "the number of blocks", len(blocks), "at least 2")
    # Not the sum less the block: where that one is by far the largest, little is left but rounding.
    rest = [[*blocks[:i], *blocks[i + 1 :]] for i in range(len(blocks))]
    return statistic(reduce(add, blocks)), [statistic(reduce(add, each)) for each in rest]


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


def _load_backbone(network, published, net, backbone):
    """The weights of a file, or those that torchvision publishes, for lpips's network."""
    try:
        if backbone is None:
            weights = published.get_state_dict(check_hash=True, weights_only=True, progress=False)
        else:
            weights = torch.load(backbone, map_location="cpu", weights_only=True)
        # lpips cuts torchvision's layers into slices: "slice2.5.weight" is "features.5.weight"
        names = {name: "features." + name.split(".", 1)[1] for name in network.state_dict()}
        network.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
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
    # lpips would unpickle the weights of the backbone: it makes random ones, replaced here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    _load_backbone(model.net, get_model_weights(_BACKBONES[net]).DEFAULT, net, backbone)
    model.requires_grad_(False)

    def distance(x, y):
        x, y = (_enlarged(images.float(), 224) for images in (x, y))
        return model.to(x.device)(x, y).flatten()

    return distance
