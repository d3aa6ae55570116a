"""What tests of faults put in the place of the digits, in every process that computes for them.

A quick data set, and a note of every block that is begun; not a part of the library. Dask's workers
load this file where ``DASK_DISTRIBUTED__WORKER__PRELOAD`` names it.
"""

import os
import resource
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from toys import TinyNet

from amedlib.datasets import entries, loaders
from amedlib.metrics import Moments
from amedlib.study import execute, procedures, store
from amedlib.study.execute import run_all
from amedlib.study.run import Run
from amedlib.training import squared_l2

HERE = str(Path(__file__).parent)
LEARNED = {"images": 180, "batch": 8, "recipe": "paper"}
RUNS = [
    Run(solver="euler", nfe=4, samples=100),
    Run(solver="amed", nfe=3, afs=True, predictor=LEARNED, samples=100),
    Run(solver="dpm2", nfe=3, afs=True, r="searched", samples=100),
    Run("learned_r", solver="amed", nfe=3, afs=True, predictor=LEARNED, samples=100),
]


def toy_dataset(denoiser, batch=7):
    """A Gaussian of 2x2 pixels, or of 8x8 for a ``TinyNet``."""
    shape = (1, 8, 8) if isinstance(denoiser, TinyNet) else (1, 2, 2)
    real = torch.randn(300, *shape, generator=torch.manual_seed(0)) / 2
    features_of = {
        "fd": lambda x: x.flatten(1)[:, :3],
        "fd_pixels": lambda x: x.flatten(1),
        "fd_joint": lambda x: 2 * x.flatten(1),
    }
    return loaders.Dataset(
        name="toy",
        title="a Gaussian",
        paper="cifar10",
        shape=shape,
        load=None,
        denoiser=denoiser,
        to_images=lambda x: x.float(),
        judge=lambda: (features_of, {name: Moments.of(f(real)) for name, f in features_of.items()}),
        metrics=(*features_of, "endpoint_error"),
        feature_distance_name="FD",
        real_images=lambda: real,
        distances=lambda loss: squared_l2,
        batch=batch,
        fingerprint="none",
    )


def install() -> None:
    """Put them there. The environment says what goes wrong.

    FAULTS_LOG: the file in which blocks are noted; FAULTS_DEADLY: an NFE at which a block kills its
    process; FAULTS_SLOW: seconds that a block waits.
    """
    data = toy_dataset(TinyNet(), batch=10)
    execute.load_dataset = lambda name, device="cpu": data
    store.SOLUTION = store.SOLUTION | {"num_steps": 5}
    procedures.GRID = (0.3, 0.5, 0.7)
    entries.DATASETS["digits"].training["images"] = 20  # as many are searched on
    whole = execute.make_block

    def make_block(run, context, index):
        if "FAULTS_LOG" in os.environ:
            with open(os.environ["FAULTS_LOG"], "a") as log:
                log.write(f"{store.result_path(run).stem}/{index} {os.getpid()}\n")
        time.sleep(float(os.environ.get("FAULTS_SLOW", 0)))
        if str(run.nfe) == os.environ.get("FAULTS_DEADLY"):
            time.sleep(0.5)  # in the middle of its work
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(run, context, index)

    execute.make_block = make_block


@contextmanager
def installed():
    """The same for a while, in the process of a test."""
    patched = [(execute, "load_dataset"), (store, "SOLUTION"), (procedures, "GRID")]
    patched += [(execute, "make_block")]
    before = [getattr(module, name) for module, name in patched]
    training = entries.DATASETS["digits"].training
    images = training["images"]
    install()
    try:
        yield
    finally:
        training["images"] = images
        for (module, name), value in zip(patched, before, strict=True):
            setattr(module, name, value)


def dask_setup(worker) -> None:
    """Called by a Dask worker that preloads this file."""
    install()


def begun(log: Path) -> list[str]:
    """The blocks that were noted, as ``<stem of the result>/<index>``."""
    return [line.split()[0] for line in log.read_text().splitlines()] if log.is_file() else []


def compute(folder, runs=RUNS, environment=(), file_size=None, user=None) -> None:
    """A study in a process of its own; if it fails, its exit status is 1.

    Args:
        environment: variables to set; FAULTS_WHY names a file for the sentence if it fails.
        file_size: no file can become longer, as on a full disk.
        user: whose permissions it has.
    """
    torch.set_num_threads(1)
    os.environ.update(environment)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if user is not None:
        os.setuid(user)
    install()
    try:
        run_all(runs, folder, "cpu", progress=False)
    except (RuntimeError, ValueError) as error:
        if "FAULTS_WHY" in os.environ:
            Path(os.environ["FAULTS_WHY"]).write_text(str(error))
        else:
            print(error, file=sys.stderr)
        sys.exit(1)
