"""Comparing the time of two things on a machine that does other things too."""

import statistics
import time
from collections.abc import Callable


def seconds(function: Callable) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(a: Callable, b: Callable, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of a and of b, in turns: whatever slows the machine for a while slows both."""
    a(), b()
    pairs = []
    for i in range(repeats):
        if i % 2:
            pairs.append((seconds(a), seconds(b)))
        else:
            pairs.append((seconds(b), seconds(a))[::-1])
    return tuple(list(column) for column in zip(*pairs, strict=True))


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of neighbouring runs."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": median, "lower quartile": low, "upper quartile": high}
