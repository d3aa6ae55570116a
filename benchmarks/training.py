"""Training of g_phi with the network differentiated in forward and in reverse mode."""

import json
import resource
import subprocess
import sys

import torch
import torch.autograd.forward_ad as fwad

import amedlib
from amedlib.denoisers import edm
from amedlib.forward_mode import forward_derivative
from amedlib.training import Trainer, Training

from .memory import TensorMemory
from .timing import compare, ratio

MIB = 2**20
# The CIFAR-10 network of EDM (ddpmpp, 55.7 million parameters), here with random weights.
CIFAR10 = {
    "img_resolution": 32,
    "img_channels": 3,
    "model_type": "SongUNet",
    "augment_dim": 9,
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "dropout": 0.13,
}
# What g_phi predicts, and so the scalars per sample that the network is differentiated by:
# r alone, or r and scale_time (the derivative by scale_dir needs no network).
FORMS = {
    "paper: r": {"recipe": "paper"},
    "release: r, scale_dir, scale_time": {"recipe": "release", "scale_time": 0.2},
}
GRADIENTS = ("forward", "reverse")


def network(name: str):
    """Network, shape of a sample, batch, time points of the schedule, and repeats."""
    if name == "digits":
        data = amedlib.load_dataset("digits")
        return data.denoiser, data.shape, 128, 4, 15
    torch.manual_seed(0)
    net = edm.build("EDMPrecond", CIFAR10).eval().requires_grad_(False)
    return net, (3, 32, 32), 16, 2, 2


def trainer(net, shape, batch, points, form, gradient) -> Trainer:
    """AMED-Solver with its Heun teacher: one batch is points - 1 updates of g_phi."""
    config = Training(num_steps=points, batch=batch, gradient=gradient, **FORMS[form])
    return Trainer(net, config, shape)


def peak_memory(name: str, form: str, gradient: str) -> dict[str, float]:
    """MiB at the peak of one batch: of tensors beyond the weights, and of this whole process."""
    net, shape, batch, points, _ = network(name)
    training = trainer(net, shape, batch, points, form, gradient)
    with TensorMemory(net.parameters()) as memory:
        training.step()
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    process *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {"tensors": memory.peak / MIB, "process": process / MIB}


def peak_memory_elsewhere(*what: str) -> dict[str, float]:
    """The same in a process of its own, which nothing before has made larger."""
    command = [sys.executable, "-m", "benchmarks.training", *what]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def derivatives(net, shape, batch):
    """One differentiation of the network by one scalar per sample, in forward and in reverse."""
    x, dx = amedlib.make_latents(range(2 * batch), shape).chunk(2)
    t, dt = torch.rand(2, batch, 1, 1, 1) + 0.5

    def forward():
        with fwad.dual_level():
            return forward_derivative(net, x, t, dx, dt)

    def reverse():
        inputs = x.clone().requires_grad_(), t.clone().requires_grad_()
        return torch.autograd.grad(net(*inputs).sum(), inputs)

    return forward, reverse


def rows(name: str):
    """One row per form of the predictor, for the network ``"digits"`` or ``"cifar10"``."""
    net, shape, batch, points, repeats = network(name)
    times = compare(*derivatives(net, shape, batch), repeats)
    common = {
        "network": name,
        "batch": batch,
        "MiB of weights": sum(p.nbytes for p in net.parameters()) / MIB,
    }
    once = {f"one derivative, time {k}": v for k, v in ratio(*times).items()}
    for form in FORMS:
        steps = [trainer(net, shape, batch, points, form, gradient).step for gradient in GRADIENTS]
        times = compare(*steps, repeats)
        row = {**common, "form": form, **once}
        row |= {f"training, time {k}": v for k, v in ratio(*times).items()}
        for gradient, seconds in zip(GRADIENTS, times, strict=True):
            row[f"seconds per batch, {gradient}"] = min(seconds)
        peaks = {g: peak_memory_elsewhere(name, form, g) for g in GRADIENTS}
        for kind in ("tensors", "process"):
            for gradient in GRADIENTS:
                row[f"peak MiB of {kind}, {gradient}"] = peaks[gradient][kind]
        forward, reverse = (peaks[g]["tensors"] for g in GRADIENTS)
        row["tensor memory ratio"] = forward / reverse
        yield row


if __name__ == "__main__":
    print(json.dumps(peak_memory(*sys.argv[1:])))
