"""Scoring long recordings in chunks against frame by frame: `python -m benchmarks.long_context`

One stream of random codes through the tiny Moshi with default TTT settings in its middle layers and windows
of 50 and 100 frames, on one thread: `nll_by_frame` in chunks of 512 frames, and `nll_streamed`, which is
Moshi's own streaming with one frame a call. Both give the same NLLs. The ratio is of medians of frames per
second, measured by turns in one process.
"""

import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from inference.likelihood import nll_by_frame, nll_streamed
from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.config import TTTConfig
from moshi_ttt.loading import ModelConfig, find_base
from moshi_ttt.lora import LoRAConfig

logger = logging.getLogger(__name__)

GOAL = 20.0
CHUNK = 512
RESULTS = Path(__file__).parent / "results"


def measure(rounds: int, frames: int = 2048, streamed: int = 128) -> dict[str, float]:
    """Frames a second of both ways, and how far their NLLs are apart.

    Args:
        rounds: measurements of each.
        frames, streamed: how many frames the two ways score in each.
    """
    torch.manual_seed(0)
    base = find_base(ModelConfig("tiny"))
    ttt = TTTConfig(layers="middle", gate_init=0.5, ttt_layer_context=50, non_ttt_layer_context=100)
    model = build_model(ModelSettings(ModelConfig("tiny"), "float32", LoRAConfig(), ttt), base)
    codes = torch.randint(0, 256, (1, 17, frames))
    few = codes[..., :streamed]

    def timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        found = work()
        return time.perf_counter() - started, found

    rates: dict[str, list[float]] = {"chunked": [], "streamed": []}
    apart = 0.0
    for _ in range(rounds + 1):  # the first warms up
        seconds, whole = timed(lambda: nll_by_frame(model, codes, CHUNK))
        rates["chunked"].append(frames / seconds)
        seconds, slow = timed(lambda: nll_streamed(model, few))
        rates["streamed"].append(streamed / seconds)
        same = slice(0, streamed - max(model.delays))  # what comes behind the end is known to one of them
        apart = max(apart, float((whole[..., :streamed] - slow)[..., same].abs().max()))
    return {name: statistics.median(values[1:]) for name, values in rates.items()} | {"apart": apart}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    found = measure(rounds=7)
    ratio = found["chunked"] / found["streamed"]
    logger.info(
        "chunks of %d: %.0f frames/s, frame by frame: %.0f; ratio %.1f, goal %.0f; apart by %.1g nats",
        CHUNK,
        found["chunked"],
        found["streamed"],
        ratio,
        GOAL,
        found["apart"],
    )
    device = f"cpu-{platform.machine()}-1thread"
    entry = {
        "name": "long context, chunks against frame by frame",
        "ratio": round(ratio / GOAL, 3),
        "goal": 1.0,
        "unit": "frames/s",
        "ours": round(found["chunked"]),
        "against": round(GOAL * found["streamed"]),
        "against_what": "20 x scoring frame by frame",
        "times_frame_by_frame": round(ratio, 1),
        "apart_nats": found["apart"],
        "device": device,
    }
    path = RESULTS / f"long-context-{device}-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps({"entries": [entry]}, indent=2) + "\n")
    logger.info("wrote %s", path)


if __name__ == "__main__":
    main()
