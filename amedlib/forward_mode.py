"""Forward differentiation of a frozen network: a dual number carried through its layers."""

from typing import ClassVar

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from amedlib.intermediate import Intermediate
from amedlib.wrapper import Wrapper


def _linear(function):
    def rule(x, dx, weight, bias=None, *rest, **options):
        y = function(x, weight, bias, *rest, **options)
        return y, function(dx, weight, None, *rest, **options)

    return rule


def _group_norm(x, dx, groups, weight=None, bias=None, eps=1e-5):
    if weight is not None:  # autocast does not reach this kernel, which takes one precision only
        x, dx = x.to(weight.dtype), dx.to(weight.dtype)
    x, dx = x.contiguous(), dx.contiguous()
    size = (*x.shape[:2], x[0, 0].numel(), groups)
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *size, eps)
    # The Jacobian of the normalisation is symmetric: its backward kernel is its forward derivative.
    only_input = [True, False, False]
    backward = torch.ops.aten.native_group_norm_backward
    dy, _, _ = backward(dx, x, mean, rstd, None, *size, only_input)
    if weight is not None:
        dy = dy * weight.reshape(1, -1, *[1] * (x.ndim - 2))
    return y, dy


def _scaling(function):
    def rule(x, dx, factor):
        return None if torch.is_tensor(factor) else (function(x, factor), function(dx, factor))

    return rule


class _FrozenLayers(TorchFunctionMode):
    """Rules by which a dual number passes the layers that take most of the time.

    PyTorch's own rules give the same derivative, but allow for tangents of the weights, which are
    frozen here, and take group normalisation to pieces: together twice the time.
    """

    rules: ClassVar = {
        **{f: _linear(f) for f in (F.conv2d, F.conv_transpose2d, F.linear)},
        **{f: _scaling(f) for f in (torch.Tensor.mul, torch.Tensor.div)},
        F.group_norm: _group_norm,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.rules:
            x, dx = fwad.unpack_dual(args[0])
            passed = None if dx is None else self.rules[function](x, dx, *args[1:], **kwargs)
            if passed is not None:
                return fwad.make_dual(*passed)
        return function(*args, **kwargs)


def forward_derivative(denoiser, x, t, dx, dt, labels=None):
    """D(x; t) and its derivative along (dx, dt), in forward mode: no activation is kept.

    Args:
        x, dx: [B, C, H, W].
        t, dt: [B, 1, 1, 1].

    To be called within ``torch.autograd.forward_ad.dual_level``.

    Returns:
        Two tensors [B, C, H, W].
    """
    with torch.no_grad(), _FrozenLayers():
        out = denoiser(fwad.make_dual(x, dx), fwad.make_dual(t, dt), labels)
        return tuple(fwad.unpack_dual(out))


class ForwardMode(Wrapper):
    """A student's denoiser and intermediate, tied together for forward mode.

    Inside a step the network's input depends on at most two scalars per sample, r and scale_time.
    So D at the second evaluation is returned as D + dD/dr (r - r0) + dD/da (a - a0) with r0 = r and
    a0 = a: the value is exact, and autograd finds the derivatives in it.
    """

    def __init__(self, denoiser, predictor):
        super().__init__(denoiser)
        self.predictor = predictor

    def intermediate(self, step, t_cur, t_next, bottleneck):
        self.r, scale_dir, self.scale_time = self.predictor(step, t_cur, t_next, bottleneck)
        # A tangent of one on r makes the tangents of the state and the time d/dr.
        return Intermediate(
            fwad.make_dual(self.r, torch.ones_like(self.r)), scale_dir, self.scale_time
        )

    def __call__(self, x, t, labels=None, **options):
        if fwad.unpack_dual(t).tangent is None:  # the evaluation at t_cur
            return super().__call__(x, t, labels, **options)
        (x, dx), (t, dt) = fwad.unpack_dual(x), fwad.unpack_dual(t)
        x, dx = x.detach(), dx.detach()
        t, dt = (value.detach().expand(len(x), 1, 1, 1).contiguous() for value in (t, dt))
        scalars, directions = [self.r], [(dx, dt)]
        if torch.is_tensor(self.scale_time):
            scalars.append(self.scale_time)
            directions.append((torch.zeros_like(dx), t / self.scale_time.detach()))
        derivatives = []
        for dx, dt in directions:
            denoised, derivative = forward_derivative(self.denoiser, x, t, dx, dt, labels)
            derivatives.append(derivative)
        for scalar, derivative in zip(scalars, derivatives, strict=True):
            denoised = denoised + derivative * (scalar - scalar.detach())
        return denoised
