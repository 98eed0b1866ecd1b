"""Codes of whole recordings as Moshi would stream them: the voice on its own stream, fillers elsewhere."""

import hashlib
from functools import lru_cache
from typing import Any

import torch
from moshi.models.compression import MimiModel

from evaluation.long_context.recordings import LongRecording
from finetune.data.audio import read_samples
from finetune.data.codec import encode_whole
from finetune.data.interleaver import TextTokens
from finetune.data.recording import Recording, UserChannel
from moshi_ttt.digest import cached_sha256

NOISE_DBFS = -60.0
# Codes of an hour are 1.5 MB.
REMEMBERED_RECORDINGS = 1024


class CodeReader:
    """Reads and encodes recordings, each once.

    Args:
        mimi: the codec of all models that are scored.
        special: tokens of their text stream.
        text, user: fillers, as `LongContextConfig` has them.
        max_sec: how much of each recording; None is all.
    """

    def __init__(self, mimi: MimiModel, special: TextTokens, text: str, user: str, max_sec: float | None):
        self.mimi, self.special, self.text, self.user, self.max_sec = mimi, special, text, user, max_sec
        self._remembered = lru_cache(maxsize=REMEMBERED_RECORDINGS)(self._encode)

    def frames(self, recording: LongRecording) -> int:
        """How many whole frames of a recording are scored."""
        seconds = min(recording.duration_sec, self.max_sec or recording.duration_sec)
        return int(seconds * self.mimi.frame_rate + 1e-6)

    def codes(self, recording: LongRecording) -> torch.Tensor:
        """Text, the voice's codebooks and the user's, `[17, T]` on the CPU."""
        return self._remembered(recording).long()

    def identity(self, recording: LongRecording) -> dict[str, Any]:
        """All that decides the codes, but for the codec."""
        stands_in = self.user if recording.channels == 1 else "recorded"
        return {
            "sha256": cached_sha256(recording.path),
            "frames": self.frames(recording),
            "text": self.text,
            "user": [stands_in, recording.name, NOISE_DBFS] if stands_in == "noise" else stands_in,
        }

    def _encode(self, recording: LongRecording) -> torch.Tensor:
        mimi, frames = self.mimi, self.frames(recording)
        user = None
        if recording.channels == 1:
            seed = int.from_bytes(hashlib.sha256(recording.name.encode()).digest()[:8])
            user = UserChannel(NOISE_DBFS if self.user == "noise" else None, seed)
        source = Recording(recording.path, recording.duration_sec, None, user)
        # A resampled crop is rough at its end.
        wanted_sec = None if self.max_sec is None else self.max_sec + 1.0
        audio = read_samples(source, mimi.sample_rate, 0.0, wanted_sec)
        codes = encode_whole(mimi, [audio])[0][:, :frames]
        if codes.shape[1] < frames:
            raise ValueError(
                f"{recording.path} gives {codes.shape[1]} frames, its header promises {frames}; convert it"
            )
        if self.user == "none" and recording.channels == 1:
            codes[codes.shape[0] // 2 :] = self.special.zero
        filler = self.special.padding if self.text == "pad" else self.special.zero
        return torch.cat((torch.full_like(codes[:1], filler), codes))
