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
    """What the two architectures share: checks, the blocks, and a decoder that takes skips.

    A class says how its layers start (``init``, ``init_zero``), what else its blocks are made with
    (``blocks``), and whether in the decoder only the last block of a resolution attends.
    """

    init: dict
    init_zero: dict
    blocks: dict
    last_attends: bool

    def __init__(
        self, img_resolution, channel_mult, dropout, label_dropout, model_channels, **integers
    ):
        super().__init__()
        least = {"label_dim": 0, "augment_dim": 0, "model_channels": 4}
        integers = {"model_channels": model_channels, **integers}
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
        self.widths = [
            (img_resolution >> n, model_channels * m) for n, m in enumerate(channel_mult)
        ]

    @property
    def channels(self) -> dict[int, int]:
        """Resolution to channels, from the image's on."""
        return dict(self.widths)

    def _add_blocks(self, in_channels, first, num_blocks, attn_resolutions, **options):
        """Encoder and decoder, in the order of EDM; ``first`` channels leave the first layer."""

        def block(cin, cout, **more):
            return UNetBlock(cin, cout, **self.blocks, **options, **more)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        cout, skips = first, [first]
        for res, channels in self.channels.items():
            if res == max(self.channels):
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, cout, 3, **self.init)
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
                skips.append(cout)
                self._add_encoder_aux(res)
            for i in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(cout, channels, attention=attention)
                cout = channels
                skips.append(cout)

        for res, channels in reversed(self.channels.items()):
            if res == self.bottleneck_size[0]:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                attends = i == num_blocks or not self.last_attends
                attention = attends and res in attn_resolutions
                cin, cout = cout + skips.pop(), channels
                self.dec[f"{res}x{res}_block{i}"] = block(cin, cout, attention=attention)
            self._add_decoder_aux(res)

    def _add_encoder_aux(self, res):
        """The layers that an architecture has beside the blocks, at a lower resolution."""

    def _add_decoder_aux(self, res):
        """The same in the decoder, at every resolution."""

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

    init = {"init_mode": "xavier_uniform"}
    init_zero = init | {"init_weight": 1e-5}
    blocks = {
        "init": init,
        "init_zero": init_zero,
        "init_attn": init | {"init_weight": math.sqrt(0.2)},
        "heads": 1,
        "skip_scale": math.sqrt(0.5),
        "eps": 1e-6,
        "resample_proj": True,
        "adaptive_scale": False,
    }
    last_attends = True

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
            model_channels,
            img_channels=in_channels,
            label_dim=label_dim,
            augment_dim=augment_dim,
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
            channel_mult_noise=channel_mult_noise,
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self.resample = {"resample_filter": resample_filter, **self.init}
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self._add_embedding(embedding_type, noise, emb, label_dim, augment_dim)
        blocks = in_channels, model_channels, num_blocks, attn_resolutions
        options = {"dropout": dropout, "resample_filter": resample_filter}
        self._add_blocks(*blocks, emb_channels=emb, **options)

    def _add_embedding(self, embedding_type, noise_channels, emb_channels, label_dim, augment_dim):
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **self.init) if label_dim else None
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, noise_channels, bias=False, **self.init)
        self.map_layer0 = Linear(noise_channels, emb_channels, **self.init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **self.init)

    def _add_encoder_aux(self, res):
        cout, name = self.channels[2 * res], f"{res}x{res}_aux"
        if self.encoder_type == "skip":
            size = self.in_channels, self.in_channels
            self.enc[f"{name}_down"] = Conv2d(*size, 0, down=True, **self.resample)
            self.enc[f"{name}_skip"] = Conv2d(self.in_channels, cout, 1, **self.init)
        elif self.encoder_type == "residual":
            cin = self.channels.get(4 * res, self.in_channels)  # the image, then what was added to
            options = {"down": True, "filter_last": True, **self.resample}
            self.enc[f"{name}_residual"] = Conv2d(cin, cout, 3, **options)

    def _add_decoder_aux(self, res):
        skip, name = self.decoder_type == "skip", f"{res}x{res}_aux"
        size = self.out_channels, self.out_channels
        if skip and res != self.bottleneck_size[0]:
            self.dec[f"{name}_up"] = Conv2d(*size, 0, up=True, **self.resample)
        if skip or res == max(self.channels):
            cout = self.channels[res]
            self.dec[f"{name}_norm"] = GroupNorm(cout, eps=1e-6)
            self.dec[f"{name}_conv"] = Conv2d(cout, self.out_channels, 3, **self.init_zero)

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

    init_zero = {"init_mode": "kaiming_uniform", "init_weight": 0.0, "init_bias": 0.0}
    init = init_zero | dict.fromkeys(("init_weight", "init_bias"), math.sqrt(1 / 3))
    blocks = {"init": init, "init_zero": init_zero, "init_attn": init}
    last_attends = False

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
            model_channels,
            img_channels=in_channels,
            label_dim=label_dim,
            augment_dim=augment_dim,
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
        )
        self.middle_bottleneck = middle_bottleneck
        emb, cout = model_channels * channel_mult_emb, self.channels[img_resolution]
        self._add_embedding(model_channels, emb, label_dim, augment_dim)
        blocks = in_channels, cout, num_blocks, attn_resolutions
        options = {"dropout": dropout, "adaptive_scale": adaptive_scale}
        self._add_blocks(*blocks, emb_channels=emb, **options)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, 3, **self.init_zero)

    def _add_embedding(self, noise_channels, emb_channels, label_dim, augment_dim):
        self.map_noise = PositionalEmbedding(noise_channels, endpoint=False)
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, noise_channels, bias=False, **self.init_zero)
        self.map_layer0 = Linear(noise_channels, emb_channels, **self.init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **self.init)
        self.map_label = None
        if label_dim:
            weight = math.sqrt(label_dim)
            self.map_label = Linear(label_dim, emb_channels, bias=False, init_weight=weight)

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
