"""Tables and figures of the studies."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.recall.report import LABELS, interval_of, per_cent
from evaluation.recall.settings import RecallConfig

TITLES = {
    "ablation": "One setting of the TTT layers changed at a time",
    "width": "Wider Moshis",
    "capacity": "How many pairs a memory holds, at 10 receptive fields",
    "leak": "A causal and a non-causal update",
}

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
        "training_loss": [round(run["learned"]["loss"], 4) for run in runs],
        "training_accuracy": [round(run["learned"]["accuracy"], 4) for run in runs],
    }


def study_table(study: dict[str, Any], distance: str) -> str:
    """Markdown: a variant and arm a row; accuracy at one distance, or at each number of pairs.

    The loss is that of text in the last hundred steps of training, in nats a token.
    """
    first = next(iter(next(iter(study.values())).values()))
    pairs = list(first["capacity"])
    columns = [f"{count} pairs" for count in pairs] or [f"right at {distance} x"]
    lines = [
        "| variant | memory | seeds | steps | loss | " + " | ".join(columns) + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(columns),
    ]
    for variant, arms in study.items():
        for arm, entry in arms.items():
            rows = [entry["capacity"][count] for count in pairs] or [entry["streaming"][distance]]
            steps = ", ".join(map(str, entry["training_steps"]))
            loss = ", ".join(f"{loss:.3f}" for loss in entry["training_loss"])
            cells = " | ".join([steps, loss, *map(per_cent, rows)])
            lines.append(f"| {variant} | {LABELS[arm][0]} | {entry['seeds']} | {cells} |")
    return "\n".join(lines)


def draw_study(study: dict[str, Any], title: str, distance: str, chance: float, path: Path) -> None:
    """Accuracy over the number of pairs where that was asked, else over the variants."""
    height = 5.0 if _asks_pairs(study) else 2.0 + 0.25 * len(study)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    if _asks_pairs(study):
        _draw_capacity(axes, study)
        axes.axhline(100 * chance, color="0.5", linewidth=1, linestyle=":", label="chance")
    else:
        _draw_variants(axes, study, distance)
        axes.axvline(100 * chance, color="0.5", linewidth=1, linestyle=":", label="chance")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)


def _asks_pairs(study: dict[str, Any]) -> bool:
    return any(entry["capacity"] for arms in study.values() for entry in arms.values())


def _draw_capacity(axes: Axes, study: dict[str, Any]) -> None:
    for (variant, arms), style in zip(study.items(), ("-", "--", ":"), strict=False):
        for arm, entry in arms.items():
            label, color, _ = LABELS[arm]
            counts = [int(count) for count in entry["capacity"]]
            right = [100 * row[0] for row in entry["capacity"].values()]
            axes.plot(counts, right, style, color=color, marker="o", ms=4, label=f"{label}, {variant}")
            axes.set_xticks(counts)
            for count, (_, low, high) in zip(counts, entry["capacity"].values(), strict=True):
                if low is not None:
                    axes.vlines(count, 100 * low, 100 * high, color=color, linewidth=1.5)
    axes.set_ylim(-2, 104)
    axes.set_xlabel("pairs told")
    axes.set_ylabel("right answers in streaming (%)")


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
    axes.set_xlim(-2, 104)
    axes.set_xlabel(f"right answers in streaming at {distance} receptive fields (%)")


def write_study(results: Results, config: RecallConfig, output: Path) -> str:
    """Write NAME.json, NAME.md and NAME.png; returns the table."""
    study = summarize_study(results)
    distance = "10"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(study, indent=1) + "\n")
    text = study_table(study, distance)
    output.with_suffix(".md").write_text(text + "\n")
    draw_study(study, TITLES[config.study], distance, config.vocabulary.chance, output.with_suffix(".png"))
    return text
