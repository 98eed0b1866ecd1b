"""What is measured: each number is a sum over a count, so that answers of any length add up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.statistics import Interval, ratio_intervals


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        unit: of its value.
        better: higher, lower, or "" where neither is.
        main: one of the few that a table begins with.
        meaning: in words.
    """

    unit: str
    better: str
    main: bool
    meaning: str


Ratio = tuple[float, float]
Ratios = dict[str, Ratio]


def value(ratio: Ratio) -> float | None:
    """Of one answer; None where there was nothing to count."""
    total, count = ratio
    return total / count if count else None


def intervals(rows: Sequence[Ratios], draws: int, seed: int) -> dict[str, tuple[Interval, float, int]]:
    """Each metric over all answers with its interval (bootstrap over answers), the count it was divided by,
    and how many answers had any."""
    names = list(rows[0])
    sums = np.array([[row[name][0] for name in names] for row in rows])
    counts = np.array([[row[name][1] for name in names] for row in rows])
    found = ratio_intervals(sums, counts, draws, seed)
    totals, having = counts.sum(0), (counts > 0).sum(0)
    return {
        name: (interval, float(total), int(n))
        for name, interval, total, n in zip(names, found, totals, having, strict=True)
    }
