"""Our samplers inside pipelines of diffusers against ``amedlib.sample``, from the same noise.

Networks are tiny and random, in single precision; they predict x_0, so that samples stay in range.
"""

import copy
import json
import re
from pathlib import Path

import diffusers
import nbformat
import numpy as np
import pytest
import torch
from test_denoisers_diffusers import ON_IMAGES, PLAIN, make, small_coder, theirs

import amedlib
from amedlib.freedoms import FREEDOMS, LearnedTable
from amedlib.intermediate import Predictor
from amedlib.training import Training, train

pytestmark = pytest.mark.filterwarnings("ignore:__array")
PAGE = Path(__file__).parents[1] / "notebooks/howto.ipynb"
X0 = {"prediction_type": "sample"}


def pipeline_of(scheduler=None, **config):
    network = make("UNet2DModel", **PLAIN | config).float()
    found = diffusers.DDPMPipeline(network, scheduler or diffusers.DDPMScheduler(**X0))
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def pipeline():
    return pipeline_of()


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.manual_seed(seed))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def images_of(pipeline, count=2):
    """Images of a pipeline [count, H, W, C], and how often it called its network."""
    calls = []
    hook = pipeline.unet.register_forward_hook(lambda *call: calls.append(1))
    options = {"num_inference_steps": pipeline.scheduler.num_inference_steps, "output_type": "np"}
    images = pipeline(count, generator=torch.manual_seed(3), **options).images
    hook.remove()
    return images, len(calls)


def as_images(x):
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def schedule(denoiser, points=5, name="polynomial", sigma_max=None):
    sigma_max = sigma_max or denoiser.sigma_max
    return amedlib.make_schedule(name, points, denoiser.sigma_min, sigma_max)


def table(times, solver, freedoms, points=1):
    """A learned table with numbers of its own."""
    found = LearnedTable(times, freedoms, points, solver.memory)
    generator = torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


# solver, its options, AFS, and the intermediate, a function of times and solver
SAMPLERS = {
    "euler": ("euler", {}, False, None),
    "heun": ("heun", {}, True, None),
    "dpm2": ("dpm2", {"r": 0.3}, False, None),
    "ipndm": ("ipndm", {"order": 3}, True, None),
    "deis": ("deis", {"mode": "rhoab"}, False, None),
    "dpmpp": ("dpmpp", {"order": 2, "predict_x0": False}, True, None),
    "thresholding": ("dpmpp", {"thresholding": True}, False, None),
    "unipc": ("unipc", {"variant": "bh1"}, True, None),
    "amed": ("amed", {}, True, lambda *_: amedlib.TimeWise([0.3, 0.4, 0.6, 0.7])),
    "network": ("ipndm", {}, True, lambda *_: Predictor(scale_time=0.1, uses_bottleneck=False)),
    "times": ("unipc", {}, False, lambda *a: table(*a, ("times", "network_times"))),
    "s4s": ("ipndm", {}, False, lambda *a: table(*a, ("coefficients",))),
    "all": ("ipndm", {}, False, lambda *a: table(*a, FREEDOMS)),
    "parallel": ("dpmpp", {}, True, lambda *a: table(*a, FREEDOMS[2:], 3)),
}


def sampler(name, denoiser):
    """The arguments of ``sample`` after the latents."""
    solver, options, afs, make_intermediate = SAMPLERS[name]
    times, solver = schedule(denoiser), amedlib.make_solver(solver, **options)
    return times, solver, afs, make_intermediate and make_intermediate(times, solver)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pipeline_makes_the_images_of_sample(pipeline, tmp_path, name):
    denoiser = amedlib.from_diffusers(pipeline)
    times, *how = sampler(name, denoiser)
    pipeline.scheduler = scheduler = amedlib.to_diffusers(times, pipeline.scheduler, *how)
    with scheduler.scaling(pipeline):
        images, calls = images_of(pipeline)
    out = amedlib.sample(denoiser, noise(2, 3, 8, 8), times, *how)
    assert calls == out.nfe == scheduler.num_inference_steps and 0.05 < images.std()
    close(as_images(out.x), images)
    # Its file holds all of it, and it begins anew.
    scheduler.save_pretrained(tmp_path)
    pipeline.scheduler = scheduler = type(scheduler).from_pretrained(tmp_path)
    for _ in range(2):
        with scheduler.scaling(pipeline):
            assert np.array_equal(images_of(pipeline)[0], images)
    if abs(scheduler.first_scale - 1) > 0.02:
        with pytest.raises(ValueError, match="within `with scheduler.scaling"):
            images_of(pipeline)
    else:  # it begins with the noise as it is
        latents = noise(2, 3, 8, 8).double() / scheduler.first_scale
        out = amedlib.sample(denoiser, latents, times, *how)
        close(as_images(out.x), images_of(pipeline)[0])


