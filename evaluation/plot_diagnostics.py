"""`python -m evaluation.plot_diagnostics history=diagnostics.jsonl`: pictures and one HTML page of them.

The history is a file that `inference.generate diagnostics.file=...` wrote, or a run's metrics.jsonl.
"""

import base64
import html
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from matplotlib.figure import Figure
from omegaconf import MISSING, DictConfig

from configs.typed import typed_config
from evaluation.diagnostics_pictures import LOSS_LOOKS, PICTURES, History, loss_panels

logger = logging.getLogger(__name__)

POINTS = 150  # in a curve of losses over positions


@dataclass
class PlotConfig:
    """Pictures of recorded diagnostics."""

    history: str = MISSING
    """File of `diagnostics.file`, or metrics.jsonl of a training run."""

    output: str | None = None
    """Folder for the pictures and index.html. None is NAME_plots beside the history."""

    inner_loss: str | None = None
    """File of `python -m evaluation.inner_loss`, to show on the page too."""

    title: str | None = None
    """What was run. None takes it from the history."""

    overwrite: bool = False
    """Write into a folder that exists."""


ConfigStore.instance().store(name="plot_diagnostics_schema", node=PlotConfig)


@dataclass
class InnerLossCurves:
    """Inner losses over positions.

    Args:
        layers: for each TTT layer the mean loss of each position, by name (`LOSSES`).
        counts: recordings that reach each position.
    """

    layers: dict[int, dict[str, list[float]]]
    counts: list[int]

    def write(self, path: Path, about: dict[str, Any]) -> None:
        content = {"about": about, "counts": self.counts, "layers": self.layers}
        path.write_text(json.dumps(content) + "\n")

    @staticmethod
    def read(path: Path) -> tuple["InnerLossCurves", dict[str, Any]]:
        """Curves, and what was run."""
        try:
            content = json.loads(path.read_text())
            layers = {int(layer): curves for layer, curves in content["layers"].items()}
            return InnerLossCurves(layers, content["counts"]), content["about"]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"inner_loss={path} is no file of `python -m evaluation.inner_loss` ({error})"
            ) from error


def read_history(path: Path) -> History:
    """Read recorded diagnostics.

    Raises:
        ValueError: there is no such file, or no diagnostics in it.
    """
    if not path.is_file():
        raise ValueError(f"history={path} does not exist")
    history = History({})
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON ({error})") from error
        if "about" in record:
            history.about = record["about"]
            continue
        split = record.pop("split", None)
        if split is not None:
            if not split.startswith("diagnostics/layer_"):
                continue
            record["layer"] = int(split.removeprefix("diagnostics/layer_"))
        history.records.setdefault(record["layer"], []).append(record)
    if not history.records:
        raise ValueError(
            f"{path} holds no diagnostics; write them with diagnostics.file=... of inference.generate, or in "
            "training with diagnostics.every_steps above 0"
        )
    lengths = {layer: len(records) for layer, records in history.records.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path} holds different numbers of records for its layers: {lengths}")
    history.unit = "frame" if "frame" in history.records[history.layers[0]][0] else "step"
    return history


def title_of(history: History, path: Path) -> str:
    """What was run, in one line."""
    if history.unit == "step":
        return f"training {path.resolve().parent.name}"
    about = history.about
    if "checkpoint" not in about:
        return path.stem
    return f"{_run_and_step(about)}, listening to {Path(about['input']).name}"


def _run_and_step(about: dict[str, Any]) -> str:
    """Which checkpoint, RUN/checkpoints/STEP/consolidated, was used."""
    folder = Path(about["checkpoint"])
    name = folder.parents[2].name if len(folder.parents) > 2 else folder.name
    return f"{name}, step {about['step']}"


def draw_inner_loss_over_positions(
    curves: InnerLossCurves, about: dict[str, Any], path: Path | None
) -> Figure:
    """The three losses of each layer over positions, averaged over neighbours where there are many."""
    length = len(curves.counts)
    width = max(1, length // POINTS)
    edges = np.arange(0, length, width)
    counts = np.array(curves.counts, dtype=float)
    total = np.add.reduceat(counts, edges)
    layers = {
        layer: {name: np.add.reduceat(np.array(values[name]) * counts, edges) / total for name in LOSS_LOOKS}
        for layer, values in curves.layers.items()
    }
    middle = (edges + (np.minimum(edges + width, length) - 1)) / 2
    figure = loss_panels(middle / about["frame_rate"], "position in the recording (s)", layers)
    smooth = f", means of {width} frames" if width > 1 else ""
    figure.suptitle(
        f"Inner loss: {_run_and_step(about)}, mean over {about['recordings']} recordings of "
        f"{Path(about['data']).name} and all heads{smooth}"
    )
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def page(title: str, about: dict[str, Any], pictures: list[tuple[Path, str]]) -> str:
    """An HTML page that holds its pictures."""
    rows = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in about.items()
    )
    figures = "".join(
        f"<h2>{html.escape(path.stem.replace('_', ' '))}</h2><p>{html.escape(caption)}</p>"
        f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path, caption in pictures
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font-family:sans-serif;max-width:90rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%}th{text-align:left;padding-right:1rem}</style></head>"
        f"<body><h1>TTT diagnostics: {html.escape(title)}</h1><table>{rows}</table>{figures}</body></html>\n"
    )


def plot(config: PlotConfig) -> Path:
    """Draw everything; returns the page."""
    path = Path(config.history).expanduser()
    history = read_history(path)
    output = (
        path.with_name(f"{path.stem}_plots") if config.output is None else Path(config.output).expanduser()
    )
    if output.exists() and not config.overwrite:
        raise ValueError(f"output {output} exists; choose another folder or set overwrite=true")
    curves = None if config.inner_loss is None else InnerLossCurves.read(Path(config.inner_loss).expanduser())
    output.mkdir(parents=True, exist_ok=True)
    title = config.title or title_of(history, path)
    pictures = []
    for name, (draw, caption) in PICTURES.items():
        figure = draw(history)
        figure.suptitle(f"{name.replace('_', ' ').capitalize()}: {title}")
        figure.savefig(output / f"{name}.png", dpi=110)
        pictures.append((output / f"{name}.png", caption))
    if curves is not None:
        picture = output / "inner_loss_over_positions.png"
        draw_inner_loss_over_positions(*curves, picture)
        pictures.append((picture, "The inner losses over positions, averaged over recordings."))
    records = len(history.records[history.layers[0]])
    about = history.about | {"TTT layers": ", ".join(map(str, history.layers)), "records": records}
    index = output / "index.html"
    index.write_text(page(title, about, pictures), encoding="utf-8")
    logger.info("wrote %s", index)
    return index


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="plot_diagnostics")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    plot(typed_config(config, PlotConfig))


if __name__ == "__main__":
    main()
