"""The library against the released code's procedure, in turns, on the same network and latents."""

import copy
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

import amedlib
from amedlib.datasets.inception import quantise_edm
from amedlib.denoisers.digits import quantise
from amedlib.metrics import Moments, moments_distance
from amedlib.sampling import make_latents, sample
from amedlib.study import plans
from amedlib.training import Trainer, Training

from . import official
from .memory import TensorMemory
from .timing import compare, ratio, seconds
from .training import MIB, network

# What was set out for: our time as a part of the released procedure's. Forward mode saves memory.
AIMS = {"training": 0.85, "samples to FD": 0.7}
# Of samples on either side: the released code's.
BATCH = 64
# The released code's recipe, which is the one that both sides can train by.
RELEASE = {"recipe": "release", "scale_time": 0.2}
STUDENTS = {
    "AMED-Solver": {"solver": "amed", "m": 1},
    "AMED-Solver without AFS": {"solver": "amed", "m": 1, "afs": False},
    "AMED-Plugin on iPNDM": {"solver": "ipndm", "m": 2, "options": {"order": 4}},
}
STUDENTS["AMED-Plugin on iPNDM without AFS"] = STUDENTS["AMED-Plugin on iPNDM"] | {"afs": False}


class Pair:
    """Both trainers of one configuration, batch by batch on the same latents."""

    def __init__(self, net, config: Training, shape, dtype=torch.float32, device="cpu"):
        self.net = net
        self.ours = Trainer(net, config, shape, device=device)
        self.official = official.Trainer(net, config, shape, device, dtype)
        self.batches = count()

    def step_ours(self):
        self.ours.step()

    def step_official(self):
        self.official.step(make_latents(self.ours.seeds(next(self.batches)), self.ours.shape))


def count_evaluations(both: Pair) -> dict[str, float]:
    """Calls of the network by either side in one batch of training, and the ratio to expect.

    Counted by a hook on the network. In reverse mode every update also goes back through it once,
    which is taken to cost as much as a call.
    """
    calls = {}
    for side in ("ours", "official"):
        made = []
        handle = both.net.register_forward_pre_hook(lambda *_, made=made: made.append(1))
        getattr(both, f"step_{side}")()
        handle.remove()
        calls[f"{side}, calls"] = len(made)
    config = both.ours.config
    if config.gradient == "forward":
        return calls
    ours, theirs = (value + config.num_steps - 1 for value in calls.values())
    return calls | {"expected ratio": ours / theirs}


def gradients(net, config: Training, shape, dtype=torch.float32) -> float:
    """Largest relative difference of the two sides' gradients over the updates of one batch.

    Relative to the gradient's Euclidean length, all parameters together.
    """
    net = copy.deepcopy(net).to(dtype)
    both = Pair(net, config, shape, dtype)
    found = []
    for trainer in (both.ours, both.official):
        trainer.predictor.to(dtype)
        seen = []

        def keep(optimizer, *_, predictor=trainer.predictor, seen=seen):
            given = [p.grad for p in predictor.parameters() if p.grad is not None]
            seen.append(torch.cat([grad.flatten() for grad in given]).double())

        trainer.optimizer.register_step_pre_hook(keep)
        found.append(seen)
    both.step_ours()
    both.step_official()
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


def row(what: str, ours, theirs, repeats: int, **more) -> dict:
    """Time of the two in turns; what is left out of ``more`` is not known for this row."""
    times = compare(ours, theirs, repeats)
    medians = {
        f"{name}, s": statistics.median(t)
        for name, t in zip(("ours", "official"), times, strict=True)
    }
    found = {"what": what, "repeats": repeats, **medians, **ratio(*times), **more}
    aim = AIMS.get(what.split(",")[0])
    return found | ({"aim": aim} if aim and "forward" not in what else {})


