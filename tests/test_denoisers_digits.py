"""The digits against scikit-learn's own array, and the shipped weights against plain statistics."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from amedlib import load_dataset, make_latents, make_schedule, make_solver, sample
from amedlib.datasets.loaders import load_weights
from amedlib.denoisers.adm import GuidedDenoiser
from amedlib.denoisers.digits import (
    SIGMA_DATA,
    DigitsClassifier,
    NoisyDigitsClassifier,
    load_digits_images,
    quantise,
)
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
    assert sum(path.stat().st_size for path in MODELS.glob("digits_*.safetensors")) < 4e6
    assert sum(path.stat().st_size for path in MODELS.glob("cifar10_*.safetensors")) < 25e6


# --- the noisy classifier, and guidance by it ---------------------------------------------------


@pytest.fixture(scope="module")
def noisy_classifier():
    tensors, _, _ = load_weights("digits_noisy_classifier.safetensors")  # checks SHA256SUMS
    net = NoisyDigitsClassifier()
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def accuracy(classifier, digits, sigma):
    """On the reference images, four draws of noise each."""
    images = (digits.images - digits.mean)[digits.reference_part].repeat(4, 1, 1, 1)
    noise = torch.randn(images.shape, generator=torch.manual_seed(0))
    right = classifier(images + sigma * noise, sigma).argmax(1)
    return (right == digits.labels[digits.reference_part].repeat(4)).float().mean().item()


def bayes(digits):
    """Logits by Bayes' rule, with the classifier's images for all that there are."""
    known = (digits.images - digits.mean)[digits.classifier_part].flatten(1)
    classes = F.one_hot(digits.labels[digits.classifier_part], 10).float()

    def logits(x, sigma):
        weights = -torch.cdist(x.flatten(1), known).square() / (2 * sigma**2)
        return (weights.softmax(1) @ classes).clamp_min(1e-30).log()

    return logits


def test_shipped_noisy_classifier_sees_through_little_noise(digits, noisy_classifier):
    for sigma in (0.002, 0.1):
        assert accuracy(noisy_classifier, digits, sigma) > 0.97
    torch.manual_seed(0)
    assert accuracy(NoisyDigitsClassifier(), digits, 0.1) < 0.3


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 5.0])
def test_shipped_noisy_classifier_tells_what_can_be_told(digits, noisy_classifier, sigma):
    assert accuracy(noisy_classifier, digits, sigma) > accuracy(bayes(digits), digits, sigma) - 0.03


def test_noisy_classifier_knows_nothing_at_the_largest_noise(noisy_classifier):
    x = 80 * make_latents(range(100), (1, 8, 8))
    assert (noisy_classifier(x, 80.0).softmax(1) - 0.1).abs().max() < 0.03


def test_sigma_data_is_the_deviation_of_the_centred_images(digits):
    assert (digits.images - digits.mean).std().item() == pytest.approx(SIGMA_DATA, abs=5e-5)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_gradient_of_log_p_against_finite_differences(digits, noisy_classifier, sigma):
    net = copy.deepcopy(noisy_classifier).double()
    x = (digits.images - digits.mean)[:3].double()
    x = x + sigma * torch.randn(x.shape, generator=torch.manual_seed(0), dtype=torch.float64)

    def log_p(x):
        return net(x, sigma).log_softmax(1)[range(3), [3, 1, 4]]

    x.requires_grad_()
    gradient = torch.autograd.grad(log_p(x).sum(), x)[0]
    step = 1e-5 * sigma
    with torch.no_grad():
        for i, direction in enumerate(torch.eye(64, dtype=torch.float64).reshape(64, 1, 1, 8, 8)):
            found = (log_p(x + step * direction) - log_p(x - step * direction)) / (2 * step)
            expected = gradient.flatten(1)[:, i]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 / sigma)


def test_noise_level_per_image(noisy_classifier):
    x = make_latents(range(3), (1, 8, 8))
    sigma = torch.tensor([0.1, 1.0, 10.0]).reshape(3, 1, 1, 1)
    alone = [noisy_classifier(x[i : i + 1], sigma[i].item()) for i in range(3)]
    torch.testing.assert_close(noisy_classifier(x, sigma), torch.cat(alone))
    with pytest.raises(ValueError, match=r"sigma must be one number or one per image \(3\)"):
        noisy_classifier(x, sigma[:2])


def test_guidance_raises_the_confidence_in_the_class_that_is_asked_for(denoiser, noisy_classifier):
    """As another classifier sees it, with a denoiser that gets the labels and one that does not."""
    judge = DigitsClassifier()
    judge.load_state_dict(load_file(MODELS / "digits_classifier.safetensors"))
    net, mean = denoiser
    data = load_dataset("digits_conditional")
    labels, latents = data.labels(range(64)), make_latents(range(64), data.shape)
    # With half as many steps the samples of a large scale are wrong: guidance makes the ODE stiff.
    times = make_schedule("polynomial", num_steps=16, sigma_min=0.002, sigma_max=80.0)
    for base in (net, lambda x, t, labels: net(x, t)):
        confidences = []
        for scale in (0, 2, 8):
            guided = GuidedDenoiser(base, noisy_classifier, scale, clip=False)
            x = sample(guided, latents, times, make_solver("heun"), labels=labels).x
            with torch.no_grad():
                p = judge(quantise(x.float() + mean)).softmax(1)
            confidences.append((p * labels).sum(1).mean().item())
        assert confidences[0] < confidences[1] < confidences[2]
        assert confidences[2] > 0.94


def test_files_of_the_noisy_classifier_are_small():
    assert (MODELS / "digits_noisy_classifier.safetensors").stat().st_size < 3e5
