"""What has been there before: how far back a word, or a speaker's last turn, lies."""

from collections.abc import Sequence
from dataclasses import dataclass

import sentencepiece
import torch

from finetune.data.interleaver import TextTokens, tokenize
from finetune.data.manifest import Word


@dataclass(frozen=True)
class PlacedWord:
    """A word on the text stream.

    Args:
        key: the word without case and surrounding punctuation; what counts as the same word.
        frame: of its first token; the others follow, one a frame.
        tokens: those that found room before the next word.
    """

    key: str
    frame: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Occurrence:
    """A word on the text stream and what came before it.

    Args:
        word: this one.
        first: the same word where the recording has it for the first time; None if that is here.
        distance_frames: since the same word last began; None for the first.
    """

    word: PlacedWord
    first: PlacedWord | None
    distance_frames: int | None


@dataclass(frozen=True)
class Turn:
    """A speaker's words with no whole word of another between them.

    Args:
        start_sec, end_sec: of its first and last word.
        gap_sec: since this speaker's last turn ended; None for the first.
    """

    start_sec: float
    end_sec: float
    gap_sec: float | None


def word_key(text: str) -> str:
    """What two words that count as the same share: "King," and "king" are one, "I'm" and "im" are not."""
    kept = [index for index, letter in enumerate(text) if letter.isalnum()]
    return text[kept[0] : kept[-1] + 1].casefold() if kept else ""


def placed_words(
    words: Sequence[Word],
    num_frames: int,
    frame_rate: float,
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> list[PlacedWord]:
    """Where the words of the text stream lie, for words in order of their starts.

    Words of which no token found room are left out.
    """
    kept = [word for word in words if word.end > word.start]
    starts = [int(word.start * frame_rate) for word in kept] + [num_frames]
    placed = []
    for word, start, following in zip(kept, starts, starts[1:], strict=False):
        tokens = tokenize(tokenizer, word.text)[: max(0, min(following, num_frames) - start)]
        if tokens:
            placed.append(PlacedWord(word_key(word.text), start, tuple(tokens)))
    return placed


def holds_word(stream: torch.Tensor, special: TextTokens) -> torch.Tensor:
    """Where a text stream holds a word's token, not padding or nothing."""
    return (stream != special.padding) & (stream != special.end_of_padding) & (stream != special.zero)


def refuse_misplaced(stream: torch.Tensor, placed: Sequence[PlacedWord], special: TextTokens) -> None:
    """Raise ValueError unless the text stream `[T]` holds exactly these words at these frames.

    NLLs are looked up by these frames: one frame off would give the numbers of other tokens.
    """
    expected = torch.full_like(stream, special.padding)
    for word in placed:
        expected[word.frame : word.frame + len(word.tokens)] = torch.tensor(word.tokens)
    wrong = ((stream != expected) & (holds_word(stream, special) | holds_word(expected, special))).nonzero()
    wrong = wrong[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"the text stream has token {int(stream[wrong[0]])} at frame {wrong[0]}, the transcript's words "
            f"give {int(expected[wrong[0]])} ({len(wrong)} frames differ); was the stream made of another "
            "transcript, or is it shifted?"
        )


def occurrences(placed: Sequence[PlacedWord]) -> list[Occurrence]:
    """Every word with what came before it in its recording; marks without letters are left out."""
    first: dict[str, PlacedWord] = {}
    last: dict[str, PlacedWord] = {}
    found = []
    for word in placed:
        if not word.key:
            continue
        before = last.get(word.key)
        distance = None if before is None else word.frame - before.frame
        found.append(Occurrence(word, first.get(word.key), distance))
        first.setdefault(word.key, word)
        last[word.key] = word
    return found


def turns(words: Sequence[Word], speaker: str) -> list[Turn]:
    """A speaker's turns, for the words of a recording in order of their starts."""
    own = [word for word in words if word.speaker == speaker]
    others = [word for word in words if word.speaker != speaker]
    groups: list[list[Word]] = []
    for word in own:
        if not groups or any(
            groups[-1][-1].end <= other.start and other.end <= word.start for other in others
        ):
            groups.append([])
        groups[-1].append(word)
    spans = [(group[0].start, max(word.end for word in group)) for group in groups]
    ends = [None, *(end for _, end in spans)]
    return [
        Turn(start, end, None if before is None else max(0.0, start - before))
        for (start, end), before in zip(spans, ends, strict=False)
    ]
