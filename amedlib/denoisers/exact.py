"""Denoisers of data whose density is known, so that samplers can be checked against mathematics."""

import torch

from amedlib.checks import require


def _noise_level(t, x):
    """t as a tensor that broadcasts against x [B, C, H, W]."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    require(t.numel() in (1, len(x)), "t", t, f"one number or one per sample ({len(x)})")
    return t.reshape(-1, 1, 1, 1)


def _check_stds(name, stds, shape):
    given = list(stds.shape)
    require(stds.shape == shape, name, given, f"of the shape of the means, {list(shape)}")
    valid = torch.isfinite(stds).all() and (stds >= 0).all()
    require(bool(valid), name, stds.min().item(), "finite and not negative")


class GaussianDenoiser:
    """The exact denoiser of Gaussian data with mean and standard deviation per element.

    D(x; t) = (std^2 x + t^2 mean)/(std^2 + t^2).

    Parameters
    ----------
    mean, std : tensors [C, H, W]; std >= 0. They are used in the dtype and on the device of x.

    Raises ValueError when the shapes differ or std is negative or not finite.
    """

    def __init__(self, mean, std):
        self.mean, self.std = torch.as_tensor(mean), torch.as_tensor(std)
        require(self.mean.ndim == 3, "mean", list(self.mean.shape), "of shape [C, H, W]")
        _check_stds("std", self.std, self.mean.shape)

    def __call__(self, x, t, labels=None):
        """D(x; t) [B, C, H, W] in the dtype of x; t > 0 is a number or one per sample [B, 1, 1, 1].

        labels are accepted because every denoiser takes them; this data has none.
        """
        t2, mean, var = _noise_level(t, x).square(), self.mean.to(x), self.std.to(x).square()
        return (var * x + t2 * mean) / (var + t2)

    def solution(self, x, t_start, t):
        """The exact solution at t of dx/dt = (x - D(x; t))/t that passes through x at t_start.

        Each element obeys d(x - mean)/dt = t (x - mean)/(std^2 + t^2), hence
        x(t) = mean + (x - mean) sqrt((std^2 + t^2)/(std^2 + t_start^2)).
        """
        mean, var = self.mean.to(x), self.std.to(x).square()
        ratio = (var + _noise_level(t, x).square()) / (var + _noise_level(t_start, x).square())
        return mean + (x - mean) * ratio.sqrt()


class GaussianMixtureDenoiser:
    """The exact denoiser of a mixture of K Gaussians with diagonal covariances.

    With v_k = std_k^2 + t^2 and the responsibilities g_k of the components for x at noise level t
    (proportional to weight_k prod Normal(x; mean_k, v_k), normalised over k),
    D(x; t) = sum_k g_k (std_k^2 x + t^2 mean_k)/v_k.

    Parameters
    ----------
    means, stds : tensors [K, C, H, W]; stds >= 0. Used in the dtype and on the device of x.
    weights : tensor [K]; positive, sum 1.

    Raises ValueError when shapes do not fit, stds are negative or weights are no distribution.
    """

    def __init__(self, means, stds, weights):
        self.means, self.stds = torch.as_tensor(means), torch.as_tensor(stds)
        self.weights = torch.as_tensor(weights)
        require(self.means.ndim == 4, "means", list(self.means.shape), "of shape [K, C, H, W]")
        _check_stds("stds", self.stds, self.means.shape)
        count, shape = len(self.means), list(self.weights.shape)
        require(shape == [count], "weights", shape, f"of shape [{count}], one per component")
        valid = (self.weights > 0).all() and abs(self.weights.sum().item() - 1) < 1e-6
        require(bool(valid), "weights", self.weights.tolist(), "positive with sum 1")

    def __call__(self, x, t, labels=None):
        """D(x; t) [B, C, H, W] in the dtype of x; t > 0 is a number or one per sample [B, 1, 1, 1].

        labels are accepted because every denoiser takes them; the components are not classes here.
        """
        t2 = _noise_level(t, x).square().unsqueeze(1)
        means, var = self.means.to(x), self.stds.to(x).square()
        v = var + t2  # [B or 1, K, C, H, W]
        deviation = x.unsqueeze(1) - means
        log_density = -0.5 * (deviation.square() / v + v.log()).flatten(2).sum(2)
        responsibility = (self.weights.to(x).log() + log_density).softmax(1)
        # mean + var/v (x - mean), the same as the formula above with one product less
        component = means + var / v * deviation
        return (responsibility[:, :, None, None, None] * component).sum(1)
