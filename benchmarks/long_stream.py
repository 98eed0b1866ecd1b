"""One hour in one stream: `python -m benchmarks.long_stream [MINUTES]`

The tiny model with default TTT settings hears the sample dialogues over and over for 45,000 frames in one
stream. Written are the median time of a frame, by the wall clock and by the CPU, and the memory of the
process, for every minute.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import sentencepiece
import soundfile
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from tqdm import trange

from inference.rows import Sampling
from inference.stream import open_stream
from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.config import TTTConfig
from moshi_ttt.finite_state import FiniteStateCheck
from moshi_ttt.loading import ModelConfig, find_base, load_mimi, load_tokenizer
from moshi_ttt.lora import LoRAConfig

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
FRAME = 1920
FRAMES_PER_MINUTE = 750


def tiny_parts() -> tuple[LMModel, MimiModel, sentencepiece.SentencePieceProcessor]:
    """The tiny model with TTT in its middle layers, its codec and its tokenizer."""
    torch.manual_seed(0)
    source = ModelConfig("tiny")
    base = find_base(source)
    config = TTTConfig(ttt_layer_context=50, non_ttt_layer_context=100)
    model = build_model(ModelSettings(source, "float32", LoRAConfig(), config), base)
    return model.eval(), load_mimi(base, "cpu"), load_tokenizer(base)


def speech(start: int = 0) -> Iterator[np.ndarray]:
    """Frames `[1920]` of the sample dialogues without end, from a dialogue on."""
    paths = sorted((ROOT / "sample_data/audio").glob("*.flac"))
    paths = paths[start % len(paths) :] + paths[: start % len(paths)]
    samples = np.concatenate([soundfile.read(path, dtype="float32")[0].sum(axis=1) for path in paths])
    place = 0
    while True:
        yield np.take(samples, range(place, place + FRAME), mode="wrap").clip(-1, 1)
        place = (place + FRAME) % len(samples)


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def stream(count: int) -> list[dict[str, float]]:
    """Stream so many minutes: what was measured in each."""
    model, mimi, _ = tiny_parts()
    source, found = speech(), []
    with open_stream(model, mimi, Sampling(), [FiniteStateCheck(model, 100)]) as opened:
        for _ in trange(count, unit="minute", disable=None):
            wall, cpu = [], []
            for _ in range(FRAMES_PER_MINUTE):
                frame = torch.from_numpy(next(source))
                before, before_cpu = time.perf_counter(), time.thread_time()
                answered = list(opened.hear(frame))
                wall.append(1000 * (time.perf_counter() - before))
                cpu.append(1000 * (time.thread_time() - before_cpu))
                assert len(answered) == 1
            values = {"frame_ms": median(wall), "frame_cpu_ms": median(cpu), "memory_mib": resident_mib()}
            found.append({name: round(value, 3) for name, value in values.items()})
    return found


def main(arguments: Iterator[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    count = int(next(arguments, "60"))
    minutes = stream(count)
    first, last = minutes[0], minutes[-1]
    found: dict[str, Any] = {"frames": count * FRAMES_PER_MINUTE, "machine": platform.machine()}
    found |= {"torch": torch.__version__, "threads": 1}
    found |= {f"{name}_last_over_first": round(last[name] / first[name], 4) for name in first}
    path = Path(__file__).with_name("results") / f"long_stream_{count}min.json"
    path.write_text(json.dumps(found | {"minutes": minutes}, indent=1) + "\n")
    logger.info("%s\nwrote %s", json.dumps(found, indent=1), path)


if __name__ == "__main__":
    main(iter(sys.argv[1:]))
