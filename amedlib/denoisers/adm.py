"""OpenAI's pixel-space networks, run by our DhariwalUNet: ADM and its classifier, EDM on LSUN.

ADM is Dhariwal and Nichol (2021, arXiv:2105.05233, openai/guided-diffusion); the EDM networks of
LSUN Bedroom and LSUN Cat come with consistency models (Song et al., 2023, arXiv:2303.01469,
openai/consistency_models). The functions ``cm_denoiser``, ``adm_denoiser`` and ``adm_classifier``
take the state dict of a checkpoint; :class:`GuidedDenoiser` joins a denoiser and a classifier.

The bottleneck is the output of OpenAI's ``middle_block``, as AMED-Solver's released code takes it
from these networks.
"""

import math
from collections.abc import Mapping
from functools import cache

import torch
import torch.autograd.forward_ad as fwad
from torch import nn

from amedlib.checks import one_of, require
from amedlib.denoisers.edm import EDMPrecond, _Precond
from amedlib.denoisers.layers import GroupNorm, UNetBlock
from amedlib.denoisers.unet import DhariwalUNet
from amedlib.schedules import noise_levels

# --- time ---------------------------------------------------------------------------------------

# The noise levels that ADM was trained at, ascending, [1000].
SIGMAS = noise_levels("adm")
# The continuous VP process that AMED-Solver's released code puts in their place (its CGPrecond).
_BETA_D, _BETA_MIN, _TIME_MIN = 19.9, 0.1, 1e-3
TIME_MAPS = ("release", "levels")


def sigma_range(time_map: str = "release") -> tuple[float, float]:
    """The lowest and the highest noise level that ADM is used at under a time map."""
    one_of("time_map", time_map, TIME_MAPS)
    if time_map == "levels":
        return float(SIGMAS[0]), float(SIGMAS[-1])
    low, high = (
        math.sqrt(math.expm1(_BETA_D * t**2 / 2 + _BETA_MIN * t)) for t in (_TIME_MIN, 1.0)
    )
    return low, high


@cache
def _minus_log_alpha_bar(device: torch.device) -> torch.Tensor:
    """Of the ``SIGMAS``; copied to a device once, which waits for it."""
    with torch.inference_mode(False):  # what is made in it could not be used in a training
        return torch.as_tensor(SIGMAS, device=device).square().log1p()


def timestep(sigma: torch.Tensor, time_map: str = "release") -> torch.Tensor:
    """ADM's (fractional) timestep of noise levels, in the shape and dtype of sigma.

    With ``"levels"`` the i-th of the ``SIGMAS`` has timestep i, from 0 to 999, and between two of
    them (and beyond the ends) log alpha is linear in the timestep, as in the schedule
    ``"discrete"``. With ``"release"`` it is 999 tau, where tau is the time of the VP process with
    sigma^2 = exp(19.9 tau^2 / 2 + 0.1 tau) - 1: so the paper's released code does it.
    """
    one_of("time_map", time_map, TIME_MAPS)
    minus_log_alpha_bar = sigma.double().square().log1p()
    if time_map == "release":
        root = (_BETA_MIN**2 + 2 * _BETA_D * minus_log_alpha_bar).sqrt()
        steps = 999 * (root - _BETA_MIN) / _BETA_D
    else:
        levels = _minus_log_alpha_bar(sigma.device)
        upper = torch.searchsorted(levels, minus_log_alpha_bar.detach()).clamp(1, 999)
        start, end = levels[upper - 1], levels[upper]
        steps = upper - 1 + (minus_log_alpha_bar - start) / (end - start)
    return steps.to(sigma.dtype)


# --- networks -----------------------------------------------------------------------------------


class _NeedsLabels:
    """A class-conditional network of OpenAI knows no "no label"."""

    def forward(self, x, sigma, labels=None, return_bottleneck=False):
        """D(x; sigma), see ``_Precond``; labels are needed if the network takes any."""
        require(
            labels is not None or not self.label_dim,
            "labels",
            labels,
            f"of shape [{len(x)}, {self.label_dim}] for this class-conditional network",
        )
        return super().forward(x, sigma, labels, return_bottleneck=return_bottleneck)


class CMPrecond(_NeedsLabels, EDMPrecond):
    """EDM's preconditioner with the noise label 1000 log(sigma) / 4 (KarrasDenoiser of cm).

    These are the scalings of the networks trained as denoisers (``edm_*.pt``); those distilled into
    consistency models have other ones.
    """

    def scalings(self, sigma):
        c_skip, c_out, c_in, c_noise = super().scalings(sigma)
        return c_skip, c_out, c_in, 1000 * c_noise


