"""Histograms as SVG that takes its colours from the page around it."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 44
BINS = 20
GAP = 2  # between bars, in the picture's units


@dataclass(frozen=True)
class Series:
    """Values of one colour.

    Args:
        name: for the legend and the bars' labels.
        values: `[n]`.
    """

    name: str
    values: Sequence[float]


def nice_step(span: float, most: int) -> float:
    """The least of 1, 2 and 5 times a power of ten that goes into `span` at most `most` times."""
    raw = max(span, 1e-9) / most
    power = 10.0 ** np.floor(np.log10(raw))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9)))


def histogram(axis: str, series: Sequence[Series], unit: str, percent: bool = False) -> str:
    """An SVG histogram; how many recordings (the y axis) have which value. Bars say so when pointed at.

    Args:
        axis: label below.
        unit: behind values.
        percent: values are shares, shown in percent.
    """
    scale = 100.0 if percent else 1.0
    data = [np.asarray(s.values, dtype=float) * scale for s in series]
    everything = np.concatenate(data)
    if len(everything) == 0:
        return "<p>nothing to show</p>"
    edges = _edges(everything)
    counts = [np.histogram(values, edges)[0] for values in data]
    top = max(int(max(c.max() for c in counts)), 1)
    y_step = max(nice_step(top, 4), 1.0)
    y_top = np.ceil(top / y_step) * y_step
    parts = [*_y_axis(y_step, y_top), *_bars(series, counts, edges, y_top, unit), *_x_axis(edges)]
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(axis)}</text>')
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(axis)}">{body}</svg>'


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of bins with round widths."""
    low, high = values.min(), values.max()
    step = nice_step(max(high - low, 0.02 * abs(high), 1e-3), BINS)
    first = np.floor(low / step)
    return step * np.arange(first, max(np.floor(high / step), first) + 2)


def _x(value: float, edges: np.ndarray) -> float:
    return LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)


def _y(count: float, y_top: float) -> float:
    return HEIGHT - BOTTOM - count / y_top * (HEIGHT - TOP - BOTTOM)


def _y_axis(step: float, top: float) -> list[str]:
    parts = []
    for value in np.arange(0, top + step / 2, step):
        y = _y(float(value), top)
        kind = "base" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
    return parts


def _x_axis(edges: np.ndarray) -> list[str]:
    step = nice_step(edges[-1] - edges[0], 8)
    ticks = step * np.arange(np.ceil(edges[0] / step - 1e-9), np.floor(edges[-1] / step + 1e-9) + 1)
    y = HEIGHT - BOTTOM + 16
    return [
        f'<text x="{_x(tick, edges):.1f}" y="{y}" text-anchor="middle">{_number(tick)}</text>'
        for tick in ticks
    ]


def _bars(
    series: Sequence[Series], counts: Sequence[np.ndarray], edges: np.ndarray, y_top: float, unit: str
) -> list[str]:
    parts = []
    slot = (WIDTH - LEFT - RIGHT) / (len(edges) - 1)
    width = max((slot - GAP) / len(series), 1.0)
    for number, (one, heights) in enumerate(zip(series, counts, strict=True)):
        for index in np.flatnonzero(heights):
            count, low, high = int(heights[index]), float(edges[index]), float(edges[index + 1])
            x, y = _x(low, edges) + GAP / 2 + number * width, _y(count, y_top)
            label = f"{one.name}: {count:,} from {_number(low)} to {_number(high)} {unit}"
            parts.append(
                f'<rect class="series{number}" x="{x:.1f}" y="{y:.1f}" width="{max(width - 0.5, 0.8):.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" rx="1.5"><title>{html.escape(label)}</title></rect>'
            )
    return parts


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "\u2212") if abs(value) > 1e-9 else "0"
