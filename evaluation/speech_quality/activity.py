"""When somebody speaks: where it is loud, and where Silero's detector hears speech."""

from typing import Any

import numpy as np

from finetune.data.voice import FRAME_SEC, VoiceConfig, frame_power, frame_samples, voiced
from finetune.data.whisper import RATE

# Silero hears the beginning of speech up to 0.3 s late, and its end about 0.05 s late.
REACH_SEC = 0.3
# Shorter silences lie within words.
VOICE = VoiceConfig(fill_sec=0.2)


class VoiceActivity:
    """Frames of 20 ms in which a channel has speech.

    Loudness (finetune/data/voice.py) says to the frame where a stretch begins and ends, and cannot tell
    speech from noise; Silero's detector can, and is late. So a loud frame is speech where Silero hears speech
    at most `REACH_SEC` away.

    Raises:
        ValueError: faster-whisper, which brings the detector, is missing.
    """

    def __init__(self) -> None:
        try:
            from faster_whisper import vad
        except ImportError as error:
            raise ValueError(
                f"faster-whisper, which brings Silero's voice activity detector, cannot be imported "
                f"({error}); install it with pip install 'moshi-ttt[quality]'"
            ) from error
        self._vad: Any = vad

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Frames with speech, `[frames]` bool, of samples `[n]` float32 at 16 kHz."""
        loud = voiced(frame_power(samples[None], frame_samples(RATE))[:, 0], VOICE)
        options = self._vad.VadOptions(
            min_speech_duration_ms=60, min_silence_duration_ms=100, speech_pad_ms=round(1000 * REACH_SEC)
        )
        heard = np.zeros(len(loud), bool)
        for speech in self._vad.get_speech_timestamps(samples, options):
            heard[round(speech["start"] / RATE / FRAME_SEC) : round(speech["end"] / RATE / FRAME_SEC)] = True
        return loud & heard
