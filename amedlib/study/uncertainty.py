"""Means and paired differences with their two sources of uncertainty."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from amedlib.checks import require
from amedlib.metrics import jackknife_error
from amedlib.study.run import BLOCKS, Result, Run


@dataclass(frozen=True)
class Estimate:
    """A mean over training seeds, with its two sources of uncertainty kept apart.

    Attributes:
        value: the mean.
        sampling_error: standard error from the finite number of samples (block jackknife).
        training_error: standard error from the finite number of trained predictors; ``None`` where
            nothing was trained, NaN where there is one seed only and it is not known.
        seeds: number of trained predictors, at least 1.
        samples: samples per number.
        pooled: degrees of freedom of a training error that was taken from other predictors;
            ``None`` where it was not.
    """

    value: float
    sampling_error: float
    training_error: float | None
    seeds: int
    samples: int
    pooled: int | None = None

    @property
    def _variances(self) -> tuple[float, float]:
        """Of sampling and of training; an unknown one is left out."""
        training = (self.training_error or 0.0) ** 2
        return self.sampling_error**2, 0.0 if np.isnan(training) else training

    @property
    def degrees_of_freedom(self) -> float:
        """After Welch and Satterthwaite; infinite for a value without uncertainty."""
        a, b = self._variances
        of_training = self.pooled or self.seeds - 1
        below = a**2 / (BLOCKS - 1) + (b**2 / of_training if b else 0.0)
        return (a + b) ** 2 / below if below else np.inf

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval (Student's t)."""
        half = stats.t.ppf(0.975, self.degrees_of_freedom) * np.sqrt(sum(self._variances))
        return float(self.value - half), float(self.value + half)

    @property
    def p_value(self) -> float:
        """Of the hypothesis that the true value is zero: two-sided, Student's t.

        One where the noise of training is not known; zero for a value without uncertainty.
        """
        if self.training_error is not None and np.isnan(self.training_error):
            return 1.0
        error = np.sqrt(sum(self._variances))
        if error == 0:
            return float(self.value == 0)
        return float(2 * stats.t.sf(abs(self.value) / error, self.degrees_of_freedom))


def trainings(results: list[Result]) -> list[Result]:
    """Results that differ in the training seed only.

    Raises:
        ValueError: a training is among them twice, and would count as two independent ones; or what
            was not trained is.
    """
    seeds = [(result.run.predictor or {}).get("seed") for result in results]
    require(len(set(seeds)) == len(seeds), "training seeds", seeds, "different, each given once")
    return results


def _combine(groups: list[list[Result]], weights: list[float], noise=None) -> Estimate:
    everything = [result for group in groups for result in trainings(group)]
    samples = {result.run.samples for result in everything}
    require(
        len(samples) == 1, "the numbers of samples", sorted(samples), "the same, to be compared"
    )
    means = [np.mean([result.value for result in group]) for group in groups]
    replicates = sum(
        weight * np.mean([result.replicates for result in group], axis=0)
        for weight, group in zip(weights, groups, strict=True)
    )
    variance, seeds, pooled = 0.0, [], []
    for weight, group in zip(weights, groups, strict=True):
        if group[0].run.predictor is None:
            continue
        seeds.append(len(group))
        values = [result.value for result in group]
        known = noise(group[0].run) if noise and len(group) == 1 else None
        if known:
            spread = (known[0] * values[0]) ** 2
            pooled.append(known[1])
        else:
            spread = np.var(values, ddof=1) / len(values) if len(values) > 1 else np.nan
        variance += weight**2 * spread
    few = [n - 1 for n in seeds if n > 1]
    return Estimate(
        float(np.dot(weights, means)),
        jackknife_error(replicates) if np.size(replicates) else 0.0,
        float(np.sqrt(variance)) if seeds else None,
        min(seeds, default=1),
        samples.pop(),
        min(pooled + few) if pooled else None,
    )


def estimate(results: list[Result], noise=None) -> Estimate:
    """The mean of results that differ in the training seed only; ``noise`` as in ``difference``.

    Raises:
        ValueError: the numbers of samples differ, or a training is given twice.
    """
    return _combine([results], [1], noise)


def difference(
    a: list[Result],
    b: list[Result],
    factor: float = 1.0,
    noise: Callable[[Run], tuple[float, int] | None] | None = None,
) -> Estimate:
    """Paired difference a - factor b on the same latents; each a list over training seeds.

    Args:
        noise: for a predictor that was trained once, its relative standard deviation over training
            seeds and the degrees of freedom of that number, from elsewhere; ``None``: not known.

    Raises:
        ValueError: the numbers of samples or the latents differ, or a training is given twice.
    """
    latents = {(r.run.dataset, r.run.metric, r.run.first_seed) for r in a + b}
    require(
        len(latents) == 1,
        "dataset, metric and latents",
        sorted(latents),
        "the same for a paired difference",
    )
    return _combine([a, b], [1, -factor], noise)


def estimates(measured: pd.DataFrame, by=("method", "nfe")) -> pd.DataFrame:
    """Means over training seeds: columns ``by``, value, low, high, half, the Estimate itself, and
    ``trainings``, the values that the mean is of."""
    rows = []
    for key, group in measured.groupby(list(by), sort=False, dropna=False):
        found = estimate(group["result"].tolist())
        low, high = found.interval
        rows.append(
            dict(zip(by, key, strict=True))
            | {
                "value": found.value,
                "low": low,
                "high": high,
                "half": (high - low) / 2,
                "estimate": found,
                "trainings": [result.value for result in group["result"]],
            }
        )
    return pd.DataFrame(rows)


def against_baseline(measured: pd.DataFrame, baseline: str) -> dict[str, Estimate]:
    """Paired difference of every variant to a baseline, by variant; columns variant, result."""
    results = {key: group["result"].tolist() for key, group in measured.groupby("variant")}
    return {
        key: difference(results[key], results[baseline])
        for key in measured["variant"].unique()
        if key != baseline
    }


def mean_curve(results, name: str) -> dict:
    """The curves of one method's results, with ``name`` averaged over its training seeds."""
    results = trainings(list(results))
    mean = np.mean([result.curves[name] for result in results], axis=0)
    return results[0].curves | {name: mean.tolist()}


def with_interval(value: float, half: float) -> str:
    """A number with its 95 % half width, to two digits of the latter: ``12.3 ± 1.2``."""
    if not half > 0:
        return f"{value:.4g}".replace("-", "−")
    digits = max(0, 1 - int(np.floor(np.log10(half))))
    value = round(value, digits) + 0.0  # no minus before a zero
    return f"{value:.{digits}f} ± {half:.{digits}f}".replace("-", "−")
