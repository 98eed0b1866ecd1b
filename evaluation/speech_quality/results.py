"""The files of a run: results and samples in the layout of lm-evaluation-harness, and the table.

    results_DATE.json                   every number with its interval, and the protocol
    samples_speech_quality_DATE.jsonl   each answer: what was meant and heard, windows, stretches, numbers
    results_DATE.md                     the table

With `limit`, or of answers to starts of recordings, the names begin with `partial_`.
"""

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.long_context.results import git_hash
from evaluation.speech_quality import turns, voice, words
from evaluation.speech_quality.activity import REACH_SEC, VOICE
from evaluation.speech_quality.answers import Answers
from evaluation.speech_quality.listening import Heard, Listener
from evaluation.speech_quality.measures import Metric, intervals, value
from evaluation.speech_quality.settings import TURNS, WORDS, SpeechQualityConfig
from evaluation.speech_quality.settings import VOICE as VOICE_TASK
from evaluation.statistics import cluster_intervals
from moshi_ttt.atomic import write_atomically

VERSION = 1
NAME = "speech_quality"
METRICS: dict[str, dict[str, Metric]] = {
    WORDS: words.METRICS,
    VOICE_TASK: voice.METRICS,
    TURNS: turns.METRICS,
}


def write_results(
    config: SpeechQualityConfig, answers: Answers, listener: Listener, heard: list[Heard]
) -> tuple[str, list[Path]]:
    """Write everything. Returns the table and the files."""
    date = f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}"
    content = summarize(config, answers, listener, heard) | {"git_hash": git_hash(), "date": date}
    prefix = "partial_" if answers.partial else ""
    table = result_table(content)
    contents = {
        f"{prefix}samples_{NAME}_{date}.jsonl": "".join(
            json.dumps(line, ensure_ascii=False) + "\n" for line in _samples(answers, heard)
        ),
        f"{prefix}results_{date}.md": table + "\n",
        f"{prefix}results_{date}.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
    }
    for name, text in contents.items():
        write_atomically(config.folder / name, text)
    return table, [config.folder / name for name in contents]


def summarize(
    config: SpeechQualityConfig, answers: Answers, listener: Listener, heard: list[Heard]
) -> dict[str, Any]:
    """All numbers of a run."""
    results: dict[str, dict[str, Any]] = {}
    for task in config.tasks:
        rows = [one.ratios[task] for one in heard]
        entry: dict[str, Any] = {"alias": task}
        for name, (found, count, having) in intervals(rows, config.bootstrap_draws, config.seed).items():
            entry[f"{name},none"] = _rounded(found.mean)
            entry[f"{name}_stderr,none"] = _rounded(found.stderr)
            entry[f"{name}_ci95,none"] = [_rounded(found.low), _rounded(found.high)]
            entry[f"{name}_n"] = having
            entry[f"{name}_count"] = round(count, 3)
        if answers.partial:
            entry["partial"] = True
        results[task] = entry
    return {
        "results": results,
        "configs": {task: asdict(config) for task in config.tasks},
        "versions": dict.fromkeys(config.tasks, VERSION),
        "n-samples": {t: {"original": answers.found, "effective": len(heard)} for t in config.tasks},
        "higher_is_better": {
            t: {name: one.better == "higher" for name, one in METRICS[t].items() if one.better}
            for t in config.tasks
        },
        "metrics": {t: {name: asdict(one) for name, one in METRICS[t].items()} for t in config.tasks},
        "n_failed": len(answers.failed),
        "failed": answers.failed,
        "ci": {"level": 0.95, "method": "bootstrap, percentiles", "cluster": "answer"},
        "partial": answers.partial,
        "models": {"checkpoint": answers.model},
        "protocol": {task: _protocol(task, config, answers, listener) for task in config.tasks},
        "hours": round(sum(item.seconds for item in answers.items) / 3600, 6),
        "similarity_over_time": _over_time(config, heard) if VOICE_TASK in config.tasks else [],
    }


