"""What is trained is one file that samples, and is not taken for another."""

import copy
import os
from dataclasses import replace

import pytest
import torch
from toys import TinyNet

import amedlib
from amedlib.compute import in_precision
from amedlib.files import save_tensors
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
    with pytest.raises(ValueError, match="whose numbers all samples share: train with form"):
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
    with pytest.raises(ValueError, match="the state of the same training of this denoiser"):
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
    save_tensors(path, {"a": torch.zeros(1)}, {"b": "c"})
    with pytest.raises(ValueError, match="is not one that a training wrote"):
        amedlib.load_sampler(path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


def foreign(path):
    save_tensors(path, {"weight": torch.ones(3)}, {})


def altered(path):
    tensors, metadata = amedlib.files.load_tensors(path)
    save_tensors(path, dict(list(tensors.items())[1:]), metadata | {"bottleneck_size": "[3, 3]"})


@pytest.mark.parametrize("spoil", [truncated, foreign, altered])
def test_a_spoilt_file_is_one_sentence_and_a_spoilt_state_begins_anew(net, trained, spoil):
    predictor, path = trained
    spoil(path)
    with pytest.raises(ValueError, match="if nothing else needs it, delete it") as caught:
        train(net, CONFIG, (1, 8, 8), path, progress=False)
    assert "\n" not in str(caught.value)
    # The state of an interrupted training is the library's own to repair.
    partial = path.with_name(f"{path.name}.partial")
    path.unlink()
    trainer = Trainer(net, CONFIG, (1, 8, 8))
    trainer.step()
    trainer.save(partial)
    spoil(partial)
    with pytest.warns(UserWarning, match="Training begins anew"):
        again = train(net, CONFIG, (1, 8, 8), path, progress=False)
    for a, b in zip(again.parameters(), predictor.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not partial.exists()


def test_files_keep_out_of_one_anothers_way(net, tmp_path):
    """Two names that differ in the suffix alone; and one that is itself called partial."""
    trainer = Trainer(net, CONFIG, (1, 8, 8))
    trainer.step()
    trainer.save(tmp_path / "nfe3.a.partial")
    other = replace(CONFIG, seed=1)
    assert train(net, other, (1, 8, 8), tmp_path / "nfe3.b", progress=False).trained_for == other
    assert train(net, CONFIG, (1, 8, 8), tmp_path / "nfe3.a", progress=False).trained_for == CONFIG
    train(net, CONFIG, (1, 8, 8), tmp_path / "x.partial", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["nfe3.a", "nfe3.b", "x.partial"]


def test_where_nothing_can_be_written_is_noticed_first(tmp_path, monkeypatch):
    def never(x, t, labels=None):
        raise AssertionError("work has begun")

    config = replace(CONFIG, uses_bottleneck=False)
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "path must be that of a file"),
        (tmp_path / "file" / "a", "the folder of path must be a folder that can be written"),
        (None, "path must be a path"),
        ("", "path must be a path"),
    ):
        with pytest.raises(ValueError, match=message):
            train(never, config, (1, 8, 8), path, progress=False)


def test_the_users_home_is_where_it_is(net, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    train(net, CONFIG, (1, 8, 8), "~/models/a", progress=False)
    assert amedlib.load_sampler("~/models/a").training == CONFIG
    assert (tmp_path / "home/models/a").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_leaves_the_network_as_it_was(net, tmp_path, precision):
    expected = [True] * len(list(net.parameters()))
    expected[1] = False
    for parameter, learns in zip(net.parameters(), expected, strict=True):
        parameter.requires_grad_(learns)
    config = replace(CONFIG, precision=precision)
    trainer = Trainer(net, config, (1, 8, 8))
    # Its losses reach the predictor alone.
    loss, _ = next(trainer.losses(amedlib.make_latents(range(4), (1, 8, 8))))
    loss.backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert any(parameter.grad is not None for parameter in trainer.predictor.parameters())
    train(net, config, (1, 8, 8), tmp_path / "a", progress=False)
    assert [parameter.requires_grad for parameter in net.parameters()] == expected


def test_a_wrapped_network_is_copied_and_known_by_its_weights(net):
    net = net.float()
    wrapped = in_precision(net, "bfloat16")
    again = copy.deepcopy(wrapped)
    assert again.denoiser is not net and again.bottleneck_size == net.bottleneck_size
    x = torch.ones(1, 1, 8, 8)
    assert torch.equal(again(x, torch.tensor(2.0)), wrapped(x, torch.tensor(2.0)))
    assert weights_fingerprint(wrapped) == weights_fingerprint(net) is not None
    other = in_precision(TinyNet(seed=1).float(), "bfloat16")
    assert weights_fingerprint(other) != weights_fingerprint(net)
