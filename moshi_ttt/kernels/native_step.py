"""One token of a stream in C++: in the place of `inner_step` and `fold_finished` of `moshi_ttt.inner_loop`.

Torch's operations go over all weights four times a token, each time through memory. This reads each once.
"""

import torch

from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.kernels.native_problem import Pending, call, network, sequence
from moshi_ttt.mini_batches import Rules, Tokens
from moshi_ttt.pending import PendingUpdates


def native_step(
    tokens: Tokens, position: torch.Tensor, state: InnerWeights, pending: PendingUpdates, rules: Rules
) -> torch.Tensor:
    """Answer one token `[N, 1, ...]` and put its update into slot `position` `[N]`: see `inner_step`."""
    contiguous = Tokens(*(x.contiguous() for x in tokens.tensors()))
    out = torch.empty_like(contiguous.q)
    given = Pending(
        inputs=list(pending.inputs), grads=list(pending.grads), lr=pending.lr, positions=position.contiguous()
    )
    weights = [*state.weights, *state.biases]
    call("step", sequence(contiguous, state, rules), weights, given, out)
    return out


def native_fold(
    finished: torch.Tensor | None,
    state: InnerWeights,
    pending: PendingUpdates,
    step_scale: torch.Tensor,
    bound: InnerBound | None,
) -> None:
    """Add the updates of mini-batches that are over to the weights, in place: see `fold_finished`."""
    nets = pending.lr.shape[0]
    if finished is None:
        finished = torch.ones(nets, dtype=torch.bool)
    given = Pending(
        inputs=list(pending.inputs), grads=list(pending.grads), lr=pending.lr, finished=finished.contiguous()
    )
    call("finish", network(state, step_scale, bound), [*state.weights, *state.biases], given)