def _protocol(task: str, config: SpeechQualityConfig, answers: Answers, listener: Listener) -> dict[str, Any]:
    """All but the model that decides a task's numbers."""
    vad = {
        "speech": "20 ms frames that are loud (finetune/data/voice.py) where Silero's detector hears speech "
        f"at most {REACH_SEC:g} s away",
        "loud": asdict(VOICE),
        "detector": f"silero_vad_v6 of faster-whisper {metadata.version('faster-whisper')}",
    }
    own: dict[str, dict[str, Any]] = {
        WORDS: {"normalization": words.NORMALIZATION, **listener.hearing()},
        VOICE_TASK: {"window_sec": config.window_sec, "encoder_sha256": listener.encoder_sha256, **vad},
        TURNS: {"answer_sec": config.answer_sec, "backchannel_sec": config.backchannel_sec, **vad},
    }
    return {
        "version": VERSION,
        "inputs_sha256": answers.inputs_sha256,
        "sampling": answers.sampling,
        "limit": config.limit,
        **own[task],
    }


def _over_time(config: SpeechQualityConfig, heard: list[Heard]) -> list[dict[str, Any]]:
    """Similarity to the first window by the second at which windows begin, the mean over answers."""
    last = max((second for one in heard for second, _ in one.similarity), default=None)
    if last is None:
        return []
    buckets = int(last // config.bucket_sec) + 1
    means = np.full((len(heard), buckets), np.nan)
    for row, one in zip(means, heard, strict=True):
        places = np.array([int(second // config.bucket_sec) for second, _ in one.similarity], int)
        for bucket in np.unique(places):
            row[bucket] = np.mean(
                [s for (_, s), p in zip(one.similarity, places, strict=True) if p == bucket]
            )
    found = cluster_intervals(means, [str(n) for n in range(len(heard))], config.bootstrap_draws, config.seed)
    return [
        {
            "from_sec": number * config.bucket_sec,
            "to_sec": (number + 1) * config.bucket_sec,
            "answers": int((~np.isnan(means[:, number])).sum()),
            "row": [_rounded(one.mean), _rounded(one.low), _rounded(one.high)],
        }
        for number, one in enumerate(found)
    ]


def _samples(answers: Answers, heard: list[Heard]) -> list[dict[str, Any]]:
    """Each answer."""
    lines = []
    for number, (item, one) in enumerate(zip(answers.items, heard, strict=True)):
        numbers = {
            task: {name: _plain(value(ratio)) for name, ratio in ratios.items()}
            for task, ratios in one.ratios.items()
        }
        lines.append(
            {
                "doc_id": number,
                "doc": {
                    "id": item.id,
                    "seconds": round(item.seconds, 3),
                    "seed": item.meta["sampling"]["seed"],
                },
                "resps": one.details,
                "numbers": numbers,
                **({"partial": True} if answers.partial else {}),
            }
        )
    return lines


def _plain(number: float | None) -> float | None:
    return None if number is None else _rounded(number)


def _rounded(number: float) -> float | None:
    return None if math.isnan(number) else round(number, 6)


def result_table(content: dict[str, Any]) -> str:
    """Markdown: a metric a row."""
    counts = next(iter(content["n-samples"].values()))
    title = f"{counts['effective']} answers, {content['hours']:.2f} h. 95 % intervals: answers are drawn."
    if content["partial"]:
        title = f"PARTIAL RESULTS ({content['partial']}). {title}"
    mark = " (partial)" if content["partial"] else ""
    lines = [title]
    if content["n_failed"]:
        failed = ", ".join(content["failed"][:5])
        lines.append(f"{content['n_failed']} recordings have no answer and are in no number: {failed}")
    lines += ["", "| | value | unit | answers | of |", "| --- | --- | --- | --- | --- |"]
    for task, entry in content["results"].items():
        for name, metric in content["metrics"][task].items():
            mean, (low, high) = entry[f"{name},none"], entry[f"{name}_ci95,none"]
            shown = "-" if mean is None else f"{mean:.4g}"
            shown += "" if low is None else f" ({low:.4g} to {high:.4g})"
            cells = (f"{task}: {name}{mark}", shown, metric["unit"], entry[f"{name}_n"], metric["meaning"])
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
