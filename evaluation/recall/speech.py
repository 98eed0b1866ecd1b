"""Real speech as codes, for the frames in which nothing is told or asked."""

import hashlib
from pathlib import Path

import soundfile
import torch
import torchaudio

from moshi_ttt.loading import ModelConfig, find_base, load_mimi

CODEBOOKS = 2
_FORMATS = {".wav", ".flac", ".ogg", ".mp3"}


def _recordings(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _FORMATS)
    if not paths:
        raise ValueError(f"speech={folder} holds no recording ({', '.join(sorted(_FORMATS))})")
    return paths


def speech_digest(folder: Path) -> str:
    """SHA-256 of a folder's recordings, to know results of other speech from these.

    Not of the codes: which of two codes that are as near is taken depends on the machine and its number of
    threads, for about one code in a thousand.
    """
    digest = hashlib.sha256()
    for path in _recordings(folder):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@torch.no_grad()
def speech_codes(folder: Path, card: int) -> torch.Tensor:
    """The tiny Mimi's first codebooks of all recordings of a folder, one channel after the other, `[2, N]`.

    Raises:
        ValueError: the folder holds no recording, or the codes do not fit the vocabulary.
    """
    paths = _recordings(folder)
    mimi = load_mimi(find_base(ModelConfig(source="tiny")), torch.device("cpu"))
    if mimi.cardinality > card:
        raise ValueError(
            f"Mimi has {mimi.cardinality} codes; set vocabulary.speech to at least that, got {card}"
        )
    parts = []
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        audio = torchaudio.functional.resample(torch.from_numpy(samples.T.copy()), rate, mimi.sample_rate)
        parts.extend(mimi.encode(audio[:, None])[:, :CODEBOOKS])
    return torch.cat(parts, dim=1)
