"""`python -m finetune.data.annotate data=LIST_OR_FOLDER model=NAME_OR_FOLDER`: transcripts with timed words.

Beside each recording NAME.json is written, as Kyutai has it: `{"alignments": [[word, [start, end], speaker],
...]}` in order of starts, and under "annotation" what made them. Left is the main speaker, right the user; a
mono file has the main speaker alone. A run that was interrupted goes on where it was. Recordings that could
not be transcribed are in the report, and the exit code is 1.
"""

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from tqdm import tqdm

from configs.share import shard_of
from configs.typed import typed_config
from finetune.data.audio import read_header, read_whole
from finetune.data.entries import BadEntry, Source, list_sources
from finetune.data.voice import FRAME_SEC, VoiceConfig, frame_power, frame_samples, voiced
from finetune.data.whisper import DEVICE_ERROR, Transcriber, WhisperConfig

logger = logging.getLogger(__name__)

POLICIES = ("keep", "redo", "refuse")
# Quieter than this nothing is heard, and Whisper would make words up.
INAUDIBLE = 10 ** (-70 / 20)
UNHEARD_VOICE_SEC = 3.0


@dataclass
class AnnotateConfig:
    """Transcripts for a data set."""

    data: str = MISSING
    """jsonl or jsonl.gz with lines {"path": ...}, a folder of such lists, or a folder of audio files."""

    model: str = MISSING
    """Name that faster-whisper knows (medium, large-v3, distil-large-v3, ...), or a folder with a model that
    was converted for CTranslate2."""

    root: str | None = None
    """Folder that all audio must lie in: nothing is written outside. None is the folder of each list."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    threads: int = 0
    """CPU threads; 0 leaves it to CTranslate2."""

    whisper: WhisperConfig = field(default_factory=WhisperConfig)

    main_speaker: str = "SPEAKER_MAIN"
    """Label of the left channel, and of mono recordings."""

    user_speaker: str = "SPEAKER_USER"
    """Label of the right channel."""

    changed: str = "refuse"
    """What becomes of transcripts made here with another model or other settings: keep, redo, or refuse:
    stop before anything is written."""

    foreign: str = "keep"
    """The same for transcripts that something else made: keep, redo or refuse."""

    shard_index: int | None = None
    """Which part of the data this process does, from 0. None takes SLURM_ARRAY_TASK_ID, else does all."""

    num_shards: int | None = None
    """How many parts there are. None takes SLURM_ARRAY_TASK_COUNT."""

    report: str | None = None
    """File for what went wrong, a JSON object a line. None is NAME.annotate-INDEX-of-COUNT.ndjson beside the
    list, or in the folder of audio."""

    @property
    def policies(self) -> dict[str, str]:
        """What becomes of a transcript, by what `_state_of` says that it is."""
        return {"missing": "redo", "same": "keep", "changed": self.changed, "foreign": self.foreign}

    def validate(self) -> None:
        for name, policy in self.policies.items():
            if policy not in POLICIES:
                raise ValueError(f"{name} must be one of {', '.join(POLICIES)}; got {policy!r}")
        if self.main_speaker == self.user_speaker:
            raise ValueError(f"main_speaker and user_speaker are both {self.main_speaker!r}; give two labels")


ConfigStore.instance().store(name="annotate_schema", node=AnnotateConfig)


class Report:
    """What went wrong, written line by line, so that a run that is killed leaves what it knew."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.counts: Counter[str] = Counter()
        self._file: TextIO = path.open("w", encoding="utf-8")

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, severity: str, file: str, reason: str) -> None:
        """Record an error (there is no transcript) or a warning (there may be something wrong with it)."""
        self.counts[severity] += 1
        line = {"severity": severity, "file": file, "reason": reason}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        tqdm.write(f"{severity}: {file}: {reason}", file=sys.stderr)


@dataclass
class Task:
    """A recording to transcribe, and other keys of the JSON file beside it, which stay."""

    path: Path
    duration_sec: float
    other_keys: dict[str, Any]


