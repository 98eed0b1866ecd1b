"""`python -m evaluation.paper_metrics checkpoint=RUN tasks=[swuggy,...] data.slm21=FOLDER ...`

How often does a model find the right one of two clips likelier? sWUGGY, sBLIMP, tSC, sSC and SALMon: whether
a trained model still knows what its base model knew. The work is shared by torchrun's processes and the tasks
of a SLURM array; whoever finishes last writes the results.
"""

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from configs.share import shard_of
from configs.typed import typed_config
from evaluation.paper_metrics.anchors import anchor_table
from evaluation.paper_metrics.data import read_tasks
from evaluation.paper_metrics.likelihood import ClipEncoder, batches_by_length, clip_nll
from evaluation.paper_metrics.models import FoundModel, find_model
from evaluation.paper_metrics.pairs import TaskData, clip_seconds
from evaluation.paper_metrics.results import NOTES, score_task, write_results
from evaluation.paper_metrics.scoring import PRIMARY, TIE_TOLERANCE, WEIGHTINGS
from evaluation.paper_metrics.settings import PaperMetricsConfig
from evaluation.paper_metrics.store import Shard, claim, make_shards, read_shard, write_shard
from inference.generate import choose_device
from moshi_ttt.integration import context_line

logger = logging.getLogger(__name__)

ConfigStore.instance().store(name="paper_metrics_schema", node=PaperMetricsConfig)


def identity_of(config: PaperMetricsConfig, model: FoundModel, tasks: Sequence[TaskData]) -> dict[str, Any]:
    """All that decides the results: whoever has the same gets the same."""
    return {
        "model": model.identity,
        "protocol": {
            "version": 1,
            "likelihood": "one forward pass, the clip on Moshi's stream, its targets by mask; state fresh",
            "weights": {name: list(weights) for name, weights in WEIGHTINGS.items()},
            "primary": PRIMARY,
            "tie_tolerance": TIE_TOLERANCE,
            "text_filler": config.text_filler,
            "user_filler": config.user_filler,
            "dtype": model.dtype,
            "codec_sha256": model.codec_sha256,
            "limit": config.limit,
            "seed": config.seed,
        },
        "data": {task.name: {"gold_sha256": task.gold_sha256, "clips_sha256": task.digest} for task in tasks},
        "layout": {"shard_clips": config.shard_clips, "batch_frames": config.batch_frames},
    }


def score_shards(
    shards: Sequence[Shard],
    seconds: dict[str, dict[str, float]],
    found: FoundModel,
    config: PaperMetricsConfig,
) -> None:
    """Score the clips of files that are missing, with a progress bar in clips."""
    device = choose_device(config.device)
    model, mimi = found.load(device)
    logger.info("%s on %s in %s; %s", found.name, device, found.dtype, context_line(model, inference=True))
    encoder = ClipEncoder(mimi, model, config.text_filler, config.user_filler)
    total = sum(len(shard.clips) for shard in shards)
    quiet = True if os.environ.get("LOCAL_RANK", "0") != "0" else None
    bar = tqdm(total=total, desc="scoring", unit="clip", disable=quiet, smoothing=0.05)
    started, heard = time.perf_counter(), 0.0
    with bar, logging_redirect_tqdm():
        for shard in shards:
            lengths = seconds[shard.task.name]
            frames = [math.ceil(lengths[name] * mimi.frame_rate) for name in shard.clips]
            nll: dict[int, np.ndarray] = {}
            for batch in batches_by_length(frames, config.batch_frames):
                names = [shard.clips[i] for i in batch]
                codes = [encoder.encode(shard.task.clips[name], lengths[name]) for name in names]
                nll.update(zip(batch, clip_nll(model, codes), strict=True))
                heard += sum(lengths[name] for name in names)
                bar.update(len(batch))
                rate = heard / (time.perf_counter() - started)
                bar.set_postfix_str(f"{rate:.1f} x real time", refresh=False)
            write_shard(shard, [nll[i] for i in range(len(shard.clips))])
    elapsed = time.perf_counter() - started
    logger.info(
        "scored %d clips, %.1f s of audio, in %.1f s: %.1f clips/s, %.1f times as fast as real time",
        *(total, heard, elapsed, total / elapsed, heard / elapsed),
    )


def run(config: PaperMetricsConfig) -> Path:
    """Score this process's share and, when nothing is missing, write the results. Returns the folder.

    Raises:
        ValueError: what is wrong with the settings, the model or the data.
    """
    config.validate()
    tasks = read_tasks(config)
    found = find_model(config)
    folder = output_folder(config, found)
    seconds = {task.name: clip_seconds(task) for task in tasks}
    for task in tasks:
        logger.info("%s", describe_task(task, seconds[task.name]))
    if config.mode == "check":
        logger.info("%s is found and the data is readable; nothing was scored", found.name)
        return folder
    identity = identity_of(config, found, tasks)
    about = {"model": found.about, "git_hash": git_hash(), "date": f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}"}
    plan = claim(folder, identity, about)
    shards = [
        shard
        for task in tasks
        for shard in make_shards(folder, identity, task, seconds[task.name], config.shard_clips)
    ]
    index, count = shard_of(config.shard_index, config.num_shards)
    mine = [shard for shard in shards[index::count] if not shard.path.is_file()]
    logger.info(
        "process %d of %d: %d of its %d files of likelihoods are to be made in %s",
        *(index, count, len(mine), len(shards[index::count]), folder),
    )
    if mine:
        score_shards(mine, seconds, found, config)
    missing = sum(not shard.path.is_file() for shard in shards)
    if missing:
        logger.info("%d of %d files are missing; the last process writes the results", missing, len(shards))
        return folder
    table = finish(folder, plan, tasks, shards, config.bootstrap_draws)
    logger.info("%s\n\n%s\n\n%s\nwrote %s", table, anchor_table(), NOTES, folder)
    return folder


def output_folder(config: PaperMetricsConfig, model: FoundModel) -> Path:
    """Where everything goes."""
    if config.output is not None:
        return Path(config.output).expanduser()
    return Path("paper_metrics", model.name if config.limit is None else f"{model.name}-limit{config.limit}")


def finish(
    folder: Path, plan: dict[str, Any], tasks: Sequence[TaskData], shards: Sequence[Shard], draws: int
) -> str:
    """Write the results from all likelihoods; returns the table."""
    scored = []
    for task in tasks:
        own = [read_shard(shard) for shard in shards if shard.task is task]
        scored.append(score_task(task, {name: nll for part in own for name, nll in part.items()}))
    return write_results(folder, plan, scored, draws)


def describe_task(task: TaskData, seconds: dict[str, float]) -> str:
    """One line of what there is to score."""
    text = (
        f"{task.name}: {len(task.pairs)} pairs of {task.clusters} ids, {len(task.clips)} clips, "
        f"{sum(seconds.values()) / 3600:.2f} h"
    )
    return text if task.clusters == task.total else f"{text} (partial: {task.total} ids in all)"


def git_hash() -> str | None:
    """The commit of this checkout; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="paper_metrics")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_grad_enabled(False)
    run(typed_config(config, PaperMetricsConfig))


if __name__ == "__main__":
    main()
