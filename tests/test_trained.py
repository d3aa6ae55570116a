"""What is trained is one file that samples, and is not taken for another."""

from dataclasses import replace

import pytest
import torch
from toys import TinyNet

import amedlib
from amedlib.trained import load_predictor, weights_fingerprint
from amedlib.training import Trainer, Training, train

CONFIG = Training(solver="ipndm", num_steps=4, afs=True, images=16, batch=8)


@pytest.fixture
def net():
    return TinyNet()


@pytest.fixture
def trained(net, tmp_path):
    path = tmp_path / "sampler.safetensors"
    return train(net, CONFIG, (1, 8, 8), path, progress=False), path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"solver": "amed", "schedule": "logsnr", "options": {}, "start": None},
        {"solver": "dpmpp", "options": {"thresholding": True}, "afs": False},
        {"form": "table", "uses_bottleneck": False, "scale_dir": 0.0, "num_steps": 5},
    ],
)
def test_a_file_samples_as_the_predictor_with_its_method(net, tmp_path, changes):
    config = replace(CONFIG, teacher=None, **changes)
    predictor = train(net, config, (1, 8, 8), tmp_path / "a.safetensors", progress=False)
    latents = amedlib.make_latents(range(5), (1, 8, 8))
    expected = amedlib.sample(
        net, latents, config.times(), config.make_solver(), config.afs, predictor
    )
    sampler = amedlib.load_sampler(tmp_path / "a.safetensors")
    found = sampler.sample(net, latents)
    assert torch.equal(found.x, expected.x) and found.nfe == expected.nfe == sampler.nfe
    assert torch.equal(sampler.times, config.times()) and sampler.training == config


def test_sigmas_are_where_a_table_steps(net, tmp_path):
    config = replace(CONFIG, form="table", uses_bottleneck=False, scale_dir=0.0)
    train(net, config, (1, 8, 8), tmp_path / "a.safetensors", progress=False)
    sampler = amedlib.load_sampler(tmp_path / "a.safetensors")
    sigmas = sampler.sigmas()
    assert sigmas[::2] == sampler.times.tolist() and sigmas == sorted(sigmas, reverse=True)
    # The same solver on these as its own time points, where AFS is off, is the plugin.
    plain = replace(config, afs=False)
    table = [torch.sigmoid(logit).item() for logit in sampler.predictor.logits]
    latents = amedlib.make_latents(range(3), (1, 8, 8))
    solver = plain.make_solver()
    plugin = amedlib.sample(
        net, latents, plain.times(), solver, intermediate=amedlib.TimeWise(table)
    )
    found = amedlib.sample(net, latents, torch.tensor(sigmas, dtype=torch.float64), solver)
    torch.testing.assert_close(found.x, plugin.x, rtol=1e-6, atol=1e-6)


def test_sigmas_of_a_predictor_that_looks_at_the_sample_are_refused(trained):
    with pytest.raises(ValueError, match="to have one list of sigmas: train with form"):
        amedlib.load_sampler(trained[1]).sigmas()


def test_another_models_file_is_refused(net, trained):
    _, path = trained
    again = train(net, CONFIG, (1, 8, 8), path, progress=False)
    assert again.trained_for == CONFIG
    other = TinyNet(seed=1)
    assert weights_fingerprint(other) != weights_fingerprint(net)
    with pytest.raises(ValueError, match="must be trained for this denoiser, whose weights"):
        train(other, CONFIG, (1, 8, 8), path, progress=False)
    with pytest.raises(ValueError, match=r"trained for samples of shape \[1, 16, 16\]"):
        train(net, CONFIG, (1, 16, 16), path, progress=False)
    with pytest.raises(ValueError, match=r"of the training asked for, \{'seed': 1\}"):
        train(net, replace(CONFIG, seed=1), (1, 8, 8), path, progress=False)
    # A denoiser that shows no weights cannot be told apart.
    assert load_predictor(path, CONFIG, lambda x, t, labels=None: x).trained_for == CONFIG


def test_an_interrupted_training_of_another_model_is_not_taken_up(net, tmp_path):
    trainer = Trainer(net, CONFIG, (1, 8, 8))
    trainer.step()
    trainer.save(tmp_path / "a.partial")
    Trainer(net, CONFIG, (1, 8, 8)).resume(tmp_path / "a.partial")
    with pytest.raises(ValueError, match="one of the same training of this denoiser"):
        Trainer(TinyNet(seed=1), CONFIG, (1, 8, 8)).resume(tmp_path / "a.partial")


def test_a_predictor_is_not_used_elsewhere_unasked(net, trained):
    predictor, _ = trained
    latents = amedlib.make_latents(range(3), (1, 8, 8))

    def sample(solver, points):
        times = amedlib.make_schedule(num_steps=points)
        return amedlib.sample(net, latents, times, amedlib.make_solver(solver), True, predictor)

    assert sample("ipndm", 4).nfe == 5
    for solver, points in (("euler", 4), ("ipndm", 5)):
        with pytest.raises(ValueError, match="must be those that the predictor was trained for"):
            sample(solver, points)
    predictor.trained_for = None
    assert sample("euler", 5).nfe == 7


@pytest.mark.parametrize("content", [b"", b"<html>", None])
def test_what_no_training_wrote_is_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is missing|is not a whole safetensors file"):
        amedlib.load_sampler(path)
    amedlib.files.save_tensors(path, {"a": torch.zeros(1)}, {"b": "c"})
    with pytest.raises(ValueError, match="must be one that a training wrote"):
        amedlib.load_sampler(path)
