"""The layers of EDM's U-Nets, with the names of EDM's checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from amedlib.checks import one_of, require


def _initial(shape, fan_in, fan_out, init_mode):
    """Random start values; a uniform mode has the variance of the normal mode of the same name."""
    variance = {
        "xavier_uniform": 2 / (fan_in + fan_out),
        "xavier_normal": 2 / (fan_in + fan_out),
        "kaiming_uniform": 1 / fan_in,
        "kaiming_normal": 1 / fan_in,
    }
    one_of("init_mode", init_mode, variance)
    if init_mode.endswith("normal"):
        return torch.randn(shape) * math.sqrt(variance[init_mode])
    return (torch.rand(shape) * 2 - 1) * math.sqrt(3 * variance[init_mode])


class Linear(nn.Module):
    """x W^T + b with EDM's initialisation."""

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        init_mode="kaiming_normal",
        init_weight=1.0,
        init_bias=0.0,
    ):
        super().__init__()
        fans = in_features, out_features
        weight = _initial((out_features, in_features), *fans, init_mode)
        self.weight = nn.Parameter(weight * init_weight)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(_initial((out_features,), *fans, init_mode) * init_bias)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """Convolution, after resampling by two if asked; kernel 0 only resamples.

    The resample filter acts on every channel alone. ``filter_last`` (the residual encoder, which
    goes down) convolves first and filters the result.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel,
        up=False,
        down=False,
        resample_filter=(1, 1),
        filter_last=False,
        init_mode="kaiming_normal",
        init_weight=1.0,
        init_bias=0.0,
    ):
        super().__init__()
        self.out_channels, self.up, self.filter_last = out_channels, up, filter_last
        self.weight = self.bias = None
        if kernel:
            shape = (out_channels, in_channels, kernel, kernel)
            fans = in_channels * kernel**2, out_channels * kernel**2
            self.weight = nn.Parameter(_initial(shape, *fans, init_mode) * init_weight)
            self.bias = nn.Parameter(_initial((out_channels,), *fans, init_mode) * init_bias)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = (taps.outer(taps) / taps.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", taps if up or down else None)
        # with [1, 1] the filter is a mean over 2x2 or a repetition, which are faster by themselves
        self.box = list(resample_filter) == [1, 1]

    def _resampled(self, x):
        if self.box:
            return F.interpolate(x, scale_factor=2.0) if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        taps = self.resample_filter.expand(channels, 1, -1, -1)
        padding = (taps.shape[-1] - 1) // 2
        if self.up:
            return F.conv_transpose2d(x, taps * 4, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)

    def forward(self, x):
        if self.resample_filter is not None and not self.filter_last:
            x = self._resampled(x)
        if self.weight is None:
            return x
        padding = self.weight.shape[-1] // 2
        if not self.filter_last:
            return F.conv2d(x, self.weight, self.bias, padding=padding)
        # all the padding comes first, so that the filter sees no edge
        padding += (self.resample_filter.shape[-1] - 1) // 2
        x = F.conv2d(x, self.weight, self.bias, padding=padding)
        taps = self.resample_filter.expand(self.out_channels, 1, -1, -1)
        return F.conv2d(x, taps, stride=2, groups=self.out_channels)


class GroupNorm(nn.Module):
    """Group normalisation in 32 groups, or fewer where a group would have less than 4 channels."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        require(
            self.groups and channels % self.groups == 0,
            "the channel count of a layer (from model_channels and channel_mult)",
            channels,
            "a multiple of 4, and from 128 on a multiple of 32",
        )
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class UNetBlock(nn.Module):
    """Residual block that takes in the embedding, followed by self-attention if asked.

    ``heads=None`` gives one attention head per 64 channels, so none below 64. ``adaptive_scale``:
    the embedding scales and shifts the normalised features; otherwise it is added before them.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        emb_channels,
        init,
        init_zero,
        init_attn,
        up=False,
        down=False,
        attention=False,
        heads=None,
        dropout=0.0,
        skip_scale=1.0,
        eps=1e-5,
        resample_filter=(1, 1),
        resample_proj=False,
        adaptive_scale=True,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        self.heads = (heads or out_channels // 64) if attention else 0
        resample = {"up": up, "down": down, "resample_filter": resample_filter}

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **init_zero)
        self.skip = None
        if up or down or in_channels != out_channels:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resample, **init)
        if self.heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, **init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, **init_zero)

    def forward(self, x, emb):
        y = self.conv0(F.silu(self.norm0(x)))
        from_emb = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = from_emb.chunk(2, dim=1)
            y = torch.addcmul(shift, self.norm1(y), scale + 1)
        else:
            y = self.norm1(y + from_emb)
        y = self.conv1(F.dropout(F.silu(y), self.dropout, self.training))
        y = (y + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.heads:
            y = (y + self.proj(self._attention(self.qkv(self.norm2(y))))) * self.skip_scale
        return y

    def _attention(self, qkv):
        # order of the channels in EDM's weights: head, channel of the head, then q, k, v
        batch, channels, height, width = qkv.shape
        q, k, v = qkv.reshape(batch * self.heads, -1, 3, height * width).unbind(2)
        weights = (q.transpose(1, 2) @ (k / math.sqrt(k.shape[1]))).softmax(-1)
        return (v @ weights.transpose(1, 2)).reshape(batch, channels // 3, height, width)


class PositionalEmbedding(nn.Module):
    """[cos | sin] of the noise level times frequencies falling from 1 to (or towards) 1/10000."""

    def __init__(self, channels, endpoint):
        super().__init__()
        self.half, self.last = channels // 2, channels // 2 - endpoint

    def forward(self, x):
        k = torch.arange(self.half, dtype=x.dtype, device=x.device)
        phase = x.outer((1 / 10000) ** (k / self.last))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[cos | sin] of 2 pi times the noise level times random frequencies of deviation 16."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, x):
        phase = x.outer(2 * math.pi * self.freqs)
        return torch.cat([phase.cos(), phase.sin()], dim=1)
