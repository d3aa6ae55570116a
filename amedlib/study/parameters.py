"""What the parameters of notebooks may be, in one place: checked before a page begins its work."""

import ast
import math
from collections.abc import Callable, Sequence

from amedlib.checks import flag, is_number, is_whole, one_of, path, plain, require, whole
from amedlib.compute import best_device
from amedlib.datasets.entries import DATASETS
from amedlib.study.cluster import check_cluster
from amedlib.study.store import RESULTS

INJECTED = "# Parameters\n"  # how papermill's cell begins


def _whole(low: int, high: int) -> Callable:
    return lambda name, given: whole(name, given, low, high)


def _several(low: int, high: int) -> Callable:
    """Different whole numbers, as a list; a single one stands for a list of one."""

    def check(name, given):
        given = plain(given)
        values = list(given) if isinstance(given, list | tuple | range) else [given]
        fit = all(is_whole(each) and low <= each <= high for each in values)
        require(
            fit and 0 < len(values) == len(set(values)),
            name,
            given,
            f"a whole number from {low:,} to {high:,} or a list of different ones, which papermill "
            f'takes as -y "{name}: [{low}, {low + 1}]"',
        )
        return values

    return check


def _number(fits: Callable, allowed: str) -> Callable:
    def check(name, given):
        require(is_number(given) and fits(given), name, given, allowed)
        return given

    return check


def _dataset(name, given):
    one_of(name, given, DATASETS)
    return given


def _device(name, given):
    require(isinstance(given, str), name, given, "a name such as 'cpu' or 'cuda'")
    return given


def _cluster(name, given):
    check_cluster(given)
    return given


def _results_dir(name, given):
    folder = path(name, given)
    require(folder.is_dir() or not folder.exists(), name, given, "a folder")
    return folder


def _size(name, given):
    fit = isinstance(given, list | tuple) and len(given) == 2
    fit = fit and all(is_whole(each) and 1 <= each <= 1024 for each in given)
    require(fit, name, given, "two whole numbers from 1 to 1,024, height and width")
    return list(given)


def _rates(name, given):
    fit = isinstance(given, dict) and len(given) > 0 and given.keys() <= DATASETS.keys()
    fit = fit and all(is_number(each) and 0 < each < math.inf for each in given.values())
    require(fit, name, given, "data sets with positive numbers, such as {'cifar10': 1000}")
    return given


_POSITIVE = _number(lambda given: 0 < given < math.inf, "a positive number")
_BOUND = _number(lambda given: 0 <= given < 1, "a bound in [0, 1)")

# Every parameter of every notebook: ``check(name, given)`` returns the value as pages use it.
PARAMETERS: dict[str, Callable] = {
    "dataset": _dataset,
    "n_samples": _whole(20, 10**8),
    "nfes": _several(1, 1000),
    "seeds": _several(0, 999),
    "device": _device,
    "cluster": _cluster,
    "results_dir": _results_dir,
    "n_images": _whole(1, 1000),
    "compute": flag,
    "train": flag,
    "every_schedule": flag,
    "nfe": _whole(1, 1000),
    "other_nfe": _whole(1, 1000),
    "seed": _whole(0, 2**32 - 1),
    "n_checked": _whole(1, 10_000),
    "step": _whole(1, 5),
    "bottleneck_size": _size,
    "scale_dir": _BOUND,
    "scale_time": _BOUND,
    "teraflops": _POSITIVE,
    "images_per_second": _rates,
    "s": _POSITIVE,
    "t": _POSITIVE,
    "dimensions": _several(1, 10_000),
    "samples": _whole(2, 10_000),
    "trajectories": _whole(2, 10_000),
}


def _unknown(cells: list[str], names: list[str]) -> list[str]:
    """What papermill's cell, the last of these that is one, assigns beside the parameters.

    papermill itself warns of it, and runs the notebook with the defaults.
    """
    injected = next((cell for cell in reversed(cells) if cell.startswith(INJECTED)), "")
    assigned = [
        node.id
        for node in ast.walk(ast.parse(injected))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    return [name for name in assigned if name not in names and not name.startswith("PAPERMILL_")]


def check(namespace: dict, parameters: str, metrics: Sequence[str] = ()) -> None:
    """Check a notebook's parameters, and put them as pages use them.

    A number that stands for a list becomes a list, ``results_dir`` a path, that of the shipped
    results unless given, and ``n_samples`` what the data set says unless given.

    Args:
        namespace: the notebook's ``globals()``.
        parameters: their names, with a question mark after one that may be ``None``.
        metrics: that the data set must have.

    Raises:
        ValueError: one of them has the wrong type or is outside its range, or papermill was given
            one that the notebook does not have.
    """
    names = [name.rstrip("?") for name in parameters.split()]
    for name in _unknown(namespace.get("In", []), names):
        one_of("a parameter of this notebook", name, names)
    for name, said in zip(names, parameters.split(), strict=True):
        if namespace[name] is not None or not said.endswith("?"):
            namespace[name] = PARAMETERS[name](name, namespace[name])
    if "device" in names and namespace.get("cluster") is None:  # workers may have others
        best_device(namespace["device"])
    if "results_dir" in names and namespace["results_dir"] is None:
        namespace["results_dir"] = RESULTS
    if "dataset" in names and namespace["dataset"] is not None:
        data = DATASETS[namespace["dataset"]]
        able = [each.name for each in DATASETS.values() if {*metrics} <= {*each.metrics}]
        allowed = f"one with {' and '.join(metrics)}: {', '.join(able)}"
        require(data.name in able, "dataset", data.name, allowed)
        if "n_samples" in names and namespace["n_samples"] is None:
            namespace["n_samples"] = data.samples
