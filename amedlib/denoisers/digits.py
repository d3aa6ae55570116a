"""The embedded default: scikit-learn's 8x8 digits, how they are divided, and their classifiers.

The digits are 1,797 real handwritten digits with 17 grey levels (Alpaydin and Kaynak, 1998, UCI
"Optical Recognition of Handwritten Digits"). The denoiser is trained on the centred images: the
analytical first step assumes that D(x; sigma_max) is near zero, which is so when the mean is zero.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from amedlib.checks import of_the_study, require

GREY_LEVELS = 17
SIGMA_DATA = 0.5416  # standard deviation of the centred images


class Digits(NamedTuple):
    """The data set and its division.

    Attributes:
        images: [1797, 1, 8, 8] float32 in [-1, 1], grey level g stands at g/8 - 1.
        labels: [1797] int64, the digits 0 to 9.
        mean: the mean image [1, 8, 8] float32 of all images; subtracted for the denoiser.
        classifier_part: indices of the third that trains the classifiers, every third image.
        reference_part: indices of the other two thirds, which give the reference statistics.
    """

    images: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    classifier_part: torch.Tensor
    reference_part: torch.Tensor


def load_digits_images() -> Digits:
    """The data from scikit-learn's own copy (no download)."""
    with of_the_study("The data set digits"):
        from sklearn.datasets import load_digits  # takes a second, which only users of it pay

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    index = torch.arange(len(images))
    return Digits(
        images,
        torch.from_numpy(data.target).long(),
        images.mean(0),
        index[index % 3 == 0],
        index[index % 3 != 0],
    )


def quantise(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] clipped and rounded to the 17 grey levels of the data, same shape."""
    return ((images + 1) * 8).round().clamp(0, GREY_LEVELS - 1) / 8 - 1


class DigitsClassifier(nn.Module):
    """A small convolutional classifier, whose features carry the Frechet distance of the digits.

    It is smooth (SiLU), so that its features can serve as a perceptual distance too.
    """

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv1 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 16, 64)
        self.out = nn.Linear(64, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, 64] of images [B, 1, 8, 8] in [-1, 1] (not centred)."""
        for conv in (self.conv0, self.conv1, self.conv2):
            x = F.silu(conv(x))
        return F.silu(self.hidden(x.flatten(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8] in [-1, 1] (not centred)."""
        return self.out(self.features(x))


class NoisyDigitsClassifier(nn.Module):
    """p(digit | x; sigma) of centred digits with noise, for classifier guidance.

    Its logits shrink with c_in = 1 / sqrt(sigma_data^2 + sigma^2), as does its input (EDM, Karras
    et al., 2022, Table 1). For classes of equal covariance the log odds are linear in x / sigma^2
    when the noise is large, so that what is learned there need not depend on sigma. Guidance
    multiplies the gradient by sigma^2, which leaves little room for errors.
    """

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(2, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 16, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor, sigma) -> torch.Tensor:
        """Logits [B, 10] of centred images with noise [B, 1, 8, 8], in the parameters' dtype.

        sigma: standard deviation of the noise, a positive number or one per image [B, 1, 1, 1].

        Raises ValueError when sigma does not fit to the batch.
        """
        x = x.to(self.out.weight.dtype)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        if len(sigma) not in (1, len(x)):
            require(False, "sigma", tuple(sigma.shape), f"one number or one per image ({len(x)})")
        c_in = (SIGMA_DATA**2 + sigma.square()).rsqrt()
        y = torch.cat([c_in * x, (sigma.log() / 4).expand_as(x)], dim=1)
        for conv in (self.conv0, self.conv1, self.conv2):
            y = F.silu(conv(y))
        return SIGMA_DATA * c_in.flatten(1) * self.out(F.silu(self.hidden(y.flatten(1))))
