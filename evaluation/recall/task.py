"""Associative recall in Moshi's own streams: what an episode is.

The user says P pairs of a key word and a value word, talks about something else for D frames, and then asks
for some of the keys; Moshi must say the values. A word lasts two frames of 80 ms. The key is in the user's
semantic codebook and the value in the acoustic one, which Moshi's delay pattern feeds one frame later; a
question has the token ASK in place of the value. Moshi answers one frame after the question, with a text
token and a semantic code; otherwise its text stream is padding and its audio streams are silence. All other
frames of the user are speech: codes of real recordings.
"""

from dataclasses import dataclass
from typing import Any

import torch

PADDING = 3
TEXT, MOSHI_SEMANTIC, MOSHI_ACOUSTIC, USER_SEMANTIC, USER_ACOUSTIC = range(5)
DELAYS = [0, 0, 1, 0, 1]
_WORD = 3  # frames from one pair, or question, to the next: two of the word and one of speech


@dataclass
class Vocabulary:
    """Tokens of the task. Audio codes: speech, keys, values, ASK, silence. Text: 4 special ones, values.

    Args:
        speech: codes of speech, 0 to speech - 1.
        keys, values: how many there are.
    """

    speech: int = 256
    keys: int = 32
    values: int = 16

    @property
    def ask(self) -> int:
        return self.speech + self.keys + self.values

    @property
    def silence(self) -> int:
        return self.ask + 1

    @property
    def card(self) -> int:
        """Codes of an audio codebook."""
        return self.silence + 1

    @property
    def text_card(self) -> int:
        return PADDING + 1 + self.values

    @property
    def chance(self) -> float:
        """Share of right answers without any memory: values are drawn independently."""
        return 1 / self.values

    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of `LMModel` that follow from the task."""
        return {
            "n_q": 4,
            "dep_q": 2,
            "card": self.card,
            "text_card": self.text_card,
            "existing_text_padding_id": PADDING,
            "delays": DELAYS,
        }


@dataclass
class Episodes:
    """A batch of episodes of one length.

    Args:
        codes: `[B, 5, T]`: text, Moshi's two codebooks, the user's two.
        answer_frames: frame of each answer, `[Q]`.
        answers: the right values, `[B, Q]`.
    """

    codes: torch.Tensor
    answer_frames: torch.Tensor
    answers: torch.Tensor

    def accuracy(self, text: torch.Tensor) -> float:
        """Share of right answers in text tokens `[B, T]`."""
        return (text[:, self.answer_frames] == self.answers + PADDING + 1).float().mean().item()


def told_until(pairs: int) -> int:
    """Frame after the last pair."""
    return _WORD * pairs


def _speech(source: torch.Tensor, batch: int, frames: int, generator: torch.Generator) -> torch.Tensor:
    """Runs of a recording's codes `[2, N]` that begin anywhere and go round, `[batch, 2, frames]`."""
    starts = torch.randint(0, source.shape[1], (batch, 1), generator=generator)
    return source[:, (starts + torch.arange(frames)) % source.shape[1]].transpose(0, 1)


def _distinct(batch: int, choices: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different numbers below `choices` in each row."""
    return torch.rand(batch, choices, generator=generator).argsort(1)[:, :count]


def draw_episodes(
    vocabulary: Vocabulary,
    speech: torch.Tensor,
    batch: int,
    pairs: int,
    distance: int,
    questions: int,
    generator: torch.Generator,
) -> Episodes:
    """Random episodes.

    Args:
        speech: codes of a recording in two codebooks, `[2, N]`.
        pairs: P, at most the keys there are.
        distance: D, frames of speech between the last pair and the first question.
        questions: how many of the pairs are asked for, in random order.
    """
    assert questions <= pairs <= vocabulary.keys
    frames = _WORD * (pairs + questions) + distance + 1
    codes = torch.empty(batch, 5, frames, dtype=torch.long)
    codes[:, TEXT] = PADDING
    codes[:, [MOSHI_SEMANTIC, MOSHI_ACOUSTIC]] = vocabulary.silence
    codes[:, USER_SEMANTIC:] = _speech(speech, batch, frames, generator)
    keys = _distinct(batch, vocabulary.keys, pairs, generator)
    values = torch.randint(0, vocabulary.values, (batch, pairs), generator=generator)
    asked = _distinct(batch, pairs, questions, generator)
    told = _WORD * torch.arange(pairs)
    ask = told_until(pairs) + distance + _WORD * torch.arange(questions)
    first_key, first_value = vocabulary.speech, vocabulary.speech + vocabulary.keys
    answers = values.gather(1, asked)
    for frame in (0, 1):
        codes[:, USER_SEMANTIC, told + frame] = first_key + keys
        codes[:, USER_ACOUSTIC, told + frame] = first_value + values
        codes[:, USER_SEMANTIC, ask + frame] = first_key + keys.gather(1, asked)
        codes[:, USER_ACOUSTIC, ask + frame] = vocabulary.ask
    codes[:, TEXT, ask + 2] = PADDING + 1 + answers
    codes[:, MOSHI_SEMANTIC, ask + 2] = first_value + answers
    return Episodes(codes, ask + 2, answers)
