"""`python -m evaluation.inner_loss checkpoint=RUN recordings=LIST.jsonl output=inner_loss.json`

The inner loss of every TTT layer over positions in recordings, averaged over recordings and heads: at the
learned weights, and before and after each frame's step (figure 5 of arXiv 2407.04620). Draws inner_loss.png
beside it.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from moshi.models.lm import LMModel
from omegaconf import MISSING, DictConfig

from configs.typed import typed_config
from evaluation.plot_diagnostics import InnerLossCurves, draw_inner_loss_over_positions
from finetune.data.clips import Clip, ClipEncoder
from finetune.data.interleaver import TextLayout, TextTokens
from finetune.data.manifest import read_manifest
from inference.generate import choose_device
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.inner_losses import LOSSES, recorded_inner_losses
from moshi_ttt.integration import context_line
from moshi_ttt.loading import load_mimi, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class InnerLossConfig:
    """The inner losses of a checkpoint over recordings."""

    checkpoint: str = MISSING
    """A run, a step or a consolidated folder."""

    recordings: str = MISSING
    """jsonl of recordings in the format of training."""

    output: str = MISSING
    """Where the numbers go, NAME.json; NAME.png is drawn beside it."""

    duration_sec: float = 60.0
    """How much of each recording, from its start."""

    max_recordings: int | None = None
    """Use only the first recordings. None uses all."""

    overwrite: bool = False
    """Replace outputs that exist."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""


ConfigStore.instance().store(name="inner_loss_schema", node=InnerLossConfig)


@torch.no_grad()
def inner_loss_curves(model: LMModel, sequences: list[torch.Tensor]) -> InnerLossCurves:
    """Mean inner losses over positions.

    Args:
        model: with TTT layers, in evaluation mode.
        sequences: codes `[17, T]` of recordings; they may differ in length.
    """
    longest = max(codes.shape[1] for codes in sequences)
    counts = torch.zeros(longest, dtype=torch.float64)
    sums: dict[int, torch.Tensor] = {}
    for codes in sequences:
        length = codes.shape[1]
        with recorded_inner_losses(model) as found:
            model(codes[None])
        counts[:length] += 1
        for layer, (losses,) in found.items():
            total = sums.setdefault(layer, torch.zeros(len(LOSSES), longest, dtype=torch.float64))
            total[:, :length] += losses.mean(dim=(1, 2))
    layers = {
        layer: dict(zip(LOSSES, (total / counts).tolist(), strict=True)) for layer, total in sums.items()
    }
    return InnerLossCurves(layers, [int(count) for count in counts])


def run(config: InnerLossConfig) -> Path:
    """Compute, write and draw."""
    output = Path(config.output).expanduser()
    picture = output.with_suffix(".png")
    if output.suffix != ".json":
        raise ValueError(f"output must be named .json, got {config.output}")
    existing = [str(path) for path in (output, picture) if path.exists()]
    if existing and not config.overwrite:
        raise ValueError(f"{', '.join(existing)} exists; choose another output or set overwrite=true")
    if not config.duration_sec > 0:
        raise ValueError(f"duration_sec must be above 0, got {config.duration_sec}")
    found = read_manifest(config.recordings, None)[: config.max_recordings]
    if not found:
        raise ValueError(f"max_recordings={config.max_recordings} leaves no recordings")
    device = choose_device(config.device)
    loaded = load_checkpoint(config.checkpoint, device)
    logger.info("%s", context_line(loaded.model, inference=True))
    mimi, tokenizer = load_mimi(loaded.base, device), load_tokenizer(loaded.base)
    layout = TextLayout.of(loaded.config["data"])
    special = TextTokens.of(loaded.model)
    encoder = ClipEncoder(mimi, tokenizer, special, config.duration_sec, layout)
    codes = [encoder.encode([Clip(recording, 0.0)]).codes[0] for recording in found]
    # Behind the end of a recording there is nothing to learn.
    curves = inner_loss_curves(loaded.model, [c[:, (c[1:] != special.zero).any(0)] for c in codes])
    about: dict[str, Any] = {
        "checkpoint": str(loaded.folder),
        "step": loaded.manifest["step"],
        "data": config.recordings,
        "recordings": len(found),
        "frame_rate": mimi.frame_rate,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    curves.write(output, about)
    draw_inner_loss_over_positions(curves, about, picture)
    logger.info("wrote %s and %s", output, picture)
    return output


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="inner_loss")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(typed_config(config, InnerLossConfig))


if __name__ == "__main__":
    main()
