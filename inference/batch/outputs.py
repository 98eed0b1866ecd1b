"""What an item's folder holds, whole or not at all.

`input.wav` (the user), `output.wav` (Moshi, as long), `output_16k.wav`, `stereo.wav` (left user, right Moshi,
as MTR-DuplexBench has it), `text.json` (timed words), `output.json` (Full-Duplex-Bench's), `perplexity.json`,
`meta.json` (with what and how fast).
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchaudio

from inference.stream import TimedWord, write_wav

META = "meta.json"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_answer(
    folder: Path, user: torch.Tensor, audio: torch.Tensor, words: list[TimedWord], rate: int
) -> None:
    """The files of an answer; user and audio are samples `[n]` at `rate`."""
    text = " ".join(word.text for word in words)
    write_wav(folder / "input.wav", [user], rate)
    write_wav(folder / "output.wav", [audio], rate)
    write_wav(folder / "output_16k.wav", [torchaudio.functional.resample(audio, rate, 16000)], 16000)
    write_wav(folder / "stereo.wav", [user, audio], rate)
    write_json(folder / "text.json", {"text": text, "words": [asdict(word) for word in words]})
    chunks = [{"text": word.text, "timestamp": [word.start, word.end]} for word in words]
    write_json(folder / "output.json", {"text": text, "chunks": chunks})


class ItemFolder:
    """The folder of one item: written beside its place, then put there.

    Args:
        output (Path): folder of all items.
        item_id (str): its name in it.
    """

    def __init__(self, output: Path, item_id: str):
        self.place = output / item_id
        self.unfinished = self.place.with_name(f".{self.place.name}.unfinished")
        self.replaced = self.place.with_name(f".{self.place.name}.replaced")

    def finished_with(self) -> dict[str, Any] | None:
        """The settings that a finished folder was made with, or None.

        Raises:
            ValueError: there is a folder that this command did not make.
        """
        if not self.place.exists():
            return None
        if not (self.place / META).is_file():
            raise ValueError(
                f"{self.place} exists and holds no {META}: it is not of this command; choose another output"
            )
        return json.loads((self.place / META).read_text(encoding="utf-8"))["settings"]

    def open(self) -> Path:
        """The folder to write in, with what was written so far."""
        self.unfinished.mkdir(parents=True, exist_ok=True)
        return self.unfinished

    def abandon(self) -> None:
        """Leave nothing of what was written, or of what was being replaced."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def end(self, meta: dict[str, Any]) -> None:
        """Write `meta.json` and put the folder in its place, replacing one that is there."""
        write_json(self.unfinished / META, meta)
        if self.place.exists():
            # Whoever looks finds the old folder, none, or the new one: never half of one.
            self.place.rename(self.replaced)
        self.unfinished.rename(self.place)
        shutil.rmtree(self.replaced, ignore_errors=True)
