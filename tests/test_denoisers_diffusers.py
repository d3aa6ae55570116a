"""Models of diffusers against diffusers' own schedulers and pipelines, on the same noise levels.

Networks are tiny and random, in double precision; what differs then is the single precision of the
schedulers' tables, which tolerances of 1e-5 and below allow.
"""

import re
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

import amedlib
from amedlib.solvers import DEIS
from amedlib.training import Trainer, Training

# Of NumPy, about what diffusers does with tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array")

U_NET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
PLAIN = U_NET | {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
WITH_TEXT = U_NET | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
}
TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
ON_IMAGES = TRANSFORMER | {"sample_size": 8, "patch_size": 2, "in_channels": 4}


def make(name, **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(diffusers, name)(**config).double()


def small_coder():
    """An autoencoder that halves the sides of images, with four channels between."""
    return make(
        "AutoencoderKL",
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.4,
    )


@pytest.fixture(scope="module")
def unet():
    return make("UNet2DModel", **PLAIN)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def distance(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# The state of these is x; that of the others is alpha x.
IN_X = (diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler)
IN_X += (diffusers.EDMEulerScheduler,)


@torch.no_grad()
def theirs(scheduler, network, x, told, scale=1.0):
    """The states at the scheduler's time steps and after the last, as diffusers' pipelines go."""
    states = [x]
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = network(scaled, timestep=scale * t.expand(len(x)), return_dict=False, **told)[0]
        x = scheduler.step(out[:, : x.shape[1]], t, x).prev_sample
        states.append(x)
    return states


@torch.no_grad()
def compare(
    network, scheduler, solver, n=7, shape=None, told=None, prepare=None, scale=1.0, **options
):
    """Relative distances of our states from the scheduler's, one after the other.

    Where the scheduler ends at zero, the last is that of D at our last time from its last state.
    """
    told = told or {}
    denoiser = amedlib.from_diffusers(network, scheduler, **told)
    times = denoiser.scheduler_times(n, **options)
    latents = noise(2, *shape or denoiser.shape)
    ours = amedlib.sample(denoiser, latents, times, solver, trajectory=True).trajectory
    scheduler.set_timesteps(n, **options)
    if prepare:
        prepare(scheduler, denoiser, times)
    in_x = isinstance(scheduler, IN_X)
    scales = torch.ones_like(times) if in_x else denoiser.convention.alpha(times)
    states = theirs(scheduler, network, ours[0] * scales[0], told, scale)
    at_times = states[:: scheduler.order]  # those of second order go through another state
    assert len(at_times) - len(times) in (0, 1)
    found = [distance(s * x, y) for s, x, y in zip(scales, ours, at_times, strict=False)]
    if scheduler.sigmas[-1] == 0:
        found.append(distance(denoiser(ours[-1], times[-1]), states[-1]))
    return found


# --- solvers -------------------------------------------------------------------------------------

PREDICTIONS = ("epsilon", "sample", "v_prediction")
KARRAS = {"use_karras_sigmas": True}


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize(
    "name, options, solver, order",
    [
        ("EulerDiscrete", {}, "euler", None),
        ("EulerDiscrete", KARRAS, "euler", None),
        ("HeunDiscrete", {}, "heun", None),
        ("DPMSolverMultistep", {}, "dpmpp", 2),
        ("DPMSolverMultistep", {}, "dpmpp", 3),
        ("DEISMultistep", {}, "deis", 1),
    ],
)
def test_solvers_take_the_same_steps(unet, predicts, name, options, solver, order):
    """At every time, and by D at the last one for the scheduler's own step to zero."""
    if order:  # lower orders at the end would come one step earlier here
        options = options | {"solver_order": order, "lower_order_final": False}
    scheduler = getattr(diffusers, name + "Scheduler")(prediction_type=predicts, **options)
    ours = {"lower_order_final": False} if solver == "dpmpp" else {}
    ours |= {"order": order} if order else {}
    found = compare(unet, scheduler, amedlib.make_solver(solver, **ours))
    # Steps of Euler and Heun begin between two levels, where sigma is linear in the time step if
    # diffusers computes it from that, and its logarithm if it goes the other way, as here.
    between = "Discrete" in name and not options
    assert max(found) < (1e-4 if between else 2e-6), found


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name, solver", [("DPMSolver", "dpmpp"), ("UniPC", "unipc")])
def test_orders_fall_alike_towards_the_lowest_level(unet, order, name, solver):
    """With lower orders at the end, where both end at the model's lowest noise level."""
    scheduler = getattr(diffusers, f"{name}MultistepScheduler")(
        solver_order=order, final_sigmas_type="sigma_min"
    )
    found = compare(unet, scheduler, amedlib.make_solver(solver, order=order))
    assert len(found) == 8
    # Of UniPC, theirs shows the states before they are corrected; at the end none is.
    assert max(found[-1:] if name == "UniPC" else found) < 1e-6, found


class LogRhoDEIS(DEIS):
    """Our DEIS with the polynomial in log sigma; ours have it in the VP time or in sigma."""

    def _variable(self, sigma):
        return torch.log(sigma)


@pytest.mark.parametrize("order", [2, 3])
def test_deis_differs_in_the_variable_of_its_polynomial_only(unet, order):
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    assert max(compare(unet, scheduler, LogRhoDEIS(order=order))) < 1e-5
    for mode in ("tab", "rhoab"):
        solver = amedlib.make_solver("deis", order=order, mode=mode)
        assert max(compare(unet, scheduler, solver)) > 1e-3


def test_rounded_time_steps_are_what_differs_with_karras_levels(unet):
    options = {"solver_order": 2, "lower_order_final": False, "use_karras_sigmas": True}
    scheduler = diffusers.DPMSolverMultistepScheduler(**options)
    solver = amedlib.make_solver("dpmpp", order=2, lower_order_final=False)

    assert 1e-5 < max(compare(unet, scheduler, solver)) < 1e-2
    assert max(compare(unet, scheduler, solver, prepare=unrounded)) < 1e-5


TAU = [0.98, 0.9, 0.7, 0.5, 0.3, 0.1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_takes_the_same_steps(unet, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    found = compare(unet, scheduler, amedlib.make_solver("euler"), n=6, sigmas=TAU)
    assert len(found) == 7 and max(found) < 1e-5, found


def unrounded(scheduler, denoiser, times):
    """Tell the network of the scheduler the time steps that ours is told."""
    scheduler.timesteps = denoiser.convention.time_step(times)


@pytest.mark.parametrize("solver", ["dpmpp", "deis"])
def test_solvers_take_the_same_steps_of_flow_matching(unet, solver):
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
    options |= {"solver_order": 3, "lower_order_final": False}
    if solver == "deis":
        scheduler, ours = diffusers.DEISMultistepScheduler(**options), LogRhoDEIS(order=3)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**options)
        ours = amedlib.make_solver("dpmpp", order=3, lower_order_final=False)
    # At the start alpha is one minus a number near one, in single precision there.
    assert max(compare(unet, scheduler, ours, prepare=unrounded)) < 1e-4


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_edm_takes_the_same_steps(unet, predicts):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=predicts)
    assert max(compare(unet, scheduler, amedlib.make_solver("euler"))) < 1e-6
    denoiser = amedlib.from_diffusers(unet, scheduler)
    assert (denoiser.sigmas, denoiser.sigma_min, denoiser.sigma_max) == (None, 0.002, 80.0)


def test_continuous_times_of_video_diffusion(unet):
    """The scheduler of Stable Video Diffusion tells its network log(sigma) / 4."""
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    assert max(compare(unet, scheduler, amedlib.make_solver("euler"))) < 1e-6
    denoiser = amedlib.from_diffusers(unet, scheduler)
    assert (denoiser.sigmas, denoiser.sigma_min, denoiser.sigma_max) == (None, 0.002, 700.0)


# --- noise levels and times ----------------------------------------------------------------------

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_range_and_levels_are_the_schedulers(unet):
    denoiser = amedlib.from_diffusers(unet, diffusers.DDIMScheduler(**STABLE_DIFFUSION))
    # what everybody quotes of Stable Diffusion v1
    assert [round(s, 4) for s in (denoiser.sigma_min, denoiser.sigma_max)] == [0.0292, 14.6146]
    levels = torch.from_numpy(denoiser.sigmas)
    numbers = denoiser.convention.time_step(levels)
    torch.testing.assert_close(numbers, torch.arange(1000).double(), rtol=0, atol=1e-9)
    middle = denoiser.convention.time_step((levels[1:] * levels[:-1]).sqrt())
    torch.testing.assert_close(middle, torch.arange(999).double() + 0.5, rtol=0, atol=1e-9)
    beyond = denoiser.convention.time_step(levels[[0, -1]] * torch.tensor([0.5, 2.0]))
    assert beyond.tolist() == [0, 999]
    ends = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    times = amedlib.make_schedule("discrete", 5, **ends, sigmas=denoiser.sigmas)
    expected = torch.tensor([999, 749.25, 499.5, 249.75, 0], dtype=torch.float64)
    # that schedule is linear in log alpha between two levels
    torch.testing.assert_close(denoiser.convention.time_step(times), expected, rtol=0, atol=0.01)


def test_the_range_is_finite_where_the_scheduler_begins_at_noise_alone(unet):
    zero_snr = diffusers.DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True)
    denoiser = amedlib.from_diffusers(unet, zero_snr)
    assert zero_snr.alphas_cumprod[-1] == 0 and len(denoiser.sigmas) == 999
    assert 14.6 < denoiser.sigma_max < np.inf
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    denoiser = amedlib.from_diffusers(unet, flow)
    tau = flow.sigmas.double().flip(0)[:-1].numpy()
    np.testing.assert_allclose(denoiser.sigmas, tau / (1 - tau), rtol=1e-3)  # single precision
    assert denoiser.sigma_max == pytest.approx(3 * 999)
    times = denoiser.scheduler_times(4)
    assert times[0] == denoiser.sigma_max and times[-1] > 0


def test_times_of_schedulers_that_list_time_steps_only(unet):
    for scheduler in (diffusers.DDIMScheduler(), diffusers.PNDMScheduler(skip_prk_steps=True)):
        times = amedlib.from_diffusers(unet, scheduler).scheduler_times(5)
        alphas = scheduler.alphas_cumprod[[800, 600, 400, 200, 0]].double()
        torch.testing.assert_close(times, ((1 - alphas) / alphas).sqrt(), rtol=1e-9, atol=0)
    assert scheduler.num_inference_steps is None  # it was left alone


# --- networks ------------------------------------------------------------------------------------

TEXT = {"encoder_hidden_states": noise(2, 3, 8)}
POOLED = {"pooled_projections": noise(2, 8, seed=1)}
EULER, FLOW = diffusers.EulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler
SIZES = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
JOINT = {"joint_attention_dim": 8, "pooled_projection_dim": 8}
SD3 = ON_IMAGES | JOINT | {"caption_projection_dim": 16, "pos_embed_max_size": 8, "out_channels": 4}
FLUX = TRANSFORMER | JOINT | {"in_channels": 4, "num_single_layers": 1, "patch_size": 1}
FLUX |= {"guidance_embeds": True, "axes_dims_rope": (2, 2, 4)}
PIXART = {"caption_channels": 8, "cross_attention_dim": 16}
WAN = TRANSFORMER | {"attention_head_dim": 12, "patch_size": (1, 2, 2), "rope_max_seq_len": 16}
WAN |= {"in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 16, "ffn_dim": 16}
SOUND = TRANSFORMER | {"sample_size": 16, "in_channels": 4, "out_channels": 4}
SOUND |= {"num_key_value_attention_heads": 1, "cross_attention_dim": 8, "time_proj_dim": 8}
SOUND |= {"global_states_input_dim": 8, "cross_attention_input_dim": 8}
NETWORKS = {
    "classes": ("UNet2DModel", PLAIN | {"num_class_embeds": 3}, EULER(), None)
    + ({"class_labels": torch.tensor([2, 0])},),
    "SD 1.5": ("UNet2DConditionModel", WITH_TEXT, EULER(**STABLE_DIFFUSION), None, TEXT),
    "SDXL": ("UNet2DConditionModel", WITH_TEXT | SIZES, EULER(**STABLE_DIFFUSION), None)
    + (TEXT | {"added_cond_kwargs": {"text_embeds": noise(2, 8), "time_ids": torch.ones(2, 6)}},),
    "SD3": ("SD3Transformer2DModel", SD3, FLOW(shift=3.0), None, TEXT | POOLED),
    "FLUX": ("FluxTransformer2DModel", FLUX, FLOW(), (16, 4))
    + (
        TEXT
        | POOLED
        | {"guidance": torch.tensor([3.0, 3.0]), "txt_ids": torch.zeros(3, 3)}
        | {"img_ids": torch.cartesian_prod(*[torch.arange(4.0)] * 2, torch.zeros(1)).roll(1, 1)},
    ),
    "DiT": ("DiTTransformer2DModel", ON_IMAGES | {"out_channels": 8}, EULER(), None)
    + ({"class_labels": torch.tensor([7, 1000])},),
    "PixArt": ("PixArtTransformer2DModel", ON_IMAGES | PIXART | {"out_channels": 8}, EULER(), None)
    + (TEXT | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},),
    "video": ("WanTransformer3DModel", WAN, FLOW(shift=5.0), (4, 3, 8, 8), TEXT),
    "sound": ("StableAudioDiTModel", SOUND, diffusers.EDMEulerScheduler(sigma_data=1.0), (4, 16))
    + (TEXT | {"global_hidden_states": noise(2, 1, 8), "rotary_embedding": None},),
}


@pytest.mark.parametrize("model", NETWORKS)
def test_networks_of_all_kinds(model):
    name, config, scheduler, shape, told = NETWORKS[model]
    network = make(name, **config)
    options = {"sigmas": TAU[:4]} if isinstance(scheduler, FLOW) else {}
    # The network of FLUX is told the time from 0 to 1.
    scale = {"FLUX": 1e-3}.get(model, 1.0)
    solver = amedlib.make_solver("euler")
    found = compare(network, scheduler, solver, 4, shape, told, scale=scale, **options)
    assert max(found) < 2e-6, found
    denoiser = amedlib.from_diffusers(network, scheduler, **told)
    is_unet = name.startswith("UNet")
    assert denoiser.gives_bottleneck == is_unet and hasattr(denoiser, "bottleneck_size") == is_unet
    # What is told matters, and may come with the labels, all of it or the first.
    first = next(iter(told))
    x, rest = noise(2, *shape or denoiser.shape), {k: v for k, v in told.items() if k != first}
    by_labels = amedlib.from_diffusers(network, scheduler, **rest)
    expected = denoiser(x, 1.5)
    assert torch.equal(by_labels(x, 1.5, told[first]), expected)
    assert torch.equal(amedlib.from_diffusers(network, scheduler)(x, 1.5, told), expected)
    assert distance(by_labels(x, 1.5, told[first].flip(0)), expected) > 1e-6
    # One for all, and noise levels of their own.
    one = by_labels(x[:1], torch.tensor(0.7), {first: told[first][:1]} | _first(rest))
    sigmas = torch.tensor([0.7, 3.0]).reshape(2, *[1] * (x.ndim - 1))
    torch.testing.assert_close(denoiser(x, sigmas)[:1], one, rtol=1e-9, atol=1e-9)


def _first(told):
    shared = ("img_ids", "txt_ids")
    return {
        k: _first(v) if isinstance(v, dict) else v if v is None or k in shared else v[:1]
        for k, v in told.items()
    }


def test_one_hot_classes_are_labels():
    network = make("UNet2DModel", **PLAIN, num_class_embeds=3)
    denoiser = amedlib.from_diffusers(network, diffusers.DDPMScheduler())
    x = noise(2, 3, 8, 8)
    one_hot = torch.nn.functional.one_hot(torch.tensor([2, 0]), 3).float()
    assert torch.equal(denoiser(x, 1.0, one_hot), denoiser(x, 1.0, torch.tensor([2, 0])))


def test_precision_of_the_network_and_of_the_state(unet):
    single = make("UNet2DModel", **PLAIN).float()
    denoiser = amedlib.from_diffusers(single, diffusers.DDPMScheduler())
    x = 3 * noise(2, 3, 8, 8)
    assert (
        denoiser(x, 2.0).dtype == torch.float64
        and denoiser(x.float(), 2.0).dtype == x.float().dtype
    )
    expected = amedlib.from_diffusers(unet, diffusers.DDPMScheduler())(x, 2.0)
    assert distance(denoiser(x, 2.0), expected) < 1e-5


# --- guidance ------------------------------------------------------------------------------------


def test_guidance_takes_two_evaluations_which_are_counted():
    network, scheduler = make("UNet2DConditionModel", **WITH_TEXT), EULER()
    empty = noise(1, 3, 8, seed=5)
    denoiser = amedlib.from_diffusers(
        network, scheduler, guidance_scale=3.0, unconditional={"encoder_hidden_states": empty}
    )
    plain = amedlib.from_diffusers(network, scheduler)
    x, text = noise(2, 4, 8, 8), TEXT["encoder_hidden_states"]
    conditional, bottleneck = plain(x, 2.0, text, return_bottleneck=True)
    unconditional = plain(x, 2.0, empty.expand(2, 3, 8))
    found, seen = denoiser(x, 2.0, text, return_bottleneck=True)
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(seen, bottleneck)
    times, counted = denoiser.scheduler_times(4), []
    hook = network.register_forward_hook(lambda *call: counted.append(1))
    out = amedlib.sample(denoiser, x, times, amedlib.make_solver("heun"), labels=text)
    hook.remove()
    assert out.nfe == len(counted) == 2 * 6


# --- the bottleneck and training -----------------------------------------------------------------


@pytest.mark.parametrize("size", [8, (12, 7)])
def test_bottleneck_is_the_output_of_the_middle_block(size):
    network = make("UNet2DConditionModel", **WITH_TEXT | {"sample_size": size})
    denoiser = amedlib.from_diffusers(network, diffusers.DDPMScheduler(), **TEXT)
    seen = []
    hook = network.mid_block.register_forward_hook(lambda *call: seen.append(call[-1]))
    x = noise(2, *denoiser.shape)
    denoised, bottleneck = denoiser(x, 1.5, return_bottleneck=True)
    hook.remove()
    assert torch.equal(bottleneck, seen[0]) and torch.equal(denoised, denoiser(x, 1.5))
    assert bottleneck.shape == (2, 16, *denoiser.bottleneck_size)
    assert not network.mid_block._forward_hooks  # nothing is left behind


def test_predictors_are_trained_on_it_in_both_directions(unet):
    denoiser = amedlib.from_diffusers(unet, diffusers.DDPMScheduler())
    ends = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    gradients = []
    for direction in ("reverse", "forward"):
        config = Training("amed", num_steps=3, images=4, batch=2, gradient=direction, **ends)
        trainer = Trainer(denoiser, config, denoiser.shape)
        for loss, _ in trainer.losses(amedlib.make_latents(range(2), denoiser.shape)):
            loss.backward()
        parameters = trainer.predictor.parameters()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


# --- pipelines that need no text encoder ---------------------------------------------------------


def test_an_unconditional_pipeline_makes_the_same_images(unet):
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipeline = diffusers.DDIMPipeline(unet, scheduler)
    state = torch.random.get_rng_state()
    denoiser = amedlib.from_diffusers(pipeline)
    # Listening left everything as it was.
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "step" not in vars(pipeline.scheduler) and not unet._forward_pre_hooks
    assert denoiser.shape == (3, 8, 8) and denoiser.evaluations_per_call == 1
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "output_type": "np"}
    images = pipeline(batch_size=2, generator=torch.manual_seed(3), **options).images
    times = denoiser.scheduler_times(5)
    # there the state at the first time is the noise, here sigma times that
    latents = noise(2, 3, 8, 8, seed=3) * (1 + times[0] ** -2).sqrt()
    out = amedlib.sample(denoiser, latents, times, amedlib.make_solver("euler"))
    ours = (denoiser(out.x, times[-1]) / 2 + 0.5).clamp(0, 1).detach()
    assert 0.1 < ours.std() and out.nfe == 4
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1), images, atol=1e-5)


