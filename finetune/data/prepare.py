"""`python -m finetune.data.prepare data.train=LIST output=FOLDER`: encode recordings once, train from codes.

Shards are shared out over the tasks of a SLURM array (or shard_index and num_shards) and, in each task, over
local processes. A shard is written whole or not at all, so whoever is killed starts again with the same
arguments and makes what is missing. The last task to finish joins the shards.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from configs.share import shard_of
from configs.typed import typed_config
from finetune.data.bad_input import BadInput
from finetune.data.config import DataConfig
from finetune.data.encoding import Job, encoded_by, encoded_here
from finetune.data.join import join
from finetune.data.plan import claim, make_plan
from finetune.data.prepared import MANIFEST, WHOLE, PreparedSet, missing_shards, shard_name
from finetune.data.recording import Recording
from finetune.data.sources import all_recordings, read_sources
from finetune.run_dir import start_logging
from moshi_ttt.digest import cached_sha256
from moshi_ttt.loading import ModelConfig, find_base

logger = logging.getLogger(__name__)

FRAME_RATE = 12.5


@dataclass
class PrepareConfig:
    """Recordings to shards of codes and words."""

    output: str = MISSING
    """Folder of the shards: a new one, or one that the same arguments began."""

    mode: str = "encode"
    """encode: make the shards that are missing, and join them when all are there. join: the last step alone.
    verify: read everything and compare it with the manifest's SHA-256."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    duration_sec: float = 100.0
    """With data.encode=per_clip: length of a clip, the same as in training."""

    shard_hours: float = 1.0
    """Audio in a shard. A kill loses at most what was done of one."""

    shard_index: int | None = None
    """This task among num_shards that share the work. None is SLURM_ARRAY_TASK_ID, or a task alone."""

    num_shards: int | None = None
    """Tasks that share the work. None is SLURM_ARRAY_TASK_COUNT, or 1."""

    workers: int = 1
    """Processes of this task, one thread each; only on the CPU. 1 encodes in the command itself."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""


ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)


def prepare(config: PrepareConfig) -> Path:
    """Do this task's part; returns the folder.

    Raises:
        ValueError: what was given cannot be prepared, or the folder holds something else.
    """
    folder = Path(config.output).expanduser()
    if config.mode == "join":
        logger.info("joined: %s", join(folder))
    elif config.mode == "verify":
        prepared = PreparedSet(folder)
        prepared.verify()
        logger.info("%s: all %d recordings are as the manifest says", folder, len(prepared))
    elif config.mode == "encode":
        encode(config, folder)
    else:
        raise ValueError(f"mode must be encode, join or verify; got {config.mode!r}")
    return folder


def encode(config: PrepareConfig, folder: Path) -> None:
    """Make the missing shards of this task, and join all when they are there."""
    device = _device(config)
    index, tasks = shard_of(config.shard_index, config.num_shards)
    base = find_base(config.model)
    data = config.data
    bad_input = BadInput(data.on_error, data.max_error_fraction)
    sources = read_sources(data.train, data.sources, bad_input)
    if len({source.weight for source in sources}) > 1:
        raise ValueError(
            f"data.train={data.train} mixes sources by weight, and codes have none; prepare each source by "
            "itself and give the weights in training: folder_a:0.7,folder_b:0.3"
        )
    recordings = all_recordings(sources)
    plan, shards = make_plan(
        recordings,
        config.data.encode or WHOLE,
        config.duration_sec,
        config.shard_hours,
        cached_sha256(Path(base.mimi_weights)),
        device.type,
    )
    claim(folder, plan)
    root = _common_folder(recordings) if data.root is None else Path(data.root).expanduser().resolve()
    mine = range(index, plan.shards, tasks)
    missing = set(missing_shards(folder, plan.shards))
    jobs = [
        Job(folder / shard_name(s), plan, s, shards[s], [recordings[i] for i in shards[s]], root)
        for s in mine
        if s in missing
    ]
    logger.info(
        "task %d of %d: %d of its %d shards are to be made, on %s",
        *(index, tasks, len(jobs), len(mine), device),
    )
    if jobs:
        _encode_all(jobs, config, device)
    missing = missing_shards(folder, plan.shards)
    if missing:
        logger.info("%d of %d shards are missing; the last task joins them", len(missing), plan.shards)
    elif jobs or not (folder / MANIFEST).is_file():
        logger.info("joined: %s", join(folder))
    else:
        logger.info("%s is whole", folder)


def _common_folder(recordings: Sequence[Recording]) -> Path:
    """The deepest folder that all recordings lie in, which their paths are kept relative to."""
    return Path(os.path.commonpath([recording.path.parent for recording in recordings]))


def _encode_all(jobs: list[Job], config: PrepareConfig, device: torch.device) -> None:
    seconds = sum(recording.duration_sec for job in jobs for recording in job.recordings)
    started = time.perf_counter()
    bar = tqdm(total=round(seconds * FRAME_RATE), desc="encoding", unit="frame", disable=None, smoothing=0.02)
    workers = min(config.workers, len(jobs))
    steps = (
        encoded_here(jobs, config.model, device) if workers <= 1 else encoded_by(jobs, config.model, workers)
    )
    with bar, logging_redirect_tqdm():
        for frames in steps:
            bar.update(frames)
            rate = bar.n / max(time.perf_counter() - started, 1e-9)
            bar.set_postfix_str(f"{rate / FRAME_RATE:.1f} h/h", refresh=False)
    elapsed = time.perf_counter() - started
    logger.info(
        "%.2f h of audio in %.1f s: %.0f frames/s, %.1f h/h",
        *(seconds / 3600, elapsed, seconds * FRAME_RATE / elapsed, seconds / elapsed),
    )


def _device(config: PrepareConfig) -> torch.device:
    """The device to encode on.

    Raises:
        ValueError: it is not there, or is to be shared by several processes.
    """
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=cpu or install a driver")
    if config.workers < 1:
        raise ValueError(f"workers must be at least 1, got {config.workers}")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and config.workers > 1:
        raise ValueError(
            f"workers={config.workers} share out CPU cores; on a GPU one process encodes "
            "16 recordings at once: use workers=1, or device=cpu"
        )
    return device


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="prepare")
def main(config: DictConfig) -> None:
    start_logging(is_main=True)
    typed = typed_config(config, PrepareConfig, unused=() if config.mode == "encode" else ("data.train",))
    prepare(typed)


if __name__ == "__main__":
    main()
