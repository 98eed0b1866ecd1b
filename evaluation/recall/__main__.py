"""`python -m evaluation.recall`: does the memory reach beyond the attention window?"""

import logging
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from configs.typed import typed_config
from evaluation.recall.probe import run as run_probe
from evaluation.recall.report import write_report
from evaluation.recall.running import run_jobs, stored_results
from evaluation.recall.settings import Job, RecallConfig, jobs_of
from evaluation.recall.speech import speech_codes, speech_digest
from evaluation.recall.studies import chosen, varied
from evaluation.recall.study_report import write_study
from moshi_ttt.device import device_of_process

ConfigStore.instance().store(name="recall_schema", node=RecallConfig)
logger = logging.getLogger(__name__)


def run_missing(jobs: list[Job], config: RecallConfig) -> None:
    """Run what is not stored, seed by seed, so that an early stop leaves whole comparisons."""
    run_jobs(
        sorted(jobs, key=lambda job: job.seed),
        speech_codes(Path(config.speech), config.vocabulary.speech),
        Path(config.store),
        config.workers,
        device_of_process(config.device, 0, torch.cuda.device_count()),
        config.max_minutes,
    )


def report_table(config: RecallConfig) -> str:
    """Run what is missing, if asked to, and write the comparison of the arms."""
    jobs = jobs_of(config, speech_digest(Path(config.speech)))
    if config.mode == "train":
        run_missing(jobs, config)
    results = stored_results(jobs, Path(config.store))
    if not results:
        raise ValueError(f"no result of these settings is in {config.store}; run with mode=train first")
    return write_report(results, config)


def report_study(config: RecallConfig) -> str:
    """The same for the variants of a study."""
    variants = [(variant.name, varied(config, variant)) for variant in chosen(config)]
    jobs = {name: jobs_of(other, speech_digest(Path(config.speech))) for name, other in variants}
    if config.mode == "train":
        run_missing([job for several in jobs.values() for job in several], config)
    stored = {name: stored_results(several, Path(config.store)) for name, several in jobs.items()}
    asked = dict(variants)
    results = {
        name: {arm: runs for arm, runs in arms.items() if arm in asked[name].arms}
        for name, arms in stored.items()
        if arms
    }
    if not results:
        raise ValueError(f"no result of this study is in {config.store}; run with mode=train first")
    return write_study(results, config, study_output(config))


def study_output(config: RecallConfig) -> Path:
    """Where the report goes."""
    output = Path(config.output)
    kind = "probe" if config.mode == "probe" else config.study
    return output if kind == "table" else output.with_stem(f"{output.stem}_{kind}")


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="recall")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    typed = typed_config(config, RecallConfig)
    typed.validate()
    if typed.mode == "probe":
        assert typed.checkpoint is not None
        logger.info("%s", run_probe(typed.probe, typed.checkpoint, study_output(typed)))
    else:
        report = report_table if typed.study == "table" else report_study
        logger.info("%s", report(typed))
    logger.info("wrote %s, .md and .png", study_output(typed))


if __name__ == "__main__":
    main()