class ADMPrecond(_NeedsLabels, _Precond):
    """A network that predicts the noise eps of x / sqrt(1 + sigma^2): D = x - sigma eps.

    time_map: see :func:`timestep`. ``sigmas`` [1000] are the levels of the training, ascending;
    ``sigma_min`` and ``sigma_max`` those of :func:`sigma_range`.
    """

    def __init__(self, time_map="release", **kwargs):
        super().__init__("DhariwalUNet", **kwargs)
        self.time_map, self.sigmas = time_map, SIGMAS
        self.sigma_min, self.sigma_max = sigma_range(time_map)

    def scalings(self, sigma):
        c_in = 1 / (1 + sigma.square()).sqrt()
        return 1, -sigma, c_in, timestep(sigma, self.time_map)


class AttentionPool(nn.Module):
    """Features [B, C, H, W] to [B, outputs]: what their mean attends to in them, projected."""

    def __init__(self, resolution, channels, outputs):
        super().__init__()
        self.heads = channels // 64
        self.positional_embedding = nn.Parameter(
            torch.randn(channels, resolution**2 + 1) / math.sqrt(channels)
        )
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding
        # order of the channels in the weights: q, k, v, then head, then channel of the head
        q, k, v = self.qkv_proj(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        weights = (q[..., :1].transpose(2, 3) @ (k / math.sqrt(k.shape[2]))).softmax(-1)
        return self.c_proj((v @ weights.transpose(2, 3)).flatten(1, 2))[..., 0]


class EncoderUNet(DhariwalUNet):
    """ADM without its decoder: the middle blocks' output, pooled to [B, outputs]."""

    def __init__(self, img_resolution, in_channels, outputs, **kwargs):
        super().__init__(img_resolution, in_channels, outputs, **kwargs)
        self.dec = nn.ModuleDict({name: b for name, b in self.dec.items() if "_in" in name})
        *_, last = self.dec.values()
        self.out_norm = GroupNorm(last.out_channels)
        self.out_conv = AttentionPool(self.bottleneck_size[0], last.out_channels, outputs)


class NoisyClassifier(nn.Module):
    """The classifier of ADM: logits of p(class | x; sigma), in the coordinates of the denoiser."""

    def __init__(self, label_dim, img_resolution, img_channels, time_map="release", **kwargs):
        super().__init__()
        one_of("time_map", time_map, TIME_MAPS)
        self.time_map, self.label_dim = time_map, label_dim
        self.model = EncoderUNet(img_resolution, img_channels, label_dim, **kwargs)

    def forward(self, x, sigma):
        """Logits [B, label_dim] of noisy images [B, C, H, W], in the dtype of the parameters.

        sigma: standard deviation of the noise, a number or one per sample [B, 1, 1, 1].
        """
        weight = self.model.map_layer0.weight
        sigma = torch.as_tensor(sigma, dtype=weight.dtype, device=x.device).reshape(-1, 1, 1, 1)
        scaled = x.to(weight.dtype) / (1 + sigma.square()).sqrt()
        return self.model(scaled, timestep(sigma, self.time_map).flatten())[0]


# --- classifier guidance ------------------------------------------------------------------------


class GuidedDenoiser(nn.Module):
    """A denoiser guided by a classifier: D(x; t) + scale t^2 grad_x log p(labels | x; t).

    This is Dhariwal and Nichol's eps - sqrt(1 - alpha_bar) grad log p (Algorithm 2, Eq. 14) written
    for D, x and t: their gradient is taken at x / sqrt(1 + t^2) and so is sqrt(1 + t^2) times ours.
    By Tweedie's formula it is, at scale 1 and with the true p, the denoiser of the labelled data.
    A call counts as one evaluation, as in the paper.

    Parameters
    ----------
    denoiser : callable (x, t, labels=None). It gets the labels too, unless its ``label_dim`` is 0.
    classifier : callable (x, t) that returns logits [B, classes], differentiable in x.
    scale : strength of the guidance, at least 0.
    clip : whether the result is clipped to [-1, 1], as the paper's released code does.

    In a graph (where gradients are on and x or t need one) the derivative is exact, second
    derivatives of the classifier included.
    """

    def __init__(self, denoiser, classifier, scale: float, clip: bool = True):
        super().__init__()
        require(0 <= scale < math.inf, "scale", scale, "a number of at least 0")
        self.denoiser, self.classifier, self.scale, self.clip = denoiser, classifier, scale, clip
        self.gives_bottleneck = getattr(denoiser, "gives_bottleneck", False)
        if self.gives_bottleneck:
            self.bottleneck_size = denoiser.bottleneck_size

    def _gradient(self, x, t, labels):
        """grad_x log p(labels | x; t), of the shape of x."""
        keeps = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
        with torch.enable_grad():
            if not (keeps and x.requires_grad):
                x = x.detach().requires_grad_()
            logits = self.classifier(x, t)
            given = tuple(labels.shape)
            require(logits.shape == given, "labels", given, f"of shape {list(logits.shape)}")
            log_p = (logits.log_softmax(1) * labels).sum()
            return torch.autograd.grad(log_p, x, create_graph=keeps)[0]

    def forward(self, x, t, labels=None, return_bottleneck=False):
        """The guided D(x; t) [B, C, H, W], in the dtype of the unguided one.

        t: a number or one per sample [B, 1, 1, 1]. labels: one-hot [B, classes]. With
        ``return_bottleneck`` the result is (D, bottleneck of the denoiser).

        Raises ValueError when the labels are missing or do not fit, and in forward mode.
        """
        require(torch.is_tensor(labels), "labels", labels, "one-hot classes, to be guided towards")
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        is_dual = any(fwad.unpack_dual(value).tangent is not None for value in (x, t))
        require(
            not is_dual, "gradient", "forward", "'reverse' through a classifier-guided denoiser"
        )
        t = t.reshape(-1, 1, 1, 1)
        gradient = self._gradient(x, t, labels)
        taken = None if getattr(self.denoiser, "label_dim", None) == 0 else labels
        options = {"return_bottleneck": True} if return_bottleneck else {}
        out = self.denoiser(x, t, taken, **options)
        denoised, *bottleneck = out if return_bottleneck else (out,)
        denoised = denoised + (self.scale * t.square() * gradient).to(denoised.dtype)
        if self.clip:
            denoised = denoised.clamp(-1, 1)
        return (denoised, *bottleneck) if return_bottleneck else denoised


# --- checkpoints --------------------------------------------------------------------------------

# Our names of the layers and OpenAI's.
_OUTER = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_label": "label_emb",
    "out_norm": "out.0",
    "out_conv": "out.2",
    "out_conv.qkv_proj": "out.2.qkv_proj",
    "out_conv.c_proj": "out.2.c_proj",
}
_RESIDUAL = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
# How the rows of a q, k, v projection are ordered: the old way of guided-diffusion is head, then
# q, k, v, then channel of the head; its new one, and that of consistency models, q, k, v, then
# head, then channel. EDM has head, channel, then q, k, v.
ATTENTION_ORDERS = ("heads", "qkv")


