"""Is it one voice throughout? Windows of Moshi's speech against its first, by an encoder of voices.

The encoder is Resemblyzer's (generalized end-to-end loss for speaker verification: three LSTM layers over 40
mel bands); only its published weights are used. Similarity is the cosine of two embeddings, which are never
negative: other voices have about 0.5 to 0.7.
"""

import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torchaudio

from evaluation.speech_quality.measures import Metric, Ratios
from finetune.data.voice import FRAME_SEC, frame_samples
from finetune.data.whisper import RATE
from moshi_ttt.digest import sha256

METRICS = {
    "similarity": Metric("", "higher", True, "of Moshi's later windows to its first, mean"),
    "similarity_last": Metric("", "higher", False, "of Moshi's last window to its first"),
    "similarity_user": Metric("", "", False, "of the user's windows to Moshi's first: another voice"),
}
INSTALL = (
    "install it with `pip install --no-deps resemblyzer==0.1.4` (16 MB; what it depends on is not needed), "
    "or give speaker_weights=pretrained.pt of that package; or leave voice out of tasks"
)
_BANDS, _SIZE, _LAYERS = 40, 256, 3
_HOP = 160  # samples
_PART_FRAMES, _PART_HOP = 160, 80  # what the encoder hears at once: 1.6 s, and half of it on
_LEVEL_DBFS = -30.0  # of what it was trained on; what is quieter is raised


class VoiceEncoder(torch.nn.Module):
    """Embeddings of voices.

    Args:
        weights: file; None is what the package resemblyzer brings.
    Raises:
        ValueError: there are none, or not of this encoder.
    """

    def __init__(self, weights: str | None, device: torch.device):
        super().__init__()
        path = find_weights(weights)
        self.lstm = torch.nn.LSTM(_BANDS, _SIZE, _LAYERS, batch_first=True)
        self.linear = torch.nn.Linear(_SIZE, _SIZE)
        self.mel = torchaudio.transforms.MelSpectrogram(
            RATE, 400, hop_length=_HOP, n_mels=_BANDS, norm="slaney", mel_scale="slaney", pad_mode="constant"
        )
        wanted = [name for name, _ in self.named_parameters()]
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
            self.load_state_dict({name: state[name] for name in wanted}, strict=False)
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} holds no weights of Resemblyzer's encoder ({error}); {INSTALL}"
            ) from error
        self.sha256 = sha256(path)
        self.to(device).eval()

    @torch.no_grad()
    def forward(self, samples: np.ndarray) -> np.ndarray:
        """The embedding `[256]`, of length 1, of a voice `[n]` at 16 kHz; n at least 1.6 s."""
        audio = torch.from_numpy(samples).to(self.linear.weight.device)
        level = 10 * torch.log10(audio.square().mean())
        audio = audio * 10 ** ((_LEVEL_DBFS - level).clamp(min=0) / 20)
        bands = self.mel(audio).T
        parts = bands.unfold(0, _PART_FRAMES, _PART_HOP).transpose(1, 2)  # [parts, frames, bands]
        _, (hidden, _) = self.lstm(parts)
        each = torch.nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)
        return torch.nn.functional.normalize(each.mean(0), dim=0).cpu().numpy()


def find_weights(given: str | None) -> Path:
    """The file of weights.

    Raises:
        ValueError: it is not there.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise ValueError(f"speaker_weights={path} is no file; {INSTALL}")
        return path
    # Found and not imported: importing needs librosa and webrtcvad.
    spec = find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        raise ValueError(
            f"voice needs the weights in the package resemblyzer, which is not installed; {INSTALL}"
        )
    return Path(spec.origin).with_name("pretrained.pt")


def windows(samples: np.ndarray, mask: np.ndarray, window_sec: float) -> list[tuple[float, np.ndarray]]:
    """Speech alone in pieces of one length, each with the second of the recording at which it begins.

    Args:
        samples: `[n]` at 16 kHz; mask: frames of 20 ms with speech.
    """
    size = frame_samples(RATE)
    missing = len(mask) * size - len(samples)
    frames = np.pad(samples, (0, missing)).reshape(-1, size)
    spoken = np.flatnonzero(mask)
    count = round(window_sec / FRAME_SEC)
    whole = [spoken[i : i + count] for i in range(0, len(spoken) - count + 1, count)]
    return [(float(places[0]) * FRAME_SEC, frames[places].reshape(-1)) for places in whole]


def measure(
    moshi: list[tuple[float, np.ndarray]], user: list[tuple[float, np.ndarray]], encoder: VoiceEncoder
) -> tuple[Ratios, list[tuple[float, float]]]:
    """Of one answer: its numbers, and Moshi's similarity to its first window by second.

    Args:
        moshi, user: windows of their speech.
    """
    embedded = [(second, encoder(samples)) for second, samples in moshi]
    others = [encoder(samples) for _, samples in user] if moshi else []
    first = embedded[0][1] if embedded else np.zeros(_SIZE, np.float32)
    later = [(second, float(voice @ first)) for second, voice in embedded[1:]]
    like_user = [float(voice @ first) for voice in others]
    values = [similarity for _, similarity in later]
    ratios = {
        "similarity": (sum(values), float(len(values))),
        "similarity_last": (sum(values[-1:]), float(len(values[-1:]))),
        "similarity_user": (sum(like_user), float(len(like_user))),
    }
    return ratios, later
