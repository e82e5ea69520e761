"""95 % confidence intervals of means, by scipy."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 2000


def wilson(right: float, asked: int) -> tuple[float, float]:
    """Wilson's interval of a share, which stays honest at 0 % and 100 %."""
    interval = stats.binomtest(round(right), asked).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap of the mean; the same values always give the same interval."""
    if len(set(values)) == 1:
        return values[0], values[0]
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean of scores from 0 to 1: Wilson's where all are right or wrong.

    That includes scores which may be partly right but never were, whose bootstrap would be a
    point.
    """
    if set(scores) <= {0.0, 1.0}:
        return wilson(sum(scores), len(scores))
    return bootstrap(scores)
