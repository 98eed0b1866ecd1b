"""Long recordings in Libri-Light's layout, made of the sample's sentences: real speech, several voices.

`python -m long_recordings FOLDER [SPEAKERS] [SECONDS]` writes such a folder.
"""

import json
import sys
from pathlib import Path

import numpy as np
import soundfile
from training import dialogue

RATE = 16000


def voice(number: int) -> list[np.ndarray]:
    """The sentences as one of several speakers says them: played faster or slower."""
    sentences = [channel for n in (1, 2, 3, 4) for channel in dialogue(n).T]
    speed = 24000 / RATE * 0.8 * 1.07**number
    return [np.interp(np.arange(0, len(s) - 1, speed), np.arange(len(s)), s) for s in sentences]


def chapter(speaker: int, seconds: float, seed: int) -> np.ndarray:
    """Sentences in a random order with pauses between, 16 kHz."""
    draw, said = np.random.default_rng([speaker, seed]), voice(speaker)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds * RATE:
        parts += [said[draw.integers(len(said))], np.zeros(int(draw.uniform(0.1, 0.6) * RATE))]
    return np.concatenate(parts)[: round(seconds * RATE)].astype(np.float32)


def libri_light(root: Path, speakers: int = 6, seconds: float = 12.0, chapters: int = 1) -> Path:
    """Write FOLDER/small/SPEAKER/BOOK/CHAPTER.flac with its json; returns FOLDER/small.

    Chapters are of different lengths.
    """
    small = root / "small"
    for speaker in range(speakers):
        book = small / str(100 + speaker) / f"emma_{speaker}"
        book.mkdir(parents=True)
        for number in range(chapters):
            name = book / f"emma_{number:02d}_austen_64kb"
            length = seconds * (1 + 0.1 * ((3 * speaker + number) % 5))
            soundfile.write(name.with_suffix(".flac"), chapter(speaker, length, number), RATE)
            about = {
                "speaker": str(100 + speaker),
                "book_meta": {"id": "158", "title": "Emma", "genre": ["Romance"], "meta_genre": "Literature"},
                "snr": 12.5,
                "voice_activity": [[0.0, length]],
            }
            name.with_suffix(".json").write_text(json.dumps(about))
    return small


if __name__ == "__main__":
    print(libri_light(Path(sys.argv[1]), *(int(a) for a in sys.argv[2:4])))
