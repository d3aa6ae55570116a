"""How much longer the sampling loop takes than the bare network calls in it."""

import statistics
import time

import torch

import amedlib
from amedlib.wrapper import Wrapper

from .timing import compare, ratio

SOLVERS = ("euler", "heun", "dpm2", "amed", "ipndm", "deis", "dpmpp", "unipc")


class Recorder(Wrapper):
    """Hands calls on to a denoiser, and keeps them and the time spent in them."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.calls, self.seconds = [], 0.0

    def __call__(self, *args, **options):
        self.calls.append((args, options))
        start = time.perf_counter()
        out = self.denoiser(*args, **options)
        self.seconds += time.perf_counter() - start
        return out


def rows(repeats: int = 9):
    """One row per solver, plain and with a predictor, on the digits network."""
    data = amedlib.load_dataset("digits")
    latents = amedlib.make_latents(range(data.batch), data.shape)
    torch.manual_seed(0)
    predictor = amedlib.Predictor("release", data.denoiser.bottleneck_size, 0.01, 0.2)
    for name in SOLVERS:
        solver = amedlib.make_solver(name, **data.solver_options.get(name, {}))
        for intermediate in (None, predictor):
            if name == "amed" and intermediate is None:
                continue
            points = 3 if intermediate or name in ("heun", "dpm2") else 5
            times = amedlib.make_schedule(num_steps=points)

            def loop(denoiser=data.denoiser, args=(latents, times, solver), more=intermediate):
                return amedlib.sample(denoiser, *args, intermediate=more)

            recorder = Recorder(data.denoiser)
            nfe = loop(recorder).nfe

            @torch.no_grad()
            def bare(calls=recorder.calls):
                for args, options in calls:
                    data.denoiser(*args, **options)

            inside = Recorder(data.denoiser)
            shares = []

            def timed_loop(inside=inside, loop=loop, shares=shares):
                inside.seconds, start = 0.0, time.perf_counter()
                loop(inside)
                whole = time.perf_counter() - start
                shares.append(whole / inside.seconds - 1)

            of_loop, of_bare = compare(timed_loop, bare, repeats)
            yield {
                "solver": name,
                "intermediate": "predictor" if intermediate else "none",
                "batch": data.batch,
                "NFE": nfe,
                "seconds": statistics.median(of_loop),
                "outside the network, %": 100 * statistics.median(shares),
                **{f"loop / bare calls, {k}": v for k, v in ratio(of_loop, of_bare).items()},
            }
