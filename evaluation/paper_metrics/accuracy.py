"""Accuracies from outcomes of pairs: voices averaged first, then ids, with intervals over ids."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluation.paper_metrics.pairs import Pair
from evaluation.statistics import Interval, macro_intervals, ratio_intervals, standard_errors

METRICS = {
    "acc": "all ids",
    "acc_in_vocab": "ids whose word has a frequency above 0",
    "acc_macro": "mean over types of the mean over the type's ids",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over clusters.

    Args:
        interval: mean and 95 % bootstrap interval; NaN where there are too few clusters.
        stderr: standard error of the mean; NaN for one cluster.
        clusters: how many were averaged.
    """

    interval: Interval
    stderr: float
    clusters: int


@dataclass(frozen=True)
class Clusters:
    """Means over the voices of each cluster.

    Args:
        values: `[clusters, columns]`.
        strata: type of each.
        in_vocab: whether its word is in the vocabulary; None where that is not asked.
    """

    values: np.ndarray
    strata: list[str]
    in_vocab: list[bool | None]


def over_voices(pairs: Sequence[Pair], values: np.ndarray) -> Clusters:
    """Means of the values `[pairs, columns]` of each cluster's pairs, in the order of clusters' names."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        rows[pair.cluster].append(index)
    names = sorted(rows)
    firsts = [pairs[rows[name][0]] for name in names]
    return Clusters(
        np.stack([values[rows[name]].mean(0) for name in names]),
        [pair.stratum for pair in firsts],
        [pair.in_vocab for pair in firsts],
    )


def estimates(pairs: Sequence[Pair], values: np.ndarray, draws: int, seed: int) -> dict[str, list[Estimate]]:
    """Means of the values `[pairs, columns]` by metric, for each column.

    The values are outcomes, or differences of two models' outcomes.
    """
    clusters = over_voices(pairs, values)
    found = {"acc": _over_all(clusters.values, draws, seed)}
    known = np.array([bool(entry) for entry in clusters.in_vocab])
    if known.any():
        found["acc_in_vocab"] = _over_all(clusters.values[known], draws, seed)
    if any(clusters.strata):
        found["acc_macro"] = _over_strata(clusters, draws, seed)
    return found


def _over_all(values: np.ndarray, draws: int, seed: int) -> list[Estimate]:
    intervals = ratio_intervals(values, np.ones_like(values), draws, seed)
    errors = standard_errors(values)
    return [Estimate(i, float(e), len(values)) for i, e in zip(intervals, errors, strict=True)]


def _over_strata(clusters: Clusters, draws: int, seed: int) -> list[Estimate]:
    names = np.array(clusters.strata)
    groups = [clusters.values[names == name] for name in sorted(set(clusters.strata))]
    intervals = macro_intervals(groups, draws, seed)
    squares = np.sum([standard_errors(values) ** 2 for values in groups], axis=0)
    errors = np.sqrt(squares) / len(groups)
    return [Estimate(i, float(e), len(names)) for i, e in zip(intervals, errors, strict=True)]


def joined(parts: dict[str, tuple[list[Pair], np.ndarray]]) -> tuple[list[Pair], np.ndarray]:
    """Pairs and values of several tasks as one whose types are the tasks."""
    pairs = [
        replace(pair, cluster=f"{name}/{pair.cluster}", stratum=name)
        for name, (found, _) in parts.items()
        for pair in found
    ]
    return pairs, np.concatenate([values for _, values in parts.values()])
