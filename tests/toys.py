"""Small denoisers that several tests use."""

import torch
import torch.nn.functional as F
from torch import nn


class TinyNet(nn.Module):
    """A smooth random network with a bottleneck, in float64; counts the images it evaluates."""

    gives_bottleneck = True
    bottleneck_size = (4, 4)

    def __init__(self, channels=1, width=8, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Conv2d(channels, width, 3, padding=1)
            self.time = nn.Linear(1, width)
            self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(width, channels, 2, stride=2)
        self.double()
        self.images = 0

    def forward(self, x, t, labels=None, return_bottleneck=False):
        self.images += len(x)
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
        scale = (1 + t**2).sqrt()
        noise = self.time(t.log().reshape(-1, 1) / 4)[..., None, None]
        bottleneck = self.down(F.silu(self.first(x / scale) + noise))
        out = self.up(F.silu(F.group_norm(bottleneck, 2)))
        denoised = x / (1 + t**2) + out * t / scale
        return (denoised, bottleneck) if return_bottleneck else denoised
