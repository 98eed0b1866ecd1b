"""A picture of a run: its losses over the steps."""

import json
from pathlib import Path

PARTS = ("text_loss", "audio_loss")


def read_metrics(run_dir: Path, split: str) -> list[dict[str, float]]:
    """Lines of metrics.jsonl of one split, in order."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


def plot_losses(run_dir: Path, title: str) -> Path:
    """Draw RUN/loss.png from metrics.jsonl: text and audio loss, training and held-out."""
    from matplotlib.figure import Figure  # a third of the time that importing training takes

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PARTS))
    for part, axis in zip(PARTS, axes, strict=True):
        for split, style in (("train", "-"), ("valid", "o--")):
            lines = read_metrics(run_dir, split)
            if lines:
                values = [line[part] for line in lines]
                axis.plot([line["step"] for line in lines], values, style, label=split, markersize=4)
        axis.set_xlabel("step")
        axis.set_ylabel(f"{part.removesuffix('_loss')} loss (nats, weighted mean)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    return path