def test_a_guided_pipeline_of_classes_makes_the_same_images():
    coder = small_coder()
    network = make("DiTTransformer2DModel", **ON_IMAGES, out_channels=8)
    scheduler = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min")
    pipeline = diffusers.DiTPipeline(network, coder, scheduler)
    denoiser = amedlib.from_diffusers(pipeline, guidance_scale=3.0)
    assert denoiser.shape == (4, 8, 8) and denoiser.evaluations_per_call == 2
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 3.0, "num_inference_steps": 5, "output_type": "np"}
    images = pipeline([5, 9], generator=torch.manual_seed(3), **options).images
    times = denoiser.scheduler_times(5)
    latents = noise(2, 4, 8, 8, seed=3) * (1 + times[0] ** -2).sqrt()
    solver = amedlib.make_solver("dpmpp", order=2)
    for labels in ([5, 9], torch.tensor([5, 9])):
        out = amedlib.sample(denoiser, latents, times, solver, labels=labels)
        assert out.nfe == 10
        ours = (denoiser.decode(out.x, batch=1) / 2 + 0.5).permute(0, 2, 3, 1)
        assert 0.01 < ours.std()
        np.testing.assert_allclose(ours, images, atol=1e-5)


# --- bad input -----------------------------------------------------------------------------------

