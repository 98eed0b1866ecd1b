"""What one conversation has written into the inner weights: numbers for a live view.

They are read from the streaming state after a step, so they cost nothing on other steps and work where steps
are captured GPU graphs. The weights are those at the start of the current mini-batch.
"""

import math
from typing import Any

import torch
from moshi.models.lm import LMModel

from moshi_ttt.integration import ttt_layers


@torch.no_grad()
def memory_of(model: LMModel, row: int) -> list[dict[str, Any]]:
    """For each TTT layer of a streaming model, and a row of its batch:

    `layer`, its number; `gate`, the mean size of the weight that the gate gives to TTT; `norm` and `change`,
    of each inner layer, Frobenius norms over all heads of its weight, and of its difference to the learned
    one. None stands for what is not finite.
    """
    found, numbers = [], []
    for index, layer in ttt_layers(model):
        ttt = layer.seq_modeling_block.ttt_layer.ttt
        state = ttt._streaming_state
        assert state is not None, f"layer {index} is not streaming"
        heads = slice(row * ttt.num_heads, (row + 1) * ttt.num_heads)
        pairs = list(zip(state.inner.weights, state.initial.weights, strict=True))
        norms = [now[heads].norm() for now, _ in pairs]
        changes = [(now[heads] - start).norm() for now, start in pairs]
        gate = layer.seq_modeling_block.gate.ttt_weight().abs().mean()
        found.append((index, len(pairs)))
        numbers += [gate.float(), *norms, *changes]
    if not found:
        return []
    fetched = torch.stack(numbers).tolist()  # one transfer
    values = iter(value if math.isfinite(value) else None for value in fetched)
    return [
        {
            "layer": index,
            "gate": next(values),
            "norm": [next(values) for _ in range(inner)],
            "change": [next(values) for _ in range(inner)],
        }
        for index, inner in found
    ]
