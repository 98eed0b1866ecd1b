"""The figure: NLL by position and by distance, and what the memory changes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

PANELS = {
    "position/words": "words",
    "position/semantic": "semantic codebook",
    "position/acoustic": "acoustic codebooks",
    "distance/words": "words",
    "distance/words, minus their first": "repeated words, minus their first",
    "distance/turns, semantic": "turns, semantic codebook",
    "distance/turns, acoustic": "turns, acoustic codebooks",
}
TICKS_SEC = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
X_LABELS = {"position": "position in the recording (s)", "distance": "since it was last there (s)"}


def draw(content: dict[str, Any], path: Path) -> None:
    """Two rows of panels by position, two by distance: the arms, and below them the paired differences."""
    about, found = content["about"], content["measures"]
    blocks = [
        panels
        for kind in X_LABELS
        if (panels := [name for name in PANELS if name in found and name.startswith(f"{kind}/")])
    ]
    columns = max(len(panels) for panels in blocks)
    figure = Figure(figsize=(4.6 * columns, 1 + 7.6 * len(blocks)), layout="constrained")
    grid = figure.subplots(2 * len(blocks), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for number, panels in enumerate(blocks):
        upper, lower = grid[2 * number], grid[2 * number + 1]
        for name, above, below in zip(panels, upper, lower, strict=False):
            _panel(above, name, found[name], "arms", about)
            _panel(below, name, found[name], "differences", about)
            above.set_title(PANELS[name])
            below.axhline(0, color="black", linewidth=1)
        upper[0].set_ylabel("NLL (nats a token)")
        lower[0].set_ylabel("difference on the same tokens (nats)\nbelow 0: the first predicts better")
    legends = (grid[0, 0].get_legend_handles_labels(), grid[1, 0].get_legend_handles_labels())
    figure.legend(*legends[0], fontsize=9, loc="outside lower left", title="NLL")
    figure.legend(*legends[1], fontsize=9, loc="outside lower right", title="difference")
    windows = "/".join(map(str, about["windows_frames"]))
    figure.suptitle(
        f"{Path(about['recordings']).name}: {about['number']} recordings, "
        f"{about['seconds_scored'] / 60:.0f} min scored, state carried\nattention windows of {windows} "
        f"frames, receptive field {about['receptive_field_frames']} frames; 95 % intervals over recordings"
    )
    figure.savefig(path, dpi=80)


def _panel(axes: Axes, name: str, measure: dict[str, Any], part: str, about: dict[str, Any]) -> None:
    kind = name.split("/")[0]
    axes.set_visible(True)
    colors = ("C0", "C1", "C2", "C3") if part == "arms" else ("C4", "C5", "C6", "C8")
    _lines(axes, measure["bins"], measure[part], kind, colors)
    _mark_reach(axes, about)
    axes.set_xlabel(X_LABELS[kind])
    axes.grid(alpha=0.3)


def _lines(
    axes: Axes, bins: list[dict[str, Any]], series: dict[str, list], kind: str, colors: Sequence[str]
) -> None:
    """A line with its interval for each series; what was not there before is a point at the left."""
    again = [i for i, edges in enumerate(bins) if not edges["first"]]
    x = [bins[i]["mean_sec"] for i in again]
    if kind == "distance":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(TICKS_SEC))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    for number, (label, rows) in enumerate(series.items()):
        color = colors[number % len(colors)]
        y = [rows[i] for i in again]
        axes.plot(x, [row[0] for row in y], color=color, marker="o", ms=3, label=label)
        low, high = ([math.nan if row[i] is None else row[i] for row in y] for i in (1, 2))
        axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        if len(again) < len(bins) and x:
            mean, lowest, highest = rows[0]
            place = min(x) / 2 * 1.08**number
            axes.plot([place], [mean], color=color, marker="s", ms=4)
            if lowest is not None:
                axes.vlines(place, lowest, highest, color=color, linewidth=1)
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
