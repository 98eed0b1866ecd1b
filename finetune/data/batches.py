"""Batches of this process without end, read ahead by threads."""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from finetune.data.chunks import ChunkEncoder, by_recording
from finetune.data.clips import Batch, Clip, Encoder, PreparedClips
from finetune.data.joined import Joined
from finetune.data.order import ClipDraw, Draw, RowDraw, Sampling
from finetune.data.prepared import INDEX


class Batches(Iterator[Batch]):
    """Batches in the order of a draw; where it is can be saved after each and gone on from.

    Batches are drawn in order before threads make them and are handed out in order, so their number of
    threads changes nothing. Threads are enough: what a shard needs is a few microseconds of Python, the rest
    is reading and copying. Encoding from audio must not be read ahead: Mimi is shared with validation.

    Args:
        draw: whose turn it is.
        encoder: makes the codes.
        workers: threads that read ahead; 0 makes a batch when it is asked for.
        ahead: how many batches.
    """

    def __init__(self, draw: Draw, encoder: Encoder, workers: int = 0, ahead: int = 2):
        self.drawing, self.encoder, self.ahead = draw, encoder, max(ahead, workers)
        self._pool = ThreadPoolExecutor(workers, "batches") if workers else None
        self._pending: deque[tuple[Future[Batch], dict[str, Any]]] = deque()
        self._state = draw.state_dict()

    def __next__(self) -> Batch:
        if self._pool is None:
            batch = self.encoder.encode(self.drawing.draw())
            self._state = self.drawing.state_dict()
            return batch
        self._read_ahead(self._pool)
        future, self._state = self._pending.popleft()
        batch = future.result()
        self._read_ahead(self._pool)
        return batch

    def _read_ahead(self, pool: ThreadPoolExecutor) -> None:
        while len(self._pending) < self.ahead:
            clips = self.drawing.draw()
            self._pending.append((pool.submit(self.encoder.encode, clips), self.drawing.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """Where the data is behind the last batch that was handed out, in plain values."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which `state` was saved.

        Raises:
            ValueError: `state` is of other data or another order.
        """
        self._drop()
        self.drawing.load_state_dict(state)
        self._state = self.drawing.state_dict()

    def close(self) -> None:
        """End the threads."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()

    def _drop(self) -> None:
        for future, _ in self._pending:
            future.cancel()
        self._pending.clear()


def data_digest(clips: Sequence[Clip]) -> str:
    """What data a position belongs to: the prepared folder, or names and lengths of the recordings."""
    if isinstance(clips, PreparedClips):
        return clips.prepared.manifest["files"][INDEX]
    digest = hashlib.sha256()
    if isinstance(clips, Joined):
        for part in clips.parts:
            digest.update(data_digest(part).encode())
        return digest.hexdigest()
    for clip in clips:
        digest.update(f"{clip.recording.path.name} {clip.recording.duration_sec} {clip.start_sec}\n".encode())
    return digest.hexdigest()


def training_batches(
    encoder: Encoder, clips: Sequence[Clip], sampling: Sampling, workers: int = 0, ahead: int = 2
) -> Batches:
    """Batches of clips that stand alone. Process r of w gets clips r, r + w, ... of one global order."""
    return Batches(ClipDraw(clips, sampling, data_digest(clips)), encoder, workers, ahead)


def chunk_batches(
    encoder: ChunkEncoder,
    chunks: Sequence[Clip],
    num_microbatches: int,
    sampling: Sampling,
    workers: int = 0,
    ahead: int = 2,
) -> Batches:
    """Micro-batches of chunks: the i-th of every step continues the rows of the i-th of the step before.

    The rows of a step are the same however they are spread over micro-batches and processes.
    """
    draw = RowDraw(by_recording(chunks), num_microbatches, sampling, data_digest(chunks))
    return Batches(draw, encoder, workers, ahead)
