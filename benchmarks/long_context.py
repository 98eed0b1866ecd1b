"""Scoring long recordings in chunks against frame by frame.

One stream of random codes through the tiny Moshi with default TTT settings in its middle layers and windows
of 50 and 100 frames: `nll_by_frame` in chunks of 512 frames, and `nll_streamed`, which is
Moshi's own streaming with one frame a call. Both give the same NLLs. The ratio is of medians of frames per
CPU second, measured by turns in one process.
"""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.harness import Entry, Options, device_name
from inference.likelihood import nll_by_frame, nll_streamed
from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.config import TTTConfig
from moshi_ttt.loading import ModelConfig, find_base
from moshi_ttt.lora import LoRAConfig

GOAL = 20.0
CHUNK = 512


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
        started = time.process_time()
        found = work()
        return time.process_time() - started, found

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


def entries(options: Options) -> list[Entry]:
    found = measure(rounds=5)
    return [
        Entry(
            "long context, chunks against frame by frame",
            round(found["chunked"] / found["streamed"], 2),
            GOAL,
            "frames/CPU s",
            round(found["chunked"]),
            round(found["streamed"]),
            "scoring frame by frame",
            device_name(1),
            {"apart_nats": found["apart"]},
        )
    ]