def training(name: str, repeats: int | None = None, batch: int | None = None, students=STUDENTS):
    """A row per student and way to differentiate; the last has the network's weights not frozen.

    The released code freezes no weights. Those of EDM's networks come frozen from their files;
    those of LSUN's and of latent models do not, and there every update computes their gradients.
    """
    net, shape, size, points, often = network(name)
    if name == "cifar10":
        size, points, often = 2, 3, 2
        students = {"AMED-Solver": STUDENTS["AMED-Solver"]}
    size, repeats = batch or size, repeats or often
    for student, options in students.items():
        for gradient in ("reverse", "forward") if student == "AMED-Solver" else ("reverse",):
            config = Training(num_steps=points, batch=size, gradient=gradient, **RELEASE, **options)
            both = Pair(net, config, shape)
            peaks = {}
            for side in ("ours", "official"):
                with TensorMemory(net.parameters()) as memory:
                    getattr(both, f"step_{side}")()
                peaks[f"{side}, MiB"] = memory.peak / MIB
            more = {"network": name, "batch": size, **count_evaluations(both), **peaks}
            more["memory ratio"] = peaks["ours, MiB"] / peaks["official, MiB"]
            more["difference of gradients"] = gradients(net, config, shape)
            if name == "digits":
                tiny = replace(config, batch=8)
                more["in float64"] = gradients(net, tiny, shape, torch.float64)
            what = f"training, {student}, {gradient}"
            yield row(what, both.step_ours, both.step_official, repeats, **more)
    if name == "digits":
        config = Training(num_steps=points, batch=size, **RELEASE, **STUDENTS["AMED-Solver"])
        both = Pair(net, config, shape)
        thawed = copy.deepcopy(net).requires_grad_(True)
        both.official.net = thawed
        what = "training, AMED-Solver, reverse, weights not frozen there"
        more = {"network": name, "batch": size}
        yield row(what, both.step_ours, both.step_official, repeats, **more)


def _method(data, student: str, points: int = 4):
    """Configuration, solver, time points and untrained predictor of a student."""
    config = Training(num_steps=points, **RELEASE, **STUDENTS[student])
    solver = config.make_solver()
    torch.manual_seed(0)
    predictor = amedlib.Predictor("release", data.denoiser.bottleneck_size, 0.01, 0.2).eval()
    return config, solver, config.times(), predictor


def outside(net, draw, repeats: int) -> float:
    """How much longer ``draw()`` takes than the network's calls in it: the median, in percent."""
    marks, shares = [], []
    mark = lambda *_: marks.append(time.perf_counter())  # noqa: E731
    handles = [net.register_forward_pre_hook(mark), net.register_forward_hook(mark)]
    for _ in range(repeats):
        marks.clear()
        whole = seconds(draw)
        shares.append(100 * (whole / (sum(marks[1::2]) - sum(marks[::2])) - 1))
    for handle in handles:
        handle.remove()
    return statistics.median(shares)


def sampling(repeats: int = 9, batch: int | None = None):
    """A row per student: one batch, and the share of the time outside the network."""
    data = amedlib.load_dataset("digits")
    latents = make_latents(range(batch or data.batch), data.shape)
    for student in ("AMED-Solver", "AMED-Plugin on iPNDM"):
        config, solver, times, predictor = _method(data, student)

        def ours(method=(times, solver, config.afs, predictor)):
            return sample(data.denoiser, latents, *method).x

        def theirs(config=config, predictor=predictor):
            return official.sample(data.denoiser, latents, config, predictor)

        shares = {
            f"{side}, outside the network, %": outside(data.denoiser, draw, repeats)
            for side, draw in (("ours", ours), ("official", theirs))
        }
        difference = (ours() - theirs()).abs().max() / ours().abs().max()
        more = {"network": "digits", "batch": len(latents), **shares}
        more["difference of samples"] = float(difference)
        yield row(f"sampling, {student}, 5 NFE", ours, theirs, repeats, **more)


@contextmanager
def threads(number: int):
    """PyTorch with a number of threads, for both sides alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settings(net, side: str, call) -> dict[str, int]:
    """The largest batch and the threads of a side's call, as the network sees them."""
    seen = []
    handle = net.register_forward_pre_hook(
        lambda _, given: seen.append((len(given[0]), torch.get_num_threads()))
    )
    call()
    handle.remove()
    largest, used = (max(column) for column in zip(*seen, strict=True))
    return {f"{side}, batch": largest, f"{side}, threads": used}


def draw_distance(data, draw, seeds, batch: int | None = None) -> float:
    """The Frechet distance of samples, as ``amedlib.study`` has it: nothing leaves the memory."""
    moments, batch = None, batch or data.batch
    for first in range(0, len(seeds), batch):
        latents = make_latents(seeds[first : first + batch], data.shape)
        found = Moments.of(data.features(data.to_images(draw(latents))))
        moments = found if moments is None else moments + found
    return moments_distance(moments, data.reference["fd"])


