"""Cost of the Frechet distance and of the moments it is made from."""

import statistics

import numpy as np

from amedlib.metrics import Moments, frechet_distance

from .timing import seconds

SAMPLES = 1000
# The digits classifier's, one in between, and Inception's.
LENGTHS = (64, 512, 2048)


def rows(repeats: int = 3):
    """One row per length of the features."""
    generator = np.random.default_rng(0)
    for length in LENGTHS:
        features = generator.standard_normal((SAMPLES, length))
        # More moments than features, so that the covariance has full rank.
        mixing = generator.standard_normal((length, length)) / np.sqrt(length)
        mean, covariance = np.zeros(length), mixing @ mixing.T
        other = np.full(length, 0.1), covariance + np.eye(length) / 10
        distance = [
            seconds(lambda: frechet_distance(mean, covariance, *other))  # noqa: B023
            for _ in range(repeats)
        ]
        moments = [seconds(lambda: Moments.of(features)) for _ in range(repeats)]  # noqa: B023
        yield {
            "features": length,
            f"seconds for the moments of {SAMPLES} samples": statistics.median(moments),
            "seconds for a distance": statistics.median(distance),
        }
