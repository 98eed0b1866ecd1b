"""Clips of recordings as codes: the text stream, Moshi's audio and the user's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, overload

import numpy as np
import sentencepiece
import torch
from moshi.models.compression import MimiModel

from finetune.data.audio import read_samples
from finetune.data.bad_input import BadInput
from finetune.data.codec import encode_crop
from finetune.data.interleaver import TextLayout, TextTokens, clip_text_stream, words_in_clip
from finetune.data.prepared import PreparedRecording, PreparedSet
from finetune.data.recording import Recording

# Encoding costs more than a small model's step. 100 s of codes are 42 kB, so this is at most 180 MB.
REMEMBERED_CLIPS = 4096


# A rest shorter than this behind the last whole clip is rounding, or less than a sample of Mimi's rate.
NO_CLIP_SEC = 1e-4


@dataclass(frozen=True)
class Clip:
    """`duration_sec` seconds of a recording from `start_sec`; the last clip of a recording is shorter."""

    recording: Recording | PreparedRecording
    start_sec: float

    @property
    def is_first(self) -> bool:
        """Whether the recording starts here."""
        return self.start_sec == 0

    def __str__(self) -> str:
        return f"{self.recording.path} at {self.start_sec:g} s"


@dataclass
class Batch:
    """Codes `[B, 17, T]` and the clips they come from."""

    codes: torch.Tensor
    clips: list[Clip]


def on_device(codes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Codes as whole numbers on the device. A GPU fetches them by itself, while this process goes on."""
    if device.type == "cuda" and codes.device.type == "cpu":
        codes = codes.pin_memory().to(device, non_blocking=True)
    return codes.to(device, torch.long)


class Encoder(Protocol):
    """Makes codes of clips."""

    def encode(self, clips: Sequence[Clip]) -> Batch:
        """Codes of some clips: text, Moshi's codebooks, the user's."""
        ...


def count_clips(recorded_sec: float, duration_sec: float) -> int:
    """How many clips cover a recording."""
    return max(1, math.ceil((recorded_sec - NO_CLIP_SEC) / duration_sec))


def clip_at(recording: Recording | PreparedRecording, number: int, duration_sec: float) -> Clip:
    """A clip by its number.

    Starts are float32, as in the loader of moshi-finetune: one sample earlier has other codes.
    """
    return Clip(recording, float(np.float32(number * duration_sec)))


def cut_clips(recordings: Sequence[Recording], duration_sec: float) -> list[Clip]:
    """All clips of the recordings, in order."""
    return [
        clip_at(recording, number, duration_sec)
        for recording in recordings
        for number in range(count_clips(recording.duration_sec, duration_sec))
    ]


class PreparedClips(Sequence[Clip]):
    """All clips of a prepared folder, in order. A clip is made when it is asked for: 8 bytes a recording.

    Args:
        prepared: the folder.
        duration_sec: length of a clip.
    """

    def __init__(self, prepared: PreparedSet, duration_sec: float):
        self.prepared = prepared
        self.duration_sec = duration_sec
        # `count_clips` of all, in one go.
        counts = np.ceil((prepared.durations - NO_CLIP_SEC) / duration_sec).astype(np.int64)
        self.ends = np.cumsum(np.maximum(counts, 1))

    def __len__(self) -> int:
        return int(self.ends[-1])

    @overload
    def __getitem__(self, index: int) -> Clip: ...

    @overload
    def __getitem__(self, index: slice) -> list[Clip]: ...

    def __getitem__(self, index: int | slice) -> Clip | list[Clip]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        recording = int(np.searchsorted(self.ends, position, side="right"))
        before = int(self.ends[recording - 1]) if recording else 0
        return clip_at(self.prepared.recording(recording), position - before, self.duration_sec)


def crop_codes(mimi: MimiModel, clip: Clip, duration_sec: float) -> torch.Tensor:
    """Codes `[16, T]` in 16 bits of a clip of audio by itself; the last of a recording is shorter."""
    assert isinstance(clip.recording, Recording)
    rate = mimi.sample_rate
    audio = read_samples(clip.recording, rate, clip.start_sec, duration_sec)
    remaining = round((clip.recording.duration_sec - clip.start_sec) * rate)
    return encode_crop(mimi, audio[:, :remaining])[:, : math.ceil(duration_sec * mimi.frame_rate)]


class ClipEncoder:
    """Turns clips into codes with Mimi, each crop encoded by itself, as moshi-finetune does.

    Args:
        mimi: the codec, on the device to encode on.
        tokenizer: the text tokenizer.
        special: special tokens of the text stream.
        duration_sec: length of a clip.
        layout: how words go on the text stream.
        bad_input: what happens to recordings that cannot be read any more.
    """

    def __init__(
        self,
        mimi: MimiModel,
        tokenizer: sentencepiece.SentencePieceProcessor,
        special: TextTokens,
        duration_sec: float,
        layout: TextLayout,
        bad_input: BadInput | None = None,
    ):
        self.mimi = mimi
        self.tokenizer = tokenizer
        self.special = special
        self.duration_sec = duration_sec
        self.layout = layout
        self.bad_input = bad_input or BadInput()
        self.num_frames = math.ceil(duration_sec * mimi.frame_rate)
        self.device = next(mimi.parameters()).device
        self._remembered = lru_cache(maxsize=REMEMBERED_CLIPS)(self._encode_one)

    def encode(self, clips: Sequence[Clip]) -> Batch:
        """Codes of some clips, `[B, 17, T]`: text, Moshi's codebooks, the user's. Missing frames are -1."""
        codes = torch.stack([self._streams(clip) for clip in clips])
        return Batch(on_device(codes, self.device), list(clips))

    def _streams(self, clip: Clip) -> torch.Tensor:
        # What lies in a shard is read faster than remembered, and needs no memory of this process.
        prepared = isinstance(clip.recording, PreparedRecording)
        return self._encode_one(clip) if prepared else self._remembered(clip)

    def crop(self, clip: Clip) -> torch.Tensor:
        """Codes of a clip by itself, `[16, T]` in 16 bits; the last of a recording is shorter."""
        if isinstance(clip.recording, PreparedRecording):
            return clip.recording.crop(round(clip.start_sec / self.duration_sec))
        return crop_codes(self.mimi, clip, self.duration_sec)

    def _encode_one(self, clip: Clip) -> torch.Tensor:
        """Text and codes of one clip, `[17, T]` in 16 bits."""
        recording = clip.recording
        try:
            codes = self.crop(clip)
            words = words_in_clip(recording.words, clip.start_sec, self.duration_sec)
        except ValueError as error:
            self.bad_input.lose(str(recording.path), error)
            return self.no_targets(self.num_frames)
        audio_frames = codes.shape[-1]
        missing = self.num_frames - audio_frames
        codes = torch.nn.functional.pad(codes, (0, missing), value=self.special.zero)
        text = clip_text_stream(
            words,
            self.num_frames,
            audio_frames,
            self.mimi.frame_rate,
            self.tokenizer,
            self.special,
            self.layout,
        )
        return torch.cat((text[None].to(torch.int16), codes))

    def no_targets(self, num_frames: int) -> torch.Tensor:
        """Codes `[17, T]` from which nothing is learnt: what stands for a clip that cannot be read.

        It keeps its place in the batch, so that no process has to know of it and the order stays.
        """
        streams = 1 + 2 * self.mimi.num_codebooks
        return torch.full((streams, num_frames), self.special.zero, dtype=torch.int16)
