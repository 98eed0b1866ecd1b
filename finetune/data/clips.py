"""Clips of recordings as codes: the text stream, Moshi's audio and the user's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import sentencepiece
import torch
from moshi.models.compression import MimiModel

from finetune.data.audio import read_samples
from finetune.data.bad_input import BadInput
from finetune.data.interleaver import TextLayout, TextTokens, clip_text_stream, words_in_clip
from finetune.data.mixing import MixedOrder
from finetune.data.recording import Recording

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
        codes = torch.stack([self._remembered(clip) for clip in clips])
        return Batch(codes.to(self.device, torch.long), list(clips))

    @torch.no_grad()
    def _encode_one(self, clip: Clip) -> torch.Tensor:
        """Codes of one clip, `[17, T]` in 16 bits: Moshi's vocabularies have at most 32,000 entries."""
        recording = clip.recording
        try:
            samples = read_samples(recording, self.mimi.sample_rate, clip.start_sec, self.duration_sec)
            words = words_in_clip(recording.words, clip.start_sec, self.duration_sec)
        except ValueError as error:
            self.bad_input.lose(str(recording.path), error)
            return self.no_targets(self.num_frames)
        audio = torch.from_numpy(samples).to(self.device)
        codes = self.mimi.encode(audio[:, None])[..., : self.num_frames]  # [2, 8, T]
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
        return torch.cat((text[None], codes.flatten(0, 1).cpu())).to(torch.int16)

    def no_targets(self, num_frames: int) -> torch.Tensor:
        """Codes `[17, T]` from which nothing is learnt: what stands for a clip that cannot be read.

        It keeps its place in the batch, so that no process has to know of it and the order stays.
        """
        streams = 1 + 2 * self.mimi.num_codebooks
        return torch.full((streams, num_frames), self.special.zero, dtype=torch.int16)


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
    mix: MixedOrder | None = None,
) -> Iterator[Batch]:
    """Batches without end. Process r of w gets clips r, r + w, ... of one global order.

    Args:
        mix: the order of clips of several sources; None draws from all of them alike.
    """
    if not clips:
        raise ValueError("there are no clips to train on")
    mine: list[Clip] = []
    order = clip_order(len(clips), seed, shuffle) if mix is None else iter(mix)
    for position, index in enumerate(order):
        if position % world == rank:
            mine.append(clips[index])
        if len(mine) == batch_size:
            yield encoder.encode(mine)
            mine = []
