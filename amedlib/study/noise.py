"""How much predictors of different training seeds differ, where few were trained."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from amedlib.study.run import Result, Run


def training_noise(measured) -> pd.DataFrame:
    """How much predictors of different seeds differ.

    Args:
        measured: frames with a column ``result``, such as those of ``stored_tables``.

    Returns:
        A row per training that was done with several seeds: plugin (or AMED-Solver), nfe,
        relative_sd (standard deviation over the mean), degrees_of_freedom; one of its Runs, and
        the values.
    """
    rows = []
    for group in _trainings(measured):
        values, what = [result.value for result in group], group[0].run
        spread = np.std(values, ddof=1) / np.mean(values)
        rows.append((what.solver != "amed", what.nfe, spread, len(values) - 1, what, values))
    columns = ["plugin", "nfe", "relative_sd", "degrees_of_freedom", "what", "values"]
    return pd.DataFrame(rows, columns=columns)


def _trainings(measured) -> list[list[Result]]:
    """Results that differ in the training seed only, where there are several."""
    groups: dict[str, dict[int, Result]] = {}
    for result in (result for frame in measured for result in frame["result"]):
        if result is not None and (predictor := result.run.predictor) is not None:
            same = replace(result.run, predictor=predictor | {"seed": 0})
            groups.setdefault(same.key, {})[predictor["seed"]] = result
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def _nearest(noise: pd.DataFrame, what: Run) -> pd.DataFrame:
    """Trainings of the same kind as a Run's (plugin or not) at the nearest NFE."""
    same = noise[noise["plugin"] == (what.solver != "amed")]
    distance = (same["nfe"] - what.nfe).abs()
    return same[distance == distance.min()]


def _pooled(nearest: pd.DataFrame) -> tuple[float, int]:
    weights = nearest["degrees_of_freedom"]
    return float(np.sqrt(np.average(nearest["relative_sd"] ** 2, weights=weights))), weights.sum()


def pooled_noise(noise: pd.DataFrame, what: Run) -> tuple[float, int] | None:
    """Relative standard deviation over training seeds that a Run has by others, with its degrees of
    freedom: pooled over predictors of the same kind (plugin or not) at the nearest NFE.

    Predictors differ in how much their trainings differ, so that what is pooled is too small for
    some. It is widened by what 95 % coverage takes where it can be checked: ``widening``.
    """
    nearest = _nearest(noise, what)
    if nearest.empty:
        return None
    relative, degrees = _pooled(nearest)
    return relative * widening(noise), degrees


def widening(noise: pd.DataFrame) -> float:
    """The factor, at least 1, by which pooled noise is widened, by conformal prediction.

    Every training with several seeds is left out in turn. How far its seeds are from the mean of
    its other seeds, in half widths of the 95 % interval that the remaining trainings give it, is a
    score; the factor is the quantile of all scores that covers one more in 95 of 100 cases.
    """
    scores = sorted(score for row in noise.index for score in _scores(noise, row))
    rank = math.ceil(0.95 * (len(scores) + 1))
    return max(1.0, scores[min(rank, len(scores)) - 1]) if scores else 1.0


def can_be_checked(noise: pd.DataFrame) -> bool:
    """Whether a training that is left out leaves another of its kind to pool."""
    return any(_scores(noise, row) for row in noise.index)


def _scores(noise: pd.DataFrame, row, factor: float = 1.0) -> list[float]:
    """How far the seeds of a training are from the others, in half widths of their intervals."""
    left_out, what = noise.loc[row], noise.loc[row, "what"]
    nearest = _nearest(noise.drop(row), what)
    if nearest.empty:
        return []
    relative, degrees = _pooled(nearest)
    values = np.array(left_out["values"])
    n = len(values)
    rest = (values.sum() - values) / (n - 1)
    half = stats.t.ppf(0.975, degrees) * factor * relative * values * np.sqrt(1 + 1 / (n - 1))
    return list(np.abs(values - rest) / half)


def coverage(measured) -> tuple[int, int]:
    """How good pooled noise is: of how many trainings it covers what the other seeds say.

    Every training is left out in turn, the widening included. From each of its seeds, and the noise
    that the other trainings give it, follows a 95 % interval for the mean of its other seeds.

    Args:
        measured: as in ``training_noise``.

    Returns:
        The number of intervals that cover that mean, and the number of intervals.
    """
    noise, covered = training_noise(measured), []
    for row in noise.index:
        factor = widening(noise.drop(row))
        covered += [score <= 1 for score in _scores(noise, row, factor)]
    return sum(covered), len(covered)


def doubt(row) -> str:
    """Where the noise of training of a comparison is borrowed, †, or not known.

    Without it nothing is decided, whatever the interval over samples.
    """
    if row.pooled:
        return " †"
    apart = row.uncorrected == "undecided" and (row.low > 0 or row.high < 0)
    return " (one training, its noise is not known)" if apart else ""
