"""The work of preparing: shards of recordings to files, in this process or in several."""

import logging
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from moshi.models.compression import MimiModel

from finetune.data.audio import read_samples
from finetune.data.clips import clip_at, count_clips, crop_codes
from finetune.data.codec import batches_of, encode_whole
from finetune.data.manifest import Recording, Word
from finetune.data.plan import Plan, words_digest
from finetune.data.prepared import WHOLE
from finetune.data.shard import Encoded, shard_bytes
from moshi_ttt.atomic import write_atomically
from moshi_ttt.digest import sha256
from moshi_ttt.loading import ModelConfig, find_base, load_mimi

logger = logging.getLogger(__name__)


# Of what could not be read.
_NO_CODES = torch.zeros(2 * 8, 0, dtype=torch.int16)

Made = TypeVar("Made")


@dataclass(frozen=True)
class Job:
    """A shard to make.

    Args:
        path: the file.
        plan: of the folder.
        shard: its number.
        numbers, recordings: places in the list, and what is there.
        root: folder that sources are named from.
        skip: go on without what cannot be read, which then has no frames; otherwise it is an error.
    """

    path: Path
    plan: Plan
    shard: int
    numbers: list[int]
    recordings: list[Recording]
    root: Path
    skip: bool = False


@dataclass(frozen=True)
class Progress:
    """A batch of recordings that is done.

    Args:
        frames: of its codes.
        lost: path and reason of each recording of which something could not be read.
    """

    frames: int
    lost: dict[str, str]


def make_shard(job: Job, mimi: MimiModel) -> Iterator[Progress]:
    """Encode and write a shard; yields as each batch of recordings is done.

    Raises:
        ValueError: a recording cannot be read, and none may be skipped.
    """
    shard = _Shard(job, mimi)
    lengths = [round(recording.duration_sec * mimi.sample_rate) for recording in job.recordings]
    for batch in batches_of(lengths, next(mimi.parameters()).device):
        yield shard.encode(batch)
    write_atomically(job.path, shard.content())


class _Shard:
    """A shard in the making."""

    def __init__(self, job: Job, mimi: MimiModel):
        self.job, self.mimi = job, mimi
        self.made: dict[int, Encoded] = {}
        self.sources: dict[int, dict[str, Any]] = {}
        self.lost: dict[int, str] = {}

    def encode(self, batch: list[int]) -> Progress:
        """Make what the shard holds of some of its recordings."""
        whole = self.job.plan.encode == WHOLE
        pieces = self._whole(batch) if whole else {index: self._clips(index) for index in batch}
        for index in batch:
            self._finish(index, pieces[index])
        frames = sum(piece.shape[1] for index in batch for piece in self.made[index].pieces)
        lost = {str(self.job.recordings[i].path): self.lost[i] for i in batch if i in self.lost}
        return Progress(frames, lost)

    def content(self) -> bytes:
        """The file's content, when all batches are encoded."""
        order = range(len(self.job.recordings))
        sources = [self.sources[index] for index in order]
        about = {"plan_sha256": self.job.plan.sha256, "shard": self.job.shard, "sources": sources}
        return shard_bytes([self.made[index] for index in order], about)

    def _whole(self, batch: list[int]) -> dict[int, list[torch.Tensor]]:
        """The codes of whole recordings, which are encoded together."""
        rate = self.mimi.sample_rate
        read = {i: self._tried(i, partial(read_samples, self.job.recordings[i], rate)) for i in batch}
        audio = {index: samples for index, samples in read.items() if samples is not None}
        encoded = encode_whole(self.mimi, list(audio.values())) if audio else []
        codes = dict(zip(audio, encoded, strict=True))
        return {index: [codes.get(index, _NO_CODES)] for index in batch}

    def _clips(self, index: int) -> list[torch.Tensor]:
        """The codes of each clip of a recording, encoded by itself."""
        recording, duration_sec = self.job.recordings[index], self.job.plan.duration_sec
        assert duration_sec is not None
        count = count_clips(recording.duration_sec, duration_sec)
        clips = [clip_at(recording, number, duration_sec) for number in range(count)]
        pieces = [self._tried(index, partial(crop_codes, self.mimi, clip, duration_sec)) for clip in clips]
        return [_NO_CODES if piece is None else piece for piece in pieces]

    def _finish(self, index: int, pieces: list[torch.Tensor]) -> None:
        """Put a recording's codes, words and source together. Without its words none of it can be used."""
        recording = self.job.recordings[index]
        about = self._tried(index, lambda: (_all_words(recording), source_digests(recording)))
        if about is None:
            pieces = [_NO_CODES for _ in pieces]
        words, digests = (None, {}) if about is None else about
        self.made[index] = Encoded(pieces, words)
        path = recording.path
        self.sources[index] = {
            "number": self.job.numbers[index],
            "path": str(path.relative_to(self.job.root) if path.is_relative_to(self.job.root) else path),
            "duration_sec": recording.duration_sec,
            **digests,
            **({"lost": self.lost[index]} if index in self.lost else {}),
        }

    def _tried(self, index: int, make: Callable[[], Made]) -> Made | None:
        """What is made of a recording; None where that cannot be, and may be skipped."""
        try:
            return make()
        except ValueError as error:
            if not self.job.skip:
                raise
            self.lost.setdefault(index, str(error))
            return None


def _all_words(recording: Recording) -> tuple[Word, ...] | None:
    return None if recording.words is None else tuple(recording.words)


def source_digests(recording: Recording) -> dict[str, str]:
    """What the manifest pins of a source.

    Raises:
        ValueError: it cannot be read any more.
    """
    try:
        return {"sha256": sha256(recording.path), "words_sha256": words_digest(recording)}
    except OSError as error:
        raise ValueError(
            f"{recording.path} cannot be read ({error}); see that it stays while it is used"
        ) from error


def encoded_here(jobs: list[Job], model: ModelConfig, device: torch.device) -> Iterator[Progress]:
    """Make shards in this process; yields as recordings are done."""
    mimi = load_mimi(find_base(model), device)
    for job in jobs:
        yield from make_shard(job, mimi)


def encoded_by(jobs: list[Job], model: ModelConfig, workers: int) -> Iterator[Progress]:
    """Make shards in several processes of one thread each; yields as recordings are done."""
    context = multiprocessing.get_context("spawn")
    progress = context.Queue()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (model, progress))
    try:
        waiting = {pool.submit(_work, job) for job in jobs}
        while waiting:
            with suppress(queue.Empty):
                yield progress.get(timeout=0.5)
            done = {future for future in waiting if future.done()}
            for future in done:
                future.result()  # raises what the worker raised
            waiting -= done
        while not progress.empty():
            yield progress.get()
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """What a process of `encoded_by` keeps between shards."""

    mimi: MimiModel
    progress: "multiprocessing.Queue[Progress]"


def _start_worker(model: ModelConfig, progress: "multiprocessing.Queue[Progress]") -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    _Worker.mimi, _Worker.progress = load_mimi(find_base(model), "cpu"), progress


def _end_with_starter() -> None:
    """Do not outlive the command: who started it again would compete with this process."""
    starter = multiprocessing.parent_process()
    assert starter is not None
    starter.join()
    os._exit(1)


def _work(job: Job) -> None:
    for progress in make_shard(job, _Worker.mimi):
        _Worker.progress.put(progress)