def _openai_names(unet):
    """Our parameter names to OpenAI's."""
    places = {}  # our block: where OpenAI has its residual and its attention part
    for i, name in enumerate(unet.enc):
        places[f"enc.{name}"] = f"input_blocks.{i}.0", f"input_blocks.{i}.1"
    i, parts = -1, 0
    for name, block in unet.dec.items():
        if name.endswith("_in0"):
            place = "middle_block.0", "middle_block.1"
        elif name.endswith("_in1"):
            place = "middle_block.2", None
        elif name.endswith("_up"):  # the last part of the block before
            place = f"output_blocks.{i}.{parts}", None
        else:
            i, parts = i + 1, 2 if block.heads else 1
            place = f"output_blocks.{i}.0", f"output_blocks.{i}.1"
        places[f"dec.{name}"] = place

    layers = dict(_OUTER)
    for name, (residual, attention) in places.items():
        layers[name] = residual  # the first convolution is a layer itself
        layers |= {f"{name}.{ours}": f"{residual}.{theirs}" for ours, theirs in _RESIDUAL.items()}
        layers |= {f"{name}.{ours}": f"{attention}.{theirs}" for ours, theirs in _ATTENTION.items()}
    split = {name: name.rpartition(".") for name, _ in unet.named_parameters()}
    return {name: f"{layers[layer]}.{kind}" for name, (layer, _, kind) in split.items()}


def _edm_order(rows, heads, order):
    """The rows of a q, k, v projection [3 C, ...] in EDM's order."""
    parts, position = {"heads": ((heads, 3), 1), "qkv": ((3, heads), 0)}[order]
    return rows.reshape(*parts, -1, *rows.shape[1:]).movedim(position, 2).reshape(rows.shape)


