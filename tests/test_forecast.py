"""What is said before work starts: what will be computed, counted, and how long it takes."""

import re
import time
from pathlib import Path

import pytest
import torch
from faulty import LEARNED, toy_dataset
from toys import TinyNet
from tqdm import tqdm

from amedlib.datasets import entries
from amedlib.study import execute, pictures, plans, procedures, store
from amedlib.study.execute import evaluations_of, run_all
from amedlib.study.forecast import forecast, rate
from amedlib.study.run import Run
from amedlib.training import Training, train

FEW = {"nfe": 4, "samples": 100}
HEUN = FEW | {"solver": "amed", "predictor": LEARNED}
AMED = {"solver": "amed", "nfe": 3, "afs": True, "samples": 100}
KINDS = {
    "samples": Run(solver="euler", **FEW),
    "predictor": Run(predictor=LEARNED, **AMED),
    "predictor of two": Run(solver="ipndm", predictor=LEARNED | {"m": 2}, **FEW),
    "search": Run(r="searched", **AMED),
    "learned_r": Run("learned_r", predictor=LEARNED, **AMED),
    "local_error": Run("local_error", solver="dpm2", **FEW),
    "local_error of a predictor": Run("local_error", **HEUN),
    "trajectory_pca": Run("trajectory_pca", solver="heun", **FEW),
    "first_slope": Run("first_slope", **FEW),
    "endpoint_accuracy": Run("endpoint_accuracy", **FEW),
    "grid_search": Run("grid_search", solver="dpm2", r=0.5, **FEW),
    "floor_fd": Run("floor_fd"),
}


@pytest.fixture
def net(monkeypatch):
    """A network that counts, in the place of that of the digits."""
    net = TinyNet()
    data = toy_dataset(net, batch=100)  # a search in several batches makes a few more
    monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu": data)
    monkeypatch.setattr(store, "SOLUTION", store.SOLUTION | {"num_steps": 11})
    monkeypatch.setattr(procedures, "GRID", (0.3, 0.5, 0.7))
    monkeypatch.setitem(entries.DATASETS["digits"].training, "images", 20)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_evaluations_are_made_as_are_said(net, tmp_path, kind):
    what = KINDS[kind]
    tasks = execute._tasks(execute._leader(what), tmp_path, "cpu", "none").values()
    said = sum(evaluations_of(task) for task in tasks)
    run_all([what], tmp_path, "cpu", progress=False)
    assert net.images == said


def test_what_will_be_computed_is_said_first(net, tmp_path, capsys, monkeypatch):
    moves = []

    class Bar(tqdm):
        def update(self, n=1):
            moves.append(n)
            return super().update(n)

    monkeypatch.setattr(execute, "tqdm", Bar)
    runs = [KINDS["predictor"], KINDS["search"], KINDS["learned_r"], KINDS["samples"]]
    calls = []
    net.register_forward_hook(lambda *_: calls.append(capsys.readouterr().err))
    run_all(runs, tmp_path, "cpu")
    written = "".join(calls) + capsys.readouterr().err
    sentence, bar = re.search(r"\n(To be computed: .*)\n((?:.|\n)*)", written).groups()
    *parts, last = sentence.split("; ")
    last, time_it_takes = last.split(". ")
    said = [re.fullmatch(r"(.*): (\d+) \((.*) evaluations\)", p).groups() for p in [*parts, last]]
    assert [(name, int(number)) for name, number, _ in said] == [
        ("To be computed: trainings", 1),
        ("grid searches", 1),
        ("solutions of the ODE", 1),
        ("sets of samples", 4),
    ]
    training, _, solution, samples = (int(each.replace(",", "")) for *_, each in said)
    assert (solution, samples) == (100 * 10, 100 * (3 + 3 + 3 + 4))
    assert re.fullmatch(r"About \d+ s, by a second of timing the network\.", time_it_takes)
    # The bar moves within a training, 23 batches of eight, and to its end.
    assert "evaluations: 100%" in bar
    assert moves[:23] == [pytest.approx(training / 23)] * 23
    run_all(runs, tmp_path, "cpu")
    assert capsys.readouterr().err == ""


def test_the_rate_is_that_of_the_network():
    class Slow:
        def __call__(self, x, t, labels=None):
            time.sleep(0.002 * len(x))
            return x

    data = toy_dataset(Slow(), batch=8)
    context = procedures.Context(data, Path(), "cpu", progress=False)
    found = rate(KINDS["samples"], context, seconds=0.2)
    assert 250 < found < 500  # it sleeps at least as long


def test_the_rate_where_the_memory_is_small():
    sizes = []

    def small(x, t, labels=None):
        sizes.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("this device is small")
        return x

    context = procedures.Context(toy_dataset(small, batch=32), Path(), "cpu", progress=False)
    assert rate(KINDS["samples"], context, seconds=0.05) > 0
    assert sizes[:5] == [1, 2, 4, 8, 4] and set(sizes[5:]) <= {4}


def test_times_are_said_in_their_unit():
    parts = [("sets of samples", KINDS["samples"])] * 10
    for speed, text in ((1000, "1 s"), (10, "40 s"), (0.1, "67 min"), (0.01, "11 h")):
        assert f"About {text}, " in forecast(parts, {"digits": speed})
    assert forecast(parts, {"digits": float("nan")}).endswith(". How long that takes is not known.")
    assert forecast([], {}) == ""


def test_a_network_that_cannot_be_timed_fails_where_it_is_used(net, tmp_path, capsys):
    def broken(module, given):
        raise ValueError("this network is broken")

    net.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="1 of 1 computations failed.*this network is broken"):
        run_all([KINDS["samples"]], tmp_path, "cpu")
    assert "How long that takes is not known." in capsys.readouterr().err


def test_the_hook_of_a_training_is_called_after_every_batch(tmp_path, capsys):
    config, calls = Training(images=20, batch=8, num_steps=3), []
    train(TinyNet(), config, (1, 8, 8), tmp_path / "p", progress=lambda: calls.append(1))
    assert len(calls) == 3 and capsys.readouterr().err == ""


def test_pictures_say_what_they_train(tmp_path, capsys):
    how = {"images": 4, "batch": 4}
    planned = plans.table2("digits", ["AMED-Solver"], [3], seeds=[0], **how)
    pictures.draw_all(planned, [0], results_dir=tmp_path, train=True)
    assert "To be computed: trainings: 1 (" in capsys.readouterr().err
    pictures.draw_all(planned, [0], results_dir=tmp_path, train=True)
    assert "To be computed" not in capsys.readouterr().err
