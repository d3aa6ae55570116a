"""Runs, results, the store, interruption, and the two sources of uncertainty."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from faulty import toy_dataset
from toys import TinyNet

from amedlib import geometry
from amedlib.datasets import loaders
from amedlib.metrics import Moments
from amedlib.study import execute, procedures, store
from amedlib.study.execute import run
from amedlib.study.run import BLOCKS, Result, Run
from amedlib.study.store import load_result, predictor_path, result_path
from amedlib.study.uncertainty import difference, estimate, estimates, mean_curve


class Counting:
    """The exact denoiser of N(0, 1/4), which counts images and can break."""

    gives_bottleneck = False

    def __init__(self):
        self.images, self.limit = 0, None

    def __call__(self, x, t, labels=None):
        self.images += len(x)
        if self.limit is not None and self.images > self.limit:
            raise KeyboardInterrupt
        return x / (1 + 4 * t**2)


@pytest.fixture
def toy(monkeypatch):
    denoiser = Counting()
    monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu": toy_dataset(denoiser))
    monkeypatch.setattr(store, "SOLUTION", store.SOLUTION | {"num_steps": 11})
    return denoiser


RUN = Run(solver="euler", nfe=4, samples=60)


def test_a_result_is_computed_once(toy, tmp_path):
    first = run(RUN, tmp_path, progress=False)
    made = toy.images
    assert made == 60 * (4 + 10)
    assert first.nfe == 4
    assert len(first.replicates) == BLOCKS
    again = run(RUN, tmp_path, progress=False)
    assert again == first
    # What the same samples gave besides is there as well.
    run(RUN.with_metric("fd_pixels"), tmp_path, progress=False)
    run(RUN.with_metric("endpoint_error"), tmp_path, progress=False)
    assert toy.images == made


def test_the_value_against_an_independent_computation(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SOLUTION", store.SOLUTION | {"num_steps": 401})
    result = run(replace(RUN, metric="endpoint_error"), tmp_path, progress=False)
    x = torch.stack([torch.randn(1, 2, 2, generator=torch.manual_seed(i)) for i in range(60)])
    x = x.double() * 80
    t = RUN.times()
    exact = x * ((1 + 4 * t[-1] ** 2) / (1 + 4 * t[0] ** 2)).sqrt()
    for now, then in zip(t[:-1], t[1:], strict=True):
        x = x + (then - now) * (x - x / (1 + 4 * now**2)) / now
    expected = (x - exact).square().sum((1, 2, 3)).mean().sqrt()
    assert result.value == pytest.approx(float(expected), rel=1e-4)


def test_batches_do_not_matter(monkeypatch, tmp_path, toy):
    values = []
    for batch in (1, 7, 60):
        data = toy_dataset(toy, batch)
        monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu", data=data: data)
        values.append(run(RUN, tmp_path / str(batch), progress=False).value)
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["dpm2", "ipndm", "unipc"])
@pytest.mark.parametrize("afs", [False, True])
def test_a_grid_search_in_batches_finds_the_same(name, afs):
    net, latents = TinyNet(), procedures.make_latents(range(11), (1, 8, 8))
    times = procedures.make_schedule(num_steps=4)
    truth = geometry.accurate_solution(net, latents, times, procedures.make_schedule(num_steps=13))
    given = net, latents, times, procedures.make_solver(name), truth, (0.2, 0.4, 0.6, 0.8), afs
    whole, parts = geometry.grid_search(*given), geometry.grid_search(*given, batch=4)
    assert parts.r.tolist() == whole.r.tolist()
    for a, b in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", ["fd", "grid_search"])
def test_the_batch_is_halved_where_the_memory_is_small(toy, tmp_path, monkeypatch, metric):
    what = Run(metric, solver="dpm2", nfe=4, r=0.5, samples=60)
    monkeypatch.setattr(procedures, "GRID", (0.3, 0.5))
    values, largest = [], []
    for room in (6, 2):

        def small(x, t, labels=None, room=room):
            largest.append(len(x))
            if len(x) > room:
                raise torch.OutOfMemoryError("this device is small")
            return toy(x, t)

        data = toy_dataset(small, batch=6)
        monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu", data=data: data)
        values.append(run(what, tmp_path / str(room), progress=False).value)
    np.testing.assert_allclose(*values, rtol=1e-6)
    assert set(largest) == {6, 3, 1}


def test_a_killed_run_goes_on_from_its_last_block(toy, tmp_path):
    expected = run(RUN, tmp_path / "undisturbed", progress=False)
    toy.images = 0
    toy.limit = 60 * 10 + 4 * 33  # dies in the sixth block
    with pytest.raises(KeyboardInterrupt):
        run(RUN, tmp_path / "killed", progress=False)
    toy.images, toy.limit = 0, None
    result = run(RUN, tmp_path / "killed", progress=False)
    assert toy.images == 4 * 30
    assert result.value == expected.value
    assert result.replicates == expected.replicates
    assert not list((tmp_path / "killed").rglob("*.partial"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"value"', '"valve"'),
        lambda text: text.replace('"nfe": 4', '"nfe": 5'),
        lambda text: "[]",
    ],
)
def test_a_corrupt_result_is_set_aside_and_computed_again(toy, tmp_path, spoil):
    good = run(RUN, tmp_path, progress=False)
    path = result_path(RUN, tmp_path)
    path.write_text(spoil(path.read_text()))
    with pytest.warns(UserWarning, match="set aside"):
        again = run(RUN, tmp_path, progress=False)
    assert again.value == good.value
    assert path.with_suffix(".corrupt").exists()


def test_a_result_survives_its_file(toy, tmp_path):
    what = Run(solver="dpm2", nfe=4, r=(0.3, 0.6), samples=40)
    result = run(what, tmp_path, progress=False)
    stored = json.loads(result_path(what, tmp_path).read_text())
    assert load_result(what, tmp_path) == result
    for name in ("seconds", "device", "versions", "fingerprint", "created"):
        assert stored[name]


def test_the_key_changes_with_every_field():
    base = Run(solver="dpm2", nfe=4, samples=40)
    others = [
        replace(base, solver="heun"),
        replace(base, options={"r": 0.4}),
        replace(base, schedule="logsnr"),
        replace(base, nfe=6),
        replace(base, r=0.4),
        replace(base, samples=50),
        replace(base, first_seed=1),
        replace(base, metric="fd_pixels"),
        replace(base, predictor={"seed": 0}),
        replace(base, predictor={"seed": 1}),
    ]
    assert len({what.key for what in [base, *others]}) == len(others) + 1


def test_learned_runs_train_once_and_share_the_predictor(monkeypatch, tmp_path):
    net = TinyNet()
    monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu": toy_dataset(net))
    monkeypatch.setattr(store, "SOLUTION", store.SOLUTION | {"num_steps": 5})
    predictor = {"images": 16, "batch": 8}
    what = Run(solver="amed", nfe=3, afs=True, predictor=predictor, samples=20)
    run(what, tmp_path, progress=False)
    assert predictor_path(what, tmp_path).is_file()
    trained = predictor_path(what, tmp_path).stat().st_mtime_ns
    found = run(what.with_metric("learned_r"), tmp_path, progress=False)
    assert predictor_path(what, tmp_path).stat().st_mtime_ns == trained
    assert len(found.curves["r"]) == 2
    assert 0 < found.value < 1


def test_a_study_keeps_the_order_in_every_executor(toy, tmp_path):
    runs = [
        replace(RUN, nfe=nfe, metric=metric)
        for metric in ("fd", "endpoint_error")
        for nfe in (5, 3, 4)
    ]
    serial = execute.run_all(runs, tmp_path / "a", progress=False)
    with ThreadPoolExecutor(2) as executor:
        parallel = execute.run_all(runs, tmp_path / "b", cluster=executor, progress=False)
    assert list(serial["nfe"]) == [5, 3, 4] * 2
    assert list(serial["value"]) == list(parallel["value"])
    assert list(serial["metric"]) == ["fd"] * 3 + ["endpoint_error"] * 3


def test_a_failure_is_named_after_the_others_are_done(toy, tmp_path, monkeypatch):
    broken = replace(RUN, nfe=3)
    whole = procedures.PROCEDURES["fd"].measure

    def failing(what, context):
        if what.nfe == 3:
            raise RuntimeError("out of order")
        return whole(what, context)

    procedure = replace(procedures.PROCEDURES["fd"], measure=failing)
    monkeypatch.setitem(procedures.PROCEDURES, "fd", procedure)
    with pytest.raises(RuntimeError, match=r"1 of 2 computations failed.*NFE 3.*out of order"):
        execute.run_all([broken, RUN], tmp_path, progress=False)
    assert load_result(RUN, tmp_path)


def test_a_denoiser_that_gives_nan_gives_no_number(toy, tmp_path, monkeypatch):
    data = toy_dataset(lambda x, t, labels=None: x * float("nan"))
    monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu": data)
    with pytest.raises(ValueError, match="Samples must be finite; .* step 1 of 10,"):
        run(RUN, tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.json"))


def test_a_folder_that_cannot_be_written_is_refused_before_work(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="results_dir must be a folder that can be written"):
        run(RUN, tmp_path / "file", progress=False)
    assert toy.images == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"metric": "fid"}, "metric must be one of .*'fd'.*; 'fid' was given"),
        ({"solver": "rk45"}, "solver must be one of .*'euler'.*; 'rk45' was given"),
        ({"schedule": "linear"}, "schedule must be one of .*'polynomial'.*; 'linear' was given"),
        ({"solver": "heun", "nfe": 3}, r"nfe must be .* without AFS \(2, 4, 6.*; 3 was given"),
        ({"solver": "heun", "nfe": 4, "afs": True}, r"with AFS \(1, 3, 5.*; 4 was given"),
        ({"solver": "amed", "nfe": 4}, "r and predictor must be given"),
        ({"nfe": 0}, "nfe must be a whole number of at least 1 and at most 1,000; 0 was given"),
        ({"r": 1.0, "nfe": 4}, "r must be strictly between 0 and 1, .*; 1.0 was given"),
        ({"r": (0.5,), "nfe": 4}, "the length of r must be the number of steps, 2; 1 was given"),
        ({"r": 0.5, "predictor": {}, "nfe": 4}, "given one at a time"),
        (
            {"samples": 0},
            "samples must be a whole number of at least 20 and at most .*; 0 was given",
        ),
        ({"samples": -5}, "samples must be"),
        ({"sigma_min": 80.0}, "0 < sigma_min < sigma_max"),
        ({"options": {"order": 2}}, "options of solver 'euler' must be none; 'order' was given"),
        ({"predictor": {"colour": 1}, "nfe": 4}, "a field of predictor must be one of"),
        ({"predictor": {"teacher": "amed"}, "nfe": 4}, "teacher must be one of"),
    ],
)
def test_bad_runs_are_refused_when_they_are_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        Run(**arguments)


def test_unknown_data_sets_are_refused():
    with pytest.raises(ValueError, match="dataset must be one of 'digits'.*; 'mnist' was given"):
        loaders.load_dataset("mnist")


# --- uncertainty --------------------------------------------------------------------------------


def made_up(value, replicates, seed=None, **fields):
    predictor = None if seed is None else {"seed": seed}
    what = Run(nfe=4, predictor=predictor, **fields)
    return Result(what, value, list(replicates), {}, 4, 1.0, "", {}, "", "")


def test_intervals_keep_the_two_sources_apart():
    rng = np.random.default_rng(0)
    replicates = 10 + 0.1 * rng.normal(size=BLOCKS)
    results = [made_up(10 + d, replicates + d, seed) for seed, d in enumerate((-0.2, 0.0, 0.2))]
    found = estimate(results)
    assert found.value == pytest.approx(10)
    sampling = np.sqrt((BLOCKS - 1) ** 2 / BLOCKS) * replicates.std(ddof=1)
    assert found.sampling_error == pytest.approx(sampling)
    assert found.training_error == pytest.approx(0.2 / np.sqrt(3))
    low, high = found.interval
    assert high - low > 2 * 1.96 * np.hypot(found.sampling_error, found.training_error)
    assert estimate(results[:1]).sampling_error == pytest.approx(sampling)
    assert np.isnan(estimate(results[:1]).training_error)


def test_paired_differences_cancel_common_noise():
    rng = np.random.default_rng(0)
    common = rng.normal(size=BLOCKS)
    a, b = made_up(11.0, 11 + common), made_up(10.0, 10 + common)
    found = difference([a], [b])
    assert found.value == pytest.approx(1)
    assert found.sampling_error == pytest.approx(0, abs=1e-12)
    assert found.training_error is None


def test_different_sample_counts_are_never_compared():
    a, b = made_up(1.0, range(10)), made_up(1.0, range(10), samples=1000)
    with pytest.raises(ValueError, match="numbers of samples must be the same"):
        difference([a], [b])
    c = made_up(1.0, range(10), first_seed=1)
    with pytest.raises(ValueError, match="the same for a paired difference"):
        difference([a], [c])


def test_a_training_that_is_given_twice_is_refused():
    results = [made_up(10.0 + seed, [10.0 + seed] * BLOCKS, seed) for seed in (0, 1)]
    assert estimate(results).seeds == 2
    plain = made_up(9.0, [9.0] * BLOCKS)
    for call in (
        lambda: estimate([results[0]] * 3),
        lambda: estimate([*results, results[0]]),
        lambda: estimate([plain, plain]),
        lambda: difference(results, [plain, plain]),
        lambda: difference([*results, results[1]], [plain]),
        lambda: mean_curve([results[0]] * 2, "rms"),
        lambda: estimates(pd.DataFrame({"method": "a", "nfe": 4, "result": [results[0]] * 2})),
    ):
        with pytest.raises(ValueError, match="training seeds must be different, each given once"):
            call()


def test_a_part_of_a_result_that_is_gone_comes_again(toy, tmp_path):
    runs = [RUN.with_metric(metric) for metric in ("fd", "fd_pixels", "endpoint_error")]
    first = execute.run_all(runs, tmp_path, progress=False)
    result_path(runs[1], tmp_path).unlink()
    others = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*.json")}
    again = execute.run_all(runs, tmp_path, progress=False)
    assert again["value"].tolist() == first["value"].tolist()
    # The others stay as they are, so that a metric can be added to stored results.
    assert others == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in others}


def test_blocks_of_other_code_are_not_used(toy, tmp_path, monkeypatch):
    toy.limit = 60 * 10 + 4 * 33
    with pytest.raises(KeyboardInterrupt):
        run(RUN, tmp_path, progress=False)
    monkeypatch.setattr(store, "code_fingerprint", lambda: "another")
    toy.images, toy.limit = 0, None
    assert run(RUN, tmp_path, progress=False).fingerprint == "code another, weights none"
    assert toy.images == 4 * 60


def test_files_that_cannot_be_had_are_reported_before_any_work(toy, tmp_path, monkeypatch):
    def load(name, device="cpu"):
        if name == "digits_uncentred":
            raise ValueError("its files are missing")
        return toy_dataset(toy)

    monkeypatch.setattr(execute, "load_dataset", load)
    with pytest.raises(ValueError, match="its files are missing"):
        execute.run_all([RUN, replace(RUN, dataset="digits_uncentred")], tmp_path, progress=False)
    assert toy.images == 0


def test_a_predictor_of_another_data_set_serves_here(tmp_path):
    """It is the very file of the other data set, and its Run is another one."""
    training = {"recipe": "paper", "images": 32, "batch": 16}
    fields = {"solver": "amed", "nfe": 5, "afs": True, "samples": 20}
    own = Run(predictor=training, **fields)
    lent = Run(dataset="digits_uncentred", predictor=training | {"trained_on": "digits"}, **fields)
    alone = Run(dataset="digits_uncentred", predictor=training, **fields)
    assert store.predictor_path(lent, tmp_path) == store.predictor_path(own, tmp_path)
    assert len({own.key, lent.key, alone.key}) == 3 and lent.training == own.training
    assert Run(predictor=training | {"trained_on": "digits"}, **fields) == own
    execute.run(lent, tmp_path, "cpu", progress=False)
    assert store.predictor_path(own, tmp_path).is_file()
    assert not store.predictor_path(alone, tmp_path).exists()
    assert store.load_result(lent, tmp_path).run == lent
    with pytest.raises(ValueError, match="trained_on of predictor must be one of"):
        Run(predictor=training | {"trained_on": "mnist"}, **fields)


def test_the_first_slope_of_a_gaussian_points_as_its_closed_form_says(tmp_path, monkeypatch):
    """D(x; t) = x / (1 + t^2) + t^2 mean / (1 + t^2) for data N(mean, 1)."""
    mean, t = 3.0, 80.0

    def denoiser(x, t, labels=None):
        return (x + t**2 * mean) / (1 + t**2)

    data = replace(loaders.load_dataset("digits"), denoiser=denoiser)
    monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu": data)
    found = execute.run(Run("first_slope", samples=20), tmp_path, "cpu", progress=False)
    x = t * procedures.make_latents(range(20), data.shape).double().flatten(1).numpy()
    slope = x - (x + t**2 * mean) / (1 + t**2)
    cosine = (slope * x).sum(1) / np.linalg.norm(slope, axis=1) / np.linalg.norm(x, axis=1)
    assert found.value == pytest.approx(1 - cosine.mean(), rel=1e-9)


def test_a_block_keeps_all_digits_of_its_moments(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 3))
    moments = {"fd": Moments.of(x + 1e8), "endpoint_error": Moments.of(x[:, :1])}
    store.save_block(tmp_path / "0.safetensors", store.Block(moments, 5, 1.5, "a CPU"))
    again = store.load_block(tmp_path / "0.safetensors")
    assert again[1:] == (5, 1.5, "a CPU") and again.moments.keys() == moments.keys()
    for name, each in moments.items():
        assert again.moments[name].count == 20
        np.testing.assert_array_equal(again.moments[name].mean, each.mean)
        np.testing.assert_array_equal(again.moments[name].covariance, each.covariance)
