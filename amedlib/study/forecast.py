"""What work will take: evaluations of the network, counted, at a rate that is measured.

What trainings and searches evaluate is no formula: it is counted by a denoiser that they call.
"""

import json
import math
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from amedlib.compute import halved
from amedlib.datasets.entries import describe
from amedlib.search import FINE
from amedlib.study import store
from amedlib.study.procedures import Context, relative_alignment
from amedlib.study.run import BLOCKS, Run
from amedlib.training import Trainer, Training

# Of a pass of ten iterations, about: a line search that is content with its first point takes one.
LBFGS_GRADIENTS = 12


class _Counter:
    """A denoiser that changes nothing, and counts the images that it is given."""

    gives_bottleneck = True
    bottleneck_size = (1, 1)

    def __init__(self):
        self.images = 0

    def __call__(self, x, t, labels=None, return_bottleneck=False):
        self.images += len(x)
        return (x, x.new_zeros(len(x), 1, 1, 1)) if return_bottleneck else x


def training_evaluations(training: Training, gradients: int | None = None) -> int:
    """Network evaluations of a whole training, of teacher and student, counted on one trajectory.

    Those of the student are differentiated: all of them for the objective ``"endpoint"``, else the
    second one of each step. Of a search those of the teacher's trajectory.

    Args:
        gradients: that L-BFGS took, as its predictor's file says; about ``LBFGS_GRADIENTS`` in
            every pass unless given. Other trainings take as many as they have batches.
    """
    if training.objective == "search":
        return (FINE - 1) * training.images
    # The seed changes nothing here, and most trainings differ in it alone.
    each = _per_trajectory(json.dumps(asdict(replace(training, seed=0))), gradients)
    batch = training.images if training.whole else training.batch
    return each * -(-training.images // batch) * batch


@cache
def _per_trajectory(training: str, gradients: int | None) -> int:
    counter = _Counter()
    trainer, one = (
        Trainer(counter, Training(**json.loads(training)), (1, 1, 1)),
        torch.ones(1, 1, 1, 1),
    )
    config = trainer.config
    if not config.whole:
        gradients = config.passes
    elif gradients is None:
        gradients = config.passes * LBFGS_GRADIENTS
    end = trainer.end(one) if gradients > 1 else None
    for _ in range(gradients):
        for _ in trainer.losses(one, end=end):
            pass
    return counter.images


def search_evaluations(search: Run) -> int:
    """Network evaluations of a Run of ``"grid_search"``, counted on a few samples."""
    counter, few = _Counter(), replace(search, samples=2 * BLOCKS)
    data = SimpleNamespace(denoiser=counter, shape=(1, 1, 1), labels=None, batch=few.samples)
    relative_alignment(few, Context(data, Path(), "cpu", progress=False))
    return counter.images // few.samples * search.samples


def _of_training(run: Run) -> int:
    return describe(run.dataset).evaluations_per_call * training_evaluations(run.training)


def _of_search(run: Run) -> int:
    return describe(run.dataset).evaluations_per_call * search_evaluations(run)


def _of_solution_block(run: Run) -> float:
    steps = store.SOLUTION["num_steps"] - 1
    return describe(run.dataset).evaluations_per_call * steps * run.samples / BLOCKS


def _of_block(run: Run) -> float:
    per_call, steps = describe(run.dataset).evaluations_per_call, store.SOLUTION["num_steps"] - 1
    of_procedure = {
        "endpoint_accuracy": per_call * (steps + steps // 2),
        "local_error": per_call * 40 * (run.num_steps - 1) + run.nfe,
        "first_slope": per_call,
    }
    return of_procedure.get(run.metric, run.nfe) * run.samples / BLOCKS


# Parts of the work: the evaluations of one, by its Run; and how many make what is named.
PARTS = {
    "trainings": (_of_training, 1),
    "grid searches": (_of_search, 1),
    "solutions of the ODE": (_of_solution_block, BLOCKS),
    "sets of samples": (_of_block, BLOCKS),
}


def rate(run: Run, context: Context, seconds: float = 1.0) -> float:
    """Network evaluations per second for a Run's data set, timed now.

    Batches are doubled up to that of sampling, or what fits the memory; the largest is repeated
    until ``seconds`` are over.
    """
    denoiser, t = context.denoiser(run), run.times()[0]
    batch, most, spent, over = 1, context.data.batch, [], time.perf_counter() + seconds
    while not spent or time.perf_counter() < over:
        x, labels = t * context.latents(range(batch)).double(), context.labels(range(batch))
        start = time.perf_counter()
        try:
            with torch.no_grad():
                denoiser(x, t, labels).sum().item()  # which waits for the device
        except torch.OutOfMemoryError as error:
            batch = most = halved(batch, "sampling", error)
            continue
        now = time.perf_counter()
        if batch < most and now < over:
            batch = min(2 * batch, most)
        else:
            spent.append(now - start)
    per_call = describe(run.dataset).evaluations_per_call
    return per_call * batch * len(spent) / sum(spent)


def _lasting(seconds: float) -> str:
    """A time to two digits, in the unit that it is read in."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * size or unit == "h":
            return f"{float(f'{max(seconds, 1) / size:.2g}'):g} {unit}"


def forecast(parts: list[tuple[str, Run]], rates: dict[str, float]) -> str:
    """What will be computed and about how long that takes, in two sentences; empty for nothing.

    Args:
        parts: names in ``PARTS``, each with its Run.
        rates: evaluations per second by data set; NaN where they are not known.
    """
    said, seconds = [], 0.0
    for name, (count, pieces) in PARTS.items():
        of = [(count(run), rates[run.dataset]) for part, run in parts if part == name]
        if of:
            evaluations = sum(each for each, _ in of)
            seconds += sum(each / speed for each, speed in of)
            said.append(f"{name}: {-(-len(of) // pieces)} ({evaluations:,.0f} evaluations)")
    if not said:
        return ""
    known = f"About {_lasting(seconds)}, by a second of timing the network."
    time_it_takes = known if math.isfinite(seconds) else "How long that takes is not known."
    return f"To be computed: {'; '.join(said)}. {time_it_takes}"
