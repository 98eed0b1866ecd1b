"""Pictures of TTT diagnostics, one function a picture. Numbers are defined in moshi_ttt/diagnostics.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STEPS = "training step"
FEW = 6  # layers that a legend can tell apart
LOSS_LOOKS = {
    "at_start": ("at the learned weights", "tab:grey"),
    "before": ("before the frame's step", "tab:orange"),
    "after": ("after the frame's step", "tab:blue"),
}


@dataclass
class History:
    """Recorded diagnostics.

    Args:
        about: what was run, as `DiagnosticsFile` has it.
        records: by layer, in order of time.
        unit: "frame" (streaming) or "step" (training).
    """

    about: dict[str, Any]
    records: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    unit: str = "frame"

    @property
    def layers(self) -> list[int]:
        return sorted(self.records)

    @property
    def time(self) -> tuple[np.ndarray, str]:
        """Times of the records, and the label of their axis with its unit."""
        numbers = np.array([record[self.unit] for record in self.records[self.layers[0]]], dtype=float)
        if self.unit == "step":
            return numbers, STEPS
        seconds = numbers / self.about.get("frame_rate", 12.5)
        if seconds[-1] > 600:
            return seconds / 60, "time in the stream (minutes)"
        return seconds, "time in the stream (s)"

    def values(self, layer: int, name: str) -> np.ndarray:
        """One number of a layer over time; NaN where it was not recorded."""
        return np.array([record.get(name, math.nan) for record in self.records[layer]], dtype=float)

    @property
    def inner_layers(self) -> int:
        return sum(name.startswith("inner_norm_") for name in self.records[self.layers[0]][0])


def _curves(figure: Figure, panels: Sequence[tuple[Axes, str, str]], history: History) -> None:
    """One line a layer in each (axes, name of the number, label of the y axis)."""
    time, label = history.time
    layers = history.layers
    depth = Normalize(layers[0], max(layers[-1], layers[0] + 1))
    for axes, name, ylabel in panels:
        for position, layer in enumerate(layers):
            colour = f"C{position}" if len(layers) <= FEW else colormaps["viridis"](depth(layer))
            marker = "." if len(time) < 40 else ""
            axes.plot(time, history.values(layer, name), color=colour, marker=marker, label=f"layer {layer}")
        _label_time(axes, label)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    if len(layers) <= FEW:
        panels[0][0].legend()
    else:
        mappable = ScalarMappable(norm=depth, cmap="viridis")
        figure.colorbar(mappable, ax=[axes for axes, _, _ in panels], label="layer")


def _label_time(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=label == STEPS))


def _row(count: int, width: float = 5.0, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def gate(history: History) -> Figure:
    """Effective weight over depth and time; raw parameter over depth."""
    figure, (over_time, over_depth) = _row(2, 6.0)
    layers, (time, label) = history.layers, history.time
    weights = np.stack([history.values(layer, "ttt_weight") for layer in layers])
    limit, signed = max(float(np.abs(weights).max()), 1e-6), bool((weights < 0).any())
    rows = np.arange(len(layers) + 1) - 0.5
    # A record stands for the time from it to the next.
    step = time[-1] - time[-2] if len(time) > 1 else 1.0
    mesh = over_time.pcolormesh(
        np.append(time, time[-1] + step),
        rows,
        weights,
        cmap="coolwarm" if signed else "viridis",
        vmin=-limit if signed else 0,
        vmax=limit,
    )
    figure.colorbar(mesh, ax=over_time, label="mean over channels")
    over_time.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    _label_time(over_time, label)
    over_time.set_ylabel("layer")
    over_time.set_title("effective weight of the TTT output")
    last = {name: np.array([history.values(i, f"gate_{name}")[-1] for i in layers]) for name in _GATE}
    places = np.arange(len(layers))
    over_depth.vlines(places, last["min"], last["max"], color="tab:grey", label="range over channels")
    over_depth.errorbar(places, last["mean"], last["std"], fmt="o", capsize=4, label="mean and deviation")
    over_depth.set_xticks(places, [str(layer) for layer in layers])
    over_depth.set_xlabel("layer")
    over_depth.set_ylabel("raw gate parameter alpha")
    over_depth.set_title("raw parameter, last record")
    over_depth.grid(alpha=0.3)
    over_depth.margins(y=0.3)  # room for the legend
    over_depth.legend(loc="upper right", ncols=2)
    return figure


_GATE = ("mean", "std", "min", "max")


def magnitudes(history: History) -> Figure:
    """Norms of the updates to the residual stream, and their ratio."""
    figure = Figure(figsize=(11.0, 7.2), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    names = ("attention_norm", "ttt_norm", "combined_norm", "ratio")
    labels = (
        "attention's update (L2 norm of a frame)",
        "gated TTT update (L2 norm of a frame)",
        "both together (L2 norm of a frame)",
        "ratio of TTT to attention",
    )
    _curves(figure, list(zip(axes, names, labels, strict=True)), history)
    for panel in axes:
        panel.set_ylim(bottom=0)
    return figure


def cosines(history: History) -> Figure:
    """Directions of the updates."""
    figure, axes = _row(3)
    pairs = ("attention_ttt", "attention_combined", "ttt_combined")
    labels = ("cosine of attention and TTT", "cosine of attention and both", "cosine of TTT and both")
    _curves(figure, [(a, f"cos_{p}", n) for a, p, n in zip(axes, pairs, labels, strict=True)], history)
    for panel in axes:
        panel.set_ylim(-1.05, 1.05)
        panel.axhline(0, color="black", linewidth=0.8)
    return figure


def inner_weights(history: History) -> Figure:
    """Norm, distance from the learned weights, and size of a frame's step, for each inner layer."""
    inner = history.inner_layers
    figure = Figure(figsize=(14.0, 3.6 * inner), layout="constrained")
    grid = figure.subplots(inner, 3, squeeze=False)
    panels = []
    for row in range(inner):
        number = row + 1
        for column, (name, label) in enumerate(
            (
                ("norm", f"Frobenius norm of W{number}, all heads"),
                ("change", f"distance of W{number} from learned"),
                ("step", f"step of W{number} in one frame"),
            )
        ):
            panels.append((grid[row, column], f"inner_{name}_{number}", label))
    _curves(figure, panels, history)
    return figure


