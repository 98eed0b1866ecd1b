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

HELD = 0.9
"""Share of right answers from which on pairs count as held."""

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
    counts = pair_counts(study)
    columns = [f"right at {distance} x"]
    if counts:
        columns = [*(f"{count} pairs" for count in counts), "pairs held"]
    lines = [
        "| variant | memory | seeds | steps | loss | " + " | ".join(columns) + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(columns),
    ]
    for variant, arms in study.items():
        for arm, entry in arms.items():
            cells = [per_cent(entry["streaming"][distance])]
            if counts:
                asked = entry["capacity"]
                cells = [per_cent(asked[count]) if count in asked else "" for count in counts]
                cells.append(str(pairs_held(asked)))
            steps = ", ".join(map(str, entry["training_steps"]))
            loss = ", ".join(f"{loss:.3f}" for loss in entry["training_loss"])
            row = [variant, LABELS[arm][0], str(entry["seeds"]), steps, loss, *cells]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def pair_counts(study: dict[str, Any]) -> list[str]:
    """All numbers of pairs that any memory of a study was asked for, rising."""
    asked = {count for arms in study.values() for entry in arms.values() for count in entry["capacity"]}
    return sorted(asked, key=int)


def pairs_held(asked: dict[str, Any]) -> int:
    """The most pairs that a memory was told and had right in HELD of the answers, as with all fewer ones."""
    held = 0
    for count, (mean, _, _) in asked.items():
        if mean < HELD:
            break
        held = int(count)
    return held


def draw_study(study: dict[str, Any], title: str, distance: str, chance: float, path: Path) -> None:
    """Accuracy over the number of pairs where that was asked, else over the variants."""
    if pair_counts(study):
        figure = _draw_capacity(study, chance)
    else:
        figure = _draw_variants(study, distance, chance)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _draw_capacity(study: dict[str, Any], chance: float) -> Figure:
    """A panel for each memory, a line for each variant."""
    arms = list(dict.fromkeys(arm for entries in study.values() for arm in entries))
    figure = Figure(figsize=(4.2 * len(arms) + 1.5, 4.5), layout="constrained")
    panels = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    counts = pair_counts(study)
    for panel, arm in zip(panels, arms, strict=True):
        panel.axhline(100 * chance, color="0.5", linewidth=1, linestyle=":", label="chance")
        panel.axhline(100 * HELD, color="0.8", linewidth=1, label=f"{100 * HELD:g} %: held")
        for index, (variant, entries) in enumerate(study.items()):
            if arm in entries:
                _draw_line(panel, entries[arm]["capacity"], f"C{index}", variant)
        panel.set_xscale("log", base=2)
        panel.set_xticks([int(count) for count in counts], counts)
        panel.minorticks_off()
        panel.set_title(LABELS[arm][0], fontsize=10)
        panel.set_xlabel("pairs told")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(-2, 104)
    panels[0].set_ylabel("right answers in streaming (%)")
    entries = [entry for panel in panels for entry in zip(*panel.get_legend_handles_labels(), strict=True)]
    lines = {label: line for line, label in entries}
    names = [name for name in (*study, *lines) if name in lines]  # variants first, in their order
    lines = {name: lines[name] for name in names}
    figure.legend(lines.values(), lines, fontsize=9, loc="outside right center")
    return figure


def _draw_line(axes: Axes, asked: dict[str, Any], color: str, label: str) -> None:
    counts = [int(count) for count in asked]
    right = [100 * mean for mean, _, _ in asked.values()]
    axes.plot(counts, right, color=color, marker="o", ms=4, label=label)
    for count, (_, low, high) in zip(counts, asked.values(), strict=True):
        if low is not None:
            axes.vlines(count, 100 * low, 100 * high, color=color, linewidth=1.5)


def _draw_variants(study: dict[str, Any], distance: str, chance: float) -> Figure:
    figure = Figure(figsize=(9, 2.0 + 0.25 * len(study)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(100 * chance, color="0.5", linewidth=1, linestyle=":", label="chance")
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
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


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
