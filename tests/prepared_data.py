"""Recordings of several lengths and folders prepared from them, for the tests."""

import json
from pathlib import Path

import numpy as np
import soundfile
from training import compose_config, dialogue, own_logging

from configs.typed import typed_config
from finetune.data.prepare import PrepareConfig, prepare

FRAME = 1920  # samples
CHUNK_SEC = 0.64  # 8 frames
LENGTHS = (20, 5, 27.5, 8, 13)  # frames of the recordings: whole, partial and single chunks
TINY_SHARDS = 1.7 / 3600  # hours: 3 shards


def write_recordings(folder: Path, lengths=LENGTHS) -> Path:
    """A jsonl of recordings of so many frames each, with words of both speakers throughout."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, frames in enumerate(lengths):
        samples = dialogue(index % 4 + 1)[24000 * 2 :][: int(frames * FRAME)]
        soundfile.write(folder / f"{index}.wav", samples, 24000)
        starts = np.arange(0.03 * index, frames / 12.6, 0.23)
        words = [
            [
                ("amiable", "yes", "naïve")[n % 3],
                [start, start + 0.1],
                f"SPEAKER_{'MAIN' if n % 4 else 'USER'}",
            ]
            for n, start in enumerate(starts)
        ]
        (folder / f"{index}.json").write_text(json.dumps({"alignments": words}))
        lines.append(json.dumps({"path": f"{index}.wav", "duration": len(samples) / 24000}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def run_prepare(output: Path, *overrides: str) -> Path:
    """What `python -m finetune.data.prepare output=OUTPUT OVERRIDES` does, with the tiny Mimi."""
    settings = {f"output={output}", "model=tiny", "device=cpu", f"shard_hours={TINY_SHARDS}", *overrides}
    config = typed_config(compose_config(*settings, name="prepare"), PrepareConfig, unused=("data.train",))
    with own_logging():
        return prepare(config)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but for what a killed last step left."""
    left_over = (".tmp.prepared", ".tmp.index", ".tmp.sources", ".tmp.plan")
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(left_over)]
    return {path.name: path.read_bytes() for path in paths}
