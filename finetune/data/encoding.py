"""The work of preparing: shards of recordings to files, in this process or in several."""

import logging
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel

from finetune.data.audio import read_samples
from finetune.data.clips import clip_at, count_clips, crop_codes
from finetune.data.codec import batches_of, encode_whole
from finetune.data.manifest import Recording
from finetune.data.plan import Plan, words_digest
from finetune.data.prepared import WHOLE
from finetune.data.shard import Encoded, shard_bytes, write_atomically
from moshi_ttt.digest import sha256
from moshi_ttt.loading import ModelConfig, find_base, load_mimi

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A shard to make.

    Args:
        path: the file.
        plan: of the folder.
        shard: its number.
        numbers, recordings: places in the list, and what is there.
        root: folder that sources are named from.
    """

    path: Path
    plan: Plan
    shard: int
    numbers: list[int]
    recordings: list[Recording]
    root: Path


def make_shard(job: Job, mimi: MimiModel) -> Iterator[int]:
    """Encode and write a shard; yields the frames of each batch of recordings that is done."""
    made: dict[int, Encoded] = {}
    lengths = [round(recording.duration_sec * mimi.sample_rate) for recording in job.recordings]
    for batch in batches_of(lengths, next(mimi.parameters()).device):
        recordings = [job.recordings[i] for i in batch]
        if job.plan.encode == WHOLE:
            audio = [read_samples(recording, mimi.sample_rate) for recording in recordings]
            pieces = [[codes] for codes in encode_whole(mimi, audio)]
        else:
            assert job.plan.duration_sec is not None
            pieces = [encode_clips(recording, mimi, job.plan.duration_sec) for recording in recordings]
        for index, codes in zip(batch, pieces, strict=True):
            made[index] = Encoded(codes, job.recordings[index].words)
        yield sum(codes.shape[1] for of_one in pieces for codes in of_one)
    sources = [
        source_of(number, recording, job.root)
        for number, recording in zip(job.numbers, job.recordings, strict=True)
    ]
    about = {"plan_sha256": job.plan.sha256, "shard": job.shard, "sources": sources}
    write_atomically(job.path, shard_bytes([made[i] for i in range(len(job.recordings))], about))


def encode_clips(recording: Recording, mimi: MimiModel, duration_sec: float) -> list[torch.Tensor]:
    """Codes `[16, T]` of each clip of a recording, encoded by itself."""
    count = count_clips(recording.duration_sec, duration_sec)
    return [
        crop_codes(mimi, clip_at(recording, number, duration_sec), duration_sec) for number in range(count)
    ]


def source_of(number: int, recording: Recording, root: Path) -> dict[str, Any]:
    """What the manifest says of a source."""
    path = recording.path
    return {
        "number": number,
        "path": str(path.relative_to(root) if path.is_relative_to(root) else path),
        "sha256": sha256(path),
        "words_sha256": words_digest(recording),
        "duration_sec": recording.duration_sec,
    }


def encoded_here(jobs: list[Job], model: ModelConfig, device: torch.device) -> Iterator[int]:
    """Make shards in this process; yields frames as they are done."""
    mimi = load_mimi(find_base(model), device)
    for job in jobs:
        yield from make_shard(job, mimi)


def encoded_by(jobs: list[Job], model: ModelConfig, workers: int) -> Iterator[int]:
    """Make shards in several processes of one thread each; yields frames as they are done."""
    context = multiprocessing.get_context("spawn")
    frames = context.Queue()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (model, frames))
    try:
        waiting = {pool.submit(_work, job) for job in jobs}
        while waiting:
            with suppress(queue.Empty):
                yield frames.get(timeout=0.5)
            done = {future for future in waiting if future.done()}
            for future in done:
                future.result()  # raises what the worker raised
            waiting -= done
        while not frames.empty():
            yield frames.get()
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """What a process of `encoded_by` keeps between shards."""

    mimi: MimiModel
    frames: "multiprocessing.Queue[int]"


def _start_worker(model: ModelConfig, frames: "multiprocessing.Queue[int]") -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    _Worker.mimi, _Worker.frames = load_mimi(find_base(model), "cpu"), frames


def _end_with_starter() -> None:
    """Do not outlive the command: who started it again would compete with this process."""
    starter = multiprocessing.parent_process()
    assert starter is not None
    starter.join()
    os._exit(1)


def _work(job: Job) -> None:
    for frames in make_shard(job, _Worker.mimi):
        _Worker.frames.put(frames)
