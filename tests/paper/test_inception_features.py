"""Inception features and FID against torch-fidelity, on a network of random weights."""

import hashlib
import io
from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

from amedlib.datasets.inception import inception_features, quantise_edm
from amedlib.metrics import Moments, moments_distance


class Blank(FeatureExtractorInceptionV3):
    """torch-fidelity's network with its initial weights."""

    def load_state_dict(self, *_):
        pass


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, in torch's older format: the size of the published one fits it."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = Blank("inception", ["2048"], empty)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    yield path
    path.unlink()  # 96 MB


@pytest.fixture(scope="module")
def features(weights):
    return inception_features(weights, sha256=digest(weights))


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(1))


def test_equals_a_direct_call(weights, features, images):
    direct = FeatureExtractorInceptionV3("direct", ["2048"], str(weights))(images)[0]
    found = features(images)
    assert torch.equal(found, direct)
    assert found.dtype == torch.float32 and found.shape == (4, 2048)
    assert not found.requires_grad
    # means over space of rectified values, alive and different from image to image
    assert found.min() >= 0 and found.std(0).max() > 0.01 and bool(found.isfinite().all())


def test_deterministic_and_the_same_in_any_batch(features, images):
    found = features(images)
    assert torch.equal(found, features(images))
    alone = torch.cat([features(image[None]) for image in images])
    # in training mode the statistics of a batch would mix its images
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(images.flip(0)).flip(0), found, rtol=1e-4, atol=1e-5)


def test_images_of_any_size_are_resized_as_tensorflow_did(features):
    """TensorFlow 1 samples at i * in / out: halving takes every second pixel, averaging none."""
    large = torch.randint(
        0, 256, (1, 3, 598, 598), dtype=torch.uint8, generator=torch.manual_seed(2)
    )
    torch.testing.assert_close(features(large), features(large[..., ::2, ::2]))
    flat = [
        features(torch.full((1, 3, *size), 200, dtype=torch.uint8))
        for size in ((299, 299), (32, 32), (64, 64), (256, 256), (40, 500))
    ]
    for other in flat[1:]:
        torch.testing.assert_close(other, flat[0], rtol=1e-4, atol=1e-5)


def test_every_level_counts(features):
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    found = features(levels[:, None, None, None].expand(-1, 3, 8, 8))
    assert torch.pdist(found).min() > 0.01


def test_streamed_distance_is_that_of_torch_fidelity(features):
    generator = torch.manual_seed(3)
    noise = torch.randn(2, 24, 3, 16, 16, dtype=torch.float64, generator=generator)
    sets = [quantise_edm(noise[0] * 0.4), quantise_edm(noise[1] * 0.5 + 0.1)]
    found = [torch.cat([features(part) for part in s.split(16)]) for s in sets]
    streamed = [Moments.of(f[:7]) + Moments.of(f[7:20]) + Moments.of(f[20:]) for f in found]
    # 24 images leave the covariance of 12 features regular, and that of 256 singular
    for d in (12, 256):
        ours = moments_distance(
            *(Moments(m.count, m.mean[:d], m.scatter[:d, :d]) for m in streamed)
        )
        statistics = [fid_features_to_statistics(f[:, :d].contiguous()) for f in found]
        theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
        assert ours == pytest.approx(theirs, rel=1e-5)  # torch-fidelity takes the mean in float32
        for s, f in zip(statistics, found, strict=True):
            s["mu"] = f[:, :d].double().mean(0).numpy()
        theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
        assert ours == pytest.approx(theirs, rel=1e-7)


def test_altered_weights_are_refused(weights, tmp_path):
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    altered = tmp_path / "altered.pth"
    altered.write_bytes(content)
    try:
        with pytest.raises(ValueError, match=f"SHA-256 of .*altered.pth must be {digest(weights)}"):
            inception_features(altered, sha256=digest(weights))
        with pytest.raises(ValueError, match="must be 6726825d.*, as published"):
            inception_features(weights)
    finally:
        altered.unlink()
    with pytest.raises(ValueError, match="weights_path must be an existing file"):
        inception_features(tmp_path / "absent.pth")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_the_file_does_not_run(tmp_path, zipped):
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pth"
    torch.save({"weight": Trap(sprung)}, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert sprung.exists()  # the trap works
    sprung.unlink()
    with pytest.raises(Exception, match="(?i)weights.only"):
        inception_features(path, sha256=digest(path))
    assert not sprung.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(features, wrong):
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \[B, 3, H, W\]"):
        features(wrong)
