"""Transcripts: `NAME.json` beside the audio, `{"alignments": [[word, [start, end], speaker], ...]}`."""

import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard, overload

from finetune.data.audio import DURATION_TOLERANCE_SEC
from finetune.data.recording import Word

# Of recordings whose words are read when they are needed. An hour of dialogue has some 10,000 words, 2 MB.
REMEMBERED_TRANSCRIPTS = 256


def transcript_path(audio: Path) -> Path:
    """Where the transcript of a recording lies."""
    return audio.with_suffix(".json")


def read_words(audio: Path, duration_sec: float) -> tuple[Word, ...]:
    """Words of a recording in the order of their starts.

    Raises:
        ValueError: names the transcript and the first entry that is wrong.
    """
    path = transcript_path(audio)
    content = read_json(path, f"expected the transcript of {audio.name} with timed words")
    if not isinstance(content, dict) or not isinstance(content.get("alignments"), list):
        raise ValueError(f'{path}: expected {{"alignments": [[word, [start, end], speaker], ...]}}')
    words = [_read_word(path, index, item, duration_sec) for index, item in enumerate(content["alignments"])]
    return tuple(sorted(words, key=lambda word: word.start))


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file holds; ValueError that names it where it holds none."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; {expected}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); {expected}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def parse_json(text: bytes) -> Any:
    """`json.loads` of UTF-8 whose only error is ValueError."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("brackets within brackets, too deep to read") from error


def _read_word(path: Path, index: int, item: Any, duration_sec: float) -> Word:
    match item:
        case [str(text), [start, end], str(speaker)] if is_time(start) and is_time(end):
            pass
        case _:
            raise ValueError(
                f"{path}: alignment {index}: expected [word, [start, end], speaker], got {str(item)[:80]}"
            )
    if end > duration_sec + DURATION_TOLERANCE_SEC or start < 0:
        raise ValueError(
            f"{path}: alignment {index}: {text!r} at {start}-{end} s is outside the audio, which lasts "
            f"{duration_sec:.3f} s"
        )
    return Word(text, float(start), float(end), speaker)


def is_time(value: Any) -> TypeGuard[float]:
    """Whether a value from JSON is a finite number of seconds. JSON has integers that no float can hold."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53


class WordsOnDemand(Sequence[Word]):
    """Words of a recording that are read when somebody looks, for lists of many recordings.

    What is wrong with a transcript is an error then.
    """

    def __init__(self, audio: Path, duration_sec: float):
        self._audio = audio
        self._duration_sec = duration_sec

    def _words(self) -> tuple[Word, ...]:
        return _remembered_words(self._audio, self._duration_sec)

    def __len__(self) -> int:
        return len(self._words())

    @overload
    def __getitem__(self, index: int) -> Word: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Word]: ...

    def __getitem__(self, index: int | slice) -> Word | Sequence[Word]:
        return self._words()[index]

    def __iter__(self) -> Iterator[Word]:
        return iter(self._words())


_remembered_words = lru_cache(maxsize=REMEMBERED_TRANSCRIPTS)(read_words)
