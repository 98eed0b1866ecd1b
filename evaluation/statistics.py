"""Intervals of what was measured more than once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Fewer are too alike when drawn with replacement: their intervals would be far too narrow.
FEWEST_ROWS = 5


@dataclass
class Interval:
    """A mean and its 95 % confidence interval.

    Args:
        stderr: standard error of the mean; NaN where it was not computed.
    """

    mean: float
    low: float
    high: float
    stderr: float = float("nan")


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


def ratio_intervals(sums: np.ndarray, counts: np.ndarray, draws: int, seed: int = 0) -> list[Interval]:
    """Means over all observations of each column, with bootstrap intervals over rows (percentiles).

    Observations of a row (a recording) are not independent, so whole rows are drawn, with replacement. Calls
    with the same seed and number of rows draw the same rows.

    Args:
        sums, counts: of the observations of each row, `[R, columns]`.
        draws: sets of rows that are drawn.
    Returns:
        An interval for each column. With fewer than `FEWEST_ROWS` rows that have observations, low and high
        are NaN; with none, the mean too.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=draws)
    means, ratios = (
        _ratio(weights @ sums, weights @ counts) for weights in (np.ones((1, len(counts))), drawn)
    )
    intervals = []
    for mean, column, rows in zip(means[0], ratios.T, (counts > 0).sum(0), strict=True):
        if rows < FEWEST_ROWS:
            intervals.append(Interval(float(mean), float("nan"), float("nan")))
            continue
        low, high = np.nanpercentile(column, (2.5, 97.5))
        intervals.append(Interval(float(mean), float(low), float(high), float(np.nanstd(column))))
    return intervals


def cluster_intervals(
    values: np.ndarray, clusters: Sequence[str], draws: int, seed: int = 0
) -> list[Interval]:
    """Means over the recordings of each column, with bootstrap intervals over clusters, such as speakers.

    Args:
        values: `[recordings, columns]`; NaN is no value.
        clusters: of each recording.
    """
    names, rows = np.unique(np.asarray(clusters), return_inverse=True)
    there = ~np.isnan(values)
    sums, counts = np.zeros((len(names), values.shape[1])), np.zeros((len(names), values.shape[1]))
    np.add.at(sums, rows, np.where(there, values, 0.0))
    np.add.at(counts, rows, there)
    return ratio_intervals(sums, counts, draws, seed)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means, NaN where there is nothing."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
