"""What a TTT layer adds to a streaming step of Moshi 7B's size: `python -m benchmarks.streaming_step`

One frame of one stream on the CPU, dimension 4096, 32 attention heads, mini-batches of 16, float32. The TTT
layer, four `nn.Linear` of its projections' sizes and one read of its state are each timed right after a step
of the Moshi layer, as in a model, where other layers' weights have passed through the caches in between.
Figures are medians over rounds; the TTT layer's is the mean over positions in the mini-batch of such medians,
because one step in 16 also folds the updates into the weights. `own_projections` times the layer's own
modules, which on the CPU are faster than `nn.Linear` (`moshi_ttt.projection`).
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
from typing import Any

import torch
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.ttt_layer import TTTWrapper

logger = logging.getLogger(__name__)

DIM, HOST_HEADS, MINI_BATCH = 4096, 32, 16
ROUNDS = 10 * MINI_BATCH
RESULTS = Path(__file__).parent / "results"


def moshi_layer() -> StreamingTransformerLayer:
    """A temporal layer of Moshi 7B with a window of 100 frames."""
    return StreamingTransformerLayer(
        DIM,
        HOST_HEADS,
        dim_feedforward=int(4.125 * DIM),
        causal=True,
        context=100,
        rope=RotaryEmbedding(interleave=True),
        norm="rms_norm_f32",
        gating="silu",
    )


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _round(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each work, all but the layer's own measured with the layer's weights in the caches."""
    times = {}
    for name, work in works.items():
        times["layer"] = timed(works["layer"])
        if name != "layer":
            times[name] = timed(work)
    return times


@torch.no_grad()
def measure(num_heads: int) -> dict[str, float]:
    """Milliseconds of one frame: ttt, layer, projections (as `nn.Linear` and the layer's own), state."""
    torch.manual_seed(0)
    wrapper = TTTWrapper(DIM, HOST_HEADS, TTTConfig(num_heads=num_heads, mini_batch_size=MINI_BATCH))
    ttt, layer, x = wrapper.ttt, moshi_layer(), torch.randn(1, 1, DIM)
    joined = torch.randn(1, 1, ttt.wo.in_features)
    plain = [nn.Linear(p.in_features, p.out_features) for p in (ttt.wq, ttt.wk, ttt.wv, ttt.wo)]
    with ttt.streaming(1), layer.streaming(1):
        state = ttt._streaming_state
        assert state is not None
        parts = (*state.inner.weights, *state.pending.inputs, *state.pending.grads)
        works: dict[str, Callable[[], Any]] = {
            "layer": lambda: layer(x),
            "ttt": lambda: wrapper(x),
            "projections": lambda: [linear(x) for linear in plain[:3]] + [plain[3](joined)],
            "own_projections": lambda: (ttt.wq(x), ttt.wk(x), ttt.wv(x), ttt.wo(joined)),
            "state": lambda: [part.sum() for part in parts],
        }
        rounds = [_round(works) for _ in range(MINI_BATCH + ROUNDS)][MINI_BATCH:]
    result = {name: statistics.median(r[name] for r in rounds) for name in works}
    by_position = [[r["ttt"] for r in rounds[p::MINI_BATCH]] for p in range(MINI_BATCH)]
    result["ttt"] = statistics.mean(statistics.median(times) for times in by_position)
    return {name: 1e3 * seconds for name, seconds in result.items()}


def entries(device: str) -> list[dict[str, Any]]:
    """One entry for each goal; a ratio above 1 meets it."""
    few, many = measure(8), measure(HOST_HEADS)
    goals = [
        ("TTT-MLP streaming step, 8 heads", few, 0.2 * few["layer"], "20 % of the Moshi layer's step"),
        (
            "TTT-MLP streaming step, 32 heads",
            many,
            1.2 * (many["projections"] + many["state"]),
            "1.2 x four nn.Linear projections and one pass over its state",
        ),
    ]
    return [
        {
            "name": name,
            "ratio": round(against / times["ttt"], 3),
            "goal": 1.0,
            "unit": "ms",
            "ours": round(times["ttt"], 3),
            "against": round(against, 3),
            "against_what": what,
            "of_layer": round(times["ttt"] / times["layer"], 3),
            "times": {key: round(value, 3) for key, value in times.items()},
            "device": device,
        }
        for name, times, against, what in goals
    ]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    device = f"cpu-{platform.machine()}-{torch.get_num_threads()}threads"
    result = entries(device)
    for entry in result:
        logger.info(
            "%s: %.2f ms, %.0f %% of the Moshi layer beside it (%.2f ms); goal %.2f ms (%s), ratio %.2f",
            entry["name"],
            entry["ours"],
            100 * entry["of_layer"],
            entry["times"]["layer"],
            entry["against"],
            entry["against_what"],
            entry["ratio"],
        )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{device}-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps({"entries": result}, indent=2) + "\n")
    logger.info("wrote %s", path)


if __name__ == "__main__":
    main()
