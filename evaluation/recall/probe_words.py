"""What a checkpoint is told and asked in probe mode: code words, and phrases of recordings.

An episode tells P pairs of a key and a value, goes on with other speech, and comes back to the keys. A Moshi
has likelihoods for its own text and codebooks alone (it has no logits for the user's), so pairs are on
Moshi's stream, where recordings have their main speaker, and the user is silent while they last: what the
user said would be another hint, of which the candidates' likelihoods know nothing. Everything else is
recordings as they are, both sides of them.

code_words: every frame of a word has random codes of the model's vocabulary in all of Moshi's codebooks; the
text is a random token in its first frame, then padding.
phrases: `key_frames` + `value_frames` frames of a recording, text and Moshi's codes, where a word of the main
speaker begins with the value. All pairs of an episode are of one recording, so that the voice tells nothing,
and the speech between is of the others, so that nothing is told twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from moshi.models.lm import LMModel

from evaluation.recall.probe_settings import Probe


@dataclass(frozen=True)
class Speech:
    """A recording as the model hears it.

    Args:
        name: of its file.
        codes: `[17, T]`.
        starts: frames in which words of the main speaker begin, in order.
    """

    name: str
    codes: torch.Tensor
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Episodes:
    """Episodes of one task, with their questions at every distance.

    Args:
        told: `[B, 17, T]`: pairs, then speech up to the last question and `max_delay` frames on.
        untold: the same with speech in place of the pairs.
        ends: frames at which the questions come, rising.
        keys: `[B, P, 17, key_frames]`, as they are told and asked.
        values: `[B, P, 17, value_frames]`; value p belongs to key p.
        clusters: for each episode what it shares with others: its recording, or only itself.
    """

    told: torch.Tensor
    untold: torch.Tensor
    ends: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    clusters: tuple[str, ...]

    def rows(self, rows: slice) -> "Episodes":
        """Some of the episodes."""
        return replace(
            self,
            told=self.told[rows],
            untold=self.untold[rows],
            keys=self.keys[rows],
            values=self.values[rows],
            clusters=self.clusters[rows],
        )

    @property
    def questions_frames(self) -> int:
        """Frames of all questions with all candidates at one distance."""
        batch, pairs = self.keys.shape[:2]
        return batch * pairs**2 * (self.keys.shape[-1] + self.values.shape[-1])


def question_frames(probe: Probe, receptive_field: int, mini_batch_frames: int, delay: int) -> list[int]:
    """Frame of the question at each distance: the asked one or a little later, where a mini-batch begins.

    Raises:
        ValueError: two distances come to the same frame, or they do not rise.
    """
    # All of the last pair must have been read before the state is reset, its delayed codes too.
    asked = [probe.told_frames + max(round(d * receptive_field), delay + 1) for d in probe.distances]
    frames = [-(-frame // mini_batch_frames) * mini_batch_frames for frame in asked]
    if any(later <= earlier for earlier, later in zip(frames, frames[1:], strict=False)):
        raise ValueError(
            f"probe.distances must rise, by at least a mini-batch of {mini_batch_frames} frames each; got "
            f"{', '.join(f'{d:g}' for d in probe.distances)} receptive fields of {receptive_field} frames"
        )
    return frames


class EpisodeMaker:
    """Draws episodes.

    Args:
        probe: settings.
        model: for its vocabulary and streams.
        speeches: recordings.
        silence: codes of silence in the user's codebooks, `[8]`.
        ends: frames of the questions.
    """

    def __init__(
        self,
        probe: Probe,
        model: LMModel,
        speeches: Sequence[Speech],
        silence: torch.Tensor,
        ends: Sequence[int],
    ):
        self.probe = probe
        self.model = model
        self.speeches = speeches
        self.silence = silence
        self.ends = tuple(ends)
        self.frames = self.ends[-1] + max(model.delays)

    def code_words(self) -> Episodes:
        """Episodes of random codes.

        Raises:
            ValueError: the recordings are shorter than the longest distance, or the vocabulary is too small.
        """
        generator = torch.Generator().manual_seed(self.probe.seed)
        pairs, tokens = self.probe.pairs, self._text_tokens()
        if len(tokens) < 2 * pairs:
            raise ValueError(
                f"{pairs} pairs need {2 * pairs} text tokens, the model has {len(tokens)}; lower probe.pairs"
            )
        runs, keys, values = [], [], []
        for _ in range(self.probe.episodes):
            runs.append(self._speech(self.speeches, generator))
            text = tokens[torch.randperm(len(tokens), generator=generator)[: 2 * pairs]].split(pairs)
            keys.append(self._random_words(text[0], self.probe.key_frames, generator))
            values.append(self._random_words(text[1], self.probe.value_frames, generator))
        clusters = tuple(str(index) for index in range(self.probe.episodes))
        return self._episodes(torch.stack(runs), torch.stack(keys), torch.stack(values), clusters)

    def phrases(self) -> Episodes:
        """Episodes of phrases.

        Raises:
            ValueError: no recording has enough words, or the others are shorter than the longest distance.
        """
        generator = torch.Generator().manual_seed(self.probe.seed)
        starts = {speech.name: self._phrase_starts(speech) for speech in self.speeches}
        fits = {name: len(packed(found, 0, self._phrase)) for name, found in starts.items()}
        usable = [speech for speech in self.speeches if fits[speech.name] >= self.probe.pairs]
        if not usable:
            self._refuse_words(fits)
        if len(self.speeches) < 2:
            raise ValueError(
                "phrases need at least two recordings: what is between telling and asking is taken from the "
                f"others; {self.probe.recordings} gives {len(self.speeches)}"
            )
        runs, keys, values, clusters = [], [], [], []
        for index in range(self.probe.episodes):
            speech = usable[index % len(usable)]
            runs.append(self._speech([s for s in self.speeches if s is not speech], generator))
            chosen = self._choose(starts[speech.name], generator)
            keys.append(self._cut(speech, chosen, self.probe.key_frames))
            values.append(self._cut(speech, chosen + self.probe.key_frames, self.probe.value_frames))
            clusters.append(speech.name)
        return self._episodes(torch.stack(runs), torch.stack(keys), torch.stack(values), tuple(clusters))

    @property
    def _phrase(self) -> int:
        return self.probe.key_frames + self.probe.value_frames

    def _episodes(
        self, untold: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, clusters: tuple[str, ...]
    ) -> Episodes:
        told = untold.clone()
        for pair in range(self.probe.pairs):
            start = pair * (self._phrase + self.probe.pause_frames)
            told[:, :, start : start + self._phrase] = torch.cat((keys[:, pair], values[:, pair]), dim=-1)
        device = self.model.device
        moved = (codes.to(device) for codes in (told, untold, keys, values))
        told, untold, keys, values = moved
        return Episodes(told, untold, self.ends, keys, values, clusters)

    def _speech(self, speeches: Sequence[Speech], generator: torch.Generator) -> torch.Tensor:
        """A run of recordings in random order that begins anywhere and goes round, `[17, frames]`."""
        order = torch.randperm(len(speeches), generator=generator).tolist()
        codes = torch.cat([speeches[index].codes for index in order], dim=1)
        there = codes.shape[1]
        if there < self.frames:
            raise ValueError(
                f"an episode up to the longest of probe.distances has {self.frames} frames, "
                f"{len(speeches)} recording(s) of {self.probe.recordings} give {there} without repeating; "
                "ask for shorter distances or give more recordings"
            )
        start = int(torch.randint(0, there, (), generator=generator))
        return codes.roll(-start, dims=1)[:, : self.frames]

    def _text_tokens(self) -> torch.Tensor:
        """Text tokens that are words or parts of words."""
        special = {self.model.text_padding_token_id, self.model.end_of_text_padding_id}
        return torch.tensor([token for token in range(self.model.text_card) if token not in special])

    def _random_words(self, text: torch.Tensor, frames: int, generator: torch.Generator) -> torch.Tensor:
        """A word for each of the text tokens `[P]`, `[P, 17, frames]`."""
        shape = (len(text), self.model.num_codebooks, frames)
        words = torch.randint(0, self.model.card, shape, generator=generator)
        words[:, 0] = self.model.text_padding_token_id
        words[:, 0, 0] = text
        return self._silence_user(words)

    def _silence_user(self, words: torch.Tensor) -> torch.Tensor:
        """Words `[P, 17, frames]` with nothing said by the user, in place."""
        words[:, self.model.audio_offset + self.model.dep_q :] = self.silence[:, None]
        return words

    def _phrase_starts(self, speech: Speech) -> list[int]:
        """First frames of all phrases with enough words."""
        found = []
        for value in speech.starts:
            first, last = value - self.probe.key_frames, value + self.probe.value_frames
            key_words = sum(first <= start < value for start in speech.starts)
            value_words = sum(value <= start < last for start in speech.starts)
            enough = key_words >= self.probe.key_words and value_words >= self.probe.value_words
            if enough and first >= 0 and last <= speech.codes.shape[1]:
                found.append(first)
        return sorted(set(found))

    def _choose(self, starts: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """First frames of the phrases of an episode, which share no frame, in random order, `[P]`."""
        offset = int(torch.randint(0, len(starts), (), generator=generator))
        apart = packed(starts, offset, self._phrase)
        if len(apart) < self.probe.pairs:
            apart = packed(starts, 0, self._phrase)
        order = torch.randperm(len(apart), generator=generator)[: self.probe.pairs]
        return torch.tensor(apart)[order]

    def _cut(self, speech: Speech, starts: torch.Tensor, frames: int) -> torch.Tensor:
        """Slices of a recording with a silent user, `[P, 17, frames]`."""
        cut = [speech.codes[:, start : start + frames].clone() for start in starts.tolist()]
        return self._silence_user(torch.stack(cut))

    def _refuse_words(self, most: dict[str, int]) -> None:
        best = max(most, key=most.__getitem__)
        raise ValueError(
            f"an episode needs probe.pairs={self.probe.pairs} phrases of one recording that do not "
            f"overlap, {self._phrase} frames each with {self.probe.key_words} and {self.probe.value_words} "
            f"words of the main speaker; the best recording, {best}, has {most[best]} ("
            f"{sum(len(speech.starts) for speech in self.speeches)} timed words of the main speaker in all). "
            "Lower probe.pairs, key_frames or value_frames, give longer recordings with timed words, or ask "
            "with probe.tasks=[code_words] alone"
        )


def packed(starts: Sequence[int], offset: int, length: int) -> list[int]:
    """As many stretches of `length` frames as fit from `starts[offset]` on without overlap: first frames."""
    found: list[int] = []
    for start in starts[offset:]:
        if not found or start >= found[-1] + length:
            found.append(start)
    return found