def draw_distance_officially(data, draw, seeds, batch: int = BATCH) -> float:
    """The same through PNG files."""
    with tempfile.TemporaryDirectory() as folder:
        return official.samples_to_distance(
            draw,
            seeds,
            data.shape,
            lambda x: quantise_edm(data.to_images(x)),
            # The digits have 17 grey levels, which 256 hold exactly.
            lambda images: data.features(quantise(images.float() / 127.5 - 1)),
            data.reference["fd"],
            Path(folder),
            batch,
        )


def distance(repeats: int = 15, samples: int = 2000, batch: int = BATCH, number: int = 1):
    """From latents to the Frechet distance at 5 NFE, with equal batches and threads."""
    data = amedlib.load_dataset("digits")
    _ = data.reference
    config, solver, times, predictor = _method(data, "AMED-Solver")

    def draw(latents):
        return sample(data.denoiser, latents, times, solver, config.afs, predictor).x

    def draw_officially(latents):
        return official.sample(data.denoiser, latents, config, predictor)

    seeds, values = range(samples), {}

    def ours():
        values["ours"] = draw_distance(data, draw, seeds, batch)

    def theirs():
        values["official"] = draw_distance_officially(data, draw_officially, seeds, batch)

    with threads(number):
        how = settings(data.denoiser, "ours", ours) | settings(data.denoiser, "official", theirs)
        found = row("samples to FD, AMED-Solver, 5 NFE", ours, theirs, repeats)
    yield found | {
        "network": "digits",
        "batch": batch,
        **how,
        "samples": samples,
        "difference of FD": abs(values["ours"] / values["official"] - 1),
    }


def table(
    nfe: int = 5,
    images: int = 512,
    samples: int = 1000,
    repeats: int = 2,
    batch: int = BATCH,
    number: int = 1,
):
    """Table 2 at one NFE, small: every method is trained where it learns, sampled and judged.

    The plain solvers' arithmetic is the library's on both sides. Both train in batches of 128,
    sample in batches of ``batch`` and have ``number`` threads.
    """
    data = amedlib.load_dataset("digits")
    _ = data.reference
    planned = plans.table2("digits")
    runs = planned[planned["nfe"] == nfe].drop_duplicates("method").set_index("method")["run"]
    seeds, values = range(samples), {}

    def learned(what):
        kept = {"num_steps": what.num_steps, "options": what.options, "images": images}
        m = what.training.m
        more = {"batch": min(128, images), "afs": what.afs}
        return Training(solver=what.solver, m=m, **more, **RELEASE, **kept)

    def drawn_by(what, predictor=None):
        solver = what.make_solver()
        return lambda x: sample(data.denoiser, x, what.times(), solver, what.afs, predictor).x

    def ours():
        for method, what in runs.items():
            predictor = None
            if what.predictor is not None:
                trainer = Trainer(data.denoiser, learned(what), data.shape)
                for _ in range(trainer.batches):
                    trainer.step()
                predictor = trainer.predictor
            values["ours", method] = draw_distance(data, drawn_by(what, predictor), seeds, batch)

    def theirs():
        for method, what in runs.items():
            draw = drawn_by(what) if what.predictor is None else None
            if draw is None:
                both = Pair(data.denoiser, learned(what), data.shape)
                for _ in range(both.ours.batches):
                    both.step_official()
                config, predictor = both.official.config, both.official.predictor

                def draw(x, config=config, predictor=predictor):
                    return official.sample(data.denoiser, x, config, predictor)

            values["official", method] = draw_distance_officially(data, draw, seeds, batch)

    with threads(number):
        found = row(f"Table 2 at {nfe} NFE, small", ours, theirs, repeats)
    yield found | {
        "network": "digits",
        "batch": batch,
        **{f"{side}, batch": batch for side in ("ours", "official")},
        **{f"{side}, threads": number for side in ("ours", "official")},
        "methods": len(runs),
        "images": images,
        "samples": samples,
        "difference of FD": max(
            abs(values["ours", method] / values["official", method] - 1) for method in runs.index
        ),
    }
