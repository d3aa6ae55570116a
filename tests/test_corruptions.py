"""Joint features, and what the distances make of real images that are corrupted."""

import json

import numpy as np
import pytest
import torch

from amedlib.datasets import joint
from amedlib.datasets.loaders import load_dataset
from amedlib.metrics import Moments, moments_distance
from amedlib.study import corruptions

WHOLE = joint.DIGITS, joint.CIFAR10


@pytest.mark.parametrize("frequencies", WHOLE)
def test_a_wave_has_the_coefficient_of_its_frequency_alone(frequencies):
    """Images are made by the formula of the cosine transform, and no transform is used."""
    side, axes = (8, 1) if frequencies is joint.DIGITS else (32, 3)
    place = (torch.arange(side) + 0.5) * torch.pi / side
    down, across = (frequencies.of_axis[0][i] for i in (1, 3))
    wave = 2 / side * torch.cos(down * place)[:, None] * torch.cos(across * place)
    images = torch.full((1, axes, 1, 1), axes**-0.5) * wave
    found = frequencies.of(images)
    assert found.shape == (1, frequencies.count)
    expected = torch.zeros_like(found)
    expected[0, len(frequencies.of_axis[0]) * 1 + 3] = 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_of_grey_images_no_colour_counts_and_of_digits_nothing_is_lost():
    x = torch.randn(4, 1, 32, 32)
    brightness = len(joint.CIFAR10.of_axis[0]) ** 2
    found = joint.CIFAR10.of(x.expand(4, 3, 32, 32))
    assert (
        found[:, brightness:].abs().max() < 1e-4 < found[:, :brightness].abs().min(1).values.max()
    )
    digits = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(joint.DIGITS.of(digits).norm(dim=1), digits.flatten(1).norm(dim=1))


def test_each_half_of_the_features_has_a_variance_of_fifty():
    reference = load_dataset("digits").reference["fd_joint"]
    variance = np.diag(reference.covariance)
    assert [variance[:64].sum(), variance[64:].sum()] == pytest.approx([50, 50])
    # With the power 2 the deviation of a scaled coefficient is the inverse of what it was.
    was = joint.DIGITS.of(load_dataset("digits").real_images()).numpy().std(0)
    scaled = np.sqrt(variance[:64]) * was
    assert scaled == pytest.approx(np.full(64, scaled[0]), rel=1e-3)


def test_moments_of_scaled_vectors():
    x, factors = torch.randn(50, 3).double(), np.array([0.5, 2.0, 3.0])
    expected, found = Moments.of(x * torch.from_numpy(factors)), Moments.of(x) * factors
    assert (expected.count, *found.total) == pytest.approx((found.count, *expected.total))
    np.testing.assert_allclose(found.outer, expected.outer)


def test_colour_images_are_compared_in_the_same_features_as_their_reference():
    """The test images' shipped moments lie near those of the training images, and no noise does."""
    data = load_dataset("cifar10_small")
    test, *rest = data.held_out["fd_joint"]
    floor = moments_distance(sum(rest, test), data.reference["fd_joint"])
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (300, 3, 32, 32), generator=random, dtype=torch.uint8)
    features = data.features_of["fd_joint"](noise)
    assert features.shape == (300, 196)
    # The classifier's are the last of them, but for their scale.
    ratio = features[:, 68:] / data.features(noise)
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    assert 0 < floor < 1 < 50 < moments_distance(Moments.of(features), data.reference["fd_joint"])


@pytest.fixture(scope="module")
def digits():
    return corruptions.measure_corrupted("digits")


def ends(table):
    return table[table["strength"].isna()].set_index("kind")


@pytest.mark.parametrize("dataset", corruptions.REAL)
def test_the_joint_distance_grows_with_every_corruption_and_noise_is_farthest(dataset, digits):
    table = digits if dataset == "digits" else corruptions.load_table(dataset)
    found = corruptions.judged(table).query("metric == 'fd_joint'")
    assert len(found) == 5 * len(corruptions.CORRUPTIONS) and found["grows"].all()
    assert table["fd_joint"].max() == ends(table).loc[corruptions.NOISE, "fd_joint"]
    # So is milder noise, of all that is no noise.
    mild = ends(table).loc["noise of deviation 1", "fd_joint"]
    others = table[~table["kind"].str.contains("noise|saturation")]
    assert others["fd_joint"].max() < mild


def test_the_distance_of_the_classifiers_features_does_not(digits):
    for table in (digits, corruptions.load_table("cifar10_small")):
        found = corruptions.judged(table).query("metric == 'fd'")
        assert not found["below"].all()


def test_the_table_on_the_page_is_what_is_measured(digits):
    shipped = corruptions.load_table("digits")
    assert shipped["kind"].tolist() == digits["kind"].tolist()
    for metric in ("fd", "fd_pixels", "fd_joint"):
        np.testing.assert_allclose(shipped[metric], digits[metric], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dataset", corruptions.REAL)
def test_shipped_tables_are_of_the_shipped_weights(dataset):
    """No images of CIFAR-10 are shipped: its table stands for the features it was measured in."""
    content = json.loads(corruptions.path_of(dataset).read_text())
    assert content["fingerprint"].endswith(f"weights {load_dataset(dataset).fingerprint}")


def test_what_is_wrong_with_the_arguments(tmp_path):
    with pytest.raises(ValueError, match="dataset must be one of 'digits', 'cifar10_small'"):
        corruptions.measure_corrupted("cats")
    with pytest.raises(ValueError, match="images must be a folder or archive of CIFAR-10"):
        corruptions.measure_corrupted("cifar10_small")
    with pytest.raises(ValueError, match="the table of corruptions must be measured"):
        corruptions.load_table("digits", tmp_path)