def test_what_is_trained_goes_with_its_pipeline(pipeline, tmp_path):
    """AMED's table with AFS, saved and loaded with the networks."""
    denoiser = amedlib.from_diffusers(pipeline)
    ends = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    config = Training("ipndm", num_steps=4, form="table", recipe="paper", uses_bottleneck=False)
    config = Training(**vars(config) | ends | {"images": 16, "batch": 8})
    train(denoiser, config, denoiser.shape, tmp_path / "a.safetensors", progress=False)
    trained = amedlib.load_sampler(tmp_path / "a.safetensors")
    given = {"trained": trained, "pipeline": pipeline, "amedlib": amedlib}
    torch.manual_seed(3)
    exec(lines("to_diffusers"), given)
    expected = as_images(trained.sample(denoiser, noise(1, 3, 8, 8)).x)
    close(np.asarray(given["images"][0]) / 255, expected[0], 0.51 / 255)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    images, calls = images_of(loaded)
    assert calls == trained.nfe == 5
    latents = noise(2, 3, 8, 8).double() / loaded.scheduler.first_scale
    close(as_images(trained.sample(denoiser, latents).x), images)
    # The pipeline as it is now is the same denoiser.
    again = amedlib.from_diffusers(loaded)
    close(trained.sample(again, latents).x, trained.sample(denoiser, latents).x)
    written = json.loads((tmp_path / "pipeline/scheduler/scheduler_config.json").read_text())
    assert written["times"] == trained.times.tolist() and len(written["steps"]) == 3
    # Another trained sampler in its place, and diffusers' own.
    times, solver = schedule(denoiser, 3), amedlib.make_solver("euler")
    other = amedlib.to_diffusers(times, loaded.scheduler, solver)
    assert type(other.model_scheduler) is diffusers.DDPMScheduler
    own = diffusers.DDIMScheduler.from_config(loaded.scheduler.config)
    assert own.config["prediction_type"] == "sample"


