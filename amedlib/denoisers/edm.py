"""The networks of EDM (Karras et al., 2022, arXiv:2206.00364) and their preconditioners.

SongUNet is the DDPM++ and NCSN++ architecture of Song et al. (2021, arXiv:2011.13456), DhariwalUNet
the ADM architecture of Dhariwal and Nichol (2021, arXiv:2105.05233), both as EDM configures them.
Parameters and buffers carry the names of EDM's checkpoints, so that these load strictly.

Three things differ from EDM's own classes: all is computed in the dtype of the parameters (after
``.double()`` in float64 throughout, never in half precision); an embedding that is the same for the
whole batch is computed once; and the bottleneck, the output of the last encoder block, comes back
from the call.
"""

import inspect
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


class _UNet(nn.Module):
    """What the two architectures share: checks, label dropout, and a decoder that takes skips."""

    def __init__(self, img_resolution, channel_mult, dropout, label_dropout, **integers):
        super().__init__()
        least = {"label_dim": 0, "augment_dim": 0, "model_channels": 4}
        for name, value in {"img_resolution": img_resolution, **integers}.items():
            low = least.get(name, 1)
            require(isinstance(value, int) and value >= low, name, value, f"an integer >= {low}")
        require(
            len(channel_mult) > 0 and all(isinstance(m, int) and m > 0 for m in channel_mult),
            "channel_mult",
            channel_mult,
            "a list of positive integers, one per resolution",
        )
        factor = 2 ** (len(channel_mult) - 1)
        require(
            img_resolution % factor == 0,
            "img_resolution",
            img_resolution,
            f"a multiple of {factor}, so that channel_mult {list(channel_mult)} can halve it",
        )
        for name, value in {"dropout": dropout, "label_dropout": label_dropout}.items():
            require(0 <= value < 1, name, value, "in [0, 1)")
        self.label_dropout = label_dropout
        self.bottleneck_size = (img_resolution // factor, img_resolution // factor)

    def _dropped(self, labels):
        """Labels [B, label_dim], in training a random part of them set to zero ("no label")."""
        if not (self.training and self.label_dropout):
            return labels
        return labels * (torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout)

    @staticmethod
    def _decoded(block, x, skips, emb):
        # a block with more input channels than x has takes the encoder's last unused output too
        if x.shape[1] != block.in_channels:
            x = torch.cat([x, skips.pop()], dim=1)
        return block(x, emb)


class SongUNet(_UNet):
    """DDPM++ (positional, standard, standard) and NCSN++ (fourier, residual, standard).

    Arguments as in EDM. ``forward`` takes the scaled image, c_noise [B or 1] and labels, and
    returns the raw output and the bottleneck.
    """

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.10,
        label_dropout=0,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        decoder_type="standard",
        resample_filter=(1, 1),
    ):
        one_of("embedding_type", embedding_type, ("positional", "fourier"))
        one_of("encoder_type", encoder_type, ("standard", "skip", "residual"))
        one_of("decoder_type", decoder_type, ("standard", "skip"))
        super().__init__(
            img_resolution,
            channel_mult,
            dropout,
            label_dropout,
            img_channels=in_channels,
            label_dim=label_dim,
            augment_dim=augment_dim,
            model_channels=model_channels,
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
            channel_mult_noise=channel_mult_noise,
        )
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init = {"init_mode": "xavier_uniform"}
        init_zero = {"init_mode": "xavier_uniform", "init_weight": 1e-5}
        init_attn = {"init_mode": "xavier_uniform", "init_weight": math.sqrt(0.2)}

        def block(cin, cout, **options):
            return UNetBlock(
                cin,
                cout,
                emb_channels,
                init,
                init_zero,
                init_attn,
                heads=1,
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                resample_filter=resample_filter,
                resample_proj=True,
                adaptive_scale=False,
                **options,
            )

        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init)
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [(img_resolution >> level, mult) for level, mult in enumerate(channel_mult)]
        resample = {"resample_filter": resample_filter, **init}
        cout, caux, skips = model_channels, in_channels, [model_channels]
        for res, mult in levels:
            if res == img_resolution:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, cout, 3, **init)
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
                skips.append(cout)
                if encoder_type == "skip":
                    self.enc[f"{res}x{res}_aux_down"] = Conv2d(caux, caux, 0, down=True, **resample)
                    self.enc[f"{res}x{res}_aux_skip"] = Conv2d(caux, cout, 1, **init)
                elif encoder_type == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(
                        caux, cout, 3, down=True, filter_last=True, **resample
                    )
                    caux = cout
            for i in range(num_blocks):
                cin, cout = cout, model_channels * mult
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(cin, cout, attention=attention)
                skips.append(cout)

        for res, mult in reversed(levels):
            lowest = res == self.bottleneck_size[0]
            if lowest:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                attention = i == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(cin, cout, attention=attention)
            if decoder_type == "skip" or res == img_resolution:
                if decoder_type == "skip" and not lowest:
                    self.dec[f"{res}x{res}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, up=True, **resample
                    )
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(cout, eps=1e-6)
                self.dec[f"{res}x{res}_aux_conv"] = Conv2d(cout, out_channels, 3, **init_zero)

    def forward(self, x, noise_labels, labels=None, augment_labels=None):
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if self.map_label is not None:
            scale = math.sqrt(labels.shape[1])
            emb = emb + self.map_label(self._dropped(labels) * scale)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips, aux = [], x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) * math.sqrt(0.5)
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
                skips.append(x)
        bottleneck = x

        aux = None
        for name, block in self.dec.items():
            if "aux_up" in name:
                aux = block(aux)
            elif "aux_norm" in name:
                normed = block(x)
            elif "aux_conv" in name:
                out = block(F.silu(normed))
                aux = out if aux is None else aux + out
            else:
                x = self._decoded(block, x, skips, emb)
        return aux, bottleneck


