"""The figure: NLL by position and by distance, and below each what the memory changes."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = {
    "position/words": "words",
    "position/semantic": "semantic codebook",
    "position/acoustic": "acoustic codebooks",
    "distance/words": "words",
    "distance/words, minus their first": "repeated words, minus their first",
    "distance/turns, semantic": "turns, semantic codebook",
    "distance/turns, acoustic": "turns, acoustic codebooks",
}
X_LABELS = {"position": "position in the recording (s)", "distance": "since it was last there (s)"}


def draw(content: dict[str, Any], path: Path) -> None:
    """A column for each measure: the arms above, the paired differences below, 95 % intervals."""
    about, found = content["about"], content["measures"]
    panels = {name: title for name, title in PANELS.items() if name in found}
    figure = Figure(figsize=(1.5 + 4.6 * len(panels), 9.5), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False)
    for column, (name, title) in zip(grid.T, panels.items(), strict=True):
        kind, measure = name.split("/")[0], found[name]
        for axes, part in zip(column, ("arms", "differences"), strict=True):
            _lines(axes, measure["bins"], measure[part], kind)
            _mark_reach(axes, about)
            axes.set_xlabel(X_LABELS[kind])
            axes.grid(alpha=0.3)
        column[0].set_title(title)
        column[1].axhline(0, color="black", linewidth=1)
    grid[0, 0].set_ylabel("NLL (nats a token)")
    grid[1, 0].set_ylabel("difference on the same tokens (nats)\nbelow 0: the first predicts better")
    for row in grid:
        handles, labels = row[0].get_legend_handles_labels()
        row[-1].legend(handles, labels, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    windows = "/".join(map(str, about["windows_frames"]))
    figure.suptitle(
        f"{Path(about['data']).name}: {about['recordings']} recordings, {about['seconds_scored'] / 60:.0f} "
        f"min scored, state carried; attention windows of {windows} frames, receptive field "
        f"{about['receptive_field_frames']} frames; 95 % intervals over recordings"
    )
    figure.savefig(path, dpi=90)


def _lines(axes: Axes, bins: list[dict[str, Any]], series: dict[str, list], kind: str) -> None:
    """A line with its interval for each series; what was not there before is a point at the left."""
    again = [i for i, edges in enumerate(bins) if not edges["first"]]
    x = [bins[i]["mean_sec"] for i in again]
    if kind == "distance":
        axes.set_xscale("log")
    for number, (label, rows) in enumerate(series.items()):
        color = f"C{number}"
        y = [rows[i] for i in again]
        axes.plot(x, [row[0] for row in y], color=color, marker="o", ms=3, label=label)
        if all(row[1] is not None for row in y):
            axes.fill_between(x, [r[1] for r in y], [r[2] for r in y], color=color, alpha=0.12, linewidth=0)
        if len(again) < len(bins) and x:
            mean, low, high = rows[0]
            place = min(x) / 2 * 1.06**number
            axes.plot([place], [mean], color=color, marker="s", ms=4)
            if low is not None:
                axes.vlines(place, low, high, color=color, linewidth=1)
    if len(again) < len(bins) and x:
        axes.annotate("first", (min(x) / 2, 0.01), xycoords=("data", "axes fraction"), fontsize=8)


def _mark_reach(axes: Axes, about: dict[str, Any]) -> None:
    """The attention window and the receptive field of the stacked windows."""
    rate = about["frame_rate"]
    marks = [(frames / rate, "window", "--") for frames in about["windows_frames"]]
    marks.append((about["receptive_field_frames"] / rate, "receptive field", ":"))
    for seconds, name, style in marks:
        axes.axvline(seconds, color="0.5", linewidth=1, linestyle=style)
        place = axes.get_xaxis_transform()
        axes.text(
            seconds, 0.99, name, rotation=90, va="top", ha="right", fontsize=7, color="0.4", transform=place
        )
