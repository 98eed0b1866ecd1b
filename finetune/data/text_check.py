"""Whether the words of a transcript are where the voices are."""

from dataclasses import dataclass

import numpy as np

from finetune.data.findings import ChannelMeasures, Checked, CheckLimits, Job
from finetune.data.levels import Levels
from finetune.data.transcript_faults import TimedWord
from finetune.data.voice import dbfs, runs


def check_text(
    result: Checked, words: list[TimedWord], levels: Levels, voice: np.ndarray, own: np.ndarray, job: Job
) -> None:
    """Whether the words are where the voices are."""
    channel_words = [
        sorted((w for w in words if w.speaker == channel.speaker), key=lambda w: w.start)
        for channel in result.channels
    ]
    if len(result.channels) == 2 and _swapped(result, channel_words, levels, job.limits):
        return  # what follows would say the same of every word
    for index, mine in enumerate(channel_words):
        check = _ChannelText(result, result.channels[index], mine, levels.frame_sec, job.limits)
        if not check.mismatch(voice[:, index]):
            check.silent_words(voice[:, index])
            check.unworded_voice(own[:, index])
        check.rate()


def _swapped(
    result: Checked, channel_words: list[list[TimedWord]], levels: Levels, limits: CheckLimits
) -> bool:
    """Note that the words lie in the other channel."""
    right_ones, wrong_ones = 0, []
    level = np.cumsum(np.pad(levels.power.astype(np.float64), ((1, 0), (0, 0))), axis=0)
    for index, mine in enumerate(channel_words):
        if not mine:
            continue
        first, last = _frames(mine, levels.frame_sec, len(levels.power))
        mean = dbfs((level[last] - level[first]) / np.maximum(last - first, 1)[:, None])  # [words, 2]
        difference = mean[:, index] - mean[:, 1 - index]
        right_ones += int((difference > limits.swap_db).sum())
        wrong_ones += [mine[i].start for i in np.flatnonzero(difference < -limits.swap_db)]
    wrong = len(wrong_ones)
    if wrong < limits.swap_words or wrong <= limits.swap_share * (wrong + right_ones):
        return False
    result.add(
        "swap", min(wrong_ones), f"{wrong} of {wrong + right_ones} words lie in the other speaker's channel"
    )
    return True


def _frames(
    words: list[TimedWord], frame_sec: float, count: int, margin_sec: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """First frame of each word, and the one behind its last."""
    starts = np.array([w.start for w in words]) - margin_sec
    ends = np.array([w.end for w in words]) + margin_sec
    first = np.clip(np.floor(starts / frame_sec), 0, count).astype(int)
    last = np.clip(np.ceil(ends / frame_sec), 0, count).astype(int)
    return first, np.maximum(first, last)


@dataclass
class _ChannelText:
    """The words of one speaker against the voice on the channel."""

    result: Checked
    channel: ChannelMeasures
    words: list[TimedWord]
    frame_sec: float
    limits: CheckLimits

    def mismatch(self, voice: np.ndarray) -> bool:
        """Whether the words are those of another recording, or lie elsewhere in time."""
        if len(self.words) < self.limits.mismatch_words:
            return False
        covered = np.zeros(len(voice), bool)
        for first, last in zip(*_frames(self.words, self.frame_sec, len(voice)), strict=True):
            covered[first:last] = True
        share = float(voice[covered].mean()) if covered.any() else 0.0
        if share >= self.limits.mismatch_share:
            return False
        message = f"of the time of {len(self.words)} words only {share:.0%} has voice: another transcript?"
        self.result.add("mismatch", self.words[0].start, message, self.channel.speaker)
        return True

    def silent_words(self, voice: np.ndarray) -> None:
        """Words one after another where the channel is silent."""
        if not self.words:
            return
        total = np.concatenate(([0], np.cumsum(voice)))
        first, last = _frames(self.words, self.frame_sec, len(voice), self.limits.word_margin_sec)
        for start, end in runs(total[last] == total[first]):
            if end - start >= self.limits.silent_words:
                text = " ".join(word.text for word in self.words[start : min(end, start + 6)])
                message = f"{end - start} word(s) where the channel is silent: {text!r}"
                self.result.add("silent_words", self.words[start].start, message, self.channel.speaker)

    def unworded_voice(self, voice: np.ndarray) -> None:
        """Long stretches of voice between words."""
        size, margin = len(voice), self.limits.word_margin_sec
        first, last = _frames(self.words, self.frame_sec, size, margin) if self.words else ([], [])
        total = np.concatenate(([0], np.cumsum(voice)))
        reached = np.maximum.accumulate(np.concatenate(([0], last)).astype(int))
        for start, end in zip(reached, [*first, size], strict=True):
            seconds = float(total[max(start, end)] - total[start]) * self.frame_sec
            if seconds >= self.limits.unworded_voice_sec:
                at = float((start + np.flatnonzero(voice[start:end])[0]) * self.frame_sec)
                message = f"{seconds:.1f} s of voice without a word, until {end * self.frame_sec:.2f} s"
                self.result.add("unworded_voice", at, message, self.channel.speaker)

    def rate(self) -> None:
        """Words per second of voice."""
        seconds = self.channel.voice_sec
        if not self.words or seconds < self.limits.rate_voice_sec:
            return
        rate = len(self.words) / seconds
        if not self.limits.slowest <= rate <= self.limits.fastest:
            message = f"{len(self.words)} words in {seconds:.0f} s of voice: {rate:.1f} a second"
            self.result.add("rate", self.words[0].start, message, self.channel.speaker)