class DhariwalUNet(_UNet):
    """ADM. Arguments as in EDM; ``forward`` as in :class:`SongUNet`.

    Two more, for OpenAI's own checkpoints: ``adaptive_scale`` as in :class:`UNetBlock`; with
    ``middle_bottleneck`` the bottleneck is taken behind the two blocks between encoder and decoder.
    """

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.10,
        label_dropout=0,
        adaptive_scale=True,
        middle_bottleneck=False,
    ):
        super().__init__(
            img_resolution,
            channel_mult,
            dropout,
            label_dropout,
            img_channels=in_channels,
            label_dim=label_dim,
            augment_dim=augment_dim,
            model_channels=model_channels,
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
        )
        emb_channels = model_channels * channel_mult_emb
        third = math.sqrt(1 / 3)
        init = {"init_mode": "kaiming_uniform", "init_weight": third, "init_bias": third}
        init_zero = {"init_mode": "kaiming_uniform", "init_weight": 0.0, "init_bias": 0.0}

        def block(cin, cout, **options):
            options |= {"dropout": dropout, "adaptive_scale": adaptive_scale}
            return UNetBlock(cin, cout, emb_channels, init, init_zero, init, **options)

        self.middle_bottleneck = middle_bottleneck

        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero)
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.map_label = None
        if label_dim:
            self.map_label = Linear(
                label_dim, emb_channels, bias=False, init_weight=math.sqrt(label_dim)
            )

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [(img_resolution >> level, mult) for level, mult in enumerate(channel_mult)]
        cout = model_channels * channel_mult[0]
        skips = [cout]
        for res, mult in levels:
            if res == img_resolution:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, cout, 3, **init)
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
                skips.append(cout)
            for i in range(num_blocks):
                cin, cout = cout, model_channels * mult
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(cin, cout, attention=attention)
                skips.append(cout)

        for res, mult in reversed(levels):
            if res == self.bottleneck_size[0]:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(cin, cout, attention=attention)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, 3, **init_zero)

    def forward(self, x, noise_labels, labels=None, augment_labels=None):
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._dropped(labels))
        emb = F.silu(emb)

        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        bottleneck = x
        for name, block in self.dec.items():
            x = self._decoded(block, x, skips, emb)
            if self.middle_bottleneck and name.endswith("_in1"):
                bottleneck = x
        return self.out_conv(F.silu(self.out_norm(x))), bottleneck


