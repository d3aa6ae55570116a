"""How much predictors of different training seeds differ, where few were trained."""

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
        relative_sd (standard deviation over the mean), degrees_of_freedom.
    """
    rows = []
    for group in _trainings(measured):
        values, what = [result.value for result in group], group[0].run
        spread = np.std(values, ddof=1) / np.mean(values)
        rows.append((what.solver != "amed", what.nfe, spread, len(values) - 1))
    columns = ["plugin", "nfe", "relative_sd", "degrees_of_freedom"]
    return pd.DataFrame(rows, columns=columns)


def _trainings(measured) -> list[list[Result]]:
    """Results that differ in the training seed only, where there are several."""
    groups: dict[str, dict[int, Result]] = {}
    for result in (result for frame in measured for result in frame["result"]):
        if result is not None and (predictor := result.run.predictor) is not None:
            same = replace(result.run, predictor=predictor | {"seed": 0})
            groups.setdefault(same.key, {})[predictor["seed"]] = result
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def pooled_noise(noise: pd.DataFrame, what: Run) -> tuple[float, int] | None:
    """Relative standard deviation over training seeds that a Run has by others, with its degrees of
    freedom: pooled over predictors of the same kind (plugin or not) at the nearest NFE."""
    same = noise[noise["plugin"] == (what.solver != "amed")]
    distance = (same["nfe"] - what.nfe).abs()
    nearest = same[distance == distance.min()]
    if nearest.empty:
        return None
    weights = nearest["degrees_of_freedom"]
    return float(np.sqrt(np.average(nearest["relative_sd"] ** 2, weights=weights))), weights.sum()


def coverage(measured) -> tuple[int, int]:
    """How good pooled noise is: of how many trainings it covers what the other seeds say.

    Every training is left out in turn. From each of its seeds, and the noise that the other
    trainings give it, follows a 95 % interval for the mean of its other seeds.

    Args:
        measured: as in ``training_noise``.

    Returns:
        The number of intervals that cover that mean, and the number of intervals.
    """
    trainings, covered = _trainings(measured), []
    for group in trainings:
        others = (other for other in trainings if other is not group)
        known = pooled_noise(training_noise({"result": other} for other in others), group[0].run)
        values = np.array([result.value for result in group])
        n = len(values)
        if known:
            relative, degrees = known
            half = stats.t.ppf(0.975, degrees) * relative * values * np.sqrt(1 + 1 / (n - 1))
            rest = (values.sum() - values) / (n - 1)
            covered += (np.abs(values - rest) <= half).tolist()
    return sum(covered), len(covered)
