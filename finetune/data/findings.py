"""What the check of a data set finds: limits, measures of a recording, problems."""

from dataclasses import dataclass, field

from finetune.data.entries import Source
from finetune.data.voice import VoiceConfig


@dataclass
class CheckLimits:
    """From where on something is a problem."""

    duration_sec: float = 0.1
    """The list's duration may differ by this from the file's, and words may end this late."""

    order_sec: float = 0.001
    """A word may start this much before the one in front of it."""

    clipped_share: float = 0.001
    """Share of a channel's voiced frames (20 ms) with 3 samples in a row at full scale."""

    quiet_dbfs: float = -42.0
    """RMS of a channel's voice below this is quiet."""

    same_channels: float = 0.98
    """Correlation of the channels above this: a mono recording saved as stereo."""

    swap_db: float = 6.0
    """A word lies in the wrong channel where that is louder by this."""

    swap_share: float = 0.5
    """Swapped channels are suspected where more of the words that lie in one channel lie in the wrong one."""

    swap_words: int = 3
    """Fewer words in the wrong channel raise no suspicion."""

    word_margin_sec: float = 0.2
    """Words may be this far from the voice."""

    silent_words: int = 2
    """So many words of a speaker one after another where the channel is silent are a problem."""

    unworded_voice_sec: float = 4.0
    """So much voice between two words of its speaker, or before the first or behind the last."""

    mismatch_share: float = 0.6
    """Where less of the time of a speaker's words has voice, it is the transcript of something else."""

    mismatch_words: int = 10
    """Fewer words say nothing about that."""

    slowest: float = 0.7
    """Fewer words per second of voice are suspicious."""

    fastest: float = 6.0
    """More are, too."""

    rate_voice_sec: float = 20.0
    """Less voice than this says nothing about the rate."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to check about one recording.

    Args:
        speakers: labels of the left and the right channel.
    """

    source: Source
    speakers: tuple[str, str]
    limits: CheckLimits
    voice: VoiceConfig


@dataclass(slots=True)
class Problem:
    """Something wrong at a second of a file.

    Args:
        kind: a field of `Severities`.
        speaker: whose channel or words, where it is about one of them.
    """

    kind: str
    file: str
    second: float
    message: str
    speaker: str | None = None


@dataclass(slots=True)
class ChannelMeasures:
    """Levels are in dB of full scale; None where there is nothing to measure.

    Args:
        voice_dbfs: RMS of the voiced frames.
        clipped_share: share of the voiced frames.
    """

    speaker: str
    voice_sec: float
    voice_dbfs: float | None
    peak_dbfs: float
    clipped_share: float
    words: int


@dataclass(slots=True)
class Checked:
    """A recording's measures and problems. The shares are of its duration.

    Args:
        speakers: labels in the transcript.
        silence_share: nobody speaks.
        overlap_share: both do.
    """

    file: str
    duration_sec: float = 0.0
    channels: list[ChannelMeasures] = field(default_factory=list)
    speakers: list[str] = field(default_factory=list)
    silence_share: float = 0.0
    overlap_share: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: str, second: float, message: str, speaker: str | None = None) -> None:
        self.problems.append(Problem(kind, self.file, round(max(second, 0.0), 2), message, speaker))
