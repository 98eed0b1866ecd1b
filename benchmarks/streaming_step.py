"""What a TTT layer adds to a streaming step of Moshi 7B's size.

One frame of one stream on the CPU, dimension 4096, 32 attention heads, mini-batches of 16, float32. The TTT
layer, four `nn.Linear` of its projections' sizes and one read of its state are each timed right after a step
of the Moshi layer, as in a model, where other layers' weights have passed through the caches in between.
Figures are medians over rounds; the TTT layer's is the mean over positions in the mini-batch of such medians,
because one step in 16 also folds the updates into the weights. `own_projections` times the layer's own
modules, which on the CPU are faster than `nn.Linear` (`moshi_ttt.projection`).
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn

from benchmarks.harness import Entry, Options, cpu_sec, lower_is_better
from moshi_ttt.config import TTTConfig
from moshi_ttt.ttt_layer import TTTWrapper

DIM, HOST_HEADS, MINI_BATCH = 4096, 32, 16
ROUNDS = 5 * MINI_BATCH


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


def _round(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each work, all but the layer's own measured with the layer's weights in the caches."""
    times = {}
    for name, work in works.items():
        times["layer"] = cpu_sec(works["layer"])
        if name != "layer":
            times[name] = cpu_sec(work)
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


def entries(options: Options) -> list[Entry]:
    few, many = measure(8), measure(HOST_HEADS)
    # A Moshi 7B has 32 of these layers. Its depformer is left out: it would make ours look better.
    whole, added = 32 * few["layer"], 16 * few["ttt"]
    bytes_moved = 1.2 * (many["projections"] + many["state"])
    times = {key: round(value, 3) for key, value in few.items()}
    return [
        lower_is_better(
            "streaming step, 8 heads in 16 of 32 layers",
            added,
            0.15 * whole,
            1.0,
            "ms a frame",
            "15 % of plain Moshi's temporal layers",
            share=round(added / whole, 4),
            times=times,
        ),
        lower_is_better(
            "streaming step of a layer, 32 heads",
            many["ttt"],
            bytes_moved,
            1.0,
            "ms a frame",
            "1.2 x four nn.Linear projections and a pass over its state",
            of_layer=round(many["ttt"] / many["layer"], 3),
            times={key: round(value, 3) for key, value in many.items()},
        ),
    ]
