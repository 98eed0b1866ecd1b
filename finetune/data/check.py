"""`python -m finetune.data.check data.train=LIST`: is this data set fit to train on?

Reads every recording once, in several processes, and tells what is in the data set and what is wrong with it:
a table, a page (NAME.html, one file) and every problem with its file and second (NAME.jsonl beside it).
Exit code: 0 fine, 1 problems, 2 the data set cannot be read.
"""

import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from tqdm import tqdm

from configs.typed import typed_config
from finetune.data.check_page import write_page
from finetune.data.entries import BadEntry, Source, list_sources
from finetune.data.findings import Checked, CheckLimits, Job, Problem
from finetune.data.recording_check import check_recording
from finetune.data.summary import Summary, summarize
from finetune.data.voice import VoiceConfig

logger = logging.getLogger(__name__)

LEVELS = ("error", "warning", "off")


@dataclass
class CheckData:
    """What to check."""

    train: str = MISSING
    """The list or folder to train on: jsonl, jsonl.gz, a folder of such lists, a folder of audio."""

    valid: str | None = None
    """The list of held-out recordings; one that is in both is a problem."""

    root: str | None = None
    """Folder that all audio must lie in. None is the folder of each list."""

    main_speaker: str = "SPEAKER_MAIN"
    """Label of the left channel's words, and of a mono recording's."""

    user_speaker: str = "SPEAKER_USER"
    """Label of the right channel's words."""


@dataclass
class Severities:
    """What each kind of problem is: error, warning or off. Its limits are in finetune/data/findings.py."""

    list: str = "error"
    """A line of a list names no recording."""

    repeated: str = "error"
    """A recording is named twice, or is in both train and valid."""

    unreadable: str = "error"
    """Not audio, truncated, empty, or more than two channels."""

    not_finite: str = "error"
    """NaN or infinite samples."""

    duration: str = "error"
    """The list has another duration than the file."""

    transcript: str = "error"
    """A stereo recording has no transcript, or some of it is not in the format."""

    order: str = "error"
    """A word stands behind one that starts later."""

    outside: str = "error"
    """A word lies outside the audio, or has no length."""

    speaker: str = "warning"
    """Words of somebody who has no channel: nobody will learn them."""

    swap: str = "error"
    """The words lie in the other speaker's channel."""

    mismatch: str = "error"
    """The words are not where the voice is: the transcript of something else."""

    silent_words: str = "error"
    """A few words where the channel is silent."""

    unworded_voice: str = "warning"
    """Long voice without a word."""

    rate: str = "warning"
    """Very few or very many words per second of voice."""

    same_channels: str = "error"
    """Both channels hold the same."""

    silent_channel: str = "warning"
    """A channel without any voice."""

    clipping: str = "warning"
    """Samples at full scale."""

    quiet: str = "warning"
    """A faint voice."""


@dataclass
class CheckConfig:
    """The check of a data set."""

    data: CheckData = field(default_factory=CheckData)
    severity: Severities = field(default_factory=Severities)
    limits: CheckLimits = field(default_factory=CheckLimits)
    voice: VoiceConfig = field(default_factory=VoiceConfig)

    fail_on: str = "error"
    """From which severity on the exit code is 1: error or warning."""

    output: str = "data_check.html"
    """The page; NAME.jsonl beside it holds every problem."""

    workers: int | None = None
    """Processes. None is one for each CPU."""

    shown: int = 20
    """Problems printed on the terminal. All are in NAME.jsonl."""

    listed: int = 500
    """Problems on the page."""

    def validate(self) -> None:
        for f in fields(self.severity):
            value = getattr(self.severity, f.name)
            if value not in LEVELS:
                raise ValueError(f"severity.{f.name} must be one of {', '.join(LEVELS)}; got {value!r}")
        if self.fail_on not in LEVELS[:2]:
            raise ValueError(f"fail_on must be error or warning, got {self.fail_on!r}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, or null for one a CPU; got {self.workers}")
        if Path(self.output).suffix != ".html":
            raise ValueError(f"output must be named NAME.html, got {self.output}")


