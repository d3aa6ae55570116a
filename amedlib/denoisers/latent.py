"""Latent diffusion (Rombach et al., 2022, arXiv:2112.10752) as D(x; t), through diffusers.

The networks, their weights and the text encoder come from diffusers and transformers (extra
``paper``). Here they get the convention of everything else: x = x_0 + t n with the noise level t.
The network was trained on 1000 levels with the input x / sqrt(1 + t^2) and predicts the noise n,
so D(x; t) = x - t n. Between two levels its time step is interpolated, linearly in log alpha, as
the released code of the paper does (``CFGPrecond``); sigma_min and sigma_max are its first and last
level, also as there.

Weights are read from safetensors files only, never from a pickle; ``convert_ldm`` alone opens one,
restricted to its tensors.

**Stable Diffusion v1** comes from the Hugging Face hub, see ``stable_diffusion``.

**LSUN Bedroom** is published as a checkpoint of the original code only: ``lsun_bedrooms.zip`` from
``https://ommer-lab.com/files/latent-diffusion/``; its ``model.ckpt`` holds the autoencoder too. The
two conversion scripts of diffusers for such checkpoints do not run any more (one imports a class
that is gone, the other calls ``UNet2DModel`` with argument names that are gone), and neither takes
the averaged weights, with which the released code samples. So it is converted here, once::

    from amedlib.denoisers import latent

    latent.convert_ldm("lsun_bedrooms/model.ckpt", "lsun_bedroom_ldm")
    denoiser = latent.lsun_bedroom_ldm("lsun_bedroom_ldm")
"""

import importlib
import pickle
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.autograd.forward_ad as fwad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from amedlib.checks import require
from amedlib.schedules import BETAS, noise_levels

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Latent models need {name} from the paper extra: pip install 'amedlib[paper]'."
        ) from error


