"""Intervals of what was measured more than once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Numbers of draws x rows held at once: 64 MB.
_BLOCK = 1 << 23

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
    means, ratios = _ratio(sums.sum(0), counts.sum(0)), _drawn_ratios(sums, counts, draws, generator)
    intervals = []
    for mean, column, rows in zip(means, ratios.T, (counts > 0).sum(0), strict=True):
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


def _drawn_ratios(
    sums: np.ndarray, counts: np.ndarray, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """Means of sets of rows drawn with replacement, `[draws, columns]`."""
    rows = len(counts)
    block = max(1, _BLOCK // rows)
    found = []
    for first in range(0, draws, block):
        size = min(block, draws - first)
        weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=size)
        found.append(_ratio(weights @ sums, weights @ counts))
    return np.concatenate(found)


def macro_intervals(groups: Sequence[np.ndarray], draws: int, seed: int = 0) -> list[Interval]:
    """Mean over groups of the mean of each group's rows, with bootstrap intervals over rows in each group.

    Args:
        groups: values of each group, `[rows, columns]`.
    Returns:
        An interval for each column. Where a group has fewer than `FEWEST_ROWS` rows, low and high are NaN.
    """
    assert groups
    mean = np.mean([values.mean(0) for values in groups], axis=0)
    if min(len(values) for values in groups) < FEWEST_ROWS:
        return [Interval(float(column), float("nan"), float("nan")) for column in mean]
    generator = np.random.default_rng(seed)
    drawn = [_drawn_ratios(values, np.ones_like(values), draws, generator) for values in groups]
    low, high = np.percentile(np.mean(drawn, axis=0), (2.5, 97.5), axis=0)
    columns = zip(mean, low, high, strict=True)
    return [Interval(float(m), float(a), float(b)) for m, a, b in columns]


def standard_errors(values: np.ndarray) -> np.ndarray:
    """Standard errors of the means of independent rows `[rows, columns]`; NaN for one row."""
    if len(values) == 1:
        return np.full(values.shape[1], np.nan)
    return stats.sem(values, axis=0)


def mcnemar(first_alone: int, second_alone: int) -> float:
    """p-value of McNemar's exact test.

    Args:
        first_alone, second_alone: how often only one of the two is right.
    """
    disagreements = first_alone + second_alone
    if disagreements == 0:
        return 1.0
    return float(stats.binomtest(first_alone, disagreements, 0.5).pvalue)