HALF = make("UNet2DModel", **PLAIN).to(torch.float16)
NET = make("UNet2DModel", **PLAIN)
CLASSES = make("DiTTransformer2DModel", **ON_IMAGES, out_channels=8)
BY_TEXT = make("UNet2DConditionModel", **WITH_TEXT)
DDPM = diffusers.DDPMScheduler()
X = noise(2, 3, 8, 8)


@pytest.mark.parametrize(
    "sentence, call",
    [
        ("model must be a pipeline or a network of diffusers; 'function'", lambda f: f(noise)),
        ("scheduler must be a scheduler of diffusers; 'NoneType' was", lambda f: f(NET)),
        ("prediction_type of DDPMScheduler must be one of 'epsilon', 'sample'",
         lambda f: f(NET, diffusers.DDPMScheduler(prediction_type="score"))),
        ("prediction_type of ScoreSdeVeScheduler must be one of .*; None was",
         lambda f: f(NET, diffusers.ScoreSdeVeScheduler())),
        ("noise levels of DDPMScheduler must be .* ascending without repeating",
         lambda f: f(NET, diffusers.DDPMScheduler(trained_betas=[0.1, 0.0, 0.1]))),
        ("noise levels of DPMSolverMultistepScheduler for 9 steps must .* without repeating; \\[",
         lambda f: f(NET, diffusers.DPMSolverMultistepScheduler(5)).scheduler_times(9)),
        ("weights of UNet2DModel must be in float32 on a CPU; .*; torch.float16 was",
         lambda f: f(HALF, DDPM)),
        ("labels must be one for each of 2 samples; \\(3,\\) was",
         lambda f: f(CLASSES, DDPM)(X[:, :1].expand(2, 4, 8, 8), 1.0, torch.arange(3))),
        ("encoder_hidden_states must be for a batch of 2 samples, or of 1 for all; \\(3, 3, 8",
         lambda f: f(BY_TEXT, DDPM, encoder_hidden_states=noise(3, 3, 8))(noise(2, 4, 8, 8), 1.0)),
        ("encoder_hidden_states must be given to UNet2DConditionModel, for all or as labels",
         lambda f: f(BY_TEXT, DDPM)(noise(2, 4, 8, 8), 1.0)),
        ("conditioning must be an argument of UNet2DModel .*; 'prompt' was",
         lambda f: f(NET, DDPM, prompt="a cat")),
        ("labels must be a tensor or a dictionary of tensors; \\['a', 'b'\\] was",
         lambda f: f(BY_TEXT, DDPM)(noise(2, 4, 8, 8), 1.0, ["a", "b"])),
        ("unconditional must be given exactly where guidance_scale is; None was",
         lambda f: f(BY_TEXT, DDPM, guidance_scale=3.0)),
        ("guidance_scale must be a number; 'much' was",
         lambda f: f(NET, DDPM, guidance_scale="much")),
        ("t must be one number or one per sample \\(2\\); \\(3, 1, 1, 1\\) was",
         lambda f: f(NET, DDPM)(X, torch.ones(3))),
        ("autoencoder must be a pipeline's", lambda f: f(NET, DDPM).decode(X)),
        ("conditioning must be an argument of DDPMPipeline that counts no samples; 'batch_size'",
         lambda f: f(diffusers.DDPMPipeline(NET, DDPM), batch_size=2)),
        ("labels must be None where conditioning or the model",
         lambda f: f(diffusers.DDPMPipeline(NET, DDPM))(X, 1.0, ["a", "b"])),
        ("labels must be a list of 2, one 'class_labels' for each sample; \\[1\\] was",
         lambda f: f(diffusers.DiTPipeline(CLASSES, None, DDPM))(noise(2, 4, 8, 8), 1.0, [1])),
        ("labels must be a list of 2, one 'class_labels' for each sample; None was",
         lambda f: f(diffusers.DiTPipeline(CLASSES, None, DDPM))(noise(2, 4, 8, 8), 1.0)),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(sentence, call):
    with pytest.raises(ValueError, match=sentence) as raised:
        call(amedlib.from_diffusers)
    assert "\n" not in str(raised.value) and str(raised.value).endswith("was given.")


def test_nan_of_a_network_is_reported_with_its_step():
    network = make("UNet2DModel", **PLAIN)
    torch.nn.init.constant_(network.conv_out.bias, torch.nan)
    denoiser = amedlib.from_diffusers(network, diffusers.DDPMScheduler())
    times, solver = denoiser.scheduler_times(4), amedlib.make_solver("euler")
    with pytest.raises(ValueError, match="NaN or inf arose in step 1 of 3"):
        amedlib.sample(denoiser, noise(1, 3, 8, 8), times, solver)


@pytest.mark.parametrize("call", ["from_diffusers(None)", "to_diffusers(None, None)"])
def test_without_the_package_the_extra_is_named(call):
    code = (
        "import sys, amedlib\n"
        "assert 'diffusers' not in sys.modules\n"
        "sys.modules['diffusers'] = None\n"
        f"amedlib.{call}"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"ImportError: .*pip install 'amedlib\[diffusers\]'\.\s*$", found.stderr)
