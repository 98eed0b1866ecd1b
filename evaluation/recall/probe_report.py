"""Accuracy and margins of a probed checkpoint: numbers, table, figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from evaluation.recall.probe_settings import Probe
from evaluation.recall.report import per_cent
from evaluation.statistics import mean_interval

TITLES = {"code_words": "code words", "phrases": "phrases of recordings"}
LOOKS = {
    "plain": ("as it is", "tab:blue", "-"),
    "not_told": ("not told", "0.45", "-"),
    "state_reset": ("inner state reset at the question", "tab:brown", "--"),
    "inner_lr_0": ("inner learning rate 0", "tab:purple", "--"),
    "gain": ("gain of as it is over not told", "tab:green", ":"),
}
_STREAMS = {"text": slice(0, 1), "semantic": slice(1, 2), "acoustic": slice(2, None)}

Row = list[float | None]


@dataclass
class Answers:
    """What a task came to.

    Args:
        nll: by condition, negative log-likelihoods in nats, `[distances, B, questions, candidates, streams]`;
            candidate p is right for question p.
        clusters: `[B]` what an episode shares with others that are no independent measurement.
        distances: in frames.
        receptive_field: in frames.
    """

    nll: dict[str, torch.Tensor]
    clusters: tuple[str, ...]
    distances: list[int]
    receptive_field: int


def right(nll: torch.Tensor) -> torch.Tensor:
    """Share of questions `[..., P, P]` whose true value is likelier than every other, `[...]`.

    A tie is wrong.
    """
    own = torch.eye(nll.shape[-1], dtype=torch.bool, device=nll.device)
    others = nll.masked_fill(own, math.inf).amin(-1)
    return (nll.diagonal(dim1=-2, dim2=-1) < others).double().mean(-1)


def margin(nll: torch.Tensor) -> torch.Tensor:
    """How much less likely the other values are than the true one, in nats: `[..., P, P]` to `[...]`.

    The mean over an episode's questions and wrong candidates. What a question or a candidate costs by itself
    falls out of it.
    """
    pairs = nll.shape[-1]
    true = nll.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (nll.sum(dim=(-2, -1)) - true) / (pairs * (pairs - 1)) - true / pairs


def interval(
    values: Sequence[float], clusters: Sequence[str], lowest: float = -math.inf, highest: float = math.inf
) -> Row:
    """[mean, low, high] over the means of clusters; low and high are None for one cluster alone."""
    groups: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    found = mean_interval([sum(group) / len(group) for group in groups.values()], lowest, highest)
    return [None if math.isnan(value) else round(value, 4) for value in (found.mean, found.low, found.high)]


def summarize(probe: Probe, answers: Answers) -> dict[str, Any]:
    """Numbers of a task by condition and distance, with 95 % intervals over clusters."""
    distances = [f"{distance:g}" for distance in probe.distances]
    summary: dict[str, Any] = {
        "episodes": len(answers.clusters),
        "clusters": len(set(answers.clusters)),
        "distance_frames": dict(zip(distances, answers.distances, strict=True)),
        "conditions": {
            name: {
                distance: _summarize_one(nll[index], answers.clusters)
                for index, distance in enumerate(distances)
            }
            for name, nll in answers.nll.items()
        },
    }
    plain = answers.nll["plain"]
    summary["plain_against"] = {
        name: {
            distance: _accuracy_and_margin((plain - nll)[index].sum(-1), answers.clusters)
            for index, distance in enumerate(distances)
        }
        for name, nll in answers.nll.items()
        if name != "plain"
    }
    return summary


def _accuracy_and_margin(nll: torch.Tensor, clusters: tuple[str, ...]) -> dict[str, Any]:
    """From `[B, P, P]`. Of a difference to a control: whether the true value gained most over it, and how
    much more than the others."""
    return {
        "accuracy": interval(right(nll).tolist(), clusters, 0.0, 1.0),
        "margin_nats": interval(margin(nll).tolist(), clusters),
    }


def _summarize_one(nll: torch.Tensor, clusters: tuple[str, ...]) -> dict[str, Any]:
    """Numbers of one condition at one distance, from `[B, P, P, streams]`."""
    total = nll.sum(-1)
    truth = total.diagonal(dim1=-2, dim2=-1).mean(-1)
    return _accuracy_and_margin(total, clusters) | {
        "true_value_nats": interval(truth.tolist(), clusters, 0.0),
        "margin_nats_by_stream": {
            name: interval(margin(nll[..., streams].sum(-1)).tolist(), clusters)
            for name, streams in _STREAMS.items()
        },
    }


def table(summary: dict[str, Any]) -> str:
    """Markdown: a table for each task, a condition a row, accuracy in per cent and margin in nats."""
    parts = []
    for task, found in summary["tasks"].items():
        distances = list(found["distance_frames"])
        units = "recordings" if task == "phrases" else "episodes"
        lines = [
            f"{TITLES[task]}: right answers (%) / margin (nats), chance "
            f"{100 * summary['chance']:g} %, {found['episodes']} episodes, 95 % intervals over "
            f"{found['clusters']} {units}",
            "",
            "| condition | " + " | ".join(f"{d} x ({found['distance_frames'][d]})" for d in distances) + " |",
            "| --- |" + " --- |" * len(distances),
        ]
        lines += [_table_row(LOOKS[name][0], rows) for name, rows in shown(found).items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """Rows of a task's table by their names in LOOKS: the conditions, and plain's gain over not_told."""
    return found["conditions"] | {"gain": found["plain_against"]["not_told"]}


def _table_row(label: str, rows: dict[str, Any]) -> str:
    cells = [f"{per_cent(row['accuracy'])} / {_nats(row['margin_nats'])}" for row in rows.values()]
    return f"| {label} | " + " | ".join(cells) + " |"


def _nats(row: Row) -> str:
    mean, low, high = row
    assert mean is not None
    if low is None or high is None:
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def draw(summary: dict[str, Any], path: Path) -> None:
    """Accuracy and margin over distance, a column for each task."""
    tasks = summary["tasks"]
    figure = Figure(figsize=(5 * len(tasks) + 1, 7), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    for column, (task, found) in enumerate(tasks.items()):
        top, bottom = panels[:, column]
        frames = list(found["distance_frames"].values())
        distances = [count / summary["receptive_field_frames"] for count in frames]
        for name, rows in shown(found).items():
            _line(top, distances, [_scaled(row["accuracy"], 100) for row in rows.values()], name)
            _line(bottom, distances, [row["margin_nats"] for row in rows.values()], name)
        top.axhline(100 * summary["chance"], color="0.6", linewidth=1)
        top.set_ylim(-2, 103)
        top.set_ylabel("right answers (%)")
        top.set_title(f"{TITLES[task]}, one of {summary['pairs']}; {found['episodes']} episodes")
        bottom.axhline(0, color="0.6", linewidth=1)
        bottom.set_ylabel("margin of the true value (nats)")
        bottom.set_xlabel("frames since telling, in receptive fields of attention")
        for axes in (top, bottom):
            axes.axvline(1, color="0.6", linewidth=1, linestyle=":")
            axes.set_xscale("log")
            axes.set_xticks(distances, [f"{distance:.2g}" for distance in distances])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=9)
    reach, step = summary["receptive_field_frames"], summary["step"]
    figure.suptitle(f"Probe of a checkpoint at step {step}; receptive field {reach} frames; 95 % intervals")
    figure.savefig(path, dpi=130)


def _scaled(row: Row, factor: float) -> Row:
    return [None if value is None else factor * value for value in row]


def _line(axes: Any, distances: list[float], rows: list[Row], name: str) -> None:
    label, color, style = LOOKS[name]
    axes.plot(distances, [row[0] for row in rows], style, color=color, marker="o", ms=4, label=label)
    if all(row[1] is not None for row in rows):
        low, high = ([row[index] for row in rows] for index in (1, 2))
        axes.fill_between(distances, low, high, color=color, alpha=0.15, linewidth=0)
