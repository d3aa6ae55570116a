"""The preconditioned networks of EDM (Karras et al., 2022, arXiv:2206.00364): D(x; t) from a U-Net.

Parameters and buffers carry the names of EDM's checkpoints, so that these load strictly.
"""

import inspect
import math

import torch
from torch import nn

from amedlib.checks import one_of, require
from amedlib.denoisers.unet import DhariwalUNet, SongUNet


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
            given = tuple(labels.shape) if torch.is_tensor(labels) else labels
            require(given == (len(x), self.label_dim), "labels", given, allowed)
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
