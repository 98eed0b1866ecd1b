"""Table, figure and numbers of the benchmark."""

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evaluation.recall.settings import RecallConfig
from evaluation.statistics import mean_interval

LABELS = {
    "attention_window": ("attention, short window", "0.45", "-"),
    "attention_full": ("attention, full context", "black", "-"),
    "ttt_linear": ("TTT-Linear", "tab:blue", "-"),
    "ttt_mlp": ("TTT-MLP", "tab:orange", "-"),
    "ttt_mlp_3": ("TTT-MLP, 3 layers", "tab:green", "-"),
    "inner_lr_0": ("TTT-MLP, inner learning rate 0", "tab:purple", "--"),
    "state_reset": ("TTT-MLP, state reset", "tab:brown", "--"),
    "non_causal": ("TTT-MLP, trained non-causally", "tab:red", ":"),
    "persistent_on": ("TTT-MLP, trained on chunks, state carried", "tab:cyan", "-."),
    "persistent_off": ("TTT-MLP, trained on chunks, state dropped", "tab:pink", "-."),
}


def summarize(results: dict[str, list[dict[str, Any]]], config: RecallConfig) -> dict[str, Any]:
    """The report: shares of right answers with 95 % intervals over seeds, by arm and distance."""
    size = config.size
    return {
        "window_frames": size.window_frames,
        "receptive_field_frames": size.receptive_field,
        "chance": config.vocabulary.chance,
        "pairs": config.scoring.pairs,
        "seeds": {arm: len(results[arm]) for arm in config.arms if arm in results},
        "episodes_per_distance_and_seed": config.scoring.episodes,
        "arms": {arm: _summarize_arm(results[arm]) for arm in config.arms if arm in results},
    }


def _summarize_arm(results: list[dict[str, Any]]) -> dict[str, Any]:
    distances = list(results[0]["scores"])
    learned = [result["learned"] for result in results]
    return {
        "streaming": {d: _row(results, d, "streaming") for d in distances},
        "offline": {d: _row(results, d, "offline") for d in distances},
        "stream_equals_offline": min(r["scores"][d]["same"] for r in results for d in distances),
        "parameters": results[0]["parameters"],
        "training_steps": [entry["steps"] for entry in learned],
        "training_loss": [round(entry["loss"], 4) for entry in learned],
        "training_accuracy": [round(entry["accuracy"], 4) for entry in learned],
        "seconds": [result["seconds"] for result in results],
    }


def interval_of(shares: list[float]) -> list[float | None]:
    """[mean, low, high] of shares over seeds; low and high are None for one seed alone."""
    interval = mean_interval(shares, 0.0, 1.0)
    values = (interval.mean, interval.low, interval.high)
    return [None if math.isnan(value) else round(value, 4) for value in values]


def _row(results: list[dict[str, Any]], distance: str, kind: str) -> list[float | None]:
    return interval_of([result["scores"][distance][kind] for result in results])


def table(summary: dict[str, Any]) -> str:
    """Markdown: streaming accuracy in per cent, an arm a row, a distance a column."""
    arms = summary["arms"]
    distances = list(next(iter(arms.values()))["streaming"])
    lines = [
        "| memory | seeds | " + " | ".join(f"{d} x" for d in distances) + " |",
        "| --- | --- |" + " --- |" * len(distances),
    ]
    for name, arm in arms.items():
        cells = [per_cent(arm["streaming"][d]) for d in distances]
        lines.append(f"| {LABELS[name][0]} | {summary['seeds'][name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def per_cent(row: list[float | None]) -> str:
    """Mean and interval as text."""
    mean, low, high = row
    assert mean is not None
    if low is None or high is None:
        return f"{100 * mean:.1f}"
    return f"{100 * mean:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def draw(summary: dict[str, Any], path: Path) -> None:
    """Accuracy over distance, a line with its interval for each arm."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    reach = summary["receptive_field_frames"]
    arms = summary["arms"]
    for index, (name, arm) in enumerate(arms.items()):
        label, color, style = LABELS[name]
        # Side by side on the logarithmic axis: many arms are right always, and as many by chance.
        aside = 1.045 ** (index - (len(arms) - 1) / 2)
        distances = [float(d) * aside for d in arm["streaming"]]
        rows = list(arm["streaming"].values())
        axes.plot(
            distances,
            [100 * r[0] for r in rows],
            style,
            color=color,
            linewidth=1,
            marker="o",
            ms=4,
            label=label,
        )
        if all(r[1] is not None for r in rows):
            low, high = ([100 * r[i] for r in rows] for i in (1, 2))
            axes.vlines(distances, low, high, color=color, linewidth=1.5)
    axes.axhline(100 * summary["chance"], color="0.5", linewidth=1, linestyle=":", label="chance")
    axes.axvline(1, color="0.5", linewidth=1, linestyle="--", label=f"reach of attention: {reach} frames")
    axes.set_xscale("log")
    ticks = [float(d) for d in next(iter(arms.values()))["streaming"]]
    axes.set_xticks(ticks, [f"{d:g}" for d in ticks])
    axes.minorticks_off()
    axes.set_ylim(-2, 104)
    axes.set_xlabel("frames between being told and being asked, in receptive fields of the attention windows")
    axes.set_ylabel("right answers in streaming (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    seeds = sorted(set(summary["seeds"].values()))
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    windows = f"windows of {summary['window_frames']} frames"
    axes.set_title(
        f"Recall of {summary['pairs']} pairs, {windows}, {count} seeds, 95 % intervals", fontsize=11
    )
    figure.savefig(path, dpi=130)


def write_report(results: dict[str, list[dict[str, Any]]], config: RecallConfig) -> str:
    """Write NAME.json, NAME.md and NAME.png; returns the table."""
    summary = summarize(results, config)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(summary, indent=1) + "\n")
    text = table(summary)
    output.with_suffix(".md").write_text(text + "\n")
    draw(summary, output.with_suffix(".png"))
    return text
