"""Intervals of what was measured more than once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], lowest: float, highest: float) -> Interval:
    """Mean of independent repetitions, with Student's t interval cut to the range that values can have.

    One value alone has no interval: low and high are NaN.
    """
    assert len(values) >= 1
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, max(lowest, mean - half), min(highest, mean + half))
