"""Is what is heard what was meant? Whisper's transcript of an answer against Moshi's inner monologue."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.speech_quality.measures import Metric, Ratios
from finetune.data.whisper import RATE, Transcriber

METRICS = {
    "wer": Metric(
        "%", "lower", True, "words of the inner monologue that are wrong, missing or added in the transcript"
    ),
    "words_per_min": Metric("per min", "", False, "words of the inner monologue"),
}
NORMALIZATION = "lower case; words are letters, digits and apostrophes; Mr. and Mrs. in full"
_TITLES = {"mr": "mister", "mrs": "missus"}


def measure(text: str, samples: np.ndarray, transcriber: Transcriber) -> tuple[Ratios, dict[str, Any]]:
    """Of one answer: its numbers, and what was meant and heard.

    Args:
        text: the inner monologue.
        samples: Moshi's voice `[n]` at 16 kHz.
    """
    heard = " ".join(word for word, _, _ in transcriber.words(samples, RATE))
    meant_words, heard_words = normalized(text), normalized(heard)
    errors = word_errors(meant_words, heard_words)
    minutes = len(samples) / RATE / 60
    ratios = {
        "wer": (100.0 * errors, float(len(meant_words))),
        "words_per_min": (float(len(meant_words)), minutes),
    }
    return ratios, {"monologue": text, "transcript": heard, "errors": errors, "words": len(meant_words)}


def normalized(text: str) -> list[str]:
    """The words of a text, as `NORMALIZATION` says."""
    plain = text.casefold().replace("\u2019", "'")
    words: list[str] = re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain)
    return [_TITLES.get(word, word) for word in words]


def word_errors(meant: Sequence[str], heard: Sequence[str]) -> int:
    """Fewest words to replace, leave out and add that make one list of the other."""
    numbers = {word: number for number, word in enumerate({*meant, *heard})}
    columns = np.array([numbers[word] for word in heard], dtype=np.int64)
    steps = np.arange(len(heard) + 1)
    row = steps.copy()
    for word in meant:
        replaced = row[:-1] + (columns != numbers[word])
        best = np.concatenate(([row[0] + 1], np.minimum(replaced, row[1:] + 1)))
        # Words added from the left: the smallest of best[k] + (j - k) for k up to j.
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])
