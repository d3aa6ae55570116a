"""Where results, predictors and solutions of the ODE are kept, named by what determines them."""

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from amedlib import checks
from amedlib.checks import require
from amedlib.datasets.files import DATA, INSTALLED
from amedlib.datasets.loaders import Dataset
from amedlib.files import (
    Damaged,
    check_writable,
    load_tensors,
    save_tensors,
    tensor_shapes,
    write_atomically,
)
from amedlib.metrics import Moments
from amedlib.study.run import BLOCKS, Result, Run, flat, short_hash
from amedlib.trained import load_predictor

# Shipped ones in a clone; where the library was installed, a folder of the user's own.
RESULTS = Path("amed_results").absolute() if INSTALLED else DATA / "results"


def _folder(results_dir, run: Run, dataset: str | None = None) -> Path:
    require(isinstance(run, Run), "run", run, "an amedlib.Run")
    return checks.path("results_dir", results_dir) / (dataset or run.dataset)


def result_path(run: Run, results_dir=RESULTS) -> Path:
    """Where the result of a Run is kept."""
    return _folder(results_dir, run) / f"{run.metric}-{run.key}.json"


def predictor_path(run: Run, results_dir=RESULTS) -> Path:
    """Where the predictor of a Run is kept; Runs of one training share it."""
    folder = _folder(results_dir, run, run.trained_on) / "predictors"
    return folder / f"{short_hash(flat(run.training))}.safetensors"


# The ODE's own solution. `endpoint_accuracy` measures how far it moves with half the steps.
SOLUTION = {"solver": "unipc", "options": {"order": 3, "thresholding": False}, "num_steps": 129}


def solution_key(run: Run) -> list:
    """What determines the ODE's solution from a Run's latents."""
    what = [SOLUTION, run.sigma_min, run.sigma_max, run.first_seed, run.samples]
    return what + [run.precision] * (run.precision != "float32")


def solution_path(run: Run, results_dir=RESULTS) -> Path:
    """Where the ODE's solution from a Run's latents is kept; Runs with the same latents share it.

    In half precision, whose rounding is below the solution's own accuracy (`endpoint_accuracy`);
    made in blocks, as a result is.
    """
    return _folder(results_dir, run) / "endpoints" / f"{short_hash(solution_key(run))}.safetensors"


@lru_cache(maxsize=10_000)  # the ledger asks for each result several times
def _read(path: Path, *version: int) -> Result:
    content = json.loads(path.read_bytes())
    content["run"].pop("version", None)  # of the procedure; was always 1
    content["run"] = Run(**content["run"])
    return Result(**content)


def load_result(run: Run, results_dir=RESULTS) -> Result | None:
    """The stored result, or ``None``. A file that cannot be read is set aside with a warning."""
    path = result_path(run, results_dir)
    try:
        status = path.stat()
        result = _read(path, status.st_mtime_ns, status.st_size)
        if result.run != run or not np.isfinite(result.value):
            raise ValueError("it holds the result of another run, or no number")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        _set_aside(path, error)
        return None
    return result


def result_files(dataset: str, results_dir=RESULTS) -> list[Path]:
    """The files of all results of a data set, in their order."""
    folder = checks.path("results_dir", results_dir) / dataset
    return sorted(folder.glob(f"*-{'[0-9a-f]' * 16}.json"))


def read_result(path: Path) -> Result | None:
    """The result in a file, or ``None`` where it holds none of this version."""
    with suppress(ValueError, TypeError, KeyError):
        status = path.stat()
        result = _read(path, status.st_mtime_ns, status.st_size)
        if path.stem == f"{result.run.metric}-{result.run.key}" and np.isfinite(result.value):
            return result
    return None


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_suffix(".corrupt")
    check_writable(path.parent, "results_dir")
    with suppress(FileNotFoundError):  # another study may have done it
        os.replace(path, aside)
    warnings.warn(
        f"The file {path} cannot be used ({error}); it was set aside as {aside.name} and is made "
        "again.",
        stacklevel=3,
    )


def is_whole_predictor(path: Path) -> bool:
    """Whether the file of a predictor is there; one that cannot be read is set aside."""
    return _is_whole(path, load_predictor)


def is_whole_solution(path: Path) -> bool:
    """Whether the file of a solution is there; one that cannot be read is set aside."""
    return _is_whole(path, _check_solution)


def _check_solution(path: Path) -> None:
    if list(tensor_shapes(path)) != ["x"]:
        raise Damaged("it holds no solution")


def _is_whole(path: Path, read: Callable) -> bool:
    if not path.is_file():
        return False
    try:
        read(path)
    except Damaged as error:
        _set_aside(path, error)
        return False
    return True


def save_result(result: Result, results_dir=RESULTS) -> None:
    """Write a result atomically, a field per line."""
    rows = [f'"{name}": {json.dumps(v, allow_nan=False)}' for name, v in asdict(result).items()]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    write_atomically(result_path(result.run, results_dir), text.encode())


def unfinished(path: Path) -> Path:
    """The folder of what belongs to a file that is not finished."""
    return path.with_suffix(".blocks.partial")


def kept_block(path: Path, fingerprint: str, index: int) -> Path:
    """Where the index-th block of a file is kept until the file is made.

    Blocks of other code or weights have other names: they do not mix.
    """
    origin = short_hash([BLOCKS, fingerprint])
    return unfinished(path) / f"{index}-{origin}.safetensors"


@lru_cache
def code_fingerprint() -> str:
    """A hash of the library's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def fingerprint_of(data: Dataset) -> str:
    return f"code {code_fingerprint()}, weights {data.fingerprint}"


@lru_cache
def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {"python": platform.python_version()} | packages


@lru_cache
def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{model or platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


class Block(NamedTuple):
    """What one block of samples adds to a Run's numbers, and what it took."""

    moments: dict[str, Moments]
    nfe: int
    seconds: float
    device: str


def load_block(path: Path) -> Block | None:
    """A block that is kept; ``None`` if there is none, or none that can be read."""
    try:
        tensors, metadata = load_tensors(path)
    except ValueError:
        return None
    moments = {
        name.removesuffix("/count"): Moments(
            int(tensors[name]),
            *(tensors[name.replace("/count", part)].numpy() for part in ("/mean", "/scatter")),
        )
        for name in tensors
        if name.endswith("/count")
    }
    return Block(moments, **json.loads(metadata["block"]))


def save_block(path: Path, block: Block) -> None:
    tensors = {
        f"{name}/{part}": torch.as_tensor(getattr(moments, part))
        for name, moments in block.moments.items()
        for part in ("count", "mean", "scatter")
    }
    about = {name: value for name, value in block._asdict().items() if name != "moments"}
    save_tensors(path, tensors, {"block": json.dumps(about)})
