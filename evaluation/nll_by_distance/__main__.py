"""`python -m evaluation.nll_by_distance checkpoints=[RUN,...] recordings=LIST.jsonl output=nll.json`

What is a memory worth on real speech? Streams whole recordings through checkpoints, every code scored once
with the state carried from the first frame to the last, and gives the NLL by position in the recording, of
words by distance since the same word, and of turns by the gap since the same speaker last spoke.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from configs.typed import typed_config
from evaluation.nll_by_distance.arms import (
    Arm,
    about,
    arms_of,
    comparisons,
    labels_of,
    refuse_different_streams,
    reset_every,
    score_arms,
)
from evaluation.nll_by_distance.measures import Bins, Measures, frequent_words
from evaluation.nll_by_distance.report import write_report
from evaluation.nll_by_distance.settings import NllConfig
from evaluation.nll_by_distance.sides import Side, SideReader
from finetune.data.interleaver import TextTokens
from finetune.data.manifest import Recording, read_manifest
from inference.generate import choose_device
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.integration import context_line
from moshi_ttt.loading import load_mimi, load_tokenizer

logger = logging.getLogger(__name__)

ConfigStore.instance().store(name="nll_by_distance_schema", node=NllConfig)


@dataclass
class Scored:
    """The NLLs of every arm of every checkpoint.

    Args:
        reader: what the recordings were read with.
        sides: as they were scored.
        nll: for each side the NLLs `[1 + dep_q, T]` by arm.
        arms: in order.
        checkpoints: what each is, by label.
    """

    reader: SideReader
    sides: list[Side]
    nll: list[dict[str, torch.Tensor]]
    arms: list[Arm]
    checkpoints: dict[str, dict[str, Any]]


def score(config: NllConfig, recordings: list[Recording], device: torch.device) -> Scored:
    """Score all recordings with all checkpoints, one checkpoint in memory at a time."""
    labels = labels_of(config.checkpoints, config.labels)
    data = refuse_different_streams(config.checkpoints, labels)
    scored = None
    for label, path in zip(labels, config.checkpoints, strict=True):
        loaded = load_checkpoint(path, device)
        logger.info("%s: %s", label, context_line(loaded.model, inference=True))
        if scored is None:
            reader = SideReader(
                load_mimi(loaded.base, device),
                load_tokenizer(loaded.base),
                TextTokens.of(loaded.model),
                data["main_speaker"],
                data["keep_main_only"],
                config.both_sides,
            )
            sides = [side for index, found in enumerate(recordings) for side in reader.read(index, found)]
            scored = Scored(reader, sides, [{} for _ in sides], [], {})
        scored.checkpoints[label] = about(loaded, config.reset_frames)
        scored.arms += arms_of(label, reset_every(loaded, config.reset_frames) is not None)
        more = score_arms(loaded, label, scored.sides, config.chunk_frames, config.reset_frames)
        for nll, added in zip(scored.nll, more, strict=True):
            nll.update(added)
    assert scored is not None
    return scored


def run(config: NllConfig) -> Path:
    """Score, measure and write; returns the file of numbers."""
    config.validate()
    recordings = read_manifest(config.recordings)[: config.max_recordings]
    scored = score(config, recordings, choose_device(config.device))
    sides, frame_rate, checkpoints = scored.sides, scored.reader.frame_rate, scored.checkpoints
    lengths_sec = [side.codes.shape[-1] / frame_rate for side in sides]
    windows = {w for c in checkpoints.values() for kind in c["windows_frames"].values() for w in kind}
    reach = min(checkpoint["receptive_field_frames"] for checkpoint in checkpoints.values())
    measures = Measures(
        Bins.of(max(lengths_sec), config.position_bin_sec, sorted(windows), reach, frame_rate),
        len(recordings),
        [arm.name for arm in scored.arms],
        frame_rate,
        config.turn_sec,
        scored.reader.special,
        frequent_words(sides, config.frequent_words),
    )
    for side, nll in zip(sides, scored.nll, strict=True):
        measures.add(side, nll)
    facts = {
        "recordings": config.recordings,
        "number": len(recordings),
        "sides": len(sides),
        "seconds_scored": round(sum(lengths_sec), 1),
        "frame_rate": frame_rate,
        "windows_frames": sorted(windows),
        "receptive_field_frames": reach,
        "turn_sec": config.turn_sec,
        "frequent_words": sorted(measures.frequent),
        "bootstrap_draws": config.bootstrap_draws,
        "checkpoints": checkpoints,
    }
    table = write_report(measures, comparisons(scored.arms), facts, config.outputs, config.bootstrap_draws)
    logger.info("%s\nwrote %s, %s and %s", table, *config.outputs)
    return config.outputs[0]


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="nll_by_distance")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(typed_config(config, NllConfig))


if __name__ == "__main__":
    main()
