"""Words to the text stream: one token a frame, as moshi-finetune's Interleaver lays them out.

Its options have its meanings: on the same words the streams are the same, token for token.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import sentencepiece
import torch
from moshi.models.lm import LMModel

from finetune.data.recording import Word


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


@dataclass(frozen=True)
class TextLayout:
    """Whose words go on the text stream, and how they are laid out.

    Args:
        keep_main_only: only the main speaker's words; otherwise everybody's.
        main_speaker: the main speaker's label in the transcripts.
        use_bos_eos: BOS before the word with which the main speaker takes the turn, EOS before the word with
            which another takes it from him. Needs everybody's words.
        keep_and_shift: say a word to its end before the next begins, however late; otherwise what has not
            been placed when the next word starts is dropped.
        audio_delay_sec: how much later the audio is than the text. Below 0 the text comes later, and the
            frames before it can come have no target.
        in_word_padding: token of the frames in which a word still lasts when its tokens are all placed; None
            is padding.
    """

    keep_main_only: bool = True
    main_speaker: str = "SPEAKER_MAIN"
    use_bos_eos: bool = False
    keep_and_shift: bool = False
    audio_delay_sec: float = 0.0
    in_word_padding: int | None = None

    @property
    def looks_back(self) -> bool:
        """Whether the text of a frame can depend on more than the word that was begun last."""
        return (
            self.use_bos_eos
            or self.keep_and_shift
            or self.audio_delay_sec != 0
            or self.in_word_padding is not None
        )

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "TextLayout":
        """The layout among the data settings of a config. Checkpoints may be older than a setting."""
        names = [field.name for field in fields(TextLayout)]
        return TextLayout(**{name: settings[name] for name in names if name in settings})

    def validate(self) -> None:
        """Raise ValueError for options that cannot work together."""
        if self.use_bos_eos and self.keep_main_only:
            raise ValueError(
                "data.use_bos_eos marks where speakers take turns, but data.keep_main_only leaves one of "
                "them; set one of both to false"
            )
        if not math.isfinite(self.audio_delay_sec):
            raise ValueError(f"data.audio_delay_sec must be a number of seconds, got {self.audio_delay_sec}")
        if self.in_word_padding is not None and self.in_word_padding < 0:
            raise ValueError(
                f"data.in_word_padding must be a token, or null for padding; got {self.in_word_padding}"
            )


def tokenize(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Token ids of a word or text; lines are joined by the tokenizer's newline piece."""
    first, *others = (tokenizer.encode(line) for line in text.strip().split("\n"))
    newline = tokenizer.encode("\n")[-1:] if others else []
    for tokens in others:
        first = [*first, *newline, *tokens]
    return first


def words_in_clip(words: Sequence[Word] | None, start_sec: float, duration_sec: float) -> list[Word] | None:
    """Words that start inside a clip, with times relative to its start; None where there is no transcript.

    `words` are in order.
    """
    if words is None:
        return None
    first = bisect_left(words, start_sec, key=_start)
    last = bisect_left(words, start_sec + duration_sec, lo=first, key=_start)
    return [
        Word(word.text, word.start - start_sec, word.end - start_sec, word.speaker)
        for word in words[first:last]
    ]


def _start(word: Word) -> float:
    return word.start


def _tokens_of_words(
    words: Sequence[Word], tokenizer: sentencepiece.SentencePieceProcessor, layout: TextLayout
) -> list[tuple[float, float, list[int]]]:
    """(start, end, tokens) of the words that are placed, in order."""
    placed = []
    last_speaker = None
    for word in words:
        is_main = word.speaker == layout.main_speaker
        if layout.keep_main_only and not is_main:
            continue
        tokens = tokenize(tokenizer, word.text)
        if layout.use_bos_eos and not layout.keep_main_only and word.speaker != last_speaker:
            if is_main:
                tokens = [tokenizer.bos_id(), *tokens]
            elif last_speaker == layout.main_speaker:
                tokens = [tokenizer.eos_id(), *tokens]
        last_speaker = word.speaker
        start, end = word.start - layout.audio_delay_sec, word.end - layout.audio_delay_sec
        # A word without duration is not said, but has taken the turn all the same.
        if word.end > word.start and (layout.audio_delay_sec == 0 or word.end > layout.audio_delay_sec):
            placed.append((start, end, tokens))
    return placed


