"""Scoring recordings, one arm after the other; what is done is on the disk and is not done again."""

import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluation.long_context.arms import Arm, parse_context, running
from evaluation.long_context.codes import CodeReader
from evaluation.long_context.models import Opened, reach_of
from evaluation.long_context.pieces import Piece, Plan
from evaluation.long_context.recordings import LongRecording
from inference.likelihood import nll_by_frame, reset_frames
from moshi_ttt.atomic import write_atomically
from moshi_ttt.memory_arms import attention_contexts, mini_batch_frames

logger = logging.getLogger(__name__)

VERSION = 1  # of what is scored and how; another one does not use old files


@dataclass(frozen=True)
class Job:
    """One recording in one arm.

    Args:
        path: file of its NLLs: an array `[codebooks, frames]` float32 for each piece, by name.
        recording: index.
    """

    path: Path
    arm: Arm
    recording: int
    pieces: tuple[Piece, ...]

    @property
    def frames(self) -> int:
        return sum(piece.frames for piece in self.pieces)


@dataclass(frozen=True)
class ArmFacts:
    """How an arm was run: its windows, its receptive field, and when it forgets, in frames."""

    windows_frames: list[int]
    receptive_field_frames: int
    reset_frames: int | None


def facts_of(opened: Opened, arm: Arm, wanted_reset: int | None) -> ArmFacts:
    """What an arm means for a model. Its parameters are not looked at."""
    with attention_contexts(opened.model, *parse_context(arm.context)):
        forgets = reset_frames(opened.model, wanted_reset) if arm.memory == "reset" else None
        return ArmFacts(**reach_of(opened.model), reset_frames=forgets)


def jobs_of(
    opened: Opened,
    arm: Arm,
    facts: ArmFacts,
    recordings: Sequence[LongRecording],
    plan: Plan,
    reader: CodeReader,
    with_controls: bool,
    folder: Path,
) -> list[Job]:
    """The jobs of one arm. Their files are named by a sum of all that decides the numbers in them."""
    jobs = []
    for index, recording in enumerate(recordings):
        pieces = tuple(plan.pieces(index, with_controls))
        used = sorted({span[0] for piece in pieces for span in piece.spans})
        decides = {
            "version": VERSION,
            "model": opened.identity,
            "arm": [arm.memory, facts.windows_frames, arm.context, facts.reset_frames],
            "pieces": [[piece.name, [[used.index(i), *ab] for i, *ab in piece.spans]] for piece in pieces],
            "codes": [reader.identity(recordings[i]) for i in used],
        }
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        stem = re.sub(r"[^\w.-]+", "_", recording.name)[-100:]
        jobs.append(Job(folder / arm.name / f"{stem}-{key}.npz", arm, index, pieces))
    return jobs


class Progress:
    """A bar in frames that knows how much faster than real time they are scored."""

    def __init__(self, title: str, frames: int, frame_rate: float):
        self.bar = tqdm(total=frames, desc=title, unit="frame", unit_scale=True, disable=None)
        self.frame_rate, self.started, self.done = frame_rate, time.perf_counter(), 0

    def add(self, frames: int) -> None:
        self.done += frames
        self.bar.update(frames)
        self.bar.set_postfix_str(f"{self.times_real_time:.1f} x real time", refresh=False)

    @property
    def times_real_time(self) -> float:
        return self.done / self.frame_rate / max(time.perf_counter() - self.started, 1e-9)


def run_jobs(
    opened: Opened,
    jobs: Sequence[Job],
    facts: dict[str, ArmFacts],
    recordings: Sequence[LongRecording],
    reader: CodeReader,
    chunk_frames: int,
    title: str,
) -> None:
    """Do the jobs whose files are not there yet."""
    todo = [job for job in jobs if not job.path.is_file()]
    logger.info("%s: %d of %d recordings x arms are scored already", title, len(jobs) - len(todo), len(jobs))
    if not todo:
        return
    size = mini_batch_frames(opened.model)
    progress = Progress(title, sum(job.frames for job in todo), reader.mimi.frame_rate)
    for job in todo:
        forgetting = facts.get(Arm("reset", job.arm.context).name)
        chunk = whole_chunks(chunk_frames, size, forgetting and forgetting.reset_frames)
        forgets = facts[job.arm.name].reset_frames
        found = score(opened, job.arm, job.pieces, recordings, reader, chunk, forgets, progress.add)
        write_atomically(job.path, _npz(found))
    progress.bar.close()
    hours = progress.done / progress.frame_rate / 3600
    logger.info(
        "%s: %d files, %.2f h of audio, %.1f x real time", title, len(todo), hours, progress.times_real_time
    )


def whole_chunks(wanted: int, size: int, forgets: int | None) -> int:
    """A chunk of about `wanted` frames in whole mini-batches, which goes into `forgets` without a rest.

    All arms are then cut alike, and differ by what they are alone, not by rounding.
    """
    most = max(wanted // size, 1)
    if forgets is None:
        return most * size
    fitting = max(n for n in range(1, most + 1) if forgets // size % n == 0)
    return size * (fitting if 4 * fitting >= most or fitting * size == forgets else most)


def score(
    opened: Opened,
    arm: Arm,
    pieces: Sequence[Piece],
    recordings: Sequence[LongRecording],
    reader: CodeReader,
    chunk_frames: int,
    forgets: int | None,
    on_frames: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """NLLs of each piece, `[dep_q, kept frames]` float32, by its name."""
    found = {}
    for piece in pieces:
        parts = [reader.codes(recordings[index])[:, start:stop] for index, start, stop in piece.spans]
        codes = torch.cat(parts, dim=1)[None].to(opened.model.device)
        with running(opened.model, arm):
            nll = nll_by_frame(opened.model, codes, chunk_frames, forgets, on_frames)[0, 1:]
        found[piece.name] = nll[:, nll.shape[1] - piece.kept :].numpy()
    return found


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_scores(job: Job) -> dict[str, np.ndarray]:
    """What `score` gave, read back."""
    with np.load(job.path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def shown(facts: ArmFacts, frame_rate: float) -> dict[str, Any]:
    """Facts with seconds."""
    return {
        "windows_frames": facts.windows_frames,
        "receptive_field_frames": facts.receptive_field_frames,
        "receptive_field_sec": round(facts.receptive_field_frames / frame_rate, 2),
        "reset_frames": facts.reset_frames,
    }
