"""How cost grows with the images, the NFE, the resolution and the methods; memory with images."""

import json
import resource
import subprocess
import sys

import numpy as np
import torch

import amedlib
from amedlib.denoisers import edm
from amedlib.sampling import make_latents, sample

from .memory import TensorMemory
from .race import draw_distance
from .sampling import SOLVERS
from .timing import seconds
from .training import MIB

BATCH = 100  # of the digits network, for everything but the images
# What is varied, how much of it, and the exponent that is expected of the time.
IMAGES = (50, 150, 500, 1500, 5000)
NFES = (3, 6, 12, 25, 50, 100, 200)
SIDES = (4, 8, 16, 32, 64)


def sampler(data, name: str = "euler", points: int = 4, fixed: float | None = None):
    """Latents to samples, by a solver on a polynomial schedule."""
    solver = amedlib.make_solver(name, **data.solver_options.get(name, {}))
    times = amedlib.make_schedule(num_steps=points)
    middle = amedlib.TimeWise(fixed) if fixed else None
    return lambda latents: sample(data.denoiser, latents, times, solver, False, middle).x


def small_network(side: int):
    """A network whose work is the same for every pixel: halvings down to 4x4, one block each."""
    torch.manual_seed(0)
    sizes = {"img_resolution": side, "img_channels": 3, "model_channels": 16, "num_blocks": 1}
    levels = [1] * (side // 4).bit_length()
    more = {"model_type": "SongUNet", "channel_mult": levels, "attn_resolutions": []}
    return edm.build("EDMPrecond", sizes | more).eval().requires_grad_(False)


def images(data, counts=IMAGES):
    """From latents to the Frechet distance at 3 NFE, by the number of images."""
    draw = sampler(data)
    for n in counts:
        yield n, lambda n=n: draw_distance(data, draw, range(n))


def evaluations(data, nfes=NFES, batch=BATCH):
    """One batch of samples, by the NFE."""
    latents = make_latents(range(batch), data.shape)
    for nfe in nfes:
        draw = sampler(data, points=nfe + 1)
        yield nfe, lambda draw=draw: draw(latents)


def pixels(data, sides=SIDES, batch=64):
    """One evaluation of a small network, by the pixels of an image."""
    for side in sides:
        net = small_network(side)
        x, t = make_latents(range(batch), (3, side, side)), torch.tensor(1.0)
        yield side**2, torch.no_grad()(lambda net=net, x=x, t=t: net(x, t))


def methods(data, names=SOLVERS, batch=BATCH):
    """One batch of samples at 4 NFE from each of the first methods, by their number."""
    latents = make_latents(range(batch), data.shape)
    two_stage = {"heun": None, "dpm2": None, "amed": 0.5}
    draws = [
        sampler(data, name, 3 if name in two_stage else 5, two_stage.get(name)) for name in names
    ]
    for n in range(1, len(draws) + 1):
        yield n, lambda n=n: [draw(latents) for draw in draws[:n]]


VARIED = {"images": images, "NFE": evaluations, "pixels": pixels, "methods": methods}
EXPECTED = 1.0  # of all four: nothing is done twice, and nothing looks at two of them at once


def rows(repeats: int = 5, **given):
    """A row per quantity: the fastest of ``repeats`` at every value, and the fitted exponent.

    The values are gone through again and again, so that a slow while slows all of them.

    Args:
        given: for a test, the values of a quantity instead of its own.
    """
    data = amedlib.load_dataset("digits")
    _ = data.reference
    for name, vary in VARIED.items():
        calls = list(vary(data, *given.get(name, ())))
        for _, call in calls[:2]:
            call()
        times = [[seconds(call) for _, call in calls] for _ in range(repeats)]
        values = [value for value, _ in calls]
        fastest = np.min(times, axis=0)
        logs = np.log(values), np.log(fastest)
        # Of the last two points by itself: there the fixed cost of a call counts least.
        yield {
            "quantity": name,
            "expected exponent": EXPECTED,
            "exponent": float(np.polyfit(*logs, 1)[0]),
            "at the end": float(np.diff(logs[1])[-1] / np.diff(logs[0])[-1]),
            "values": values,
            "seconds": fastest.tolist(),
        }


def peak(count: int) -> dict[str, float]:
    """MiB at the peak of sampling and judging so many images at 2 NFE, in this process."""
    data = amedlib.load_dataset("digits")
    _ = data.reference
    draw = sampler(data, points=3)
    with TensorMemory(data.denoiser.parameters()) as memory:
        draw_distance(data, draw, range(count))
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    process *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {"tensors, MiB": memory.peak / MIB, "process, MiB": process / MIB}


def memory(counts=(500, 5_000, 50_000)):
    """A row per number of images, each in a process of its own."""
    for count in counts:
        command = [sys.executable, "-m", "benchmarks.growth", str(count)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        yield {"images": count, **json.loads(found)}


if __name__ == "__main__":
    print(json.dumps(peak(int(sys.argv[1]))))
