"""Words to the text stream: one token a frame, as moshi-finetune's Interleaver lays them out."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import sentencepiece
import torch
from moshi.models.lm import LMModel

from finetune.data.manifest import Word


@dataclass(frozen=True)
class TextTokens:
    """Special tokens of the text stream.

    Args:
        padding: between words.
        end_of_padding: the last frame of padding before a word.
        zero: no embedding and no target.
    """

    padding: int
    end_of_padding: int
    zero: int

    @staticmethod
    def of(model: LMModel) -> "TextTokens":
        return TextTokens(model.text_padding_token_id, model.end_of_text_padding_id, model.zero_token_id)


def tokenize(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Token ids of a word or text; lines are joined by the tokenizer's newline piece."""
    first, *others = (tokenizer.encode(line) for line in text.strip().split("\n"))
    newline = tokenizer.encode("\n")[-1:] if others else []
    for tokens in others:
        first = [*first, *newline, *tokens]
    return first


def words_in_clip(words: Sequence[Word], start_sec: float, duration_sec: float) -> list[Word]:
    """Words that start inside a clip, with times relative to its start. `words` are in order."""
    first = bisect_left(words, start_sec, key=_start)
    last = bisect_left(words, start_sec + duration_sec, lo=first, key=_start)
    return [
        Word(word.text, word.start - start_sec, word.end - start_sec, word.speaker)
        for word in words[first:last]
    ]


def _start(word: Word) -> float:
    return word.start


def text_stream(
    words: Sequence[Word],
    num_frames: int,
    frame_rate: float,
    tokenizer: sentencepiece.SentencePieceProcessor,
    special: TextTokens,
    main_speaker: str | None,
) -> torch.Tensor:
    """One text token for each frame, `[num_frames]`.

    A word's tokens follow each other from the frame in which it starts; what has not been placed when the
    next word starts is dropped. The padding frame before a word becomes `end_of_padding`.

    Args:
        words: with times relative to the first frame, in order.
        main_speaker: keep only this speaker's words; None keeps all.
    """
    kept = [w for w in words if w.end > w.start and main_speaker in (None, w.speaker)]
    tokenized = [(word.start * frame_rate, tokenize(tokenizer, word.text)) for word in kept]
    tokens = [special.padding] * num_frames
    pending: deque[int] = deque()
    upcoming = deque(tokenized)
    for frame in range(num_frames):
        while upcoming and upcoming[0][0] < frame + 1:
            pending = deque(upcoming.popleft()[1])
        if pending:
            if frame > 0 and tokens[frame - 1] == special.padding:
                tokens[frame - 1] = special.end_of_padding
            tokens[frame] = pending.popleft()
    return torch.tensor(tokens, dtype=torch.long)


def text_slice(
    words: Sequence[Word],
    first: int,
    stop: int,
    num_frames: int,
    frame_rate: float,
    tokenizer: sentencepiece.SentencePieceProcessor,
    special: TextTokens,
    main_speaker: str | None,
) -> torch.Tensor:
    """Frames `first` to `stop` of `text_stream` of a whole recording of `num_frames`, `[stop - first]`.

    Takes as long as the slice does, wherever it lies: only the last word that began before it can reach in.
    """
    assert 0 <= first <= stop <= num_frames

    def position(word: Word) -> float:
        return word.start * frame_rate

    def kept(word: Word) -> bool:
        return word.end > word.start and main_speaker in (None, word.speaker)

    # A word in the frame behind the slice makes an end of padding of the slice's last frame.
    seen = min(stop + 1, num_frames)
    inside = bisect_left(words, first, key=position)
    behind = bisect_left(words, seen, lo=inside, key=position)
    pending: deque[int] = deque()
    for index in reversed(range(inside)):
        if kept(words[index]):
            started = int(position(words[index]))
            pending = deque(tokenize(tokenizer, words[index].text)[first - started :])
            break
    upcoming = deque(word for word in words[inside:behind] if kept(word))
    tokens = [special.padding] * (seen - first)
    for index in range(seen - first):
        while upcoming and position(upcoming[0]) < first + index + 1:
            pending = deque(tokenize(tokenizer, upcoming.popleft().text))
        if pending:
            if index > 0 and tokens[index - 1] == special.padding:
                tokens[index - 1] = special.end_of_padding
            tokens[index] = pending.popleft()
    return torch.tensor(tokens[: stop - first], dtype=torch.long)


def clip_text_stream(
    words: Sequence[Word],
    clip_frames: int,
    audio_frames: int,
    frame_rate: float,
    tokenizer: sentencepiece.SentencePieceProcessor,
    special: TextTokens,
    main_speaker: str | None,
) -> torch.Tensor:
    """Text stream of a clip of `clip_frames` whose audio fills `audio_frames` of them, `[clip_frames]`.

    moshi-finetune builds ceil(audio_frames x frame_rate) frames of text, as if frames were seconds, so a
    short last clip has padding targets behind its audio and only then the zero token. Its numbers depend on
    that, so it is the same here.
    """
    filled = min(clip_frames, math.ceil(audio_frames * frame_rate))
    stream = text_stream(words, filled, frame_rate, tokenizer, special, main_speaker)
    return torch.nn.functional.pad(stream, (0, clip_frames - filled), value=special.zero)
