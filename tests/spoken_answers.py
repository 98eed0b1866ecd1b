"""Answers as inference.batch leaves them, of real speech laid out so that all about it is known."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import dialogue

from finetune.data.voice import VoiceConfig, frame_power, runs, voiced
from inference.batch.outputs import ItemFolder, write_answer
from inference.stream import TimedWord

RATE = 24000
FRAME = 480  # samples of 20 ms, what voice activity is told in


@cache
def pieces(shortest: int = 60) -> list[np.ndarray]:
    """Pieces of speech without a pause: whole frames, `shortest` or a few more, the first and last loud."""
    found = []
    for number, side in ((1, 0), (1, 1), (2, 0), (4, 0), (4, 1)):
        channel = dialogue(number)[:, side]
        power = frame_power(channel[None], FRAME)[:, 0]
        loud = voiced(power, VoiceConfig(fill_sec=0.0, range_db=25.0))
        for start, end in runs(voiced(power, VoiceConfig(fill_sec=0.1))):
            places = np.flatnonzero(loud[start:end]) + start
            while len(places) and (behind := places[places >= places[0] + shortest - 1]).size:
                found.append(channel[places[0] * FRAME : (behind[0] + 1) * FRAME])
                places = behind[1:]
    return found


def turn(number: int) -> np.ndarray:
    """One side's whole sentence of a sample dialogue, without the silence around it."""
    channel = dialogue(abs(number))[:, 0 if number > 0 else 1]
    places = np.flatnonzero(channel)
    return channel[places[0] : places[-1] + 1]


def laid_out(frames: int, *placed: tuple[int, np.ndarray]) -> np.ndarray:
    """Silence of so many frames with pieces in it, each at its frame."""
    samples = np.zeros(frames * FRAME, np.float32)
    for start, piece in placed:
        samples[start * FRAME : start * FRAME + len(piece)] = piece
    return samples


def write_spoken(
    folder: Path, item_id: str, user: np.ndarray, moshi: np.ndarray, text: str = "", **meta: Any
) -> Path:
    """A finished item, as inference.batch writes it; keys of `meta` replace what meta.json says."""
    place = ItemFolder(folder, item_id)
    words = [TimedWord(word, 0.1 * n, 0.1 * n + 0.1) for n, word in enumerate(text.split())]
    write_answer(place.open(), torch.from_numpy(user), torch.from_numpy(moshi), words, RATE)
    settings = {"input_sha256": item_id, "max_sec": None, "generate": True}
    content = {
        "checkpoint": "runs/a/checkpoints/checkpoint_000500/consolidated",
        "step": 500,
        "files_sha256": {"ttt.safetensors": "1"},
        "base_sha256": {"moshi": "2"},
        "sampling": {"temp": 0.8, "seed": len(item_id)},
    }
    settings |= meta.pop("settings", {})
    place.end(content | meta | {"settings": settings})
    return place.place
