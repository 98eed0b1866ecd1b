"""`python -m evaluation.recall`: does the memory reach beyond the attention window?"""

import hashlib
import logging
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from evaluation.recall.report import write_report
from evaluation.recall.running import run_jobs, stored_results
from evaluation.recall.settings import RecallConfig, jobs_of
from evaluation.recall.speech import speech_codes
from inference.command import typed_config

ConfigStore.instance().store(name="recall_schema", node=RecallConfig)
logger = logging.getLogger(__name__)


def digest_of(codes: torch.Tensor) -> str:
    """SHA-256 of codes, to know results of other speech from these."""
    return hashlib.sha256(codes.contiguous().numpy().tobytes()).hexdigest()


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="recall")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    typed = typed_config(config, RecallConfig)
    typed.validate()
    codes = speech_codes(Path(typed.speech), typed.vocabulary.speech)
    jobs = jobs_of(typed, digest_of(codes))
    if typed.mode == "train":
        run_jobs(jobs, codes, Path(typed.store), typed.workers)
    results = stored_results(jobs, Path(typed.store))
    if not results:
        raise ValueError(f"no result of these settings is in {typed.store}; run with mode=train first")
    logger.info("%s", write_report(results, typed))
    logger.info("wrote %s, .md and .png", typed.output)


if __name__ == "__main__":
    main()
