"""95 % confidence intervals of means."""

import math
import random
from collections.abc import Sequence

Z = 1.959964
"""Standard deviations that hold 95 % of a normal distribution."""
RESAMPLES = 2000


def wilson(right: float, asked: int) -> tuple[float, float]:
    """Wilson's interval of a share, which stays honest at 0 % and 100 %."""
    share = right / asked
    spread = Z * math.sqrt(share * (1 - share) / asked + Z**2 / (4 * asked**2))
    middle = share + Z**2 / (2 * asked)
    scale = 1 + Z**2 / asked
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap of the mean; the same values always give the same interval."""
    rng = random.Random(0)
    count = len(values)
    means = sorted(math.fsum(rng.choices(values, k=count)) / count for _ in range(RESAMPLES))
    tail = round(0.025 * RESAMPLES)
    return means[tail], means[-1 - tail]


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean of scores from 0 to 1: Wilson's where all are right or wrong.

    That includes scores which may be partly right but never were, whose bootstrap would be a
    point.
    """
    if set(scores) <= {0.0, 1.0}:
        return wilson(sum(scores), len(scores))
    return bootstrap(scores)
