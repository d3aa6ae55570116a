"""What FID is computed from: 8-bit images, features of Inception-v3, published statistics.

FID is ``moments_distance`` of the features' ``Moments`` and a reference's ``Statistics``. The
network is the TensorFlow one of 2015 that FID was defined with (Heusel et al., 2017), in
torch-fidelity's translation to PyTorch.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from amedlib.checks import require
from amedlib.metrics import require_covariance

# Of weights-inception-2015-12-05-6726825d.pth (torch-fidelity); pytorch-fid publishes the same file
# as pt_inception-2015-12-05-6726825d.pth.
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Statistics(NamedTuple):
    """Mean [d] and covariance [d, d] of features, float64; ``moments_distance`` takes it."""

    mean: np.ndarray
    covariance: np.ndarray


def quantise_edm(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to 0..255 as NVIDIA's code does: ``x * 127.5 + 128``, clipped, truncated.

    This rounds to the nearest of 256 levels. Values beyond [-1, 1] are clipped; NaN has no meaning.
    """
    require(x.is_floating_point(), "images to quantise", x.dtype, "floating point, in [-1, 1]")
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def inception_features(
    weights_path: Path | str, device: str = "cpu", sha256: str = WEIGHTS_SHA256
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The features of FID: uint8 images [B, 3, H, W] to float32 [B, 2048].

    The network enlarges or shrinks the images to 299x299 itself, the way TensorFlow 1 did.

    Args:
        weights_path: the file weights-inception-2015-12-05-6726825d.pth; nothing is downloaded.
        device: where the network runs and the features are.
        sha256: of the file; another one is for tests with other weights.

    Raises:
        ImportError: the ``paper`` extra is not installed.
        ValueError: the file is missing or another one; images are not of this form.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            "FID needs the packages of the paper extra: pip install 'amedlib[paper]'."
        ) from error
    path = Path(weights_path)
    require(path.is_file(), "weights_path", str(path), "an existing file")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    require(found == sha256, f"the SHA-256 of {path}", found, f"{sha256}, as published")
    # torch-fidelity would unpickle whatever the file holds. It gets one that holds tensors only.
    weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    tensors_only = io.BytesIO()
    torch.save(weights, tensors_only)
    tensors_only.seek(0)
    network = FeatureExtractorInceptionV3("inception", ["2048"], tensors_only).to(device)

    @torch.no_grad()
    def features(images):
        require(
            images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3,
            "images",
            (images.dtype, tuple(images.shape)),
            "uint8 of shape [B, 3, H, W], made by quantise_edm",
        )
        return network(images.to(device))[0]

    return features


def read_statistics(path: Path | str) -> Statistics:
    """Reference statistics as EDM and OpenAI publish them, an npz file with ``mu`` and ``sigma``.

    Nothing else in the file is read, so not the images that OpenAI's hold as well.

    Raises:
        ValueError: the file is missing or damaged, or has no mean and covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = archive["mu"], archive["sigma"]
    except Exception as error:  # numpy, zipfile and zlib have many ways to say that a file is bad
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The file {path} is not a whole npz file of mu and sigma: {reason}."
        ) from error
    require(
        mean.ndim == 1 and covariance.shape == 2 * mean.shape and mean.size > 0,
        f"the shapes of mu and sigma in {path}",
        (mean.shape, covariance.shape),
        "[d] and [d, d]",
    )
    require(
        mean.dtype.kind == covariance.dtype.kind == "f",
        f"mu and sigma in {path}",
        (str(mean.dtype), str(covariance.dtype)),
        "floating point",
    )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    require(
        bool(np.isfinite(mean).all() and np.isfinite(covariance).all()),
        f"mu and sigma in {path}",
        "NaN or inf",
        "finite",
    )
    require_covariance(f"sigma in {path}", covariance)
    return Statistics(mean, covariance)
