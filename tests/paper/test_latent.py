"""Latent models against diffusers' own schedulers and pipelines, and against the original code.

All networks are tiny and random; they go through the files and the loaders as the real ones do.
"""

import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

import amedlib
from amedlib.compute import in_precision
from amedlib.denoisers import latent
from amedlib.training import Trainer, Training

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LSUN_LEVELS = LEVELS | {"beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
PROMPTS = ["ab c", "f e d"]


def save_stable_diffusion(folder):
    """Stable Diffusion v1 in small: text of 8 tokens, latents 4x8x8, images 3x16x16."""
    torch.manual_seed(0)
    letters = "abcdef"
    words = [*letters, *[f"{c}</w>" for c in letters], "ab", "<|startoftext|>", "<|endoftext|>"]
    files = folder / "made"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\na b\n")
    (files / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    parts = {
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(files),
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(words),
                bos_token_id=13,
                eos_token_id=14,
                pad_token_id=14,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=8,
            )
        ),
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
        # the scheduler of the published files
        "scheduler": diffusers.PNDMScheduler(**LEVELS, skip_prk_steps=True, steps_offset=1),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    shutil.rmtree(files)


UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
}
AUTOENCODER = latent.LSUN_AUTOENCODER | {
    "sample_size": 16,
    "num_vq_embeddings": 32,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "scaling_factor": 0.5,
}


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    save_stable_diffusion(folder)
    return folder


