"""Joint features: an image's frequencies beside a classifier's features of it.

A classifier learns to look through what does not change the class. So a distance of its features
alone stops growing where images are bad, and takes blur for worse than noise. Frequencies grow with
every corruption of the pixels, and cannot tell a digit from noise of the same spectrum. Together
they see both. ``amedlib.study.corruptions`` measures what they see.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import dctn

from amedlib.metrics import Moments


class Frequencies(NamedTuple):
    """Which coefficients of the discrete cosine transform count, and how much.

    Attributes:
        of_axis: for each axis of colour the frequencies 0 to H - 1 in both directions. The axes
            are those of the transform along the channels: brightness, red against blue, and green
            against both.
        power: a coefficient is divided by this power of its deviation over the real images; the
            larger, the more the high frequencies count, in which noise stands out.
    """

    of_axis: tuple[tuple[int, ...], ...]
    power: float

    @property
    def count(self) -> int:
        """The number of coefficients."""
        return sum(len(each) ** 2 for each in self.of_axis)

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """Coefficients [B, count] of images [B, C, H, W]; the transform is orthonormal."""
        pixels = images.float().cpu().numpy()
        coefficients = dctn(pixels, axes=(1, 2, 3), norm="ortho")
        found = [
            coefficients[:, axis][:, each][:, :, each].reshape(len(images), -1)
            for axis, each in enumerate(map(list, self.of_axis))
        ]
        return torch.from_numpy(np.concatenate(found, axis=1)).to(images.device)


# All of the 8x8 digits. Of 32x32 pixels one less than each power of two, from the mean of the image
# to the finest; colour only where JPEG copies of the images keep it. The powers are those with
# which noise is farthest of all, and everything grows: `corruptions.ipynb` shows it.
DIGITS = Frequencies((tuple(range(8)),), power=2.0)
CIFAR10 = Frequencies(((0, 1, 3, 7, 15, 31), (0, 1, 3, 7), (0, 1, 3, 7)), power=0.75)


def side_by_side(frequencies: Frequencies, features: Callable) -> Callable:
    """A function of images [B, C, H, W] in [-1, 1]: coefficients, then features, [B, d]."""
    return lambda images: torch.cat([frequencies.of(images), features(images)], dim=1)


def balance(frequencies: Frequencies, real: Moments) -> np.ndarray:
    """Factors [d] of what ``side_by_side`` returns, from its moments of real images.

    Coefficients get their power. Then each half, coefficients and features, has a total variance of
    50: a distance of 100 is as far as the real images scatter.
    """
    variance = np.diag(real.covariance).clip(1e-12)  # of a few flat images some do not vary
    factors = np.ones(len(variance))
    factors[: frequencies.count] = variance[: frequencies.count] ** (-frequencies.power / 2)
    for half in (slice(frequencies.count), slice(frequencies.count, None)):
        factors[half] *= np.sqrt(50 / (factors[half] ** 2 @ variance[half]))
    return factors


def balanced(features: Callable, factors: np.ndarray) -> Callable:
    """``features`` times ``factors``, [B, d] in float64."""

    def scaled(images):
        found = features(images)
        return found * torch.as_tensor(factors, device=found.device)

    return scaled
