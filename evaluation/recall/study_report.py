"""Tables and figures of the studies."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.recall.report import LABELS, interval_of, per_cent
from evaluation.recall.settings import RecallConfig

Results = dict[str, dict[str, list[dict[str, Any]]]]


def summarize_study(results: Results) -> dict[str, Any]:
    """Right answers of every variant and arm, [mean, low, high], by distance and by number of pairs."""
    return {
        variant: {arm: _summarize(runs) for arm, runs in arms.items()} for variant, arms in results.items()
    }


def _summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "streaming": {
            distance: interval_of([run["scores"][distance]["streaming"] for run in runs])
            for distance in runs[0]["scores"]
        },
        "capacity": {
            pairs: interval_of([run["capacity"][pairs] for run in runs]) for pairs in runs[0]["capacity"]
        },
        "seeds": len(runs),
        "parameters": runs[0]["parameters"],
        "training_steps": [run["learned"]["steps"] for run in runs],
        "training_accuracy": [round(run["learned"]["accuracy"], 4) for run in runs],
    }


def study_table(study: dict[str, Any], distance: str) -> str:
    """Markdown: a variant and arm a row; accuracy at one distance, or at each number of pairs."""
    first = next(iter(next(iter(study.values())).values()))
    pairs = list(first["capacity"])
    columns = [f"{count} pairs" for count in pairs] or [f"right at {distance} x"]
    lines = [
        "| variant | memory | seeds | steps | " + " | ".join(columns) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(columns),
    ]
    for variant, arms in study.items():
        for arm, entry in arms.items():
            rows = [entry["capacity"][count] for count in pairs] or [entry["streaming"][distance]]
            steps = ", ".join(map(str, entry["training_steps"]))
            cells = " | ".join(map(per_cent, rows))
            lines.append(f"| {variant} | {LABELS[arm][0]} | {entry['seeds']} | {steps} | {cells} |")
    return "\n".join(lines)


def draw_study(study: dict[str, Any], distance: str, chance: float, path: Path) -> None:
    """Accuracy over the number of pairs where that was asked, else over the variants."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    if any(entry["capacity"] for arms in study.values() for entry in arms.values()):
        _draw_capacity(axes, study)
        axes.axhline(100 * chance, color="0.6", linewidth=1, label="chance")
    else:
        _draw_variants(axes, study, distance)
        axes.axvline(100 * chance, color="0.6", linewidth=1, label="chance")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)


def _draw_capacity(axes: Axes, study: dict[str, Any]) -> None:
    for (variant, arms), style in zip(study.items(), ("-", "--", ":"), strict=False):
        for arm, entry in arms.items():
            label, color, _ = LABELS[arm]
            counts = [int(count) for count in entry["capacity"]]
            right = [100 * row[0] for row in entry["capacity"].values()]
            axes.plot(counts, right, style, color=color, marker="o", ms=4, label=f"{label}, {variant}")
    axes.set_ylim(0, 103)
    axes.set_xlabel("pairs told")
    axes.set_ylabel("right answers in streaming (%)")
    axes.set_title("How many pairs a memory holds, at 10 receptive fields")


def _draw_variants(axes: Axes, study: dict[str, Any], distance: str) -> None:
    arms = list(dict.fromkeys(arm for entries in study.values() for arm in entries))
    for index, arm in enumerate(arms):
        label, color, _ = LABELS[arm]
        rows = [
            (row, entries[arm]["streaming"][distance])
            for row, entries in enumerate(study.values())
            if arm in entries
        ]
        heights = [row + 0.15 * index for row, _ in rows]
        axes.plot([100 * right[0] for _, right in rows], heights, "o", color=color, label=label)
        for height, (_, (_, low, high)) in zip(heights, rows, strict=True):
            if low is not None:
                axes.plot([100 * low, 100 * high], [height, height], color=color, linewidth=1.5)
    axes.set_yticks(range(len(study)), list(study))
    axes.invert_yaxis()
    axes.set_xlim(0, 103)
    axes.set_xlabel(f"right answers in streaming at {distance} receptive fields (%)")
    axes.set_title("One setting changed at a time")


def write_study(results: Results, config: RecallConfig, output: Path) -> str:
    """Write NAME.json, NAME.md and NAME.png; returns the table."""
    study = summarize_study(results)
    distance = "10"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(study, indent=1) + "\n")
    text = study_table(study, distance)
    output.with_suffix(".md").write_text(text + "\n")
    draw_study(study, distance, config.vocabulary.chance, output.with_suffix(".png"))
    return text
