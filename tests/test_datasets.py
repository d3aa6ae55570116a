"""Data sets: their weights are the published ones, and shifting the data shifts the denoiser."""

import shutil
import sys

import pytest
import torch

from amedlib import load_dataset
from amedlib.datasets import entries, loaders
from amedlib.datasets.files import DATA
from amedlib.datasets.loaders import load_weights
from amedlib.denoisers.digits import DigitsClassifier, NoisyDigitsClassifier, load_digits_images
from amedlib.sampling import make_latents, sample
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver
from amedlib.training import Trainer, Training


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


def test_where_it_was_installed_the_remedy_is_one_that_is_there(models, monkeypatch):
    monkeypatch.setattr(loaders, "INSTALLED", True)
    with pytest.raises(ValueError, match="is missing; copy it there from") as caught:
        load_weights("cifar10_edm.safetensors", models, command="make models")
    assert "make" not in str(caught.value)


def test_sums_that_an_editor_touched_are_read(models):
    sums = models / "SHA256SUMS"
    lines = ["# of the release", "", *sums.read_text().splitlines(), " "]
    sums.write_bytes("\r\n".join(lines).encode())
    assert load_weights("digits_classifier.safetensors", models)[0]
    sums.unlink()
    with pytest.raises(ValueError, match="SHA256SUMS says nothing of it"):
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
    assert set(entries.DATASETS) >= {
        "digits",
        "digits_uncentred",
        "digits_conditional",
        "digits_guidance_2",
        "digits_guidance_4",
        "digits_guidance_8",
    }


def test_a_sample_has_the_class_of_its_seed_whatever_the_batch():
    data = load_dataset("digits_conditional")
    seeds = range(48)
    labels = data.labels(seeds)
    assert labels.shape == (48, 10) and (labels.sum(1) == 1).all()
    assert len(labels.argmax(1).unique()) == 10
    times = make_schedule("polynomial", num_steps=9, sigma_min=0.002, sigma_max=80.0)

    def samples(some):
        latents = make_latents(some, data.shape)
        return sample(data.denoiser, latents, times, make_solver("heun"), labels=data.labels(some))

    x = samples(seeds).x
    for some in (seeds[5:6], seeds[40:]):
        assert torch.equal(data.labels(some), labels[some.start : some.stop])
        torch.testing.assert_close(samples(some).x, x[some.start : some.stop], rtol=1e-4, atol=1e-4)
    classifier = DigitsClassifier()
    classifier.load_state_dict(load_weights("digits_classifier.safetensors")[0])
    seen = classifier(data.to_images(x)).argmax(1)
    assert (seen == labels.argmax(1)).float().mean() > 0.8


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_guidance_moves_the_conditional_denoiser_of_images_that_are_not_centred(scale):
    noisy_classifier = NoisyDigitsClassifier()
    noisy_classifier.load_state_dict(load_weights("digits_noisy_classifier.safetensors")[0])
    data, plain = load_dataset(f"digits_guidance_{scale}"), load_dataset("digits_conditional")
    assert data.guidance == scale and not data.afs
    network, mean = plain.denoiser, load_digits_images().mean
    x = (2 * make_latents(range(4), data.shape).double()).requires_grad_()
    t, labels = torch.tensor(2.0, dtype=torch.float64), data.labels(range(4))
    log_p = noisy_classifier(x - mean, t).log_softmax(1)[labels.bool()].sum()
    moved = scale * 4 * torch.autograd.grad(log_p, x)[0]
    with torch.no_grad():
        expected = network(x - mean, t, labels) + mean + moved.float()
        found = data.denoiser(x, t, labels)
    torch.testing.assert_close(found, expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1  # so that the clipping is seen


def test_fingerprints_name_all_weights(monkeypatch):
    def found():
        # not from the cache of ``load_dataset``
        load = loaders._load.__wrapped__
        return [load(name, "cpu").fingerprint for name in ("digits", "digits_guidance_2")]

    before = found()

    def other(name):
        return *load_weights(name)[:2], f"other {name}" if "noisy" in name else load_weights(name)[
            2
        ]

    monkeypatch.setattr(loaders, "load_weights", other)
    after = found()
    assert before[0] == after[0] and before[1] != after[1] and before[0] != before[1]


def test_a_predictor_trains_through_guidance():
    data = load_dataset("digits_guidance_8")
    options = {"order": 3, "thresholding": False}
    config = Training(solver="dpmpp", options=options, num_steps=4, afs=False, images=16, batch=8)
    trainer = Trainer(data.denoiser, config, data.shape, labels=data.labels)
    before = [p.clone() for p in trainer.predictor.parameters()]
    trainer.step()
    trainer.step()
    assert torch.tensor(trainer.log).isfinite().all()
    moved = zip(before, trainer.predictor.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in moved)