def annotate(config: AnnotateConfig) -> int:
    """Transcribe what is missing; returns how many recordings of this shard have no transcript."""
    config.validate()
    index, count = shard_of(config.shard_index, config.num_shards)
    entries = list_sources(config.data, config.root)
    _refuse_shared_transcripts([entry for entry in entries if isinstance(entry, Source)])
    report_path = _report_path(config, index, count)
    transcriber = Transcriber(config.model, config.whisper, config.device, config.threads)
    settings = {
        "model": transcriber.model_id,
        **asdict(config.whisper),
        "speakers": [config.main_speaker, config.user_speaker],
    }
    with Report(report_path) as report:
        mine = entries[index::count]
        tasks = _find_tasks(config, mine, settings, report)
        logger.info(
            "shard %d of %d: %d of its %d recordings to transcribe", index, count, len(tasks), len(mine)
        )
        _transcribe_all(config, tasks, transcriber, settings, report)
        errors, warnings = report.counts["error"], report.counts["warning"]
        logger.info("%d recordings failed, %d warnings: %s", errors, warnings, report.path)
    return errors


def _refuse_shared_transcripts(sources: Sequence[Source]) -> None:
    """a.wav and a.flac would have one transcript."""
    seen: dict[Path, Path] = {}
    for source in sources:
        other = seen.setdefault(source.path.with_suffix(".json"), source.path)
        if other != source.path:
            raise ValueError(
                f"{other} and {source.path} would share the transcript {other.with_suffix('.json').name}; "
                "rename one of them"
            )


def _report_path(config: AnnotateConfig, index: int, count: int) -> Path:
    if config.report is not None:
        return Path(config.report).expanduser()
    data = Path(config.data).expanduser()
    if not data.exists():  # several lists, as in a mix
        raise ValueError(f"data={config.data} is no single list or folder; give report=FILE for what fails")
    name = f"annotate-{index}-of-{count}.ndjson"
    return data / name if data.is_dir() else data.with_name(f"{data.name.split('.')[0]}.{name}")


def _find_tasks(
    config: AnnotateConfig, entries: Sequence[Source | BadEntry], settings: dict[str, Any], report: Report
) -> list[Task]:
    """Recordings that need a transcript. Those that cannot be read are reported.

    Raises:
        ValueError: there is a transcript that the config refuses.
    """
    tasks, kept, seen = [], Counter(), set()
    for entry in tqdm(entries, desc="looking for transcripts", unit="file", disable=None, leave=False):
        if isinstance(entry, BadEntry):
            report.add("error", entry.where, entry.reason)
            continue
        if entry.path in seen:
            continue
        seen.add(entry.path)
        transcript = entry.path.with_suffix(".json")
        try:
            content = _read_transcript(transcript)
            state = _state_of(content, settings)
            policy = config.policies[state]
            if policy == "refuse":
                raise ValueError(_refusal(transcript, state, content, settings))
            if policy == "keep":
                kept[state] += 1
                continue
        except (OSError, _BadTranscriptError) as error:
            report.add("error", str(entry.path), str(error))
            continue
        try:
            header = read_header(entry.path)
        except ValueError as error:
            report.add("error", str(entry.path), str(error))
            continue
        other = {k: v for k, v in content.items() if k not in ("alignments", "annotation")}
        tasks.append(Task(entry.path, header.promised_sec, other))
    for state, number in kept.items():
        logger.info("%d transcripts kept (%s)", number, {"same": "finished before"}.get(state, state))
    return tasks


class _BadTranscriptError(Exception):
    """The file where the transcript belongs holds something else, which is not ours to overwrite."""


