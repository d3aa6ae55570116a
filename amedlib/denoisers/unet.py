"""The U-Nets of EDM (Karras et al., 2022, arXiv:2206.00364).

SongUNet is the DDPM++ and NCSN++ architecture of Song et al. (2021, arXiv:2011.13456), DhariwalUNet
the ADM architecture of Dhariwal and Nichol (2021, arXiv:2105.05233), both as EDM configures them.
Parameters and buffers carry the names of EDM's checkpoints, so that these load strictly.

Three things differ from EDM's own classes: all is computed in the dtype of the parameters (after
``.double()`` in float64 throughout, never in half precision); an embedding that is the same for the
whole batch is computed once; and the bottleneck, the output of the last encoder block, comes back
from the call.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from amedlib.checks import one_of, require
from amedlib.denoisers.layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)


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
