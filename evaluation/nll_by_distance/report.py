"""Numbers and table of what was measured."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.nll_by_distance.measures import FIRST, Measure, Measures
from evaluation.nll_by_distance.pictures import draw
from evaluation.statistics import Interval


def summarize(measures: Measures, pairs: Sequence[tuple[str, str]], draws: int) -> dict[str, Any]:
    """Every measure that has observations: its bins, and in each the means of arms and differences."""
    there = {name: measure for name, measure in measures.found.items() if measure.counts.any()}
    return {name: _summarize(measure, pairs, draws) for name, measure in there.items()}


def _summarize(measure: Measure, pairs: Sequence[tuple[str, str]], draws: int) -> dict[str, Any]:
    kept = [i for i in range(measure.counts.shape[1]) if measure.counts[:, i].sum() > 0]

    def rows(intervals: list[Interval]) -> list[list[float | None]]:
        return [_numbers(intervals[i]) for i in kept]

    bins = [
        {
            "from_sec": _edge(measure.edges[i]),
            "to_sec": None if measure.edges[i] == FIRST else _edge(measure.edges[i + 1]),
            "first": measure.edges[i] == FIRST,
            "mean_sec": _mean_place(measure, i),
            "observations": int(measure.counts[:, i].sum()),
            "recordings": int((measure.counts[:, i] > 0).sum()),
        }
        for i in kept
    ]
    return {
        "bins": bins,
        "arms": {arm: rows(measure.means(arm, draws)) for arm in measure.sums},
        "differences": {f"{a} - {b}": rows(measure.differences(a, b, draws)) for a, b in pairs},
    }


def _edge(edge: float) -> float | None:
    return None if edge == FIRST or math.isinf(edge) else round(edge, 3)


def _mean_place(measure: Measure, i: int) -> float | None:
    if measure.edges[i] == FIRST:
        return None
    return round(measure.places[:, i].sum() / measure.counts[:, i].sum(), 3)


def _numbers(interval: Interval) -> list[float | None]:
    values = (interval.mean, interval.low, interval.high)
    return [None if math.isnan(value) else round(value, 5) for value in values]


def bin_label(edges: dict[str, Any]) -> str:
    """A bin as text."""
    if edges["first"]:
        return "first"
    if edges["to_sec"] is None:
        return "all" if edges["from_sec"] == 0 else f"from {edges['from_sec']:g} s"
    return f"{edges['from_sec']:g}–{edges['to_sec']:g} s"


def table(content: dict[str, Any]) -> str:
    """Markdown: NLL of each arm over everything, then the differences by distance."""
    found = content["measures"]
    whole = {name.removeprefix("all/"): m for name, m in found.items() if name.startswith("all/")}
    arms = list(next(iter(whole.values()))["arms"])
    lines = ["NLL in nats a token over everything:", "", "| arm | " + " | ".join(whole) + " |"]
    lines.append("| --- |" + " --- |" * len(whole))
    for arm in arms:
        lines.append(f"| {arm} | " + " | ".join(_cell(m["arms"][arm][0]) for m in whole.values()) + " |")
    pairs = list(next(iter(whole.values()))["differences"])
    if not pairs:
        return "\n".join(lines)
    lines += [
        "",
        "Differences on the same tokens (below 0: the first of the two predicts better); bold where the 95 % "
        "interval over recordings leaves out 0. Within and beyond the receptive field of attention:",
        "",
        *_differences(found, ("all", "reach"), pairs),
    ]
    if any(name.startswith("distance/") for name in found):
        lines += ["", "By distance:", "", *_differences(found, ("distance",), pairs)]
    return "\n".join(lines)


def _differences(found: dict[str, Any], kinds: Sequence[str], pairs: Sequence[str]) -> list[str]:
    """Rows of the bins of the measures of some kinds, a column for each pair of arms."""
    lines = ["| | n (recordings) | " + " | ".join(pairs) + " |", "| --- | --- |" + " --- |" * len(pairs)]
    for name, measure in found.items():
        kind, what = name.split("/")
        if kind not in kinds:
            continue
        for index, edges in enumerate(measure["bins"]):
            cells = [_cell(measure["differences"][pair][index], bold=True) for pair in pairs]
            counted = f"{edges['observations']} ({edges['recordings']})"
            lines.append(f"| {what}, {bin_label(edges)} | {counted} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: list[float | None], bold: bool = False) -> str:
    mean, low, high = row
    assert mean is not None
    if low is None or high is None:
        return f"{mean:.3f}"
    text = f"{mean:.3f} ({low:.3f} to {high:.3f})"
    return f"**{text}**" if bold and (low > 0 or high < 0) else text


def write_report(
    measures: Measures,
    pairs: Sequence[tuple[str, str]],
    facts: dict[str, Any],
    outputs: tuple[Path, Path, Path],
    draws: int,
) -> str:
    """Write numbers, table and figure; returns the table."""
    content = {"about": facts, "measures": summarize(measures, pairs, draws)}
    numbers, markdown, picture = outputs
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(content, indent=1) + "\n")
    text = table(content)
    markdown.write_text(text + "\n")
    draw(content, picture)
    return text
