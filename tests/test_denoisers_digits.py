"""The digits against scikit-learn's own array, and the shipped weights against plain statistics."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from amedlib.denoisers.digits import DigitsClassifier, load_digits_images, quantise
from amedlib.denoisers.edm import build

MODELS = Path(__file__).parent.parent / "data" / "models"


@pytest.fixture(scope="module")
def digits():
    return load_digits_images()


@pytest.fixture(scope="module")
def denoiser():
    path = MODELS / "digits_edm.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    mean = tensors.pop("mean_image")
    net = build(metadata["precond_class"], json.loads(metadata["init_kwargs"]))
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False), mean


def test_images_are_those_of_scikit_learn(digits):
    raw = load_digits()
    grey = ((digits.images + 1) * 8).squeeze(1).numpy()
    assert (grey == raw.images).all()
    assert (digits.labels.numpy() == raw.target).all()
    torch.testing.assert_close(digits.mean.double(), digits.images.double().mean(0))


def test_parts_are_disjoint_and_complete(digits):
    both = torch.cat([digits.classifier_part, digits.reference_part])
    assert both.sort().values.tolist() == list(range(1797))
    assert len(digits.classifier_part) == 599
    # every digit is in both parts, in numbers that fit
    for part in (digits.classifier_part, digits.reference_part):
        counts = digits.labels[part].bincount(minlength=10)
        assert counts.min() > 0.7 * counts.max()


def test_quantise(digits):
    assert torch.equal(quantise(digits.images), digits.images)
    off = torch.tensor([-3.0, -1.02, -0.94, -0.93, 0.05, 0.07, 1.4])
    expected = torch.tensor([-1.0, -1.0, -1.0, -0.875, 0.0, 0.125, 1.0])
    assert torch.equal(quantise(off), expected)


def test_shipped_classifier_knows_images_it_never_saw(digits):
    classifier = DigitsClassifier().eval()
    classifier.load_state_dict(load_file(MODELS / "digits_classifier.safetensors"))
    images = digits.images[digits.reference_part]
    with torch.inference_mode():
        assert classifier.features(images).shape == (1198, 64)
        right = classifier(images).argmax(1) == digits.labels[digits.reference_part]
    assert right.float().mean() > 0.97


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.5])
def test_shipped_denoiser_beats_the_best_linear_one(digits, denoiser, sigma):
    """Below the Wiener filter's error, which is what the covariance of the data alone allows."""
    net, mean = denoiser
    images = digits.images - mean
    noisy = images + sigma * torch.randn(images.shape, generator=torch.manual_seed(0))
    with torch.inference_mode():
        error = (net(noisy, sigma) - images).square().mean()
    variances = torch.linalg.eigvalsh(images.flatten(1).T.cov().double())
    linear = (variances * sigma**2 / (variances + sigma**2)).mean()
    assert error < 0.9 * linear


def test_shipped_denoiser_is_near_zero_at_the_largest_noise(digits, denoiser):
    """What the analytical first step assumes, and why the data are centred."""
    net, mean = denoiser
    torch.testing.assert_close(mean, digits.mean)
    noise = torch.randn(500, 1, 8, 8, generator=torch.manual_seed(0))
    with torch.inference_mode():
        denoised = net(80.0 * noise, 80.0)
    spread = (digits.images - mean).square().mean().sqrt()
    assert denoised.square().mean().sqrt() < 0.15 * spread


def test_shipped_files_are_small():
    assert sum(path.stat().st_size for path in MODELS.glob("*.safetensors")) < 4e6
