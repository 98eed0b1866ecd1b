"""`python -m evaluation.long_context checkpoint=RUN recordings=librilight/small output=long`

What is a memory worth over whole chapters? Streams long recordings through a checkpoint in several arms, of
which each leaves out a part of the memory, and compares them frame by frame: NLL by position, and beyond what
attention can reach. Started again after a kill, it goes on; several processes share the work. The protocol is
in docs/long_context.md.
"""

import logging
import os
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from configs.share import shard_of
from configs.typed import typed_config
from evaluation.long_context.recordings import drawn, find_recordings, speakers_of
from evaluation.long_context.results import console, write_results
from evaluation.long_context.settings import LongContextConfig
from evaluation.long_context.work import conclude, do, missing_jobs
from inference.generate import choose_device

logger = logging.getLogger(__name__)

ConfigStore.instance().store(name="long_context_schema", node=LongContextConfig)


def run(config: LongContextConfig) -> Path | None:
    """Score, measure and write; returns the page, or None while other processes are not done."""
    config.validate()
    found = find_recordings(config.recordings)
    recordings = drawn(found, config.limit, config.seed)
    hours = sum(recording.duration_sec for recording in recordings) / 3600
    logger.info(
        "%d recordings of %d speakers, %.2f h%s",
        len(recordings),
        len(speakers_of(recordings)),
        hours,
        "" if len(recordings) == len(found) else f": PARTIAL, {len(found)} were found",
    )
    index, count = shard_of(config.shard_index, config.num_shards)
    work = do(config, recordings, _device(config.device), index, count)
    missing = missing_jobs(work)
    if missing:
        logger.info(
            "this is part %d of %d: %d of %d files are done; who finishes the last writes the report",
            index + 1,
            count,
            len(work.jobs) - len(missing),
            len(work.jobs),
        )
        return None
    content, lines = conclude(config, work, recordings, len(found))
    written = write_results(config, content, lines)
    logger.info("%s\nwrote %s", console(content), "\n      ".join(map(str, written)))
    return written[0]


def _device(name: str) -> torch.device:
    """This process's device: one GPU for each process of a node."""
    device = choose_device(name)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="long_context")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(typed_config(config, LongContextConfig))


if __name__ == "__main__":
    main()