def _load(unet, state, attention_order, learn_sigma=False):
    """Fill a network with OpenAI's parameters; every one is used, every one of ours is set."""
    one_of("attention_order", attention_order, ATTENTION_ORDERS)
    for block in unet.modules():
        if isinstance(block, UNetBlock):  # where our rules for groups and heads agree with OpenAI's
            require(
                block.out_channels >= 128 and block.out_channels % 64 == 0,
                "model_channels times a channel_mult",
                block.out_channels,
                "a multiple of 64 and at least 128",
            )
    require(isinstance(state, Mapping), "state", type(state).__name__, "a dictionary of tensors")
    names = _openai_names(unet)
    missing = [name for name in names.values() if name not in state]
    unknown = sorted(state.keys() - set(names.values()))
    found = [f"without {missing[0]!r} ({len(missing)} are missing)"] if missing else []
    found += [f"with {unknown[0]!r} ({len(unknown)} are unknown)"] if unknown else []
    require(not found, "state", " and ".join(found), f"the {len(names)} tensors of this network")

    filled = {}
    for name, parameter in unet.named_parameters():
        value, expected = state[names[name]], list(parameter.shape)
        if name == "map_label.weight":
            expected.reverse()
        elif name.endswith((".qkv.weight", ".proj.weight")) and value.ndim == 3:
            expected.pop()  # a 1x1 convolution over pixels in a row
        elif name.startswith("out_conv.") and learn_sigma:
            expected[0] *= 2  # the mean first, then the variance, which the ODE does not use
        given = list(value.shape)
        require(given == expected, f"the shape of {names[name]}", given, f"{expected}")
        if name == "map_label.weight":
            value = value.T
        elif ".qkv." in name:
            heads = unet.get_submodule(name.rpartition(".qkv")[0]).heads
            value = _edm_order(value, heads, attention_order)
        filled[name] = value[: len(parameter)].reshape(parameter.shape)
    unet.load_state_dict(dict(unet.named_buffers()) | filled)


_LSUN = {
    "img_resolution": 256,
    "img_channels": 3,
    "label_dim": 0,
    "model_channels": 256,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "num_blocks": 2,
    "attn_resolutions": (32, 16, 8),
    "dropout": 0.0,
    "adaptive_scale": False,
}
_IMAGENET = _LSUN | {"label_dim": 1000, "adaptive_scale": True}
_CLASSIFIER = _IMAGENET | {"model_channels": 128}


def _changed(defaults, architecture):
    for name in architecture:
        one_of("the name of a change to the architecture", name, defaults)
    return defaults | architecture


def cm_network(**architecture) -> CMPrecond:
    """The network of ``cm_denoiser`` with random weights."""
    return CMPrecond(0.002, 80.0, **_changed(_LSUN, architecture), middle_bottleneck=True)


def cm_denoiser(state, attention_order: str = "qkv", **architecture) -> CMPrecond:
    """The denoiser of ``edm_bedroom256_ema.pt`` or ``edm_cat256_ema.pt``, frozen, in float32.

    Its noise levels are 0.002 to 80.

    Args:
        state: the checkpoint's state dict.
        attention_order: of its attention, ``"heads"`` or ``"qkv"``; see ``ATTENTION_ORDERS``.
        architecture: what is not as in these checkpoints: img_resolution 256, img_channels 3,
            label_dim 0, model_channels 256, channel_mult (1, 1, 2, 2, 4, 4), num_blocks 2,
            attn_resolutions (32, 16, 8), dropout 0, adaptive_scale False (use_scale_shift_norm).

    Raises:
        ValueError: the state dict is not one of this architecture, or the latter is impossible.
    """
    net = cm_network(**architecture)
    _load(net.model, state, attention_order)
    return net.eval().requires_grad_(False)


def adm_denoiser(
    state,
    time_map: str = "release",
    attention_order: str = "heads",
    learn_sigma: bool = True,
    **architecture,
) -> ADMPrecond:
    """The denoiser of ``256x256_diffusion.pt``, frozen, in float32; unguided and not clipped.

    Args:
        state: the checkpoint's state dict.
        time_map: see ``timestep``.
        learn_sigma: whether the network also predicts variances; they are left out.
        attention_order, architecture: as in ``cm_denoiser``, with label_dim 1000 and adaptive_scale
            True unless given. ``256x256_diffusion_uncond.pt`` has label_dim 0.

    Raises:
        ValueError: as in ``cm_denoiser``.
    """
    changed = _changed(_IMAGENET, architecture)
    net = ADMPrecond(time_map, **changed, middle_bottleneck=True)
    _load(net.model, state, attention_order, learn_sigma)
    return net.eval().requires_grad_(False)


def adm_classifier(
    state, time_map: str = "release", attention_order: str = "heads", **architecture
) -> NoisyClassifier:
    """The classifier of ``256x256_classifier.pt``, frozen, in float32.

    Arguments as in ``adm_denoiser``, with model_channels 128 unless given; label_dim is the number
    of classes.

    Raises:
        ValueError: as in ``cm_denoiser``.
    """
    changed = _changed(_CLASSIFIER, architecture)
    classifier = NoisyClassifier(time_map=time_map, **changed)
    _load(classifier.model, state, attention_order)
    return classifier.eval().requires_grad_(False)
