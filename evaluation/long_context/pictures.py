"""The figures: NLL by position, paired differences, controls; as PNG, and as SVG for a light or dark page."""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from evaluation.long_context.arms import MEMORIES
from evaluation.long_context.measures import PRIMARY

INK = "#1b1b1a"  # becomes the colour of the page's text
STYLES = ("-", "--", ":", "-.")
COLOURS = ("#2a78d6", "#d95926", "#2e9e63", "#a05cc4", "#8d7a2e", "#c2477f", "#1f9aa8", "#7d7f86")
TITLES = {
    PRIMARY: "all codebooks, semantic x 100 (w100)",
    "semantic": "semantic codebook",
    "acoustic": "acoustic codebooks",
}
NETWORKS = ("gate_off", "base")  # arms that are another network
_LOOK = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "moshi-ttt",
    "font.size": 9,
}


def draw_all(content: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the figures as PNG; returns them as SVG by name."""
    drawn: dict[str, Callable[[dict[str, Any]], Figure]] = {"nll_by_position": by_position}
    if content["differences"]:
        drawn["paired_differences"] = differences
    if content["prefix"] or content["foreign"]:
        drawn["controls"] = controls
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    with matplotlib.rc_context(_LOOK):  # type: ignore[arg-type]
        for name, draw in drawn.items():
            figure = draw(content)
            if content["partial"]:
                figure.suptitle(f"{figure.get_suptitle()}\nPARTIAL: {content['partial']}")
            figure.draw_without_rendering()  # the layout, once for both files
            figure.set_layout_engine("none")
            figure.savefig(folder / f"{name}.png", dpi=110, facecolor="white")
            found[name] = svg(figure)
    return found


def svg(figure: Figure) -> str:
    """The figure as part of a page, in the colours of its text; it loads nothing."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) width="([^"]*)"', r'\1 style="max-width: calc(\2 * 1.25)"', text)
    return text.replace(INK, "currentColor").replace("xlink:href", "href")


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.7 * count, 4.6), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def by_position(content: dict[str, Any]) -> Figure:
    """NLL over positions, a line for each arm."""
    figure, axes = _panels(len(TITLES), "NLL by position in the recording; bands: 95 % over speakers")
    for panel, stream in zip(axes, TITLES, strict=True):
        for name, arm in content["arms"].items():
            _curve(panel, _middles(content), arm["curve"][stream], name, _look(name, content))
        panel.axhline(content["ln_card"], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        place = (0.02, content["ln_card"])
        panel.annotate(
            "knows nothing: ln(card)", place, xycoords=("axes fraction", "data"), va="bottom", fontsize=7
        )
        panel.set_title(TITLES[stream])
        panel.set_ylabel("NLL (nats a code)")
        _positions(panel, content)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def differences(content: dict[str, Any]) -> Figure:
    """Paired differences over positions."""
    title = "Differences on the same frames; below 0: the first predicts better; bands: 95 % over speakers"
    found = content["differences"]
    # Another network differs by far more than a memory: it has axes of its own.
    network = [name for name, pair in found.items() if pair["of"][1].startswith(NETWORKS)]
    memory = [name for name in found if name not in network]
    rows = [pairs for pairs in (memory, network) if pairs]
    figure = Figure(figsize=(4.7 * len(TITLES), 4.4 * len(rows) + 0.3), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), len(TITLES), squeeze=False)
    for pairs, panels in zip(rows, grid, strict=True):
        for panel, stream in zip(panels, TITLES, strict=True):
            for name in pairs:
                look = _look(found[name]["of"][1], content)
                _curve(panel, _middles(content), found[name]["curve"][stream], name, look)
            panel.axhline(0, color=INK, linewidth=0.8)
            panel.set_title(TITLES[stream])
            panel.set_ylabel("difference (nats a code)")
            _positions(panel, content)
        panels[0].legend(fontsize=8)
    return figure


def controls(content: dict[str, Any]) -> Figure:
    """The fixed target behind a growing prefix, and behind a foreign one."""
    prefix, foreign = content["prefix"], content["foreign"]
    figure, axes = _panels(bool(prefix) + bool(foreign), "Controls: the same target each time (w100)")
    if prefix:
        panel = axes.pop(0)
        for name, streams in prefix["minus_shortest"].items():
            _curve(panel, prefix["frames"], streams[PRIMARY], name, _look(name, content))
        panel.axhline(0, color=INK, linewidth=0.8)
        panel.set_title("the prefix grows")
        panel.set_ylabel(f"NLL - NLL behind {prefix['frames'][0]} frames (nats a code)")
        _positions(panel, content, "length of the prefix")
        panel.legend(fontsize=8)
    if foreign:
        _foreign(axes.pop(0), foreign)
    return figure


def _foreign(panel: Axes, foreign: dict[str, Any]) -> None:
    arms = foreign["minus_own"]
    kinds = {
        "other": "all of the prefix foreign",
        "far": f"all but the last {foreign['near_frames']:,} frames",
    }
    for shift, (key, label) in enumerate(kinds.items()):
        for place, rows in enumerate(arms.values()):
            if key in rows:
                mean, low, high, _ = rows[key][PRIMARY]
                x = place + 0.22 * (shift - 0.5)
                if low is not None:
                    panel.vlines(x, low, high, color=COLOURS[shift], linewidth=2)
                panel.plot([x], [mean], "o", color=COLOURS[shift], label=label if place == 0 else None)
    panel.axhline(0, color=INK, linewidth=0.8)
    panel.set_xticks(range(len(arms)), list(arms))
    panel.set_xlim(-0.6, len(arms) - 0.4)
    panel.set_title("a prefix of another speaker's recording")
    panel.set_ylabel("NLL - NLL behind the own prefix (nats a code)")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8)


def _middles(content: dict[str, Any]) -> list[float]:
    """Where the buckets are drawn: their geometric middles."""
    return [math.sqrt(max(b["from_frame"], 1) * b["to_frame"]) for b in content["buckets"]]


def _look(name: str, content: dict[str, Any]) -> tuple[str, str]:
    """Colour and style of an arm's lines: a colour for each memory, a style for each context."""
    contexts = list(dict.fromkeys(arm.partition("@")[2] for arm in content["arms"]))
    memory, _, context = name.partition("@")
    return COLOURS[MEMORIES.index(memory)], STYLES[contexts.index(context) % len(STYLES)]


def _curve(
    panel: Axes, x: Sequence[float], rows: Sequence[Sequence[Any]], name: str, look: tuple[str, str]
) -> None:
    colour, style = look
    mean, low, high = ([math.nan if row[i] is None else row[i] for row in rows] for i in range(3))
    panel.plot(x, mean, color=colour, linestyle=style, marker="o", ms=3, linewidth=1.5, label=name)
    panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _positions(panel: Axes, content: dict[str, Any], what: str = "position") -> None:
    """The x axis in frames, below, and in seconds, above; lines at the windows and receptive fields."""
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(f"{what} (frames)")
    rate = content["frame_rate"]
    above = panel.secondary_xaxis("top", functions=(lambda x: x / rate, lambda x: x * rate))
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel(f"{what} (s)", fontsize=8)
    panel.grid(alpha=0.25)
    marks = {(w, "window", "--") for arm in content["arms"].values() for w in arm["windows_frames"]}
    marks |= {(a["receptive_field_frames"], "receptive field", "-.") for a in content["arms"].values()}
    longest = content["buckets"][-1]["to_frame"]
    for frames, name, style in sorted(marks):
        if not 0 < frames <= longest:
            continue
        panel.axvline(frames, color=INK, alpha=0.6, linewidth=1, linestyle=style)
        panel.text(frames, 0.02, f"{name} {frames:,}", rotation=90, fontsize=7, va="bottom", ha="right",
                   transform=panel.get_xaxis_transform())  # fmt: skip