@pytest.fixture(scope="module")
def ldm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    torch.manual_seed(1)
    diffusers.LDMPipeline(
        diffusers.VQModel(**AUTOENCODER),
        diffusers.UNet2DModel(**UNET),
        diffusers.DDIMScheduler(**LSUN_LEVELS),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd(sd_folder):
    return latent.stable_diffusion(sd_folder).double()


@pytest.fixture(scope="module")
def ldm(ldm_folder):
    return latent.lsun_bedroom_ldm(ldm_folder).double()


@pytest.fixture(params=["sd", "ldm"])
def denoiser(request):
    return request.getfixturevalue(request.param)


def labels_of(denoiser, count=2):
    return None if denoiser.no_text is None else denoiser.encode(PROMPTS[:1] * count)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


# --- noise levels --------------------------------------------------------------------------------


def test_levels_are_those_of_diffusers(sd, ldm):
    for denoiser, config in ((sd, LEVELS), (ldm, LSUN_LEVELS)):
        alphas = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
        # single precision there: 1 - alpha loses digits at the lowest levels
        np.testing.assert_allclose(denoiser.sigmas, np.sqrt((1 - alphas) / alphas), rtol=1e-4)
        assert (denoiser.sigma_min, denoiser.sigma_max) == tuple(denoiser.sigmas[[0, -1]])
    # what everybody quotes of Stable Diffusion v1
    assert [round(value, 4) for value in (sd.sigma_min, sd.sigma_max)] == [0.0292, 14.6146]


def test_discrete_schedule_has_equidistant_time_steps(denoiser):
    ends = {"sigma_min": denoiser.sigma_min, "sigma_max": denoiser.sigma_max}
    times = amedlib.make_schedule("discrete", 6, **ends, sigmas=denoiser.sigmas)
    expected = torch.linspace(999, 0, 6, dtype=torch.float64)
    torch.testing.assert_close(denoiser.time_step(times), expected, rtol=0, atol=1e-8)


def test_time_step_is_linear_in_log_alpha(sd):
    log_alpha = -0.5 * np.log1p(sd.sigmas**2)
    sigma = np.geomspace(sd.sigma_min, sd.sigma_max, 57)
    expected = np.interp(0.5 * np.log1p(sigma**2), -log_alpha, np.arange(1000))
    np.testing.assert_allclose(sd.time_step(torch.from_numpy(sigma)), expected, atol=1e-9)
    # beyond the ends the outermost lines go on
    for sigma, k in ((0.7 * sd.sigma_min, 0), (1.5 * sd.sigma_max, 998)):
        slope = log_alpha[k + 1] - log_alpha[k]
        expected = k + (-0.5 * np.log1p(sigma**2) - log_alpha[k]) / slope
        got = sd.time_step(torch.tensor([sigma], dtype=torch.float64)).item()
        assert got == pytest.approx(expected, rel=1e-9)
    # it can be differentiated, as training needs it
    points = torch.tensor([0.05, 0.7, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sd.time_step, points)


# --- D(x; t) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 400, 999])
def test_denoised_is_what_ddim_predicts(ldm, step):
    scheduler = diffusers.DDIMScheduler(**LSUN_LEVELS)
    scheduler.set_timesteps(1000)
    clean, n = noise(2, *ldm.shape), noise(2, *ldm.shape, seed=1)
    noisy = scheduler.add_noise(clean, n, torch.tensor([step, step]))
    predicted = ldm.unet(noisy, step).sample
    expected = scheduler.step(predicted, step, noisy).pred_original_sample
    sigma = ldm.sigmas[step]
    # tables in single precision there; at the top, x_0 is a difference of two large numbers
    close(ldm(clean + sigma * n, sigma), expected, 1e-4)


@pytest.mark.parametrize("step", [0, 1, 400, 999])
def test_guided_denoised_is_what_euler_predicts(sd, step):
    scheduler = diffusers.EulerDiscreteScheduler(**LEVELS, timestep_spacing="linspace")
    scheduler.set_timesteps(1000)
    labels, sigma = sd.encode(PROMPTS), sd.sigmas[step]
    x = noise(2, *sd.shape) + sigma * noise(2, *sd.shape, seed=1)
    scaled = scheduler.scale_model_input(x, scheduler.timesteps[999 - step])
    conditional = sd.unet(scaled, step, labels).sample
    unconditional = sd.unet(scaled, step, sd.encode(["", ""])).sample
    guided = unconditional + 7.5 * (conditional - unconditional)
    out = scheduler.step(guided, scheduler.timesteps[999 - step], x)
    close(sd(x, sigma, labels), out.pred_original_sample, 1e-4)


def test_guidance(sd_folder, sd):
    assert sd.guidance == 7.5 and sd.evaluations_per_call == 2
    plain = latent.stable_diffusion(sd_folder, guidance=1).double()
    assert plain.evaluations_per_call == 1
    labels, empty = sd.encode(PROMPTS), sd.no_text.expand(2, -1, -1)
    x = 3 * noise(2, *sd.shape)
    conditional, bottleneck = plain(x, 3.0, labels, return_bottleneck=True)
    unconditional = plain(x, 3.0, empty)
    guided, from_second_half = sd(x, 3.0, labels, return_bottleneck=True)
    close(guided, unconditional + 7.5 * (conditional - unconditional), 1e-10)
    close(from_second_half, bottleneck, 1e-10)
    # guidance 1 is the conditional network alone
    predicted = plain.unet(x / 10**0.5, plain.time_step(torch.tensor([3.0]).double()), labels)
    close(conditional, x - 3 * predicted.sample)
    assert (conditional - unconditional).abs().max() > 1e-3  # the text matters


def test_bottleneck_is_the_output_of_the_middle_block(denoiser):
    seen = []
    hook = denoiser.unet.mid_block.register_forward_hook(lambda *call: seen.append(call[-1]))
    labels = labels_of(denoiser)
    denoised, bottleneck = denoiser(noise(2, *denoiser.shape), 1.5, labels, return_bottleneck=True)
    hook.remove()
    assert torch.equal(bottleneck, seen[0][-2:])
    assert bottleneck.shape == (2, 64, *denoiser.bottleneck_size)
    assert torch.equal(denoised, denoiser(noise(2, *denoiser.shape), 1.5, labels))
    assert not denoiser.unet.mid_block._forward_hooks  # nothing is left behind


def test_batch_and_noise_level_per_sample(denoiser):
    x, sigmas = 2 * noise(3, *denoiser.shape), noise(3, 1, 1, 1).abs() + 0.3
    labels = labels_of(denoiser, 3)
    together = denoiser(x, sigmas, labels)
    for i in range(3):
        label = None if labels is None else labels[i : i + 1]
        close(denoiser(x[i : i + 1], sigmas[i].squeeze(), label), together[i : i + 1], 1e-10)


def test_dtype_is_that_of_the_state(ldm_folder):
    single = latent.lsun_bedroom_ldm(ldm_folder)
    x = noise(1, *single.shape)
    assert single(x, 2.0).dtype == torch.float64
    assert single(x.float(), 2.0).dtype == torch.float32
    expected = single(x, 2.0)
    for half in (in_precision(single, "bfloat16"), single.to(torch.bfloat16)):
        found = half(x, 2.0)
        assert found.dtype == torch.float64 and not torch.equal(found, expected)
        close(found, expected, 0.02)


# --- text and images -----------------------------------------------------------------------------


def pipeline(sd, scheduler):
    parts = {"vae": sd.autoencoder, "text_encoder": sd.text_encoder, "tokenizer": sd.tokenizer}
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        unet=sd.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_prompts_are_encoded_as_in_the_pipeline(sd):
    pipe = pipeline(sd, diffusers.DDIMScheduler(**LEVELS))
    prompts = [*PROMPTS, "a b c d e f a b c d e f"]  # the last one is too long
    conditional, unconditional = pipe.encode_prompt(prompts, "cpu", 1, True)
    close(sd.encode(prompts), conditional)
    # encoded when the model was loaded, in single precision
    close(sd.no_text.expand_as(unconditional), unconditional, 1e-5)
    assert sd.encode(prompts).shape == (3, 8, 16)


def test_text_encoder_of_the_published_files(sd_folder, sd, tmp_path):
    """Published weights carry the prefix "text_model.", those saved today do not."""
    shutil.copytree(sd_folder, tmp_path / "sd")
    folder = tmp_path / "sd" / "text_encoder"
    weights = latent.stable_diffusion(sd_folder).text_encoder.state_dict()
    tensors = {f"text_model.{name}": value for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    again = latent.stable_diffusion(tmp_path / "sd").double()
    close(again.encode(PROMPTS), sd.encode(PROMPTS))


def test_decode(denoiser):
    scaling = denoiser.autoencoder.config.scaling_factor
    z = 0.5 * noise(5, *denoiser.shape)
    expected = denoiser.autoencoder.decode(z / scaling).sample
    images = denoiser.decode(z, batch=2)
    assert images.shape == (5, 3, 16, 16)
    close(images, expected.clamp(-1, 1), 1e-10)
    assert denoiser.decode(1e3 * z).abs().max() <= 1


# --- sampling and training -----------------------------------------------------------------------


def test_sampling_is_the_pipeline_of_stable_diffusion(sd):
    """The whole way, against diffusers' pipeline with the scheduler that takes the same steps."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **LEVELS, solver_order=3, timestep_spacing="linspace", final_sigmas_type="sigma_min"
    )
    latents = noise(2, *sd.shape)
    # there the state is x / sqrt(1 + t^2)
    start, end = (1 / np.sqrt(1 + s**2) for s in (sd.sigma_max, sd.sigma_min))
    theirs = pipeline(sd, scheduler)(
        PROMPTS,
        num_inference_steps=9,
        guidance_scale=7.5,
        latents=latents * sd.sigma_max * start,
        output_type="latent",
    ).images
    ends = {"sigma_min": sd.sigma_min, "sigma_max": sd.sigma_max}
    times = amedlib.make_schedule("discrete", 10, **ends, sigmas=sd.sigmas)
    solver = amedlib.make_solver("dpmpp", order=3, thresholding=False)
    out = amedlib.sample(sd, latents, times, solver, labels=sd.encode(PROMPTS))
    assert out.nfe == 2 * 9  # two evaluations a step
    close(out.x * end, theirs, 1e-4)  # single precision there


def gradients(denoiser, mode):
    config = Training(
        schedule="discrete",
        noise_levels="stable_diffusion" if denoiser.text_encoder else "lsun_bedroom_ldm",
        num_steps=3,
        sigma_min=0.1,
        sigma_max=10.0,
        scale_time=0.2,
        gradient=mode,
        batch=2,
        images=4,
    )
    trainer = Trainer(denoiser, config, denoiser.shape)
    found = []
    for i in range(2):
        latents = amedlib.make_latents([2 * i, 2 * i + 1], denoiser.shape)
        for loss, _ in trainer.losses(latents, labels_of(denoiser)):
            assert torch.isfinite(loss) and loss > 0
            trainer.optimizer.zero_grad()
            loss.backward()
            trainer.optimizer.step()
            found.append(torch.cat([p.grad.flatten() for p in trainer.predictor.parameters()]))
    return torch.stack(found)


def test_predictor_trains_in_both_modes(denoiser):
    reverse, forward = gradients(denoiser, "reverse"), gradients(denoiser, "forward")
    assert len(reverse) == 4 and (reverse.norm(dim=1) > 0).all()
    # the predictor computes in single precision
    close(forward, reverse, 1e-3)


# --- files ---------------------------------------------------------------------------------------


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickled_weights_are_refused(sd_folder, tmp_path, part):
    folder = shutil.copytree(sd_folder, tmp_path / "sd") / part
    (weights,) = folder.glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    weights.unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    with pytest.raises(ValueError, match=rf"must hold its weights as a \.safetensors .* {name}"):
        latent.stable_diffusion(tmp_path / "sd")
    assert not (tmp_path / "executed").exists()


def test_from_the_cache_without_network(sd_folder, sd, tmp_path):
    place = tmp_path / "models--some--model"
    snapshot = place / "snapshots" / ("0" * 40)
    shutil.copytree(sd_folder, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    found = latent.stable_diffusion("some/model", cache_dir=tmp_path, local_files_only=True)
    x, labels = noise(1, *sd.shape), sd.encode(PROMPTS[:1])
    close(found.double()(x, 1.0, labels), sd(x, 1.0, labels), 1e-10)
    # pickles in the cache are as little opened, harmless as this one is
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    weights = {name: value.float() for name, value in sd.unet.state_dict().items()}
    torch.save(weights, snapshot / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="'unet' of 'some/model' was not found"):
        latent.stable_diffusion("some/model", cache_dir=tmp_path, local_files_only=True)


def test_missing_files_say_what_to_do(sd_folder, tmp_path):
    with pytest.raises(ValueError, match=r"'scheduler' of 'some/model' .* by hand") as error:
        latent.stable_diffusion("some/model", cache_dir=tmp_path, local_files_only=True)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    shutil.copytree(sd_folder, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "vae")
    with pytest.raises(ValueError, match="'vae' of '.*sd' was not found"):
        latent.stable_diffusion(tmp_path / "sd", local_files_only=True)
    with pytest.raises(ValueError, match=r"The folder nowhere is missing; .*convert_ldm makes it"):
        latent.lsun_bedroom_ldm("nowhere")


def test_missing_package_is_one_sentence(monkeypatch, sd_folder):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"need diffusers .* pip install 'amedlib\[paper\]'"):
        latent.stable_diffusion(sd_folder)


def test_bad_input(sd_folder, sd, ldm):
    x = noise(2, *sd.shape)
    bad = [
        (lambda: sd(x, 1.0), r"labels must be of shape \[2, 8, 16\], from encode.*None was given"),
        (lambda: sd(x, 1.0, sd.encode(["a"])), r"labels must .*\(1, 8, 16\) was given"),
        (lambda: sd(x, x[0, 0, 0, :3].abs(), labels_of(sd)), r"t must be one number or one per"),
        (lambda: ldm(x[:, :3], 1.0, x), "labels must be None for a model without text"),
        (lambda: ldm.encode(["a"]), "the model must be one with text"),
        (lambda: latent.stable_diffusion(sd_folder, float("nan")), "guidance must be a finite"),
        (
            lambda: latent.LatentDenoiser(ldm.unet, ldm.autoencoder, ldm.sigmas, 2.0),
            "guidance must be 1 for a model without text",
        ),
    ]
    for call, sentence in bad:
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize("change", [{"prediction_type": "v_prediction"}, {"beta_end": 0.02}])
def test_other_models_are_refused(sd_folder, tmp_path, change):
    shutil.copytree(sd_folder, tmp_path / "sd")
    diffusers.DDIMScheduler(**LEVELS | change).save_pretrained(tmp_path / "sd" / "scheduler")
    with pytest.raises(
        ValueError, match=r"the scheduler of stable_diffusion must be \{.*was given"
    ):
        latent.stable_diffusion(tmp_path / "sd")


# --- conversion of a checkpoint of the original code ---------------------------------------------
#
# The networks of CompVis/latent-diffusion, written again after their definition, with the names of
# their parameters. Configurations are in the words of diffusers.


def norm_act(channels, eps=1e-5):
    return nn.GroupNorm(32, channels, eps), nn.SiLU()


class Residual(nn.Module):
    def __init__(self, cin, cout, emb):
        super().__init__()
        self.in_layers = nn.Sequential(*norm_act(cin), nn.Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, cout))
        after = nn.Dropout(0.0), nn.Conv2d(cout, cout, 3, padding=1)
        self.out_layers = nn.Sequential(*norm_act(cout), *after)
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, channels, head_dim):
        super().__init__()
        self.norm, self.head_dim = nn.GroupNorm(32, channels), head_dim
        self.qkv, self.proj_out = (
            nn.Conv1d(channels, 3 * channels, 1),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x, emb):
        flat = x.flatten(2)
        # channels are ordered: head, then q, k, v, then the channel of the head
        heads = self.qkv(self.norm(flat)).unflatten(1, (-1, 3, self.head_dim))
        q, k, v = heads.unbind(2)
        weights = (q.transpose(-1, -2) @ k / self.head_dim**0.5).softmax(-1)
        out = (v @ weights.transpose(-1, -2)).flatten(1, 2)
        return (flat + self.proj_out(out)).view_as(x)


class Resample(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        setattr(self, "conv" if up else "op", nn.Conv2d(channels, channels, 3, 2 - up, 1))

    def forward(self, x, emb):
        return self.conv(F.interpolate(x, scale_factor=2)) if self.up else self.op(x)


class OriginalUNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, layers = config["block_out_channels"], config["layers_per_block"]
        width, emb = widths[0], 4 * widths[0]
        attention = [kind.startswith("Attn") for kind in config["down_block_types"]]
        self.width = width

        def level(cin, cout, attend):
            block = [Residual(cin, cout, emb)]
            return [*block, Attention(cout, config["attention_head_dim"])] if attend else block

        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        conv = nn.Conv2d(config["in_channels"], width, 3, padding=1)
        self.input_blocks, skips, c = nn.ModuleList([nn.ModuleList([conv])]), [width], width
        for i, (cout, attend) in enumerate(zip(widths, attention, strict=True)):
            for _ in range(layers):
                self.input_blocks.append(nn.ModuleList(level(c, cout, attend)))
                c = cout
                skips.append(c)
            if i < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Resample(c, up=False)]))
                skips.append(c)
        self.middle_block = nn.ModuleList([*level(c, c, True), Residual(c, c, emb)])
        self.output_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            for j in range(layers + 1):
                block = level(c + skips.pop(), widths[i], attention[i])
                c = widths[i]
                if i and j == layers:
                    block.append(Resample(c, up=True))
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(*norm_act(c), nn.Conv2d(c, config["out_channels"], 3, padding=1))

    def forward(self, x, t):
        half = self.width // 2
        angles = t[:, None] * torch.exp(-np.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        skips = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, emb)
        return self.out(x)


class CoderBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, cin, 1e-6), nn.GroupNorm(32, cout, 1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class CoderAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / x.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


def module(**children):
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


class OriginalAutoencoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, layers = config["block_out_channels"], config["layers_per_block"]
        latents, levels = config["latent_channels"], len(config["block_out_channels"])

        def middle(c):
            return module(
                block_1=CoderBlock(c, c), attn_1=CoderAttention(c), block_2=CoderBlock(c, c)
            )

        def ends(first, inner, last, out):
            return {
                "conv_in": nn.Conv2d(first, inner, 3, padding=1),
                "norm_out": nn.GroupNorm(32, last, 1e-6),
                "conv_out": nn.Conv2d(last, out, 3, padding=1),
            }

        down, c = nn.ModuleList(), widths[0]
        for i, width in enumerate(widths):
            blocks = [CoderBlock(c if j == 0 else width, width) for j in range(layers)]
            part, c = module(block=nn.ModuleList(blocks)), width
            if i < levels - 1:
                part.downsample = module(conv=nn.Conv2d(c, c, 3, 2))
            down.append(part)
        self.encoder = module(down=down, mid=middle(c), **ends(3, widths[0], c, latents))
        up = []
        for i in reversed(range(levels)):
            blocks = [CoderBlock(c if j == 0 else widths[i], widths[i]) for j in range(layers + 1)]
            part, c = module(block=nn.ModuleList(blocks)), widths[i]
            if i:
                part.upsample = module(conv=nn.Conv2d(c, c, 3, padding=1))
            up.insert(0, part)
        self.decoder = module(
            up=nn.ModuleList(up), mid=middle(widths[-1]), **ends(latents, widths[-1], c, 3)
        )
        self.quantize = module(embedding=nn.Embedding(config["num_vq_embeddings"], latents))
        self.quant_conv = nn.Conv2d(latents, latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)

    @staticmethod
    def _middle(mid, x):
        return mid.block_2(mid.attn_1(mid.block_1(x)))

    def encode(self, x):
        e = self.encoder
        x = e.conv_in(x)
        for part in e.down:
            for block in part.block:
                x = block(x)
            if hasattr(part, "downsample"):
                x = part.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return self.quant_conv(e.conv_out(F.silu(e.norm_out(self._middle(e.mid, x)))))

    def decode(self, z):
        d, codes = self.decoder, self.quantize.embedding.weight
        flat = z.movedim(1, -1)
        nearest = torch.cdist(flat.reshape(-1, z.shape[1]), codes).argmin(1)
        z = codes[nearest].view_as(flat).movedim(-1, 1)
        x = self._middle(d.mid, d.conv_in(self.post_quant_conv(z)))
        for part in reversed(d.up):
            for block in part.block:
                x = block(x)
            if hasattr(part, "upsample"):
                x = part.upsample.conv(F.interpolate(x, scale_factor=2))
        return d.conv_out(F.silu(d.norm_out(x)))


def original_checkpoint(path, averaged, trained, coder):
    """What PyTorch Lightning writes; it mentions a class of its own."""
    state = {f"model.diffusion_model.{k}": v for k, v in trained.state_dict().items()}
    for name, value in averaged.state_dict().items():
        state["model_ema.diffusion_model" + name.replace(".", "")] = value
    state |= {f"first_stage_model.{k}": v for k, v in coder.state_dict().items()}
    state |= {"betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    places = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    places.append("pytorch_lightning.callbacks.model_checkpoint")
    kept = {name: sys.modules.get(name) for name in places}
    sys.modules |= {name: types.ModuleType(name) for name in places}
    mentioned = type("ModelCheckpoint", (), {"__module__": places[-1]})
    sys.modules[places[-1]].ModelCheckpoint = mentioned
    torch.save({"state_dict": state, "callbacks": {mentioned: {"best": 1}}, "epoch": 7}, path)
    for name, before in kept.items():
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def test_converted_checkpoint_computes_what_the_original_does(tmp_path):
    torch.manual_seed(2)
    averaged, trained = OriginalUNet(UNET).eval(), OriginalUNet(UNET)
    coder = OriginalAutoencoder(AUTOENCODER).eval()
    original_checkpoint(tmp_path / "model.ckpt", averaged, trained, coder)
    latent.convert_ldm(tmp_path / "model.ckpt", tmp_path / "made", UNET, AUTOENCODER)
    denoiser = latent.lsun_bedroom_ldm(tmp_path / "made")
    x = noise(2, *denoiser.shape).float()
    with torch.no_grad():
        expected = averaged(x, torch.tensor([3.0, 700.5]))
        close(denoiser.unet(x, torch.tensor([3.0, 700.5])).sample, expected, 1e-5)
        images = noise(2, 3, 16, 16).float()
        close(denoiser.autoencoder.encode(images).latents, coder.encode(images), 1e-5)
        expected = coder.decode(x / 0.5)
        close(denoiser.decode(x), expected.clamp(-1, 1), 1e-5)
    # it is a pipeline of diffusers too
    pipe = diffusers.LDMPipeline(denoiser.autoencoder, denoiser.unet, diffusers.DDIMScheduler())
    assert set(pipe.components) == {path.name for path in (tmp_path / "made").iterdir()}


def test_conversion_fits_to_the_published_size():
    """Names and shapes of the real networks, without their weights."""
    with torch.device("meta"):
        unet = OriginalUNet(latent.LSUN_UNET)
        made = latent._unet_weights(unet.state_dict(), 2, 32)
        expected = diffusers.UNet2DModel(**latent.LSUN_UNET).state_dict()
        coder = OriginalAutoencoder(latent.LSUN_AUTOENCODER)
        made |= latent._autoencoder_weights(coder.state_dict(), 3)
        expected |= diffusers.VQModel(**latent.LSUN_AUTOENCODER).state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in expected.items()}
    # Rombach et al. (2022), Table 12: 274 million parameters
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == 274


def test_bad_checkpoints(tmp_path):
    target = tmp_path / "made"
    path = tmp_path / "model.ckpt"
    with pytest.raises(ValueError, match=r"model\.ckpt is missing, damaged, or holds something"):
        latent.convert_ldm(path, target)
    torch.save({"state_dict": {}, "trap": Trap(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match="such content is not executed"):
        latent.convert_ldm(path, target)
    assert not (tmp_path / "executed").exists()
    trained, coder = OriginalUNet(UNET), OriginalAutoencoder(AUTOENCODER)
    original_checkpoint(path, trained, trained, coder)
    other = UNET | {"block_out_channels": (32, 96)}
    with pytest.raises(ValueError, match="are not those of this architecture"):
        latent.convert_ldm(path, target, other, AUTOENCODER)
    assert not target.exists()
