"""Clips of recordings as codes: the text stream, Moshi's audio and the user's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import sentencepiece
import sphn
import torch
from moshi.models.compression import MimiModel

from finetune.data.interleaver import TextTokens, clip_text_stream, words_in_clip
from finetune.data.manifest import Recording

# Encoding costs more than a small model's step. 100 s of codes are 42 kB, so this is at most 180 MB.
REMEMBERED_CLIPS = 4096


# A rest shorter than this behind the last whole clip is rounding, or less than a sample of Mimi's rate.
NO_CLIP_SEC = 1e-4


@dataclass(frozen=True)
class Clip:
    """`duration_sec` seconds of a recording from `start_sec`; the last clip of a recording is shorter."""

    recording: Recording
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


def cut_clips(recordings: Sequence[Recording], duration_sec: float) -> list[Clip]:
    """All clips of the recordings, in order.

    Starts are float32, as in the loader of moshi-finetune: one sample earlier has other codes.
    """
    return [
        Clip(recording, float(np.float32(index * duration_sec)))
        for recording in recordings
        for index in range(math.ceil((recording.duration_sec - NO_CLIP_SEC) / duration_sec))
    ]


class ClipEncoder:
    """Turns clips into codes with Mimi, each crop encoded by itself, as moshi-finetune does.

    Args:
        mimi: the codec, on the device to encode on.
        tokenizer: the text tokenizer.
        special: special tokens of the text stream.
        duration_sec: length of a clip.
        main_speaker: whose words go on the text stream; None is everybody's.
    """

    def __init__(
        self,
        mimi: MimiModel,
        tokenizer: sentencepiece.SentencePieceProcessor,
        special: TextTokens,
        duration_sec: float,
        main_speaker: str | None,
    ):
        self.mimi = mimi
        self.tokenizer = tokenizer
        self.special = special
        self.duration_sec = duration_sec
        self.main_speaker = main_speaker
        self.num_frames = math.ceil(duration_sec * mimi.frame_rate)
        self.device = next(mimi.parameters()).device
        self._remembered = lru_cache(maxsize=REMEMBERED_CLIPS)(self._encode_one)

    def encode(self, clips: Sequence[Clip]) -> Batch:
        """Codes of some clips, `[B, 17, T]`: text, Moshi's codebooks, the user's. Missing frames are -1."""
        codes = torch.stack([self._remembered(clip) for clip in clips])
        return Batch(codes.to(self.device, torch.long), list(clips))

    @torch.no_grad()
    def _encode_one(self, clip: Clip) -> torch.Tensor:
        """Codes of one clip, `[17, T]` in 16 bits: Moshi's vocabularies have at most 32,000 entries."""
        audio = torch.from_numpy(self._read(clip)).to(self.device)
        codes = self.mimi.encode(audio[:, None])[..., : self.num_frames]  # [2, 8, T]
        audio_frames = codes.shape[-1]
        missing = self.num_frames - audio_frames
        codes = torch.nn.functional.pad(codes, (0, missing), value=self.special.zero)
        text = clip_text_stream(
            words_in_clip(clip.recording.words, clip.start_sec, self.duration_sec),
            self.num_frames,
            audio_frames,
            self.mimi.frame_rate,
            self.tokenizer,
            self.special,
            self.main_speaker,
        )
        return torch.cat((text[None], codes.flatten(0, 1).cpu())).to(torch.int16)

    def _read(self, clip: Clip):
        """Samples `[2, n]` at Mimi's rate. sphn resamples, as in moshi-finetune's loader."""
        rate = self.mimi.sample_rate
        audio, _ = sphn.read(
            str(clip.recording.path),
            start_sec=clip.start_sec,
            duration_sec=self.duration_sec,
            sample_rate=rate,
        )
        remaining = round((clip.recording.duration_sec - clip.start_sec) * rate)
        return audio[:, :remaining]


def clip_order(num_clips: int, seed: int, shuffle: bool, start: int = 0) -> Iterator[int]:
    """Indices of clips without end: each epoch has every clip once, in an order drawn from seed and epoch.

    Args:
        start: how many indices have been drawn before.
    """
    epoch, offset = divmod(start, num_clips)
    while True:
        order = list(range(num_clips))
        if shuffle:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(num_clips, generator=generator).tolist()
        yield from order[offset:]
        epoch, offset = epoch + 1, 0


def training_batches(
    encoder: ClipEncoder,
    clips: Sequence[Clip],
    batch_size: int,
    seed: int,
    shuffle: bool,
    rank: int,
    world: int,
) -> Iterator[Batch]:
    """Batches without end. Process r of w gets clips r, r + w, ... of one global order."""
    if not clips:
        raise ValueError("there are no clips to train on")
    mine: list[Clip] = []
    for position, index in enumerate(clip_order(len(clips), seed, shuffle)):
        if position % world == rank:
            mine.append(clips[index])
        if len(mine) == batch_size:
            yield encoder.encode(mine)
            mine = []
