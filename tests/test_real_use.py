"""What went wrong in use: wrong numbers without a word, and right input refused."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import TinyNet

import amedlib
from amedlib.denoisers import edm
from amedlib.denoisers.exact import GaussianDenoiser
from amedlib.intermediate import Intermediate
from amedlib.solvers import SOLVERS, canonical_options

SHAPES = [(5,), (2, 7), (1, 4, 4), (3, 2, 4, 4)]  # vectors, sound, images, video
WHOLE = ("euler", "heun", "dpm2", "ipndm", "deis", "dpmpp", "unipc")


def normal(x, t, labels=None):
    """Exact for data that are standard normal: the solution keeps x / sqrt(1 + t^2)."""
    return x / (1 + torch.as_tensor(t) ** 2)


def solve(denoiser, shape=(1, 4, 4), solver="ipndm", n=3, intermediate=None, latents=None, **how):
    latents = amedlib.make_latents(range(n), shape) if latents is None else latents
    times = amedlib.make_schedule(num_steps=how.pop("num_steps", 6))
    method = amedlib.make_solver(solver, **how)
    return amedlib.sample(denoiser, latents, times, method, intermediate=intermediate)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, t, labels=None: normal(x, t)[:1],
        lambda x, t, labels=None: normal(x, t).mean(0),
        lambda x, t, labels=None: normal(x, t)[:, 0],
        lambda x, t, labels=None: normal(x, t).mean(),
        lambda x, t, labels=None: (normal(x, t), None),
        lambda x, t, labels=None: None,
        lambda x, t, labels=None: normal(x, t).numpy(),
    ],
)
@pytest.mark.parametrize("solver", WHOLE)
def test_an_output_of_another_shape_is_refused(wrong, solver):
    with pytest.raises(ValueError, match=r"what the denoiser returns must be .*\(3, 1, 4, 4\)"):
        solve(wrong, solver=solver)


def test_a_bottleneck_that_does_not_come_is_refused():
    class Forgets:
        gives_bottleneck, bottleneck_size = True, (4, 4)

        def __call__(self, x, t, labels=None, return_bottleneck=False):
            return normal(x, t)

    with pytest.raises(ValueError, match=r"must be a tuple \(D, bottleneck\); 'Tensor' was given"):
        solve(Forgets())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", WHOLE)
@pytest.mark.parametrize("plugin", [False, True])
def test_any_trailing_shape(shape, solver, plugin):
    """The same numbers as those of an image with as many pixels in one row."""
    r = torch.rand(3, 1, 1, 1, generator=torch.manual_seed(0)) / 2 + 0.25  # as a predictor's
    middle = (lambda *_: Intermediate(r, 1 + r / 10, 1 - r / 10)) if plugin else None
    latents = amedlib.make_latents(range(3), shape)
    found, expected = (
        solve(normal, solver=solver, intermediate=middle, latents=each, thresholding=True)
        if solver in ("dpmpp", "unipc")
        else solve(normal, solver=solver, intermediate=middle, latents=each)
        for each in (latents, latents.reshape(3, 1, 1, -1))
    )
    assert found.x.shape == (3, *shape) and found.nfe == expected.nfe
    torch.testing.assert_close(found.x.flatten(1), expected.x.flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
def test_data_beyond_one_are_not_squeezed_unless_it_is_said(solver):
    def constant(x, t, labels=None):
        return torch.full_like(x, 5.0)

    assert solve(constant, solver=solver).x.mean() == pytest.approx(5, abs=0.01)
    assert solve(constant, solver=solver, thresholding=True).x.mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", WHOLE)
def test_what_is_not_finite_is_named_with_its_step(solver, value):
    def breaks(x, t, labels=None):
        return torch.where(torch.as_tensor(t) < 1, value, normal(x, t))

    with pytest.raises(ValueError, match=r"NaN or inf arose in step \d of 5, from t = \d"):
        solve(breaks, solver=solver)
    latents = amedlib.make_latents(range(3), (1, 4, 4))
    latents[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match="latents must be finite"):
        solve(normal, solver=solver, latents=latents)


@pytest.mark.parametrize("solver", ["deis", "dpmpp", "unipc"])
@pytest.mark.parametrize("r", [1e-17, 1 - 1e-17])
def test_an_r_at_its_end_is_named(solver, r):
    middle = lambda *_: Intermediate(torch.tensor(r, dtype=torch.float64))  # noqa: E731
    try:
        found = solve(normal, solver=solver, intermediate=middle).x
    except ValueError as error:
        assert "NaN or inf arose in step" in str(error)
    else:
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("r", [0.001, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("solver", ["dpm2", "ipndm", "deis", "dpmpp", "unipc", "amed"])
def test_a_learned_r_in_single_precision_is_used_in_the_states_own(r, solver):
    single = torch.tensor(r, dtype=torch.float32)
    found = [
        solve(normal, solver=solver, intermediate=lambda *_, each=each: Intermediate(each)).x
        for each in (single, single.double())
    ]
    torch.testing.assert_close(*found, rtol=1e-14, atol=1e-14)


def test_defaults_of_the_process_change_no_sample():
    before = amedlib.make_latents([3, 4], (1, 2, 2)), amedlib.sampling.make_classes([3, 4], 10)
    out = solve(normal).x
    torch.set_default_dtype(torch.float64)
    try:
        latents, classes = (
            amedlib.make_latents([3, 4], (1, 2, 2)),
            amedlib.sampling.make_classes([3, 4], 10),
        )
        again = solve(normal).x
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip((*before, out), (latents, classes, again), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    with torch.device("meta"):  # a default device on which nothing can be computed
        latents = amedlib.make_latents([3, 4], (1, 2, 2))
        classes = amedlib.sampling.make_classes([3, 4], 10)
        times = amedlib.make_schedule(num_steps=5)
    assert torch.equal(latents, before[0]) and torch.equal(classes, before[1])
    assert torch.equal(times, amedlib.make_schedule(num_steps=5))


def test_equal_runs_have_one_key_however_they_are_written():
    def key(**fields):
        return amedlib.Run(**{"nfe": 6, "samples": 40} | fields).key

    same = [
        [{"solver": "ipndm"}, {"solver": "ipndm", "options": {"order": 4}}],
        [{"solver": "dpm2"}, {"solver": "dpm2", "options": {"r": 0.5}}],
        [{}, {"rho": 7}, {"rho": 7.0}, {"sigma_max": 80}, {"sigma_max": 80.0}],
        [{"schedule": "logsnr"}, {"schedule": "logsnr", "rho": 3}],
        [
            {"solver": "unipc"},
            {"solver": "unipc", "options": {"thresholding": False}},
            {"solver": "unipc", "options": {"variant": "bh2", "order": 3, "predict_x0": True}},
        ],
        [
            {"solver": "ipndm", "predictor": {"seed": 1}},
            {"solver": "ipndm", "predictor": {"seed": 1, "scale_time": 0}},
            {"solver": "ipndm", "predictor": {"seed": 1, "teacher": "ipndm"}},
        ],
    ]
    keys = [{key(**fields) for fields in group} for group in same]
    assert [len(group) for group in keys] == [1] * len(keys)
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(keys, 2))
    base = amedlib.Run(solver="ipndm", nfe=6, samples=40)
    assert base == amedlib.Run(solver="ipndm", options={"order": 4}, rho=7, nfe=6, samples=40)


@pytest.mark.parametrize("name", SOLVERS)
def test_canonical_options_make_the_same_solver(name):
    for options in ({}, {"order": 2}, {"order": 3, "thresholding": True}, {"r": 0.3}):
        try:
            solver = amedlib.make_solver(name, **options)
        except ValueError:
            continue
        assert amedlib.make_solver(name, **canonical_options(name, options)) == solver


def test_an_exact_denoiser_is_what_the_closed_form_says():
    """That ``normal`` above is the denoiser of standard normal data."""
    shape = (1, 4, 4)
    exact = GaussianDenoiser(torch.zeros(shape), torch.ones(shape))
    x = amedlib.make_latents(range(2), shape).double()
    torch.testing.assert_close(exact(x, torch.tensor(2.0)).to(x), normal(x, 2.0))


def test_numpys_numbers_and_arrays_are_taken():
    latents = amedlib.make_latents(np.arange(3), (1, 4, 4))
    assert torch.equal(latents, amedlib.make_latents(range(3), (1, 4, 4)))
    times = amedlib.make_schedule(
        num_steps=np.int64(5), sigma_max=np.float32(80), rho=np.float32(7)
    )
    solver = amedlib.make_solver("ipndm", order=np.int32(3))
    expected = amedlib.sample(normal, latents, times, solver)
    found = amedlib.sample(normal, latents.numpy(), times.numpy(), solver, np.True_)
    assert torch.is_tensor(found.x) and found.nfe == expected.nfe - 1
    found = amedlib.sample(normal, latents.numpy(), times.tolist(), solver)
    assert torch.equal(found.x, expected.x)
    labels = np.eye(3, dtype=np.float32)
    seen = []
    amedlib.sample(
        lambda x, t, labels: seen.append(labels) or x, latents, times, solver, labels=labels
    )
    assert torch.equal(seen[0], torch.eye(3))
    for each in (["a", "b", "c"], [3, 1, np.int64(2)], {"tokens": torch.ones(3, 2), "size": None}):
        amedlib.sample(
            lambda x, t, labels: seen.append(labels) or x, latents, times, solver, labels=each
        )
        assert seen[-1] == each
    r = amedlib.TimeWise(np.array([0.25, 0.5, 0.75, 0.5], np.float32))
    assert r.table == [0.25, 0.5, 0.75, 0.5]
    run = amedlib.Run(
        solver="ipndm",
        nfe=np.int64(5),
        samples=np.int64(40),
        first_seed=np.int32(2),
        rho=np.float32(7),
    )
    assert run == amedlib.Run(solver="ipndm", nfe=5, samples=40, first_seed=2)
    assert run.key == amedlib.Run(solver="ipndm", nfe=5, samples=40, first_seed=2).key
    training = amedlib.Training(solver="ipndm", num_steps=np.int64(4), seed=np.int64(3))
    assert training == amedlib.Training(solver="ipndm", num_steps=4, seed=3)


def classes():
    """A network of ten classes."""
    sizes = {"img_resolution": 4, "img_channels": 1, "label_dim": 10, "model_channels": 4}
    return edm.EDMPrecond(**sizes, channel_mult=[1], num_blocks=1)


TIMES = amedlib.make_schedule(num_steps=5)
LATENTS = amedlib.make_latents(range(3), (1, 4, 4))
EULER = amedlib.make_solver("euler")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: amedlib.make_latents([2**70], (1, 4, 4)), "a seed must be a whole number from 0"),
        (lambda: amedlib.make_latents([-1], (1, 4, 4)), "a seed must be .*; -1 was given"),
        (lambda: amedlib.make_latents([1.5], (1, 4, 4)), "a seed must be .*; 1.5 was given"),
        (lambda: amedlib.make_latents([True], (1, 4, 4)), "a seed must be .*; True was given"),
        (lambda: amedlib.make_latents([0], (1, 4, 4), "gpu"), "device must be one that is here"),
        (lambda: amedlib.load_dataset("digits", "gpu"), "device must be one that is here"),
        (lambda: amedlib.load_dataset("digits", 3), "device must be one that is here"),
        (lambda: amedlib.run(amedlib.Run(nfe=3), device="tpu"), "device must be one that is here"),
        (lambda: amedlib.Run(nfe=True), "nfe must be .*; True was given"),
        (lambda: amedlib.Run(nfe="5"), "nfe must be .*; '5' was given"),
        (lambda: amedlib.Run(r=np.array([0.5, 2])), "r must be strictly between 0 and 1"),
        (lambda: amedlib.Run(r=np.array(["a"])), "r must be strictly between 0 and 1"),
        (lambda: amedlib.TimeWise(None), "r must be strictly between 0 and 1; None was given"),
        (lambda: amedlib.TimeWise({}), "r must be strictly between 0 and 1"),
        (lambda: amedlib.make_schedule(sigma_min="0.1"), "sigma_min must be a number; '0.1'"),
        (lambda: amedlib.make_schedule(sigma_max=None), "sigma_max must be a number; None"),
        (
            lambda: amedlib.make_schedule("discrete", sigmas=["a", "b"]),
            "sigmas must be an ascending",
        ),
        (
            lambda: amedlib.make_schedule("discrete", sigmas=[-1.0, 90.0]),
            "sigmas must be an ascend",
        ),
        (lambda: amedlib.sample(normal, LATENTS, ["a", "b"], EULER), "times must be a tensor or"),
        (lambda: amedlib.sample(normal, LATENTS, None, EULER), "times must be a tensor or"),
        (lambda: amedlib.sample(normal, "noise", TIMES, EULER), "latents must be a tensor or"),
        (lambda: amedlib.sample(normal, None, TIMES, EULER), "latents must be a tensor or"),
        (
            lambda: amedlib.sample(normal, LATENTS + 1j, TIMES, EULER),
            "latents must be .*; 'a complex tensor' was given",
        ),
        (lambda: amedlib.sample(normal, LATENTS, TIMES, "euler"), "solver must be made by"),
        (lambda: amedlib.sample(normal, LATENTS, TIMES, EULER, "no"), "afs must be True or False"),
        (
            lambda: amedlib.sample(normal, LATENTS, TIMES, EULER, trajectory="no"),
            "trajectory must be True or False",
        ),
        (
            lambda: amedlib.sample(normal, LATENTS, TIMES, EULER, labels=[1, 2]),
            r"labels must be None, a tensor .*; \[1, 2\] was given",
        ),
        (
            lambda: amedlib.sample(normal, LATENTS, TIMES, EULER, labels=[1.0, 2.0, None]),
            "labels must be None, a tensor",
        ),
        (
            lambda: amedlib.sample(normal, LATENTS, TIMES, EULER, labels={"a": torch.ones(2, 4)}),
            r"labels must be None, a tensor .*; \(2, 4\) was given",
        ),
        (
            lambda: amedlib.sample(classes(), LATENTS, TIMES, EULER, labels=[1, 2, 3]),
            r"labels must be of shape \[3, 10\]; \[1, 2, 3\] was given",
        ),
        (
            lambda: amedlib.sample(normal, LATENTS, TIMES, EULER, labels=torch.ones(2, 10)),
            r"labels must be None, a tensor \[3, ...\] or a list of 3 .*; \(2, 10\) was given",
        ),
        (lambda: amedlib.run(amedlib.Run(nfe=3), None), "results_dir must be a path"),
        (lambda: amedlib.run(amedlib.Run(nfe=3), 5), "results_dir must be a path"),
        (lambda: amedlib.run({"nfe": 3}), "run must be an amedlib.Run; {'nfe': 3} was given"),
        (lambda: amedlib.run_all([{"nfe": 3}]), "run must be an amedlib.Run"),
        (lambda: amedlib.run_all(amedlib.Run(nfe=3)), "runs must be a list of Runs"),
        (lambda: amedlib.run_all(5), "runs must be a list of Runs"),
        (lambda: amedlib.train(TinyNet(), {"num_steps": 3}, (1, 8, 8), "a"), "config must be"),
        (
            lambda: amedlib.train(TinyNet(), amedlib.Training(), (1, 8, 8), "a", device="gpu"),
            "device must be one that is here",
        ),
        (lambda: amedlib.train("net", amedlib.Training(), (1, 8, 8), "a"), "denoiser must be"),
        (lambda: amedlib.train(TinyNet(), amedlib.Training(), (1, 0), "a"), "shape must be"),
        (lambda: amedlib.train(TinyNet(), amedlib.Training(), 8, "a"), "shape must be"),
        (lambda: amedlib.make_latents([0], "ab"), "shape must be"),
        (lambda: amedlib.make_latents(5, (1, 4)), "seeds must be"),
        (lambda: amedlib.load_dataset(None), "dataset must be one of"),
        (lambda: amedlib.load_dataset(["digits"]), "dataset must be one of"),
        (lambda: amedlib.make_solver(None), "solver must be one of"),
        (lambda: amedlib.make_solver(["ipndm"]), "solver must be one of"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and text.endswith(".")
    assert not list(tmp_path.iterdir())


def test_what_inference_leaves_behind_does_not_break_a_training():
    from amedlib import solvers

    solvers._quadrature.cache_clear()
    with torch.inference_mode():
        solve(normal, solver="deis")
    config = amedlib.Training(solver="deis", num_steps=4, images=4, batch=4)
    amedlib.training.Trainer(TinyNet(), config, (1, 8, 8)).step()


@pytest.mark.parametrize("solver", WHOLE)
@pytest.mark.parametrize("afs", [False, True])
def test_the_number_of_points_is_found_by_few_samples(solver, afs, monkeypatch):
    from amedlib import sampling

    sampled = []
    whole = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *a: sampled.append(1) or whole(*a))
    method = amedlib.make_solver(solver)
    wanted = 301 if afs else 300  # two evaluations in each step, or one
    points = sampling.num_steps_for.__wrapped__(wanted, method, afs)
    assert len(sampled) < 12
    times = amedlib.make_schedule(num_steps=points, rho=1)
    out = whole(normal, amedlib.make_latents([0], (2,)), times, method, afs)
    assert out.nfe == wanted


def test_data_sets_with_and_without_a_reference_run_together(monkeypatch, tmp_path):
    """And pixels are compared where features are not."""
    from faulty import toy_dataset

    from amedlib.study import execute

    whole = toy_dataset(normal)
    seen = []
    bare = replace(whole, judge=lambda: seen.append(1), metrics=("endpoint_error",))
    sets = {"digits": whole, "digits_uncentred": bare}
    monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu": sets[name])
    monkeypatch.setattr("amedlib.study.store.SOLUTION", execute_solution())
    runs = [
        amedlib.Run("fd_pixels", nfe=3, samples=20),
        amedlib.Run("first_slope", "digits_uncentred", nfe=3, samples=20),
    ]
    frame = amedlib.run_all(runs, tmp_path, "cpu", progress=False)
    assert frame["value"].notna().all() and not seen


def execute_solution():
    from amedlib.study import store

    return store.SOLUTION | {"num_steps": 5}
