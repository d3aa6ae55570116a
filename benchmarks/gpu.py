"""How fast one card runs the paper's networks, here of true size and with random weights.

What does not fit or does not run is recorded with the type of its error; what the time did not
suffice for is left out. ``amedlib.costs`` makes hours of the paper's tables from it.
"""

import copy
import gc
import io
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import torch
from torch.utils.flop_counter import FlopCounterMode

import amedlib
from amedlib.checks import one_of, require
from amedlib.compute import halved, in_precision
from amedlib.denoisers import adm, edm
from amedlib.sampling import make_classes, make_latents
from amedlib.study.costs import training_evaluations
from amedlib.training import Trainer, Training

from . import official
from .race import RELEASE, STUDENTS, Pair, count_evaluations
from .sampling import Recorder
from .timing import compare, ratio, seconds
from .training import CIFAR10, FORMS, GRADIENTS

GIB = 2**30
IMAGENET64 = {
    "img_resolution": 64,
    "img_channels": 3,
    "label_dim": 1000,
    "model_type": "DhariwalUNet",
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
}
FFHQ = CIFAR10 | {"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}
# By data set: the network, and the batch from which the search for the largest goes down.
NETWORKS = {
    "cifar10": (lambda changes: edm.build("EDMPrecond", CIFAR10 | changes), 2048),
    "ffhq": (lambda changes: edm.build("EDMPrecond", FFHQ | changes), 512),
    "imagenet64": (lambda changes: edm.build("EDMPrecond", IMAGENET64 | changes), 512),
    "lsun_bedroom": (lambda changes: adm.cm_network(**changes), 64),
}
# The same networks so small that a test can run them.
TINY = {"img_resolution": 8, "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
# How a network is run. "float32" is PyTorch's default: TF32 in convolutions alone.
VARIANTS = {
    "float32": {},
    "float16": {"precision": "float16"},
    "float32, TF32 on": {"tf32": True},
    "float32, TF32 off": {"tf32": False},
    "bfloat16": {"precision": "bfloat16"},
    "float16, channels_last": {"precision": "float16", "channels_last": True},
}
COMPILED = {"float16, compiled": {"precision": "float16", "compiled": True}}
# How the library trains in the race; the released code has float32 unless said.
RACERS = {"float32": {}, "float16": {"precision": "float16"}}
# What a row of the race is of.
RACE = ("dataset", "student", "variant")
# Networks that the restated procedure knows.
RACED = ("cifar10", "ffhq", "imagenet64")
# Nominal TFLOP/s without sparsity, from NVIDIA's data sheets; float32 outside the tensor cores.
_H100 = {"float32": 67, "tf32": 494.7, "half": 989.4}
_A100 = {"float32": 19.5, "tf32": 156, "half": 312}
PEAKS = {
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": _H100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "Tesla T4": {"float32": 8.1, "half": 65},
}


class Bench:
    """The device, how long to measure, and until when.

    Attributes:
        changes: to the architectures; ``TINY`` or nothing.
        at_least: seconds that a call is measured for.
    """

    def __init__(self, device: str, duration: float, tiny: bool):
        self.device, self.tiny = torch.device(device), tiny
        self.is_cuda = self.device.type == "cuda"
        self.deadline = time.monotonic() + duration
        self.changes = TINY if tiny else {}
        self.at_least = 0.0 if tiny else 1.0

    def network(self, name: str):
        """A new network, and the shape of its samples."""
        with self.device:
            net = NETWORKS[name][0](self.changes).eval().requires_grad_(False)
        return net, shape_of(name, self.changes)

    def inputs(self, net, shape, batch):
        """A state as the sampling loop has it, a time, labels."""
        x = torch.randn(batch, *shape, dtype=torch.float64, device=self.device)
        t = torch.tensor(1.0, dtype=torch.float64, device=self.device)
        return x, t, self.labels(net)(range(batch))

    def labels(self, net):
        """Seeds to random classes, for a network that takes them."""
        return lambda seeds: (
            make_classes(seeds, net.label_dim, self.device) if net.label_dim else None
        )

    def waiting(self, call: Callable) -> Callable:
        """The call, over when the device is done with it."""

        def waited():
            call()
            if self.is_cuda:
                torch.cuda.synchronize()

        return waited

    def per_call(self, call: Callable) -> float:
        """Median seconds of a call that has run before."""
        call, times = self.waiting(call), []
        while len(times) < 2 or sum(times) < self.at_least:
            times.append(seconds(call))
        return statistics.median(times)

    def largest(self, call_with: Callable[[int], Callable], batch: int) -> tuple[int, Callable]:
        """The largest batch of ``batch``, its half, ... that fits, and its call, made once."""
        while True:
            try:
                call = call_with(batch)
                self.waiting(call)()
                return batch, call
            except torch.OutOfMemoryError as error:
                batch = halved(batch, "one call", error)
            if self.is_cuda:
                torch.cuda.empty_cache()

    @contextmanager
    def peak_memory(self, row: dict):
        """Puts GiB at the peak within, beyond what was there before, into a row."""
        if not self.is_cuda:
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        row["peak GiB"] = (torch.cuda.max_memory_allocated() - before) / GIB

    def measured(self, what: dict, function: Callable[[dict], None]) -> Iterator[dict]:
        """A row that ``function`` fills in, or with the type of the error that it ended with.

        After the deadline nothing is begun, and there is no row.
        """
        if time.monotonic() > self.deadline:
            return
        row = dict(what)
        if self.is_cuda:  # a network that was compiled or failed may still be held by a cycle
            gc.collect()
            torch.cuda.empty_cache()
        try:
            function(row)
        except Exception as error:
            row["failed"] = type(error).__name__
        yield row


def shape_of(name: str, changes: dict) -> tuple[int, int, int]:
    """The shape of a sample of a network, (C, H, W)."""
    shape = amedlib.describe(name).shape
    return (shape[0], *[changes.get("img_resolution", side) for side in shape[1:]])


def size(name: str, changes: dict | None = None) -> dict[str, float]:
    """Parameters of a network, and floating point operations of one evaluation; no GPU needed."""
    changes = changes or {}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = NETWORKS[name][0](changes).eval()
        labels = torch.empty(1, net.label_dim) if net.label_dim else None
        net(torch.empty(1, *shape_of(name, changes)), torch.empty(()), labels)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    return {"million parameters": millions, "GFLOP per evaluation": counter.get_total_flops() / 1e9}


def sizes():
    """The size of each network, a row per data set."""
    for name in NETWORKS:
        yield {"dataset": name, **size(name)}


def peak_share(card: str, variant: dict, flops: float) -> float | None:
    """FLOP/s as a part of the card's nominal ones; ``None`` for a card that is not listed."""
    peaks = PEAKS.get(card)
    if peaks is None:
        return None
    kind = "half" if "precision" in variant else "tf32" if variant.get("tf32", True) else "float32"
    return flops / 1e12 / peaks.get(kind, peaks["float32"])


@contextmanager
def _tf32(on: bool | None):
    """TF32 everywhere, nowhere, or with ``None`` as PyTorch has it by default."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        if on is not None:
            products.allow_tf32 = convolutions.allow_tf32 = on
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def same_backend():
    """What both sides of the race run under, as the released code sets it for itself.

    cuDNN on and choosing the fastest algorithm, no TF32.
    """
    # What is not named is taken from the defaults of `flags`, and by those cuDNN is off.
    named = {"enabled": True, "benchmark": True, "deterministic": False, "allow_tf32": False}
    with _tf32(False), torch.backends.cudnn.flags(**named):
        yield


def rates(bench: Bench, names, variants: dict) -> Iterator[dict]:
    """Images per second of the network alone, a row per network and variant."""
    card = torch.cuda.get_device_name(bench.device) if bench.is_cuda else ""
    for name in names:
        sizes = size(name, bench.changes)
        for label, variant in variants.items():

            def fill(row, name=name, variant=variant, sizes=sizes):
                net, shape = bench.network(name)
                run = in_precision(net, variant.get("precision", "float32"))
                if variant.get("channels_last"):
                    net.to(memory_format=torch.channels_last)
                if variant.get("compiled"):
                    # The tests have no compiler: there the graph is traced, and run as it is.
                    net.compile(backend="eager" if bench.tiny else "inductor")

                def call_with(batch):
                    inputs = bench.inputs(net, shape, batch)
                    return torch.no_grad()(lambda: run(*inputs))

                with _tf32(variant.get("tf32")):
                    first = 2 if bench.tiny else NETWORKS[name][1]
                    row["batch"], call = bench.largest(call_with, first)
                    with bench.peak_memory(row):
                        rate = row["batch"] / bench.per_call(call)
                row["images/s"] = rate
                row["TFLOP/s"] = rate * sizes["GFLOP per evaluation"] / 1e3
                share = peak_share(card, variant, row["TFLOP/s"] * 1e12)
                if share is not None:
                    row["% of nominal peak"] = 100 * share

            yield from bench.measured({"dataset": name, "variant": label, **sizes}, fill)


def training(bench: Bench, names) -> Iterator[dict]:
    """One batch of training AMED-Solver with its Heun teacher, forward against reverse mode."""
    for name in names:
        for gradient in GRADIENTS:

            def fill(row, name=name, gradient=gradient):
                data = amedlib.describe(name)
                net, shape = bench.network(name)
                batch = 2 if bench.tiny else data.training.get("batch", 128)
                form = FORMS["paper: r"] | {"precision": data.precision, "gradient": gradient}
                config = Training(num_steps=3, batch=batch, images=batch, **form)
                labels = bench.labels(net)
                trainer = Trainer(net, config, shape, device=bench.device, labels=labels)
                trainer.step()
                with bench.peak_memory(row):
                    per_batch = bench.per_call(trainer.step)
                evaluations = training_evaluations(config) // batch
                row |= {"precision": data.precision, "batch": batch, "at a time": trainer.part}
                row |= {"evaluations": evaluations, "seconds per batch": per_batch}
                row["images/s"] = batch * evaluations / per_batch

            yield from bench.measured({"dataset": name, "gradient": gradient}, fill)


def race(
    bench: Bench, names, racers: dict, students=("AMED-Solver",), repeats=3, known=()
) -> Iterator[dict]:
    """A batch of training, in turns with the released code's procedure, restated.

    Args:
        racers: how each side runs, by the name of the variant; the precision of the released side
            is ``released``.
        students: of ``race.STUDENTS``.
        known: rows that there are already, of which none is measured again unless it failed.
    """
    there = [tuple(row.get(k) for k in RACE) for row in known if "failed" not in row]
    raced = [name for name in names if name in RACED]
    for name, (label, way), student in product(raced, racers.items(), students):
        if (name, student, label) in there:
            continue

        def fill(row, name=name, way=way, student=student):
            net, shape = bench.network(name)
            batch = 2 if bench.tiny else amedlib.describe(name).training.get("batch", 128)
            precision = way.get("precision", "float32")
            how = RELEASE | STUDENTS[student]
            config = Training(batch=batch, images=batch, precision=precision, **how)
            released = in_precision(net, way.get("released", "float32"))
            theirs = official.Trainer(released, config, shape, bench.device)
            own = copy.deepcopy(net)
            labels = bench.labels(net)
            ours = Trainer(own, config, shape, device=bench.device, labels=labels)
            seeds = ours.seeds(0)

            def step_released():
                theirs.step(make_latents(seeds, shape), labels(seeds))

            # The evaluations are as many with one image.
            row |= count_evaluations(
                Pair(net, replace(config, batch=1, images=1), shape, device=bench.device)
            )
            if way.get("compiled"):
                own.compile(backend="eager" if bench.tiny else "inductor")
            found = compare(bench.waiting(ours.step), bench.waiting(step_released), repeats)
            row |= {"batch": batch, "at a time": ours.part, **ratio(*found)}
            row |= {
                f"{side}, s": statistics.median(times)
                for side, times in zip(("ours", "official"), found, strict=True)
            }

        with same_backend():
            yield from bench.measured(dict(zip(RACE, (name, student, label), strict=True)), fill)


def overhead(bench: Bench, names) -> Iterator[dict]:
    """The sampling loop against the bare network calls in it, with a predictor."""
    for name in names:
        for solver in ("ipndm", "unipc"):

            def fill(row, name=name, solver=solver):
                data = amedlib.describe(name)
                net, shape = bench.network(name)
                net = in_precision(net, data.precision)
                batch = 2 if bench.tiny else min(data.batch, 64)
                latents, _, labels = bench.inputs(net, shape, batch)
                with bench.device:
                    predictor = amedlib.Predictor("release", net.bottleneck_size, 0.01, 0.2)
                times = amedlib.make_schedule(num_steps=4).to(bench.device)
                method = amedlib.make_solver(solver)

                def loop(denoiser=net):
                    return amedlib.sample(
                        denoiser, latents, times, method, False, predictor, labels
                    )

                recorder = Recorder(net)
                row |= {"batch": batch, "NFE": loop(recorder).nfe}

                @torch.no_grad()
                def bare():
                    for args, options in recorder.calls:
                        net(*args, **options)

                found = compare(bench.waiting(loop), bench.waiting(bare), repeats=3)
                row |= {f"loop / bare calls, {k}": v for k, v in ratio(*found).items()}

            yield from bench.measured({"dataset": name, "solver": solver}, fill)


def features(bench: Bench) -> Iterator[dict]:
    """The network that FID is computed with, where torch-fidelity is installed."""

    def fill(row):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        class Untrained(FeatureExtractorInceptionV3):
            def load_state_dict(self, *_):
                pass

        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        net = Untrained("random weights", ["2048"], empty).to(bench.device)

        def call_with(batch):
            images = torch.zeros(batch, 3, 32, 32, dtype=torch.uint8, device=bench.device)
            return torch.no_grad()(lambda: net(images))

        row["batch"], call = bench.largest(call_with, 2 if bench.tiny else 512)
        row["images/s"] = row["batch"] / bench.per_call(call)

    yield from bench.measured({"network": "Inception-v3, float32"}, fill)


def parts(device: str, duration: float, names, tiny: bool) -> dict[str, list[Callable]]:
    """What ``python -m benchmarks gpu`` measures, by part, what may take longest last.

    Args:
        duration: seconds after which nothing new is begun.
        names: of ``NETWORKS``.
    """
    for name in names:
        one_of("networks", name, NETWORKS)
    require(
        tiny or torch.device(device).type != "cpu",
        "device",
        device,
        "a GPU for networks of true size (--tiny has small ones)",
    )
    bench = Bench(device, duration, tiny)
    return {
        "race": [lambda: race(bench, names, RACERS)],
        "rates": [lambda: rates(bench, names, VARIANTS)],
        "overhead": [lambda: overhead(bench, names)],
        "training": [lambda: training(bench, names)],
        "features": [lambda: features(bench)],
        "compiled": [lambda: rates(bench, names, COMPILED)],
        "race, compiled": [lambda: race(bench, names, COMPILED)],
    }
