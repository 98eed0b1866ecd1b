"""What a TTT layer remembers of a stream."""

from dataclasses import dataclass

import torch
from moshi.modules.streaming import State

from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.pending import PendingUpdates


@dataclass
class TTTState(State):
    """Streaming state of a TTT layer, updated in place.

    Args:
        inner: weights at the start of each row's mini-batch; copies, never the parameters.
        pending: what the current mini-batch has gathered.
        position: tokens that each row's mini-batch has seen, `[B]`.
        initial: the learned weights of one row, for resets.
        norm, step_scale: learned constants of the stream, laid out for the step.
    """

    inner: InnerWeights
    pending: PendingUpdates
    position: torch.Tensor
    initial: InnerWeights
    norm: InnerNorm
    step_scale: torch.Tensor

    def reset(self, reset_mask: torch.Tensor) -> None:
        super().reset(reset_mask)
        self.position.masked_fill_(reset_mask, 0)
        nets = reset_mask.repeat_interleave(self.pending.lr.shape[0] // self.batch_size)
        current = (*self.inner.weights, *self.inner.biases)
        learned = (*self.initial.weights, *self.initial.biases)
        for now, start in zip(current, learned, strict=True):
            now.copy_(torch.where(nets[:, None, None], start.repeat(self.batch_size, 1, 1), now))
        self.pending.clear(nets)