class _Precond(nn.Module):
    """A network F made a denoiser: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)."""

    gives_bottleneck = True

    def __init__(
        self, model_type, img_resolution, img_channels, label_dim=0, use_fp16=False, **model_kwargs
    ):
        super().__init__()
        one_of("model_type", model_type, ("SongUNet", "DhariwalUNet"))
        unet = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}[model_type]
        known = list(inspect.signature(unet).parameters)[4:]  # after the sizes, which are given
        for name in model_kwargs:
            one_of(f"the argument name for {model_type}", name, known)
        self.label_dim = label_dim
        self.model = unet(
            img_resolution, img_channels, img_channels, label_dim=label_dim, **model_kwargs
        )
        self.bottleneck_size = self.model.bottleneck_size

    def forward(self, x, sigma, labels=None, augment_labels=None, return_bottleneck=False):
        """The denoised image D(x; sigma), in the dtype of the parameters.

        x: images with noise [B, C, H, W], data scaled to [-1, 1]. sigma: standard deviation of the
        noise, a positive number or one per sample [B, 1, 1, 1]. labels: one-hot [B, label_dim] or
        None, which means zeros. augment_labels: [B, augment_dim] or None (no augmentation).
        With ``return_bottleneck`` the result is (D, bottleneck [B, Ch, *bottleneck_size]).

        Raises ValueError when sigma or labels do not fit to the batch.
        """
        weight = self.model.map_layer0.weight
        x = x.to(weight.dtype)
        sigma = torch.as_tensor(sigma, dtype=weight.dtype, device=x.device)
        if sigma.numel() not in (1, len(x)):
            require(False, "sigma", tuple(sigma.shape), f"one number or one per image ({len(x)})")
        if labels is not None:
            allowed = f"of shape [{len(x)}, {self.label_dim}]" if self.label_dim else "None"
            require(
                labels.shape == (len(x), self.label_dim), "labels", tuple(labels.shape), allowed
            )
            labels = labels.to(weight.dtype)
        elif self.label_dim:
            labels = x.new_zeros(1, self.label_dim)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma.reshape(-1, 1, 1, 1))
        out, bottleneck = self.model(c_in * x, c_noise.flatten(), labels, augment_labels)
        denoised = c_skip * x + c_out * out
        return (denoised, bottleneck) if return_bottleneck else denoised


class EDMPrecond(_Precond):
    """Preconditioner of EDM (Karras et al., 2022, Table 1, last column)."""

    def __init__(
        self,
        sigma_min=0,
        sigma_max=math.inf,
        sigma_data=0.5,
        model_type="DhariwalUNet",
        **kwargs,
    ):
        super().__init__(model_type, **kwargs)
        require(0 <= sigma_min < sigma_max, "sigma_min", sigma_min, f"in [0, {sigma_max})")
        require(sigma_data > 0, "sigma_data", sigma_data, "positive")
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def scalings(self, sigma):
        total = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        return c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4


class VPPrecond(_Precond):
    """Preconditioner of the variance-preserving models (Karras et al., 2022, Table 1, VP)."""

    def __init__(
        self,
        beta_d=19.9,
        beta_min=0.1,
        M=1000,
        epsilon_t=1e-5,
        model_type="SongUNet",
        **kwargs,
    ):
        super().__init__(model_type, **kwargs)
        require(beta_d > 0, "beta_d", beta_d, "positive")
        require(0 < epsilon_t < 1, "epsilon_t", epsilon_t, "in (0, 1)")
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        self.sigma_min, self.sigma_max = self._sigma(epsilon_t), self._sigma(1)

    def _sigma(self, t):
        return math.sqrt(math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))

    def scalings(self, sigma):
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma.square()).log()).sqrt()
        t = (root - self.beta_min) / self.beta_d
        return 1, -sigma, 1 / (sigma.square() + 1).sqrt(), (self.M - 1) * t


class VEPrecond(_Precond):
    """Preconditioner of the variance-exploding models (Karras et al., 2022, Table 1, VE)."""

    def __init__(
        self,
        sigma_min=0.02,
        sigma_max=100,
        model_type="SongUNet",
        **kwargs,
    ):
        super().__init__(model_type, **kwargs)
        require(0 <= sigma_min < sigma_max, "sigma_min", sigma_min, f"in [0, {sigma_max})")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def scalings(self, sigma):
        return 1, sigma, 1, (0.5 * sigma).log()


def build(precond_class, init_kwargs):
    """A randomly initialised network of EDM, in training mode and float32, as an ``nn.Module``.

    precond_class: "EDMPrecond", "VPPrecond" or "VEPrecond". init_kwargs: the constructor arguments
    of EDM (the ``init_kwargs`` of its checkpoints): img_resolution, img_channels, label_dim,
    model_type "SongUNet" or "DhariwalUNet", the preconditioner's own and those of the architecture.
    ``use_fp16`` is accepted and has no effect: the dtype of the parameters decides.

    Raises ValueError for an unknown class or argument name, a missing argument or a value outside
    its range. Example: ``build("EDMPrecond", {"img_resolution": 32, "img_channels": 3,
    "model_type": "SongUNet"}).eval()``.
    """
    classes = {"EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond, "VEPrecond": VEPrecond}
    one_of("precond_class", precond_class, classes)
    for name in ("img_resolution", "img_channels"):
        require(name in init_kwargs, "init_kwargs", sorted(init_kwargs), f"given with {name}")
    return classes[precond_class](**init_kwargs)