class LatentDenoiser(nn.Module):
    """D(x; t) of a latent diffusion model, with its autoencoder and, if any, its text encoder.

    All weights are frozen. ``.to(device)`` and ``.half()`` work as on any module; the state is
    combined in the dtype of x.

    Args:
        unet: ``UNet2DConditionModel`` or ``UNet2DModel`` of diffusers; predicts the noise.
        autoencoder: ``AutoencoderKL`` or ``VQModel`` of diffusers.
        sigmas: the noise levels that the network was trained on, ascending.
        guidance: scale w of classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598),
            n = n_uncond + w (n_cond - n_uncond). 1 is the conditional model alone.
        tokenizer, text_encoder: of transformers, for a model that takes text.

    Attributes:
        sigmas: [levels] float64; ``make_schedule("discrete", sigmas=denoiser.sigmas, ...)``.
        sigma_min, sigma_max: the first and the last of them.
        shape: of a latent, (C, H, W).
        bottleneck_size: (h, w) of the output of the network's middle block.
        evaluations_per_call: network evaluations per sample and call: 2 with guidance, else 1.
    """

    gives_bottleneck = True

    def __init__(self, unet, autoencoder, sigmas, guidance=1.0, tokenizer=None, text_encoder=None):
        super().__init__()
        require(np.isfinite(guidance), "guidance", guidance, "a finite number")
        require(
            guidance == 1 or text_encoder is not None,
            "guidance",
            guidance,
            "1 for a model without text",
        )
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.tokenizer, self.guidance = tokenizer, float(guidance)
        self.sigmas = np.asarray(sigmas, dtype=np.float64)
        self.sigma_min, self.sigma_max = float(self.sigmas[0]), float(self.sigmas[-1])
        self.log_alphas = torch.from_numpy(-0.5 * np.log1p(self.sigmas**2))
        self.evaluations_per_call = 1 if guidance == 1 else 2
        size = unet.config.sample_size
        self.shape = (unet.config.in_channels, size, size)
        self.bottleneck_size = (size // 2 ** (len(unet.config.block_out_channels) - 1),) * 2
        self.eval().requires_grad_(False)
        self.register_buffer("no_text", None if text_encoder is None else self.encode([""]))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings [B, tokens, dim] of texts, the ``labels`` of this model.

        What does not fit into ``tokens`` tokens (77 for Stable Diffusion v1) is cut off.
        """
        require(self.text_encoder is not None, "the model", "one without text", "one with text")
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.text_encoder.device))[0]

    @torch.no_grad()
    def decode(self, x: torch.Tensor, batch: int = 4) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] of final states x [B, C, h, w], ``batch`` at a time."""
        z = (x / self.autoencoder.config.scaling_factor).to(self.autoencoder.dtype)
        images = [self.autoencoder.decode(part).sample for part in z.split(batch)]
        return torch.cat(images).clamp(-1, 1)

    def time_step(self, sigma: torch.Tensor) -> torch.Tensor:
        """The network's time step at noise levels sigma [n]: the level's number, from 0.

        Linear in log alpha = -log(1 + sigma^2) / 2 between two levels and beyond the ends.
        """
        # Moved here, and once: with the module they could become half, and a GPU waits for it.
        levels = self.log_alphas = self.log_alphas.to(sigma)
        log_alpha = -0.5 * torch.log1p(sigma**2)
        above = torch.searchsorted(-levels, -log_alpha.detach()).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return above - 1 + (log_alpha - low) / (high - low)

    def _check_labels(self, labels, count):
        if self.no_text is None:
            require(labels is None, "labels", labels, "None for a model without text")
        else:
            shape = (count, *self.no_text.shape[1:])
            given = tuple(labels.shape) if torch.is_tensor(labels) else labels
            require(
                given == shape, "labels", given, f"of shape {list(shape)}, from encode(prompts)"
            )

    def forward(self, x, t, labels=None, return_bottleneck=False):
        """The denoised latent D(x; t), in the dtype of x.

        Args:
            x: [B, C, h, w].
            t: noise level, a positive number or one per sample [B, 1, 1, 1].
            labels: text embeddings [B, tokens, dim], from ``encode``; ``None`` without text.
            return_bottleneck: return (D, output of the network's middle block [B, Ch, h, w]),
                with guidance that of the conditional half, as in the released code.

        Raises:
            ValueError: t or labels do not fit to the batch.
        """
        sigma = torch.as_tensor(t, dtype=torch.float64, device=x.device).reshape(-1, 1, 1, 1)
        if len(sigma) not in (1, len(x)):
            require(False, "t", tuple(sigma.shape), f"one number or one per sample ({len(x)})")
        self._check_labels(labels, len(x))
        scaled = (x / (1 + sigma**2).sqrt()).to(self.unet.dtype)
        step = self.time_step(sigma.flatten()).expand(len(x))
        text = () if labels is None else (labels.to(self.unet.dtype),)
        guided = self.guidance != 1
        if guided:
            scaled, step = torch.cat([scaled, scaled]), torch.cat([step, step])
            text = (torch.cat([self.no_text.to(self.unet.dtype).expand(text[0].shape), text[0]]),)
        seen = []
        hook = self.unet.mid_block.register_forward_hook(lambda *call: seen.append(call[-1]))
        # Of the attention kernels, only this one can be differentiated in forward mode.
        dual = fwad.unpack_dual(scaled).tangent is not None
        try:
            with sdpa_kernel(SDPBackend.MATH) if dual else nullcontext():
                noise = self.unet(scaled, step, *text).sample.to(x.dtype)
        finally:
            hook.remove()
        bottleneck = seen[0]
        if guided:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + self.guidance * (conditional - unconditional)
            bottleneck = bottleneck.chunk(2)[1]
        denoised = x - (sigma * noise).to(x.dtype)
        return (denoised, bottleneck) if return_bottleneck else denoised


# --- from files in the layout of diffusers -------------------------------------------------------


def _part(library, source, name, cache_dir, local_files_only):
    """A part of a pipeline: ``library`` is the class; the configuration alone for a scheduler."""
    folder = Path(source) / name
    weights = issubclass(library, nn.Module)
    if weights and folder.is_dir() and not list(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise ValueError(
            f"The folder {folder} must hold its weights as a .safetensors file, other formats can "
            f"execute code and are not opened; it holds {found}."
        )
    options = {"cache_dir": cache_dir, "local_files_only": local_files_only, "subfolder": name}
    if weights:
        options["use_safetensors"] = True
    load = library.load_config if name == "scheduler" else library.from_pretrained
    try:
        return load(str(source), **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} of {str(source)!r} was not found: neither in a folder of this name nor "
            f"in the cache {cache_dir or 'of Hugging Face'}"
            f"{'' if local_files_only else ', nor could it be downloaded'} as safetensors; "
            f"download the repository {str(source)!r} by hand, subfolders as they are, and give "
            "its folder as source."
        ) from error


def _scheduler(name):
    """The noise levels as a scheduler of diffusers names them."""
    first, last, power = BETAS[name]
    return {
        "num_train_timesteps": len(noise_levels(name)),
        "beta_start": first,
        "beta_end": last,
        "beta_schedule": {1: "linear", 1 / 2: "scaled_linear"}[power],
        "prediction_type": "epsilon",
    }


def _levels(name, config):
    """The noise levels of the model ``name``, if the files' scheduler says the same."""
    expected = _scheduler(name)
    # "epsilon" is the default, which old files such as Stable Diffusion's do not mention
    found = {key: config.get(key, "epsilon") for key in expected}
    require(found == expected, f"the scheduler of {name}", found, str(expected))
    return noise_levels(name)


def stable_diffusion(
    source: str | Path = STABLE_DIFFUSION,
    guidance: float = 7.5,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> LatentDenoiser:
    """Stable Diffusion v1: latents 4x64x64, images 3x512x512, labels are embeddings of prompts.

    Args:
        source: repository on the Hugging Face hub, or a folder of the same layout (subfolders unet,
            vae, text_encoder, tokenizer, scheduler).
        guidance: scale of classifier-free guidance; the paper uses the default, 7.5.
        cache_dir: where downloads are kept.
        local_files_only: use what has been downloaded, without asking the network.

    Raises:
        ImportError: the ``paper`` extra is not installed.
        ValueError: the files are missing or no safetensors.
    """
    diffusers, transformers = _library("diffusers"), _library("transformers")
    parts = {
        "scheduler": diffusers.DDIMScheduler,
        "tokenizer": transformers.CLIPTokenizer,
        "text_encoder": transformers.CLIPTextModel,
        "vae": diffusers.AutoencoderKL,
        "unet": diffusers.UNet2DConditionModel,
    }
    got = {
        name: _part(library, source, name, cache_dir, local_files_only)
        for name, library in parts.items()
    }
    return LatentDenoiser(
        got["unet"],
        got["vae"],
        _levels("stable_diffusion", got["scheduler"]),
        guidance,
        got["tokenizer"],
        got["text_encoder"],
    )


def lsun_bedroom_ldm(source: str | Path) -> LatentDenoiser:
    """Unconditional latent diffusion on LSUN Bedroom: latents 3x64x64, images 3x256x256.

    Args:
        source: the folder that ``convert_ldm`` made (subfolders unet, vqvae, scheduler).

    Raises:
        ImportError: the ``paper`` extra is not installed.
        ValueError: the folder is missing, or its files are no safetensors.
    """
    diffusers = _library("diffusers")
    if not Path(source).is_dir():
        raise ValueError(
            f"The folder {source} is missing; amedlib.denoisers.latent.convert_ldm makes it from "
            "the model.ckpt in lsun_bedrooms.zip of https://ommer-lab.com/files/latent-diffusion/."
        )
    parts = {
        "scheduler": diffusers.DDIMScheduler,
        "vqvae": diffusers.VQModel,
        "unet": diffusers.UNet2DModel,
    }
    got = {name: _part(library, source, name, None, True) for name, library in parts.items()}
    levels = _levels("lsun_bedroom_ldm", got["scheduler"])
    return LatentDenoiser(got["unet"], got["vqvae"], levels)


# --- from a checkpoint of the original code ------------------------------------------------------

# models/ldm/lsun_beds256/config.yaml of CompVis/latent-diffusion, in the words of diffusers.
LSUN_UNET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    "attention_head_dim": 32,
}
LSUN_AUTOENCODER = {
    "sample_size": 256,
    "latent_channels": 3,
    "vq_embed_dim": 3,
    "num_vq_embeddings": 8192,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 1.0,  # of the original; diffusers' default is Stable Diffusion's
}
# Names inside a block: the original code's and diffusers'.
UNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "proj_out": "to_out.0",
    "norm": "group_norm",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
AUTOENCODER_NAMES = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "norm_out": "conv_norm_out",
    "nin_shortcut": "conv_shortcut",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
}


