"""sLM21, StoryCloze and SALMon in their own layouts, in small, cut from real speech."""

import csv
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import sphn
from training import dialogue

from evaluation.paper_metrics.salmon import PARTS

RATE = 16000  # of the published data sets
FRAME = RATE * 0.08  # samples
LEXICAL = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
SYNTACTIC = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")


@cache
def speech() -> np.ndarray:
    """Both speakers' turns one after the other, without the silence between, `[n]` at 16 kHz."""
    samples = np.concatenate([dialogue(number).sum(1) for number in (1, 2, 3, 4)])
    voiced = np.convolve(np.abs(samples), np.ones(2400) / 2400, "same") > 1e-3
    return sphn.resample(samples[voiced][None], 24000, RATE)[0]


def cut(number: int, frames: float) -> np.ndarray:
    """A piece of speech of so many codec frames; other numbers begin elsewhere."""
    start = int(number * 0.311 * RATE) % (len(speech()) - 20 * RATE)
    return speech()[start : start + int(frames * FRAME)]


def write_clip(path: Path, number: int, frames: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, cut(number, frames), RATE)
    return path


def write_gold(folder: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> Path:
    path = folder / "gold.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_swuggy(
    root: Path, ids: int = 4, voices: tuple[str, ...] = ("v1", "v2"), split: str = "dev"
) -> Path:
    """lexical/SPLIT: ids of which every second is out of vocabulary, said by each voice."""
    folder = root / "lexical" / split
    rows = []
    for n, (word, voice) in enumerate((w, v) for w in range(ids) for v in voices):
        for correct in ("1", "0"):
            stem = f"Stem_{word}_{voice}_{'rw' if correct == '1' else 'nw'}"
            write_clip(folder / f"{stem}.wav", 2 * n + int(correct), 4.3 + n % 3 + 2 * int(correct))
            rows.append(
                {
                    "filename": stem,
                    "id": str(word),
                    "voice": voice,
                    "frequency": ("", "12", "0", "3.5")[word % 4] if correct == "1" else "",
                    "word": f"word{word}" if correct == "1" else "",
                    "phones": "W ER D",
                    "length": "3",
                    "correct": correct,
                }
            )
    write_gold(folder, LEXICAL, rows)
    return root


def write_sblimp(root: Path, split: str = "dev") -> Path:
    """syntactic/SPLIT: two types of different sizes that use the same ids."""
    folder = root / "syntactic" / split
    rows = []
    kinds = [("agreement", "plain", n) for n in range(3)] + [("binding", "far", n) for n in range(2)]
    for n, (kind, subtype, number) in enumerate(kinds):
        for correct in ("1", "0"):
            stem = f"{kind}{number}{'ab'[int(correct)]}"
            write_clip(folder / f"{stem}.wav", 100 + 2 * n + int(correct), 9 - n + int(correct))
            rows.append(
                {
                    "filename": stem,
                    "id": str(number),
                    "voice": "A",
                    "type": kind,
                    "subtype": subtype,
                    "transcription": "the cats sleep",
                    "correct": correct,
                }
            )
    write_gold(folder, SYNTACTIC, rows)
    return root


def write_storycloze(folder: Path, stories: int = 3, speakers: tuple[str, ...] = ()) -> Path:
    """NUMBER_UUID_LABEL.wav, flat or in folders of speakers."""
    for s, speaker in enumerate(speakers or ("",)):
        for story in range(stories):
            for offset, label in enumerate(("correct", "incorrect")):
                stem = f"{2 * story + offset}_0a1b{story}-77-cd_{label}"
                write_clip(folder / speaker / f"{stem}.wav", 200 + 10 * s + 2 * story + offset, 12 + story)
    return folder


def write_salmon(folder: Path, pairs: int = 1) -> Path:
    for p, part in enumerate(PARTS):
        for sample in range(pairs):
            for label in range(2):
                name = f"sample_{sample}_{label}.wav"
                write_clip(folder / part / name, 300 + 3 * p + 2 * sample + label, 6 + p % 2)
    return folder
