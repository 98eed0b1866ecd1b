"""Recordings as chunks that follow each other: slices of the codes of the whole recording."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional as F

from finetune.data.audio import read_samples
from finetune.data.clips import Batch, Clip, ClipEncoder, PreparedClips, clip_at, count_clips, on_device
from finetune.data.codec import encode_whole
from finetune.data.interleaver import text_slice
from finetune.data.joined import Joined
from finetune.data.prepared import PreparedRecording
from finetune.data.recording import Recording, Word

# Codes of an hour are 1.5 MB.
REMEMBERED_RECORDINGS = 1024


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

    def encode(self, clips: Sequence[Clip]) -> Batch:
        """Codes of some chunks, `[B, 17, T]`: text, Moshi's codebooks, the user's. Missing frames are -1."""
        codes = torch.stack([self._chunk(clip) for clip in clips])
        return Batch(on_device(codes, self.clips.device), list(clips))

    def _chunk(self, chunk: Clip) -> torch.Tensor:
        """Text and codes of one chunk, `[17, T]` in 16 bits."""
        clips, length = self.clips, self.num_frames
        start = round(chunk.start_sec / clips.duration_sec) * length
        try:
            codes, total = self._codes(chunk.recording, start)
            text = self._text(chunk.recording.words, start, start + codes.shape[1], total)
        except ValueError as error:
            clips.bad_input.lose(str(chunk.recording.path), error)
            return clips.no_targets(length)
        streams = torch.cat((text[None].to(torch.int16), codes))
        return F.pad(streams, (0, length - streams.shape[1]), value=clips.special.zero)

    def _text(self, words: Sequence[Word] | None, first: int, stop: int, total: int) -> torch.Tensor:
        """Text stream of some frames of a recording of `total`."""
        clips = self.clips
        return text_slice(
            words, first, stop, total, clips.mimi.frame_rate, clips.tokenizer, clips.special, clips.layout
        )

    def _codes(self, recording: Recording | PreparedRecording, start: int) -> tuple[torch.Tensor, int]:
        """Codes `[16, T]` of a chunk, and how many frames its recording has."""
        stop = start + self.num_frames
        if isinstance(recording, PreparedRecording):
            return recording.codes(start, stop), recording.num_frames
        whole = self._remembered(recording)
        return whole[:, start:stop], whole.shape[1]

    def _encode_recording(self, recording: Recording) -> torch.Tensor:
        """Codes of a whole recording, `[16, N]` in 16 bits."""
        mimi = self.clips.mimi
        return encode_whole(mimi, [read_samples(recording, mimi.sample_rate)])[0]


class PreparedChunks(Sequence[Sequence[Clip]]):
    """The chunks of each recording of a prepared folder, made when they are asked for.

    Args:
        clips: the folder and the length of a chunk.
    """

    def __init__(self, clips: PreparedClips):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips.prepared)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        recording = self.clips.prepared.recording(range(len(self))[index])
        return RecordingChunks(recording, self.clips.duration_sec)


class RecordingChunks(Sequence[Clip]):
    """The chunks of one recording."""

    def __init__(self, recording: PreparedRecording, duration_sec: float):
        self.recording, self.duration_sec = recording, duration_sec

    def __len__(self) -> int:
        return count_clips(self.recording.duration_sec, self.duration_sec)

    def __getitem__(self, index):  # type: ignore[override]
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [clip_at(self.recording, number, self.duration_sec) for number in numbers]
        return clip_at(self.recording, numbers, self.duration_sec)


def by_recording(chunks: Sequence[Clip]) -> Sequence[Sequence[Clip]]:
    """Chunks of recordings, in order, as one sequence for each recording."""
    if isinstance(chunks, PreparedClips):
        return PreparedChunks(chunks)
    if isinstance(chunks, Joined):
        return Joined([by_recording(part) for part in chunks.parts])
    recordings: list[list[Clip]] = []
    for chunk in chunks:
        if chunk.is_first:
            recordings.append([])
        recordings[-1].append(chunk)
    return recordings
