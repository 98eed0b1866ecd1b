"""Recordings as chunks that follow each other, one recording at a time in each row of a batch."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch.nn import functional as F

from finetune.data.audio import read_samples
from finetune.data.clips import Batch, Clip, ClipEncoder, clip_order
from finetune.data.interleaver import text_stream
from finetune.data.mixing import MixedOrder
from finetune.data.recording import Recording
from moshi_ttt.streaming import encoding

# Codes of an hour are 1.5 MB.
REMEMBERED_RECORDINGS = 1024
# Audio given to the codec at once, 10 s. Not the length of a chunk: codes must not depend on it.
BLOCK_FRAMES = 125


class ChunkEncoder:
    """Turns chunks of recordings into codes: slices of the whole recording's, as a stream has them.

    A crop encoded by itself has other codes at its start, which no stream ever sees in its middle.

    Args:
        clips: codec, tokenizer, settings and length of a chunk.
    """

    def __init__(self, clips: ClipEncoder):
        self.clips = clips
        self.num_frames = round(clips.duration_sec * clips.mimi.frame_rate)
        self._remembered = lru_cache(maxsize=REMEMBERED_RECORDINGS)(self._encode_recording)

    def encode(self, chunks: Sequence[Clip]) -> Batch:
        """Codes of some chunks, `[B, 17, T]`: text, Moshi's codebooks, the user's. Missing frames are -1."""
        codes = torch.stack([self._chunk(chunk) for chunk in chunks])
        return Batch(codes.to(self.clips.device, torch.long), list(chunks))

    def _chunk(self, chunk: Clip) -> torch.Tensor:
        length = self.num_frames
        start = round(chunk.start_sec / self.clips.duration_sec) * length
        codes = self._remembered(chunk.recording)[:, start : start + length]
        return F.pad(codes, (0, length - codes.shape[1]), value=self.clips.special.zero)

    @torch.no_grad()
    def _encode_recording(self, recording: Recording) -> torch.Tensor:
        """Codes of a whole recording in 16 bits, `[17, N]`."""
        clips, mimi = self.clips, self.clips.mimi
        try:
            samples = read_samples(recording, mimi.sample_rate)
            words = recording.words if recording.words is None else tuple(recording.words)
        except ValueError as error:
            clips.bad_input.lose(str(recording.path), error)
            return clips.no_targets(0)
        audio = torch.from_numpy(samples)[:, None]
        frames = math.ceil(audio.shape[-1] / mimi.frame_size)
        block = BLOCK_FRAMES * mimi.frame_size
        audio = F.pad(audio, (0, -audio.shape[-1] % block))
        with encoding(mimi, audio.shape[0], BLOCK_FRAMES):
            codes = torch.cat([mimi.encode(part.to(clips.device)) for part in audio.split(block, -1)], dim=-1)
        text = text_stream(words, frames, mimi.frame_rate, clips.tokenizer, clips.special, clips.layout)
        return torch.cat((text[None], codes[..., :frames].flatten(0, 1).cpu())).to(torch.int16)


def by_recording(chunks: Sequence[Clip]) -> list[list[Clip]]:
    """Chunks of recordings, in order, as one list for each recording."""
    recordings: list[list[Clip]] = []
    for chunk in chunks:
        if chunk.is_first:
            recordings.append([])
        recordings[-1].append(chunk)
    return recordings


def chunk_order(
    recordings: Sequence[Sequence[Clip]],
    num_rows: int,
    seed: int,
    shuffle: bool,
    mix: MixedOrder | None = None,
) -> Iterator[list[Clip]]:
    """The chunks of all rows, step by step without end.

    Each row goes through a recording from its first chunk to its last, then takes the next recording of one
    order that all rows share.

    Args:
        mix: the order of recordings of several sources; None draws from all of them alike.
    """
    order = clip_order(len(recordings), seed, shuffle) if mix is None else iter(mix)
    rows = [iter(recordings[next(order)]) for _ in range(num_rows)]
    while True:
        step = []
        for row in range(num_rows):
            chunk = next(rows[row], None)
            if chunk is None:
                rows[row] = iter(recordings[next(order)])
                chunk = next(rows[row])
            step.append(chunk)
        yield step


def chunk_batches(
    encoder: ChunkEncoder,
    chunks: Sequence[Clip],
    batch_size: int,
    num_microbatches: int,
    seed: int,
    shuffle: bool,
    rank: int,
    world: int,
    mix: MixedOrder | None = None,
) -> Iterator[Batch]:
    """Micro-batches without end: the i-th of every step continues the rows of the i-th of the step before.

    Every process works out the rows of all of them, so none has to tell another where it is, and encodes its
    own. The rows of a step are the same however they are spread over micro-batches and processes.
    """
    if not chunks:
        raise ValueError("there are no recordings to train on")
    num_rows = num_microbatches * world * batch_size
    for rows in chunk_order(by_recording(chunks), num_rows, seed, shuffle, mix):
        for slot in range(num_microbatches):
            first = (slot * world + rank) * batch_size
            yield encoder.encode(rows[first : first + batch_size])