def _small_multiples(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def inner_loss(history: History) -> Figure:
    """The three inner losses of each layer over time."""
    time, label = history.time
    curves = {
        layer: {name: history.values(layer, f"inner_loss_{name}") for name in LOSS_LOOKS}
        for layer in history.layers
    }
    return loss_panels(time, label, curves)


def loss_panels(time: np.ndarray, label: str, layers: dict[int, dict[str, np.ndarray]]) -> Figure:
    """A panel for each layer with its three losses."""
    figure, axes = _small_multiples(len(layers))
    for panel, (layer, curves) in zip(axes, layers.items(), strict=True):
        for name, (text, colour) in LOSS_LOOKS.items():
            panel.plot(time, curves[name], color=colour, label=text, linewidth=1.2)
        panel.set_title(f"layer {layer}")
        panel.set_ylim(bottom=0)
        _label_time(panel, label)
        panel.set_ylabel("inner loss (1/2 squared error)")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


PICTURES = {
    "gate": (gate, "How much of the TTT output enters the residual stream."),
    "magnitudes": (magnitudes, "How strong attention's update and the gated TTT update are."),
    "cosines": (cosines, "Whether they point the same way: 1 same, 0 independent, -1 opposite."),
    "inner_weights": (inner_weights, "The inner network: its size, how far it has learnt, how fast."),
    "inner_loss": (inner_loss, "What the inner network achieves: mean over rows and heads."),
}