def _read_transcript(path: Path) -> dict[str, Any]:
    """Content of the JSON file beside a recording; empty where there is none."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _BadTranscriptError(f"{path.name} is there but is not JSON ({error}); remove it") from error
    if not isinstance(content, dict):
        raise _BadTranscriptError(f"{path.name} is there but holds no JSON object; remove it")
    return content


def _state_of(content: dict[str, Any], settings: dict[str, Any]) -> str:
    """What a JSON file is to these settings: missing, foreign, same or changed."""
    if "alignments" not in content:
        return "missing"  # other keys, as Libri-Light's, stay as they are
    annotation = content.get("annotation")
    if not isinstance(annotation, dict) or not isinstance(annotation.get("settings"), dict):
        return "foreign"
    return "same" if annotation["settings"] == settings else "changed"


def _refusal(path: Path, state: str, content: dict[str, Any], settings: dict[str, Any]) -> str:
    if state == "foreign":
        return f"{path} was made by something else; set foreign=keep or foreign=redo"
    assert state == "changed"
    old = content["annotation"]["settings"]
    differences = [
        f"{name} was {old.get(name)}, is {settings.get(name)}"
        for name in sorted(old.keys() | settings.keys())
        if old.get(name) != settings.get(name)
    ]
    return (
        f"{path} was made with other settings ({'; '.join(differences)}); set changed=redo to make such "
        "transcripts anew, or changed=keep to have both in one data set"
    )


def _transcribe_all(
    config: AnnotateConfig,
    tasks: Sequence[Task],
    transcriber: Transcriber,
    settings: dict[str, Any],
    report: Report,
) -> None:
    total = sum(task.duration_sec for task in tasks)
    started, done = time.monotonic(), 0.0
    bar_format = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=total, desc="transcribing", disable=None, bar_format=bar_format) as bar:
        for task in tasks:
            try:
                words = _transcribe(config, task, transcriber, report)
                content = {"alignments": words, **task.other_keys}
                content["annotation"] = {"settings": settings, "made_with": transcriber.versions}
                write_json(task.path.with_suffix(".json"), content)
            except (OSError, RuntimeError, ValueError) as error:
                if isinstance(error, RuntimeError) and DEVICE_ERROR.search(str(error)):
                    raise
                report.add("error", str(task.path), f"{type(error).__name__}: {error}")
            done += task.duration_sec
            bar.update(task.duration_sec)
            bar.set_postfix_str(f"{(time.monotonic() - started) / max(done, 1e-9):.3f} s per s of audio")
    seconds = time.monotonic() - started
    if tasks:
        logger.info(
            "%.2f h of audio in %.0f s: real-time factor %.3f",
            total / 3600,
            seconds,
            seconds / max(total, 1e-9),
        )


def _transcribe(
    config: AnnotateConfig, task: Task, transcriber: Transcriber, report: Report
) -> list[list[Any]]:
    """Alignments of a recording in order of the starts; at the same time the main speaker comes first."""
    samples, rate = read_whole(task.path)
    channels = len(samples)
    if channels > 2:
        raise ValueError(f"{channels} channels; expected stereo (main speaker left, user right) or mono")
    words = []
    for channel, speaker in zip(range(channels), (config.main_speaker, config.user_speaker), strict=False):
        sound = samples[channel]
        heard = transcriber.words(sound, rate) if np.abs(sound).max() > INAUDIBLE else []
        words += [[text, [start, end], speaker] for text, start, end in heard]
        power = frame_power(sound[None], frame_samples(rate))[:, 0]
        voice_sec = FRAME_SEC * voiced(power, VoiceConfig()).sum()
        if not heard and voice_sec > UNHEARD_VOICE_SEC:
            report.add(
                "warning",
                str(task.path),
                f"no words of {speaker} though there are {voice_sec:.0f} s of voice",
            )
    return sorted(words, key=lambda word: word[1][0])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader, or a run that goes on after a kill, sees all of it or none."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@hydra.main(version_base="1.3", config_path="pkg://configs.annotate", config_name="annotate")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("faster_whisper").setLevel(logging.WARNING)
    if annotate(typed_config(config, AnnotateConfig)):
        sys.exit(1)


if __name__ == "__main__":
    main()
