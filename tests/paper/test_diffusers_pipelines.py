"""Pipelines of diffusers that take text, against themselves: latents of the same noise and prompts.

All networks are tiny and random, in double precision.
"""

import json
from contextlib import nullcontext

import diffusers
import pytest
import torch
import transformers

import amedlib

PROMPTS = ["ab c", "f e d"]
CODER = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
U_NET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
}
TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
JOINT = TRANSFORMER | {"pooled_projection_dim": 16, "joint_attention_dim": 32, "in_channels": 4}
LETTERS = "abcdef"
TEXT = {
    "vocab_size": 2 * len(LETTERS) + 3,
    "bos_token_id": 13,
    "eos_token_id": 14,
    "pad_token_id": 14,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "projection_dim": 16,
}
T5 = {"vocab_size": 15, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [*LETTERS, *[f"{c}</w>" for c in LETTERS], "ab", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    return transformers.CLIPTokenizer.from_pretrained(folder)


def clip(projected=False):
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**TEXT))


def stable_diffusion(tokenizer):
    return diffusers.StableDiffusionPipeline(
        diffusers.AutoencoderKL(**CODER),
        clip(),
        tokenizer,
        diffusers.UNet2DConditionModel(**U_NET, cross_attention_dim=16),
        diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"),
        None,
        None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(tokenizer):
    unet = diffusers.UNet2DConditionModel(
        **U_NET,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    return diffusers.StableDiffusionXLPipeline(
        diffusers.AutoencoderKL(**CODER),
        clip(),
        clip(projected=True),
        tokenizer,
        tokenizer,
        unet,
        diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"),
        add_watermarker=False,
    )


def stable_diffusion_3(tokenizer):
    config = JOINT | {"sample_size": 8, "patch_size": 2, "out_channels": 4, "pos_embed_max_size": 8}
    config |= {"caption_projection_dim": 16, "pooled_projection_dim": 32}
    return diffusers.StableDiffusion3Pipeline(
        diffusers.SD3Transformer2DModel(**config),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.AutoencoderKL(**CODER, shift_factor=0.1),
        clip(projected=True),
        tokenizer,
        clip(projected=True),
        tokenizer,
        None,
        None,
    )


def flux(tokenizer):
    config = JOINT | {"in_channels": 16, "num_single_layers": 1, "guidance_embeds": True}
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.AutoencoderKL(**CODER),
        clip(),
        tokenizer,
        transformers.T5EncoderModel(transformers.T5Config(**T5)).eval(),
        tokenizer,
        diffusers.FluxTransformer2DModel(**config, axes_dims_rope=(2, 2, 4)),
    )


def wan(tokenizer):
    return diffusers.WanPipeline(
        tokenizer,
        transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)).eval(),
        diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.WanTransformer3DModel(
            **TRANSFORMER | {"attention_head_dim": 12},
            patch_size=(1, 2, 2),
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=16,
            rope_max_seq_len=16,
        ),
    )


