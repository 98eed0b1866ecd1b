"""Recordings as they are scored: each speaker's side on Moshi's own stream, with its words and turns."""

from collections.abc import Sequence
from dataclasses import dataclass

import sentencepiece
import torch
from moshi.models.compression import MimiModel

from evaluation.nll_by_distance.recurrence import (
    Occurrence,
    Turn,
    occurrences,
    placed_words,
    refuse_misplaced,
    turns,
)
from finetune.data.chunks import ChunkEncoder
from finetune.data.clips import ClipEncoder, cut_clips
from finetune.data.interleaver import TextLayout, TextTokens, text_stream
from finetune.data.manifest import Recording, Word

BLOCK_SEC = 20.48  # recordings are taken from the encoder in pieces of this length


@dataclass
class Side:
    """One speaker of a recording on Moshi's stream, the other one as the user.

    Args:
        recording: its index; both sides of a recording have the same.
        codes: `[17, T]`, text first, then this speaker's codebooks.
        words: on the text stream.
        turns: of this speaker.
    """

    recording: int
    codes: torch.Tensor
    words: list[Occurrence]
    turns: list[Turn]


class SideReader:
    """Reads and encodes recordings.

    Args:
        mimi, tokenizer, special: codec and text of the models to be scored.
        main_speaker: the label of the voice in the left channel.
        keep_main_only: whether the text stream holds only the words of the speaker on Moshi's stream.
        both_sides: also give the other speaker's side, where that speaker has words.
    """

    def __init__(
        self,
        mimi: MimiModel,
        tokenizer: sentencepiece.SentencePieceProcessor,
        special: TextTokens,
        main_speaker: str,
        keep_main_only: bool,
        both_sides: bool,
    ):
        self.frame_rate = mimi.frame_rate
        self.tokenizer = tokenizer
        self.special = special
        self.main_speaker = main_speaker
        self.keep_main_only = keep_main_only
        self.both_sides = both_sides
        layout = TextLayout(keep_main_only, main_speaker)
        self.encoder = ChunkEncoder(ClipEncoder(mimi, tokenizer, special, BLOCK_SEC, layout))

    def read(self, index: int, recording: Recording) -> list[Side]:
        """The sides of a recording."""
        clips = cut_clips([recording], self.encoder.clips.duration_sec)
        codes = torch.cat(list(self.encoder.encode(clips).codes), dim=-1)
        codes = codes[:, : int((codes[1:] != self.special.zero).any(0).nonzero()[-1]) + 1]
        sides = [self._side(index, recording, self.main_speaker, codes)]
        others = {word.speaker for word in recording.words or ()} - {self.main_speaker}
        if not self.both_sides or not others:
            return sides
        if len(others) > 1:
            raise ValueError(
                f"{recording.path} has words of {', '.join(sorted(others))} beside {self.main_speaker}; "
                "both_sides=true needs one other speaker, who is in the right channel"
            )
        other = others.pop()
        streams = (codes.shape[0] - 1) // 2
        exchanged = torch.cat((codes[:1], codes[1 + streams :], codes[1 : 1 + streams]))
        exchanged[0] = text_stream(
            self._written(recording, other),
            codes.shape[-1],
            self.frame_rate,
            self.tokenizer,
            self.special,
            TextLayout(keep_main_only=False),
        )
        return [*sides, self._side(index, recording, other, exchanged)]

    def _written(self, recording: Recording, speaker: str) -> Sequence[Word]:
        """The words that the text stream holds when a speaker is on Moshi's stream."""
        return [w for w in recording.words or () if not self.keep_main_only or w.speaker == speaker]

    def _side(self, index: int, recording: Recording, speaker: str, codes: torch.Tensor) -> Side:
        words = self._written(recording, speaker)
        placed = placed_words(words, codes.shape[-1], self.frame_rate, self.tokenizer)
        refuse_misplaced(codes[0].cpu(), placed, self.special)
        return Side(index, codes, occurrences(placed), turns(recording.words or (), speaker))