def _renamed(name, names):
    """Replace whole dotted parts, longest first."""
    for old in sorted(names, key=len, reverse=True):
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", names[old], name)
    return name


def _unet_weights(state, layers, head_dim):
    """The UNet's weights under the names of diffusers; ``layers`` residual blocks per level."""
    weights = {}
    for name, value in state.items():
        block = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
        if block and name[:15] != "input_blocks.0.":
            side, number, place, rest = block.groups()
            # the very first block on the way down is the convolution at the input
            level, layer = divmod(int(number) - (side == "input"), layers + 1)
            kind = f"{'attentions' if int(place) else 'resnets'}.{layer}"
            if rest.startswith(("op.", "conv.")):
                kind = "downsamplers.0.conv" if side == "input" else "upsamplers.0.conv"
                rest = rest.partition(".")[2]
            name = f"{'down' if side == 'input' else 'up'}_blocks.{level}.{kind}.{rest}"
        name = _renamed(name, UNET_NAMES)
        if ".attentions." in name and "group_norm" not in name:
            value = value.flatten(1) if value.ndim == 3 else value  # a convolution of width one
        if ".qkv." in name:
            heads = len(value) // (3 * head_dim)
            each = value.unflatten(0, (heads, 3, head_dim)).unbind(1)
            for letter, part in zip("qkv", each, strict=True):
                weights[name.replace("qkv", f"to_{letter}")] = part.flatten(0, 1)
        else:
            weights[name] = value
    return weights