TAU = {"sigmas": [0.98, 0.8, 0.5, 0.2]}
SIZE = {"height": 16, "width": 16}
FLUX = SIZE | {"max_sequence_length": 8}
TRUE_GUIDANCE = {"negative_prompt": "c", "true_cfg_scale": 2.0}
WAN = FLUX | {"num_frames": 5, "guidance_scale": 3.0}
# pipeline, its arguments, those of set_timesteps, evaluations per call, shape
MODELS = {
    "SD": (stable_diffusion, {}, {}, 2, (4, 8, 8)),
    "SD, other size": (stable_diffusion, {"height": 24, "width": 16}, {}, 2, (4, 12, 8)),
    "SD, unguided": (stable_diffusion, {"guidance_scale": 1.0}, {}, 1, (4, 8, 8)),
    "SDXL": (stable_diffusion_xl, {}, {}, 2, (4, 8, 8)),
    "SDXL, negative": (stable_diffusion_xl, {"negative_prompt": "c c"}, {}, 2, (4, 8, 8)),
    "SD3": (stable_diffusion_3, {}, TAU, 2, (4, 8, 8)),
    "FLUX": (flux, FLUX, TAU, 1, (16, 16)),
    "FLUX, guided": (
        flux,
        FLUX | {"negative_prompt": "c", "true_cfg_scale": 2.0},
        TAU,
        2,
        (16, 16),
    ),
    "Wan": (wan, WAN, {}, 2, (4, 2, 2, 2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_latents_are_those_of_the_pipeline(name, tokenizer):
    build, arguments, options, evaluations, shape = MODELS[name]
    torch.manual_seed(0)
    pipeline = build(tokenizer).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = amedlib.from_diffusers(pipeline, **arguments)
    assert (denoiser.evaluations_per_call, denoiser.shape) == (evaluations, shape)
    times = denoiser.scheduler_times(4, **options)
    latents = torch.randn(2, *shape, dtype=torch.float64)
    solver = amedlib.make_solver("euler")
    out = amedlib.sample(denoiser, latents, times, solver, labels=PROMPTS)
    ours = denoiser(out.x, times[-1], PROMPTS).detach()
    # pipelines of flow matching take alpha x, the others multiply by sigma themselves
    flow = denoiser.convention.flow
    begin = latents * times[0] * denoiser.convention.alpha(times[0]) if flow else latents
    asked = {"latents": begin, "num_inference_steps": 4, **arguments}
    asked |= {} if name == "Wan" else options
    theirs = pipeline(PROMPTS, output_type="latent", **asked)[0]
    # Wan's pipeline takes no sigmas, and begins where sigma is infinite.
    tolerance = 5e-3 if name == "Wan" else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))
    other = amedlib.sample(denoiser, latents, times, solver, labels=PROMPTS[::-1])
    assert not torch.allclose(other.x, out.x, rtol=1e-4)
    if ours.ndim == 4:
        images = pipeline(PROMPTS, output_type="pt", **asked)[0]
        torch.testing.assert_close(denoiser.decode(ours) / 2 + 0.5, images, rtol=0, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="autoencoder must be a pipeline's for latents"):
            denoiser.decode(ours)


@pytest.mark.parametrize("name", MODELS)
def test_a_sampler_inside_a_pipeline(name, tokenizer):
    """In single precision, with AFS and a second evaluation, which the first input shows."""
    build, arguments, _, evaluations, shape = MODELS[name]
    torch.manual_seed(0)
    pipeline = build(tokenizer).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = amedlib.from_diffusers(pipeline, **arguments)
    times = amedlib.make_schedule("logsnr", 4, 0.05, 10.0)
    how = amedlib.make_solver("ipndm"), True, amedlib.TimeWise(0.6)
    scheduler = amedlib.to_diffusers(times, pipeline.scheduler, *how)
    pipeline.scheduler, latents = scheduler, torch.randn(2, *shape)
    count = scheduler.num_inference_steps
    asked = {"latents": latents, "num_inference_steps": count, "output_type": "latent", **arguments}
    own = name.startswith("SD") and name != "SD3"  # scales its input itself
    with nullcontext() if own else scheduler.scaling(pipeline):
        found = pipeline(PROMPTS, **asked)[0]
    out = amedlib.sample(denoiser, latents, times, *how, labels=PROMPTS)
    assert count == 5 and out.nfe == count * evaluations
    assert abs(scheduler.first_scale - 1) > 0.02
    tolerance = 1e-5 * float(out.x.abs().max())
    torch.testing.assert_close(found, out.x.float(), rtol=0, atol=tolerance)
    if not own:
        with pytest.raises(ValueError, match="must be called within `with scheduler.scaling"):
            pipeline(PROMPTS, **asked)


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    torch.manual_seed(0)
    return stable_diffusion(tokenizer).to(torch.float64)


def test_prompts_are_encoded_once_or_given_for_all(pipeline):
    denoiser, counted = amedlib.from_diffusers(pipeline), []
    hooks = [
        part.register_forward_hook(lambda module, *call: counted.append(module))
        for part in (pipeline.text_encoder, pipeline.unet)
    ]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    out = amedlib.sample(
        denoiser,
        x,
        denoiser.scheduler_times(4),
        amedlib.make_solver("euler"),
        labels=PROMPTS[:1] * 2,
    )
    # with and without the prompts; the pipeline was stopped before it evaluated its network
    assert counted.count(pipeline.text_encoder) == 2
    assert counted.count(pipeline.unet) == out.nfe == 6
    for hook in hooks:
        hook.remove()
    for_all = amedlib.from_diffusers(pipeline, prompt=PROMPTS[0])
    torch.testing.assert_close(for_all(x, 2.0), denoiser(x, 2.0, PROMPTS[:1] * 2))
    with_embeddings = amedlib.from_diffusers(
        pipeline,
        prompt_embeds=pipeline.encode_prompt(PROMPTS[0], "cpu", 1, False)[0],
        negative_prompt_embeds=pipeline.encode_prompt("", "cpu", 1, False)[0],
    )
    torch.testing.assert_close(for_all(x, 2.0), with_embeddings(x, 2.0))


@pytest.mark.parametrize(
    "sentence, arguments, labels",
    [
        ("labels must be a list of 2, one 'prompt' for each sample; \\['a'\\]", {}, ["a"]),
        ("labels must be a list of 2, one 'prompt' for each sample; 'ab' was", {}, "ab"),
        ("labels must be a list of 2, one 'prompt' for each sample; None was", {}, None),
        ("labels must be None where conditioning or the model", {"prompt": "a"}, PROMPTS),
        ("guidance_rescale must be 0, because D has no", {"guidance_rescale": 0.7}, PROMPTS),
        ("conditioning must be an argument of .*; 'prompts'", {"prompts": "a"}, None),
        ("conditioning must be .*; 'num_images_per_prompt'", {"num_images_per_prompt": 2}, PROMPTS),
        ("encoder_hidden_states must be for a batch of 2", {"prompt": ["a"] * 3}, None),
    ],
)
def test_bad_input_gets_one_sentence(pipeline, sentence, arguments, labels):
    with pytest.raises(ValueError, match=sentence):
        amedlib.from_diffusers(pipeline, **arguments)(torch.ones(2, 4, 8, 8), 1.0, labels)


def test_what_is_more_than_one_network_is_refused(pipeline):
    parts = {**pipeline.components, "requires_safety_checker": False}
    control = diffusers.ControlNetModel.from_unet(pipeline.unet)
    guided = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control)
    with pytest.raises(ValueError, match="controlnet must be None in StableDiffusionControlNet"):
        amedlib.from_diffusers(guided)
    perturbed = diffusers.StableDiffusionPAGPipeline(**parts)
    with pytest.raises(ValueError, match="pag_scale must be 0"):
        amedlib.from_diffusers(perturbed)
