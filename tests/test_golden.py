"""Equality with the official implementation, through vectors recorded from it (tests/golden)."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import amedlib
from amedlib.solvers import DEIS

GOLDEN = Path(__file__).parent / "golden"
NAMES = {"dpm_2": "dpm2", "dpm_pp": "dpmpp"}
OPTIONS = {
    "max_order": "order",
    "deis_mode": "mode",
    "predict_x0": "predict_x0",
    "lower_order_final": "lower_order_final",
    "variant": "variant",
    "r": "r",
}


def load(name):
    with np.load(GOLDEN / name, allow_pickle=False) as archive:
        return dict(archive)


def denoiser_of(data):
    """The file's denoiser, written here from its formula: independent of amedlib."""
    mu, s = torch.from_numpy(data["mu"]), torch.from_numpy(data["s"])
    if "weights" not in data:
        return lambda x, t, labels=None: (s**2 * x + t**2 * mu) / (s**2 + t**2)
    weights = torch.from_numpy(data["weights"])

    def mixture(x, t, labels=None):
        t = torch.as_tensor(t).expand(len(x), 1, 1, 1)[:, None]
        v = s**2 + t**2
        log_g = (-0.5 * (x[:, None] - mu) ** 2 / v - 0.5 * v.log()).sum((2, 3, 4)) + weights.log()
        g = log_g.softmax(1)[..., None, None, None]
        return (g * (s**2 * x[:, None] + t**2 * mu) / v).sum(1)

    return mixture


@dataclass(frozen=True)
class StoredDEIS(DEIS):
    """DEIS with the coefficients that the official run used."""

    table: tuple = field(default=(), compare=False)

    def order_at(self, step, points):
        object.__setattr__(self, "row", step - 1)
        return super().order_at(step, points)

    def coefficients(self, times, t_next):
        if len(times) == 1:
            return [t_next - times[0]]
        return [self.table[self.row][j] for j in range(len(times))]


def relative_error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def run_case(data, case, solver, **more):
    latents = torch.from_numpy(data["latents"])
    out = amedlib.sample(
        denoiser_of(data),
        latents,
        torch.from_numpy(data[case["t_steps"]]),
        solver,
        afs=case["afs"],
        trajectory=True,
        **more,
    )
    theirs = torch.from_numpy(data[case["key"]])
    if theirs.ndim == 5:  # the trajectory of the first two samples
        scale = theirs[-1].abs().max()
        error = float((out.trajectory[:, :2] - theirs).abs().max() / scale)
    else:
        error = relative_error(out.x, theirs)
    return error, out.nfe


@pytest.mark.parametrize("name", ["gauss_baselines", "gmm_baselines"])
def test_plain_samplers(name):
    data = load(f"{name}.npz")
    cases = json.loads(str(data["cases"]))
    assert len(cases) == 666
    for case in cases:
        options = {ours: case[theirs] for theirs, ours in OPTIONS.items() if theirs in case}
        if case["solver"] in ("dpmpp", "dpm_pp", "unipc"):
            options["thresholding"] = True  # as the released code always does
        solver = amedlib.make_solver(NAMES.get(case["solver"], case["solver"]), **options)
        error, nfe = run_case(data, case, solver)
        tolerance = 4e-3 if options.get("mode") == "tab" else 1e-9
        assert error < tolerance, (case["key"], error)
        assert nfe == case["nfe"], case["key"]


@pytest.mark.parametrize("name", ["gauss_baselines", "gmm_baselines"])
def test_deis_with_stored_coefficients(name):
    data = load(f"{name}.npz")
    cases = [c for c in json.loads(str(data["cases"])) if c["solver"] == "deis"]
    for case in cases:
        _, schedule, points, _, _ = case["key"].split("/")
        key = f"deis_coeff/{schedule}/{points}/o{case['max_order']}_{case['deis_mode']}"
        solver = StoredDEIS(order=case["max_order"], mode=case["deis_mode"], table=data[key])
        error, _ = run_case(data, case, solver)
        assert error < 1e-9, (case["key"], error)


@pytest.mark.parametrize("name", ["gauss_amed", "gmm_amed"])
def test_amed_solver_and_plugins(name):
    data = load(f"{name}.npz")
    cases = json.loads(str(data["cases"]))
    assert len(cases) == 384
    for case in cases:
        r, scale_dir, scale_time = (
            torch.from_numpy(data[f"{case['pred']}/{output}"])[..., None, None, None]
            for output in ("r", "scale_dir", "scale_time")
        )
        if case["plain"]:
            scale_dir, scale_time = torch.ones_like(r), torch.ones_like(r)

        def intermediate(step, *_, r=r, scale_dir=scale_dir, scale_time=scale_time):
            return amedlib.Intermediate(r[step], scale_dir[step], scale_time[step])

        options = {ours: case[theirs] for theirs, ours in OPTIONS.items() if theirs in case}
        if case["solver"] in ("dpmpp", "dpm_pp", "unipc"):
            options["thresholding"] = True  # as the released code always does
        solver = amedlib.make_solver(NAMES.get(case["solver"], case["solver"]), **options)
        error, nfe = run_case(data, case, solver, intermediate=intermediate)
        assert error < 1e-9, (case["key"], error)
        assert nfe == case["nfe"], case["key"]


def test_schedules():
    data = load("schedules.npz")
    for case in json.loads(str(data["cases"])):
        ours = amedlib.make_schedule(
            case["schedule_type"],
            case["num_steps"],
            case["sigma_min"],
            case["sigma_max"],
            case["schedule_rho"],
        ).numpy()
        np.testing.assert_allclose(ours, data[f"f64/{case['key']}"], rtol=1e-10)
        # In single precision the official time_uniform loses up to 0.7 percent to cancellation.
        np.testing.assert_allclose(ours, data[f"f32/{case['key']}"], rtol=8e-3)


@pytest.mark.parametrize("dtype, tolerance", [("f32", 1e-6), ("f64", 1e-7)])
def test_predictor(dtype, tolerance):
    data = load("predictor.npz")
    hyper = json.loads(str(data["hyper"]))
    predictor = amedlib.Predictor(
        "release", (8, 8), scale_dir=hyper["scale_dir"], scale_time=hyper["scale_time"]
    )
    state = {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")}
    predictor.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    predictor.to(torch.float64 if dtype == "f64" else torch.float32)
    bottleneck = torch.from_numpy(data["bottleneck"])
    for pair, (t_cur, t_next) in enumerate(zip(data["t_cur"], data["t_next"], strict=True)):
        for suffix, given in (("", bottleneck), ("_zero_bottleneck", None)):
            with torch.no_grad():
                out = predictor(0, float(t_cur), float(t_next), given)
            for name, ours in out._asdict().items():
                theirs = data[f"{dtype}/{name}{suffix}"][pair]
                ours = ours.reshape(-1, 1).expand(len(theirs), 1)
                np.testing.assert_allclose(ours.numpy(), theirs, rtol=tolerance)