ConfigStore.instance().store(name="check_schema", node=CheckConfig)


def check(config: CheckConfig) -> Summary:
    """Read the data set and write the page and the list of problems.

    Raises:
        ValueError: the data set or the config cannot be read, or no recording can.
    """
    config.validate()
    lists = {"train": config.data.train, "valid": config.data.valid}
    entries = {name: list_sources(data, config.data.root) for name, data in lists.items() if data is not None}
    problems, sources = _distinct([entry for part in entries.values() for entry in part])
    speakers = (config.data.main_speaker, config.data.user_speaker)
    jobs = [Job(source, speakers, config.limits, config.voice) for source in sources]
    started = time.monotonic()
    checked = _check_all(jobs, config.workers or len(os.sched_getaffinity(0)))
    seconds = time.monotonic() - started
    if not any(recording.channels for recording in checked):
        reasons = [p.message for p in problems] + [p.message for r in checked for p in r.problems]
        raise ValueError(f"no recording of {config.data.train} can be read; the first: {reasons[0]}")
    severity = {f.name: getattr(config.severity, f.name) for f in fields(config.severity)}
    summary = summarize(checked, problems, severity, speakers)
    output = Path(config.output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    title = " and ".join(str(data) for data in lists.values() if data is not None)
    write_page(output, title, summary, config)
    problem_lines = [{"severity": severity[p.kind], **asdict(p)} for p in summary.problems]
    with output.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in problem_lines)
    _print(config, summary, seconds)
    logger.info("wrote %s and %s", output, output.with_suffix(".jsonl"))
    return summary


def _distinct(entries: Sequence[Source | BadEntry]) -> tuple[list[Problem], list[Source]]:
    """Each recording once, and the problems of the lists."""
    problems, seen = [], {}
    for entry in entries:
        if isinstance(entry, BadEntry):
            problems.append(Problem("list", entry.where, 0.0, entry.reason))
        elif entry.path in seen:
            message = f"named in {seen[entry.path].where} and in {entry.where}"
            problems.append(Problem("repeated", str(entry.path), 0.0, message))
        else:
            seen[entry.path] = entry
    return problems, list(seen.values())


def _check_all(jobs: Sequence[Job], workers: int) -> list[Checked]:
    """Check recordings in the order of the list, each in one process."""
    bar = tqdm(total=len(jobs), desc="checking", unit="file", disable=None, leave=False)
    with bar:
        if workers == 1 or len(jobs) < 2:
            return [_counted(check_recording(job), bar) for job in jobs]
        context = multiprocessing.get_context("spawn")  # threads of the main process do not survive a fork
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
            size = max(1, min(16, len(jobs) // (4 * workers)))
            return [_counted(checked, bar) for checked in pool.map(check_recording, jobs, chunksize=size)]


def _counted(checked: Checked, bar: tqdm) -> Checked:
    bar.update()
    return checked


def _print(config: CheckConfig, summary: Summary, seconds: float) -> None:
    width = max(len(name) for name, _ in summary.rows)
    logger.info("%s", "\n".join(f"{name.ljust(width)}  {value}" for name, value in summary.rows))
    logger.info("read in %.1f s: %.1f h of audio a minute", seconds, summary.hours * 60 / max(seconds, 1e-9))
    for (level, kind), count in sorted(summary.counts.items()):
        logger.info("%s %s: %d", level, kind, count)
    for problem in summary.problems[: config.shown]:
        level = getattr(config.severity, problem.kind)
        logger.info("%s %s %s %.2f s: %s", level, problem.kind, problem.file, problem.second, problem.message)
    if len(summary.problems) > config.shown:
        logger.info("... and %d more", len(summary.problems) - config.shown)


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="check")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        typed = typed_config(config, CheckConfig)
        summary = check(typed)
    except ValueError as error:
        logger.error("cannot check: %s", error)
        sys.exit(2)
    failing = ("error",) if typed.fail_on == "error" else ("error", "warning")
    if any(level in failing for level, _ in summary.counts):
        sys.exit(1)


if __name__ == "__main__":
    main()
