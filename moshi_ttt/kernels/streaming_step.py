"""One frame of a streaming TTT-MLP on a GPU in four launches, where torch's operations need over a hundred.

Inside a captured graph a kernel costs 1 to 3 microseconds however little it does, and a frame of one stream
is little: its time would be that of its launches. Here one program has a net (a batch row's head) and a block
of its hidden units, and the launches end where all of a net's blocks must know each other's sums:

1. `keys`: unit norm, rotary embedding, target and learning rate of the token; the hidden units for its key;
   what each block gives to Z2.
2. `answers`: the gradients G2 and G1 of the inner loss; the hidden units for the query, under the weights
   that hold the mini-batch's updates; what each block gives to the answer.
3. `finish`: the answer; where the mini-batch is over, its updates are added to the weights. Elsewhere the
   weights are not touched: a branch on the GPU, which no torch operation has inside a graph.
4. `pull`: draws the weights back into the bound, where a mini-batch is over.

The naive twin is `inner_step` and `fold_finished` of `moshi_ttt.inner_loop`, whose names are used here. All
numbers are float32; a slot that the row has not filled is never read.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moshi_ttt.inner_weights import InnerBound
from moshi_ttt.kernels import streaming_kernels
from moshi_ttt.ttt_state import TTTState

kernels: Any = streaming_kernels  # what Triton makes of signatures is not what type checkers read


@dataclass
class StepRules:
    """What a layer's step needs besides its state.

    Args:
        rope: `[K, D / 2, 2]`, cosine and sine of each position in a mini-batch.
        lr_weight, lr_bias: `[H, C]` and `[H]`.
        lr_scale: the learning rate is this times a sigmoid.
        normalize_target: as `TTTConfig.normalize_target`.
        bound: of the inner weights, or None.
    """

    rope: torch.Tensor
    lr_weight: torch.Tensor
    lr_bias: torch.Tensor
    lr_scale: float
    normalize_target: bool
    bound: InnerBound | None


def fused_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, rules: StepRules, state: TTTState
) -> torch.Tensor:
    """Answer one token of every row and go on: `state` is changed in place, as by the naive twin.

    Args:
        q, k, v: what the projections gave, `[B, 1, H * D]`.
        x: their input, `[B, 1, C]`.
        rules: of the layer.
        state: of sizes for which `kernels.choice.steps_in_triton` holds.
    Returns:
        `[B, 1, H * D]` in the dtype of q.
    """
    (w1, w2), (b1, b2) = state.inner.weights, state.inner.biases
    pending, center = state.pending, state.initial
    nets, slots, width = pending.inputs[0].shape
    hidden, columns, heads = w1.shape[2], x.shape[-1], nets // state.batch_size
    # Small blocks where there are few nets, so that they cover the GPU.
    block = min(hidden, 64 if nets * hidden >= 64 * 128 else 32)
    splits, padded = hidden // block, 1 << (slots - 1).bit_length()
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    places = empty(nets, dtype=torch.long)  # of the token; the state's are advanced while others still read
    query, target, z1 = empty(nets, width), empty(nets, width), empty(nets, hidden)
    sums, answers = empty(nets, splits, width), empty(nets, splits, width)
    dots, squares = empty(nets, splits, padded), empty(nets, 2, splits)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sizes = {"H": heads, "D": width, "F": hidden, "K": slots, "BLOCK": block}
    kernels.keys[(nets, splits + 1)](
        *(q.contiguous(), k.contiguous(), v.contiguous(), x.contiguous()),
        *(rules.rope, rules.lr_weight, rules.lr_bias, rules.lr_scale),
        *(state.norm.weight, state.norm.bias, state.position, w1, b1, w2),
        *(pending.inputs[0], pending.inputs[1], pending.lr, places, query, target, z1, sums),
        **sizes,
        **{"C": columns, "BLOCK_C": min(1024, 1 << (columns - 1).bit_length())},
        NORMALIZE=rules.normalize_target,
    )
    kernels.answers[(nets, splits)](
        *(state.norm.weight, state.norm.bias, state.step_scale, places, w1, b1, w2, b2),
        *(*pending.inputs, *pending.grads, pending.lr, query, target, z1, sums, answers, dots),
        **sizes,
        PADDED=padded,
    )
    kernels.finish[(nets, splits)](
        *(state.norm.weight, state.norm.bias, state.step_scale, places, state.position, state.exec_mask),
        *(w1, b1, w2, b2, *center.weights, *center.biases, *pending.inputs, *pending.grads, pending.lr),
        *(query, answers, dots, squares, out),
        **sizes,
        PADDED=padded,
        BOUNDED=rules.bound is not None,
    )
    if rules.bound is not None:
        kernels.pull[(nets, splits)](
            *(places, state.exec_mask, w1, b1, w2, b2, *center.weights, *center.biases, squares),
            *rules.bound.radii,
            **sizes,
        )
    return out
