"""The quantiser against exact arithmetic; published statistics, whole and damaged."""

import sys
import zipfile
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch

from amedlib.datasets.inception import Statistics, inception_features, quantise_edm, read_statistics
from amedlib.metrics import Moments, moments_distance

GOLDEN = Path(__file__).parent / "golden/fid.npz"
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(60, 8))
MEAN, COVARIANCE = FEATURES.mean(0), np.cov(FEATURES.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantiser_against_exact_arithmetic(dtype):
    # multiples of 1/256: no level begins at one within (-1, 1), so rounding decides nothing
    grid = [Fraction(k, 256) for k in range(-300, 301)]
    expected = [min(max(floor(x * Fraction(255, 2) + 128), 0), 255) for x in grid]
    found = quantise_edm(torch.tensor([float(x) for x in grid], dtype=dtype))
    assert found.dtype == torch.uint8 and found.tolist() == expected
    assert set(expected) == set(range(256))
    ends = torch.tensor([-torch.inf, -1e30, -1, 1, 1e30, torch.inf], dtype=dtype)
    assert quantise_edm(ends).tolist() == [0, 0, 0, 255, 255, 255]


def test_levels_survive_the_rounding_of_edm():
    levels = torch.arange(256)
    assert torch.equal(quantise_edm(levels / 127.5 - 1).int(), levels)


class Calls(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_the_quantiser_reads_nothing_back_from_the_device():
    read_back = {"__bool__", "__float__", "__int__", "item", "tolist", "cpu", "numpy"}
    x = torch.zeros(2, 3, 4, 4)
    with Calls() as calls:
        quantise_edm(x)
    assert calls.seen and calls.seen.isdisjoint(read_back)
    with Calls() as calls:
        assert x.min() >= -1
    assert not calls.seen.isdisjoint(read_back)


def test_images_are_quantised_once():
    with pytest.raises(ValueError, match="images to quantise must be floating point"):
        quantise_edm(quantise_edm(torch.zeros(1, 3, 4, 4)))


def test_without_the_extra_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="paper extra"):
        inception_features("weights.pth")


def test_statistics_of_the_reference_vectors(tmp_path):
    with np.load(GOLDEN, allow_pickle=False) as data:
        data = dict(data)
    np.savez(tmp_path / "b.npz", mu=data["mu_b"], sigma=data["sigma_b"])
    reference = read_statistics(tmp_path / "b.npz")
    assert isinstance(reference, Statistics)
    np.testing.assert_array_equal(reference.mean, data["mu_b"])
    np.testing.assert_array_equal(reference.covariance, data["sigma_b"])
    found = moments_distance(Moments.of(data["features_a"]), reference)
    assert found == pytest.approx(float(data["fid"]), rel=1e-8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_single_precision_and_compression(tmp_path, save, dtype):
    path = tmp_path / "s.npz"
    save(path, mu=MEAN.astype(dtype), sigma=COVARIANCE.astype(dtype))
    found = read_statistics(str(path))
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.covariance, COVARIANCE, rtol=np.finfo(dtype).eps)


def test_only_mean_and_covariance_are_read(tmp_path):
    """OpenAI's files hold the images too, 1 GB of them; here they cannot be read at all."""
    path = tmp_path / "openai.npz"
    images = RNG.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    spatial = {"mu_s": MEAN[:4], "sigma_s": COVARIANCE[:4, :4]}
    np.savez(path, arr_0=images, mu=MEAN, sigma=COVARIANCE, **spatial)
    content = path.read_bytes().replace(images.tobytes(), bytes(images.nbytes))
    path.write_bytes(content)
    with np.load(path) as archive, pytest.raises(zipfile.BadZipFile):
        archive["arr_0"]
    np.testing.assert_array_equal(read_statistics(path).covariance, COVARIANCE)


def test_rank_deficient_covariances_are_covariances(tmp_path):
    few = RNG.normal(size=(5, 30))
    np.savez(tmp_path / "few.npz", mu=few.mean(0), sigma=np.cov(few.T))
    np.savez(tmp_path / "none.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    assert read_statistics(tmp_path / "few.npz").mean.shape == (30,)
    assert not read_statistics(tmp_path / "none.npz").covariance.any()


def changed(entry, value):
    matrix = COVARIANCE.copy()
    matrix[entry] = value
    return matrix


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": MEAN, "cov": COVARIANCE}, "not a whole npz file of mu and sigma: .*mu"),
        ({"mu": MEAN}, "not a whole npz file of mu and sigma: .*sigma"),
        ({"mu": MEAN[:5], "sigma": COVARIANCE}, r"must be \[d\] and \[d, d\]"),
        ({"mu": MEAN, "sigma": COVARIANCE[:5]}, r"must be \[d\] and \[d, d\]"),
        ({"mu": MEAN[None], "sigma": COVARIANCE}, r"must be \[d\] and \[d, d\]"),
        ({"mu": 1.0, "sigma": 1.0}, r"must be \[d\] and \[d, d\]"),
        ({"mu": MEAN[:0], "sigma": COVARIANCE[:0, :0]}, r"must be \[d\] and \[d, d\]"),
        ({"mu": MEAN.astype(int), "sigma": COVARIANCE}, "must be floating point"),
        ({"mu": MEAN.astype(str), "sigma": COVARIANCE}, "must be floating point"),
        ({"mu": MEAN, "sigma": COVARIANCE + 0j}, "must be floating point"),
        ({"mu": MEAN, "sigma": changed((2, 2), np.nan)}, "must be finite"),
        ({"mu": MEAN * np.inf, "sigma": COVARIANCE}, "must be finite"),
        ({"mu": MEAN, "sigma": changed((0, 1), 0.9)}, "must be symmetric"),
        ({"mu": MEAN, "sigma": changed((3, 3), -1e-3)}, "must be a covariance"),
        ({"mu": MEAN, "sigma": -COVARIANCE}, "must be a covariance"),
        ({"mu": MEAN.astype(object), "sigma": COVARIANCE}, "Object arrays cannot be loaded"),
        ({"mu": MEAN, "sigma": COVARIANCE.astype(object)}, "Object arrays cannot be loaded"),
    ],
)
def test_other_contents_are_refused(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        read_statistics(path)
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", MEAN)
    np.save(tmp_path / "pickle.npy", MEAN.astype(object), allow_pickle=True)
    (tmp_path / "text.npz").write_text("<html>not found</html>")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("absent.npz", "one.npy", "pickle.npy", "text.npz", "empty.npz", "."):
        with pytest.raises(ValueError, match="is not a whole npz file of mu and sigma"):
            read_statistics(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_and_altered_files_are_refused(tmp_path, save):
    path = tmp_path / "s.npz"
    save(path, mu=MEAN, sigma=COVARIANCE)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a whole npz file of mu and sigma"):
            read_statistics(path)
    accepted = 0
    for place in range(0, len(whole), 3):
        altered = bytearray(whole)
        altered[place] ^= 16
        path.write_bytes(altered)
        try:
            found = read_statistics(path)
        except ValueError:
            continue
        # the checksums of the zip file leave only changes outside the numbers
        np.testing.assert_array_equal(found.covariance, COVARIANCE)
        accepted += 1
    assert accepted < len(whole) / 3 / 2
