"""Small data sets of real speech, good ones to be spoilt."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

SAMPLE = Path(__file__).parents[1] / "sample_data"
MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"


def copy_sample(folder: Path, names: tuple[int, ...] = (1, 2, 3, 4)) -> Path:
    """A list of the sample's dialogues with these numbers, and their audio and words, to change."""
    folder.mkdir(parents=True)
    for number in names:
        for ending in ("flac", "json"):
            shutil.copy(SAMPLE / "audio" / f"dialogue_{number}.{ending}", folder)
    return write_list(folder, [folder / f"dialogue_{number}.flac" for number in names])


def write_list(folder: Path, recordings: list[Path]) -> Path:
    lines = [{"path": path.name, "duration": soundfile.info(path).duration} for path in recordings]
    jsonl = folder / "list.jsonl"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return jsonl


def words_of(path: Path) -> list[Any]:
    return json.loads(path.with_suffix(".json").read_text())["alignments"]


def set_words(path: Path, words: list[Any]) -> None:
    path.with_suffix(".json").write_text(json.dumps({"alignments": words}))


def samples_of(path: Path) -> np.ndarray:
    """Samples `[n, C]` of 24 kHz."""
    return soundfile.read(path, dtype="float32", always_2d=True)[0]


def set_samples(path: Path, samples: np.ndarray, **options: Any) -> None:
    soundfile.write(path, samples, 24000, **options)
