"""What went wrong in use: wrong numbers without a word, and right input refused."""

import itertools
import math

import pytest
import torch

import amedlib
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