def test_a_guided_pipeline_that_scales_its_input_begins_with_any_scale():
    """Here by AFS with less than the noise; the network has learned variances besides."""
    coder = small_coder().float()
    network = make("DiTTransformer2DModel", **ON_IMAGES, out_channels=8).float()
    pipeline = diffusers.DiTPipeline(network, coder, diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    denoiser = amedlib.from_diffusers(pipeline, guidance_scale=3.0)
    times = schedule(denoiser, 5, "logsnr", sigma_max=3.0)
    how = amedlib.make_solver("ipndm"), True, amedlib.TimeWise(0.9)
    pipeline.scheduler = amedlib.to_diffusers(times, pipeline.scheduler, *how)
    assert pipeline.scheduler.first_scale < 0.8
    steps = pipeline.scheduler.num_inference_steps
    options = {"guidance_scale": 3.0, "num_inference_steps": steps, "output_type": "np"}
    images = pipeline([5, 9], generator=torch.manual_seed(3), **options).images
    out = amedlib.sample(denoiser, noise(2, 4, 8, 8), times, *how, labels=[5, 9])
    assert out.nfe == 2 * steps
    ours = (denoiser.decode(out.x.float()) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert 0.01 < images.std()
    close(ours.detach(), images)


SCHEDULERS = {
    "noise": diffusers.EulerDiscreteScheduler(),
    "v": diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "EDM": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_networks_of_all_predictions(name):
    """With the input scaled, or as pipelines of flow matching go, which propose sigmas instead."""
    network = make("UNet2DModel", **PLAIN).float()
    denoiser = amedlib.from_diffusers(network, SCHEDULERS[name])
    times, solver = schedule(denoiser, 4, sigma_max=80.0), amedlib.make_solver("dpmpp", order=2)
    scheduler = amedlib.to_diffusers(times, SCHEDULERS[name], solver)
    latents = noise(2, 3, 8, 8)
    if name == "flow":
        steps = scheduler.num_inference_steps
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=1.2, device="cpu")
        scheduler.set_begin_index(0)
        assert scheduler.first_scale == pytest.approx(80 / 81)
    x = latents.clone()
    for t in scheduler.timesteps:
        scaled = x if name == "flow" else scheduler.scale_model_input(x, t)
        x = scheduler.step(network(scaled, t).sample, t, x, return_dict=False)[0]
    latents = latents.double() / scheduler.first_scale if name == "flow" else latents
    expected = amedlib.sample(denoiser, latents, times, solver).x
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-5 * float(expected.std()))


@torch.no_grad()
def test_a_copy_goes_on_from_where_it_was_made(pipeline):
    denoiser = amedlib.from_diffusers(pipeline)
    times, *how = sampler("parallel", denoiser)
    scheduler = amedlib.to_diffusers(times, pipeline.scheduler, *how)
    x = noise(1, 3, 8, 8)
    for k, t in enumerate(scheduler.timesteps):
        if k == 5:
            other, y = copy.deepcopy(scheduler), x
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(pipeline.unet(scaled, t).sample, t, x).prev_sample
    for t in other.timesteps[5:]:
        y = other.step(pipeline.unet(y, t).sample, t, y).prev_sample
    assert torch.equal(x, y)


# --- lists of sigmas, by the lines of the page ---------------------------------------------------


class Trained:
    """What the page calls ``trained``: learned times, and the same for the lines that follow."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.values = schedule(denoiser, 6, "logsnr", min(denoiser.sigma_max, 80.0)).tolist()

    def sigmas(self):
        return self.values

    def sample(self, solver, latents):
        times = torch.tensor(self.values, dtype=torch.float64)
        return amedlib.sample(self.denoiser, latents, times, amedlib.make_solver(solver)).x


def lines(containing):
    """The code block in the page's text that contains a word."""
    cells = nbformat.read(PAGE, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


@pytest.mark.parametrize("kind", ["EulerDiscrete", "FlowMatchEulerDiscrete"])
def test_sigmas_in_diffusers(kind):
    """Euler's steps on them; of flow matching, with the step to zero besides."""
    flow = kind.startswith("Flow")
    network = make("UNet2DModel", **PLAIN)
    given = {"scheduler": getattr(diffusers, f"{kind}Scheduler")(**{"shift": 3.0} if flow else {})}
    denoiser = amedlib.from_diffusers(network, given["scheduler"])
    trained = Trained(denoiser)
    exec(lines(f"import {kind}Scheduler"), given | {"trained": trained}, given)
    scheduler, latents = given["scheduler"], noise(2, 3, 8, 8).double()
    expected = trained.sample("euler", latents)
    start = denoiser.convention.alpha(torch.tensor(trained.values[0])) if flow else 1.0
    end = theirs(scheduler, network, latents * trained.values[0] * start, {})[-1]
    assert len(scheduler.timesteps) == (6 if flow else 5)
    if flow:
        expected = denoiser(expected, trained.values[-1]).detach()
    torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)


def test_sigmas_in_k_diffusion(pipeline):
    k_diffusion = pytest.importorskip("k_diffusion")
    denoiser = amedlib.from_diffusers(pipeline)
    trained, latents = Trained(denoiser), noise(2, 3, 8, 8).double()

    def model(x, sigma, **_):
        return denoiser(x, sigma.reshape(-1, 1, 1, 1))

    given = {"noise": latents, "model": model, "trained": trained}
    given |= {"torch": torch, "k_diffusion": k_diffusion}
    exec(lines("k_diffusion.sampling"), given)
    expected = denoiser(trained.sample("euler", latents), trained.values[-1]).detach()
    torch.testing.assert_close(given["x"], expected, rtol=1e-5, atol=1e-5)


def test_sigmas_in_comfyui(pipeline):
    trained = Trained(amedlib.from_diffusers(pipeline))
    given = {"trained": trained, "torch": torch}
    exec(lines("ManualSigmas"), given)
    sigmas, text = given["sigmas"], given["text"]
    assert sigmas.dtype == torch.float32 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    torch.testing.assert_close(sigmas[:-1].double(), torch.tensor(trained.values).double())
    read = [float(each) for each in re.fullmatch(r"[\d., ]+", text).group().split(",")]
    close(read, sigmas, 1e-6)


# --- bad input -----------------------------------------------------------------------------------

DDPM = diffusers.DDPMScheduler(**X0)
TIMES = amedlib.make_schedule("logsnr", 4, 0.01, 100.0)
EULER = amedlib.make_solver("euler")


def out(times=TIMES, scheduler=DDPM, solver=EULER, *rest):
    return amedlib.to_diffusers(times, scheduler, solver, *rest)


def begun(**how):
    scheduler = out(**how)
    ones = torch.ones(1, 2)
    return scheduler, scheduler.step(ones, scheduler.timesteps[0], ones).prev_sample


def replaced():
    scheduler, x = begun()
    scheduler.step(x, scheduler.timesteps[1], x + 1)


def too_far():
    scheduler, x = begun()
    for t in [*scheduler.timesteps[1:], 0]:
        x = scheduler.step(x, t, x).prev_sample


def spoilt():
    scheduler, x = begun()
    for t in scheduler.timesteps[1:]:
        x = scheduler.step(x * torch.nan, t, x).prev_sample


class Other(diffusers.DDPMScheduler):
    pass


class OtherSolver(type(EULER)):
    pass


@pytest.mark.parametrize(
    "sentence, call",
    [
        ("the predictor must be one whose numbers all samples share: train with",
         lambda: out(TIMES, DDPM, EULER, False, Predictor())),
        ("thresholding must be False with AFS in a pipeline of diffusers; True was",
         lambda: out(TIMES, DDPM, amedlib.make_solver("dpmpp", thresholding=True), True)),
        ("a sampler's evaluations must be at least one in a pipeline; 0 was",
         lambda: out(TIMES[:2], DDPM, EULER, True)),
        ("scheduler must be a scheduler of diffusers; 'UNet2DModel' was",
         lambda: out(TIMES, make("UNet2DModel", **PLAIN))),
        ("scheduler must be the configuration of a scheduler of diffusers; 'Other' was",
         lambda: out(TIMES, Other())),
        ("scheduler must be the configuration of a scheduler of diffusers; None was",
         lambda: type(out())()),
        ("prediction_type of DDPMScheduler must be one of",
         lambda: out(TIMES, diffusers.DDPMScheduler(prediction_type="score"))),
        ("times must be at least two positive .* descending", lambda: out(TIMES.flip(0))),
        ("times must be a tensor or an array of numbers; 'karras' was", lambda: out("karras")),
        ("solver must be made by amedlib.make_solver; 'euler'", lambda: out(TIMES, DDPM, "euler")),
        ("solver must be made by amedlib.make_solver; OtherSolver",
         lambda: out(TIMES, DDPM, OtherSolver())),
        ("times must be a tensor or an array of numbers; None was",
         lambda: type(out())(scheduler={"_class_name": "DDPMScheduler"} | X0)),
        ("steps must be 3 of the fields .*; \\[\\{'r': \\[0.5\\]\\}\\] was",
         lambda: type(out()).from_config(out().config, steps=[{"r": [0.5]}])),
        ("the length of r must be the number of steps, 3; 2 was",
         lambda: out(TIMES, DDPM, EULER, False, amedlib.TimeWise([0.4, 0.5]))),
        ("num_inference_steps must be 3, the evaluations of this sampler; 50 was",
         lambda: out().set_timesteps(50)),
        ("sigmas must be None: the sampler has its own; \\[1.0, 0.6, 0.2\\] was",
         lambda: out().set_timesteps(sigmas=[1.0, 0.6, 0.2])),
        ("begin_index must be 0: no sampler begins in the middle; 2 was",
         lambda: out().set_begin_index(2)),
        ("the first time step must be 953.*; 500.0 was",
         lambda: out().step(TIMES, torch.tensor(500.0), TIMES)),
        ("the pipeline must be called within `with .*`, because .* with 0.949 times",
         lambda: begun(times=TIMES / 100 * 3)),
        ("sample must be what the latest step returned: .*; 'another one' was", replaced),
        ("steps must be 3; set_timesteps begins anew; 4 was", too_far),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(sentence, call):
    with pytest.raises(ValueError, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value) and str(raised.value).endswith("was given.")


def test_nan_of_a_network_is_noticed():
    with pytest.raises(ValueError, match="Samples must be finite; NaN or inf arose in the pipe"):
        spoilt()