def _autoencoder_weights(state, levels):
    weights = {}
    for name, value in state.items():
        name = re.sub(r"(?<=encoder\.down)\.(\d)\.", r"_blocks.\1.", name)
        name = re.sub(
            r"(?<=decoder\.up)\.(\d)\.", lambda m: f"_blocks.{levels - 1 - int(m[1])}.", name
        )
        name = _renamed(name.replace(".block.", ".resnets."), AUTOENCODER_NAMES)
        is_linear = ".attentions." in name and value.ndim == 4
        weights[name] = value.flatten(1) if is_linear else value
    return weights


class _Ignored:
    """Stands in for a class of PyTorch Lightning that such checkpoints mention."""


def _read_checkpoint(path):
    # torch's restriction to tensors was incomplete before (CVE-2025-32434, CVE-2026-24747)
    version = torch.__version__
    require(version >= "2.10", "the version of torch", version, "2.10 or newer for this conversion")
    mentioned = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    try:
        with torch.serialization.safe_globals([(_Ignored, mentioned)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return content["state_dict"]
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(
            f"The file {path} is missing, damaged, or holds something else than the tensors of a "
            "checkpoint of latent diffusion; such content is not executed."
        ) from error


def _below(state, prefix):
    """The weights whose names begin so, without that beginning."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def convert_ldm(
    checkpoint: str | Path,
    folder: str | Path,
    unet: dict = LSUN_UNET,
    autoencoder: dict = LSUN_AUTOENCODER,
) -> None:
    """Convert the checkpoint on LSUN Bedroom of the original code (CompVis/latent-diffusion).

    The UNet gets the averaged weights, with which the released code samples too. Only tensors are
    read from the file; nothing in it is executed.

    Args:
        checkpoint: the original ``model.ckpt``.
        folder: to be made, in the layout of diffusers (``LDMPipeline``).
        unet, autoencoder: arguments of diffusers' ``UNet2DModel`` and ``VQModel``; those of LSUN
            Bedroom unless given.

    Raises:
        ImportError: the ``paper`` extra is not installed.
        ValueError: the file is no such checkpoint, or its weights do not fit to the arguments.
    """
    diffusers = _library("diffusers")
    state = _read_checkpoint(checkpoint)
    try:
        # the averages are stored under names without dots
        averaged = {
            name: state["model_ema.diffusion_model" + name.replace(".", "")]
            for name in _below(state, "model.diffusion_model.")
        }
        network, coder = diffusers.UNet2DModel(**unet), diffusers.VQModel(**autoencoder)
        layers = unet["layers_per_block"], unet["attention_head_dim"]
        network.load_state_dict(_unet_weights(averaged, *layers))
        kept = _below(state, "first_stage_model.")
        coder.load_state_dict(_autoencoder_weights(kept, len(autoencoder["block_out_channels"])))
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"The weights in {checkpoint} are not those of this architecture: {error}."
        ) from error
    for name, part in (
        ("unet", network),
        ("vqvae", coder),
        ("scheduler", diffusers.DDIMScheduler(**_scheduler("lsun_bedroom_ldm"), clip_sample=False)),
    ):
        part.save_pretrained(Path(folder) / name)
