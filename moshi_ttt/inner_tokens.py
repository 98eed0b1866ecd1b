"""What an inner learner is about to learn from, for those who look on."""

from dataclasses import dataclass

import torch

from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.pending import PendingUpdates


@dataclass
class InnerTokens:
    """What the inner learner is about to learn from, and the weights it has: for those who look on.

    Args:
        k, target: `[N, T, D]`; T is 1 in streaming.
        lr: `[N, T]`.
        weights: at the start of the sequence, or of the mini-batch in streaming.
        norm, step_scale: of the inner loop.
        bound: of the weights over the sequence; None in streaming, and where there is none.
        pending: streaming: the updates of the mini-batch, this token's included; else None.
        position: streaming: the token's position in its mini-batch, `[N]`; else None.
    """

    k: torch.Tensor
    target: torch.Tensor
    lr: torch.Tensor
    weights: InnerWeights
    norm: InnerNorm
    step_scale: torch.Tensor
    bound: InnerBound | None = None
    pending: PendingUpdates | None = None
    position: torch.Tensor | None = None
