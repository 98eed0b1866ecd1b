"""What a recording is: its audio, who stands in for a user that was not recorded, and its words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Word:
    """A word of the transcript; times in seconds from the start of the recording."""

    text: str
    start: float
    end: float
    speaker: str


@dataclass(frozen=True)
class UserChannel:
    """What the user's channel of a mono recording holds.

    Args:
        noise_dbfs: level of white noise in dB of full scale (RMS); None is silence.
        seed: of the noise.
    """

    noise_dbfs: float | None
    seed: int


@dataclass(frozen=True)
class Recording:
    """A recording and its words in the order of their starts.

    Args:
        path: the audio: stereo, left Moshi and right the user; mono where `user` is given.
        duration_sec: its length.
        words: None where nobody wrote down what is said: no text is learnt from it, nor that there is none.
        user: what stands in for the user of a mono recording.
    """

    path: Path
    duration_sec: float
    words: Sequence[Word] | None
    user: UserChannel | None = None

    @property
    def num_channels(self) -> int:
        """Channels of the audio file."""
        return 2 if self.user is None else 1
