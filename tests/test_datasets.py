"""Data sets: their weights are the published ones, and shifting the data shifts the denoiser."""

import shutil
import sys

import pytest
import torch

from amedlib import datasets, load_dataset
from amedlib.datasets import DATA, load_weights
from amedlib.sampling import make_latents


@pytest.fixture
def models(tmp_path):
    for name in ("digits_classifier.safetensors", "SHA256SUMS"):
        shutil.copy(DATA / "models" / name, tmp_path)
    return tmp_path


def test_shipped_weights_are_the_published_ones(models):
    tensors, metadata, digest = load_weights("digits_classifier.safetensors", models)
    assert tensors and metadata
    assert digest in (models / "SHA256SUMS").read_text()


def test_a_missing_file_is_named_with_its_remedy(models):
    (models / "digits_classifier.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"digits_classifier.safetensors is missing; `make models`"
    ):
        load_weights("digits_classifier.safetensors", models)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        lambda content: b"",
    ],
    ids=["truncated", "one bit altered", "empty"],
)
def test_a_truncated_or_altered_file_is_refused(models, spoil):
    path = models / "digits_classifier.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="not the one that was published"):
        load_weights(path.name, models)


def test_moving_the_data_moves_the_denoiser():
    centred, moved = load_dataset("digits"), load_dataset("digits_uncentred")
    mean = moved.denoiser.mean
    x = 3 * make_latents(range(4), (1, 8, 8))
    t = torch.tensor(3.0)
    torch.testing.assert_close(
        moved.denoiser(x + mean, t), centred.denoiser(x, t) + mean, rtol=1e-5, atol=1e-5
    )
    # The same images come out.
    torch.testing.assert_close(moved.to_images(x + mean), centred.to_images(x))


def test_the_analytical_first_step_fits_centred_data_only():
    """At sigma_max the denoised image is the data's mean; AFS takes it to be zero."""
    x = 80 * make_latents(range(64), (1, 8, 8))
    t = torch.tensor(80.0)
    norms = [
        load_dataset(name).denoiser(x, t).mean(0).norm() for name in ("digits", "digits_uncentred")
    ]
    assert norms[0] < 0.1 * norms[1]


def test_images_have_the_datas_grey_levels():
    data = load_dataset("digits")
    images = data.to_images(make_latents(range(8), data.shape))
    levels = (images + 1) * 8
    torch.testing.assert_close(levels, levels.round())
    assert images.min() >= -1 and images.max() <= 1


def test_losses_compare_states(monkeypatch):
    data = load_dataset("digits")
    x = make_latents(range(3), data.shape)
    for loss in ("l2", "features"):
        distance = data.distances(loss)
        assert distance(x, x).abs().max() == 0
        assert (distance(x, x + 1) > 0).all()
    monkeypatch.setitem(sys.modules, "lpips", None)  # as where the extra is not installed
    with pytest.raises(ImportError, match="paper extra"):
        data.distances("lpips")


def test_registered_names():
    assert set(datasets.DATASETS) == {"digits", "digits_uncentred"}