def text_stream(
    words: Sequence[Word] | None,
    num_frames: int,
    frame_rate: float,
    tokenizer: sentencepiece.SentencePieceProcessor,
    special: TextTokens,
    layout: TextLayout,
) -> torch.Tensor:
    """One text token for each frame, `[num_frames]`.

    A word's tokens follow each other from the frame in which it starts; what has not been placed when the
    next word starts is dropped, or with `keep_and_shift` placed first. The padding frame before a word
    becomes `end_of_padding`. Without a transcript no frame has a target: nobody knows that it is silence.

    Args:
        words: with times relative to the first frame, in order; None without a transcript.
    """
    if words is None:
        return torch.full((num_frames,), special.zero, dtype=torch.long)
    in_word = special.padding if layout.in_word_padding is None else layout.in_word_padding
    tokens = [special.padding] * num_frames
    pending: deque[int] = deque()
    upcoming = deque(_tokens_of_words(words, tokenizer, layout))
    last_frame_of_word = -1
    for frame in range(num_frames):
        while upcoming and upcoming[0][0] * frame_rate < frame + 1:
            _, end, word = upcoming.popleft()
            last_frame_of_word = int(end * frame_rate)
            pending = deque([*pending, *word] if layout.keep_and_shift else word)
        if pending:
            if frame > 0 and tokens[frame - 1] in (special.padding, in_word):
                tokens[frame - 1] = special.end_of_padding
            tokens[frame] = pending.popleft()
        elif frame <= last_frame_of_word:
            tokens[frame] = in_word
    if layout.audio_delay_sec < 0:
        without = min(int(frame_rate * -layout.audio_delay_sec), num_frames)
        tokens[:without] = [special.zero] * without
    return torch.tensor(tokens, dtype=torch.long)


def text_slice(
    words: Sequence[Word] | None,
    first: int,
    stop: int,
    num_frames: int,
    frame_rate: float,
    tokenizer: sentencepiece.SentencePieceProcessor,
    special: TextTokens,
    layout: TextLayout,
) -> torch.Tensor:
    """Frames `first` to `stop` of `text_stream` of a whole recording of `num_frames`, `[stop - first]`.

    Where only the last word that began before the slice can reach in, this takes as long as the slice does,
    wherever it lies.
    """
    assert 0 <= first <= stop <= num_frames
    if words is None or layout.looks_back:
        whole = text_stream(words, num_frames, frame_rate, tokenizer, special, layout)
        return whole[first:stop]
    main_speaker = layout.main_speaker if layout.keep_main_only else None

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
    words: Sequence[Word] | None,
    clip_frames: int,
    audio_frames: int,
    frame_rate: float,
    tokenizer: sentencepiece.SentencePieceProcessor,
    special: TextTokens,
    layout: TextLayout,
) -> torch.Tensor:
    """Text stream of a clip of `clip_frames` whose audio fills `audio_frames` of them, `[clip_frames]`.

    moshi-finetune builds ceil(audio_frames x frame_rate) frames of text, as if frames were seconds, so a
    short last clip has padding targets behind its audio and only then the zero token, and a full one sees a
    word that a delay puts right behind its end. Its numbers depend on that, so it is the same here.
    """
    filled = min(clip_frames + 1, math.ceil(audio_frames * frame_rate))
    stream = text_stream(words, filled, frame_rate, tokenizer, special, layout)[:clip_frames]
    return torch.nn.functional.pad(stream, (0, clip_frames - len(stream)), value=special.zero)
