"""`python -m evaluation.nll_by_distance checkpoints=[RUN,...] recordings=LIST.jsonl output=nll.json`

What is a memory worth on real speech? Streams whole recordings through checkpoints, every code scored once
with the state carried from the first frame to the last, and gives the NLL by position in the recording, of
words by distance since the same word, and of turns by the gap since the same speaker last spoke.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from evaluation.nll_by_distance.arms import (
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
from inference.command import typed_config
from inference.generate import choose_device
from moshi_ttt.checkpoint import LoadedCheckpoint, load_checkpoint
from moshi_ttt.integration import context_line
from moshi_ttt.loading import load_mimi, load_tokenizer

logger = logging.getLogger(__name__)

ConfigStore.instance().store(name="nll_by_distance_schema", node=NllConfig)


def read_sides(
    recordings: list[Recording], loaded: LoadedCheckpoint, data: dict[str, Any], both_sides: bool
) -> tuple[list[Side], float]:
    """All sides of all recordings as codes, and the frame rate."""
    mimi = load_mimi(loaded.base, loaded.model.device)
    reader = SideReader(
        mimi,
        load_tokenizer(loaded.base),
        TextTokens.of(loaded.model),
        data["main_speaker"],
        data["keep_main_only"],
        both_sides,
    )
    sides = [side for index, recording in enumerate(recordings) for side in reader.read(index, recording)]
    return sides, mimi.frame_rate


def run(config: NllConfig) -> Path:
    """Score, measure and write; returns the file of numbers."""
    config.validate()
    recordings = read_manifest(config.recordings)[: config.max_recordings]
    device = choose_device(config.device)
    labels = labels_of(config.checkpoints, config.labels)
    data = refuse_different_streams(config.checkpoints, labels)
    sides: list[Side] = []
    frame_rate, special = 0.0, TextTokens(0, 0, 0)
    nll: list[dict[str, torch.Tensor]] = []
    arms, checkpoints = [], {}
    for label, path in zip(labels, config.checkpoints, strict=True):
        loaded = load_checkpoint(path, device)
        logger.info("%s: %s", label, context_line(loaded.model, inference=True))
        checkpoints[label] = about(loaded, config.reset_frames)
        arms += arms_of(label, reset_every(loaded, config.reset_frames) is not None)
        if not sides:
            sides, frame_rate = read_sides(recordings, loaded, data, config.both_sides)
            special = TextTokens.of(loaded.model)
            nll = [{} for _ in sides]
        scored = score_arms(loaded, label, sides, config.chunk_frames, config.reset_frames)
        for found, more in zip(nll, scored, strict=True):
            found.update(more)
    longest_sec = max(side.codes.shape[-1] for side in sides) / frame_rate
    windows = {w for c in checkpoints.values() for kind in c["windows_frames"].values() for w in kind}
    reach = min(checkpoint["receptive_field_frames"] for checkpoint in checkpoints.values())
    bins = Bins.of(longest_sec, config.position_bin_sec, sorted(windows), reach, frame_rate)
    names = [arm.name for arm in arms]
    frequent = frequent_words(sides, config.frequent_words)
    measures = Measures(bins, len(recordings), names, frame_rate, config.turn_sec, special, frequent)
    for side, found in zip(sides, nll, strict=True):
        measures.add(side, found)
    facts = {
        "data": config.recordings,
        "recordings": len(recordings),
        "sides": len(sides),
        "seconds_scored": round(sum(side.codes.shape[-1] for side in sides) / frame_rate, 1),
        "frame_rate": frame_rate,
        "windows_frames": sorted(windows),
        "receptive_field_frames": reach,
        "turn_sec": config.turn_sec,
        "frequent_words": sorted(frequent),
        "bootstrap_draws": config.bootstrap_draws,
        "checkpoints": checkpoints,
    }
    table = write_report(measures, comparisons(arms), facts, config.outputs, config.bootstrap_draws)
    logger.info("%s\nwrote %s, %s and %s", table, *config.outputs)
    return config.outputs[0]


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="nll_by_distance")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(typed_config(config, NllConfig))


if __name__ == "__main__":
    main()
