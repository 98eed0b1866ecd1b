"""Cross-entropy of Moshi's two heads, without the logits of all frames in memory.

Heads are the end of the graph and their targets are known. So a part of the frames is taken forward and at
once backward, and only the gradients are kept: with 7B and 100 s x 16 clips the text logits alone would be
2.5 GB in float32 and the depformer's activations about 30 GB, or a second forward pass of it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from moshi.models.lm import LMModel
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moshi_ttt.depformer import Depformer
from moshi_ttt.linear import linear

# Frames taken at a time: 0.25 GiB of text logits in float32; about 4 GiB of a 7B's depformer in bfloat16.
TEXT_FRAMES = 2048
DEPFORMER_FRAMES = 2500

# Sum of weight x cross-entropy of the frames in [start, stop), from their `[n, C]`.
PartOfLoss = Callable[[torch.Tensor, int, int], torch.Tensor]


def weighted_nll_sum(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum of weight x cross-entropy in nats, a float32 scalar.

    Args:
        logits: `[..., card]`; NaN is allowed where the weight is 0.
        targets, weight: `[...]`.
    """
    counts = weight > 0
    # Out of place of the NaN: a product with 0 would keep it, and no host synchronisation is needed.
    logits = torch.where(counts[..., None], logits, 0).flatten(0, -2).float()
    nll = F.cross_entropy(logits, torch.where(counts, targets, 0).flatten(), reduction="none")
    return (nll * weight.flatten()).sum()


def _nll_sum(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`weighted_nll_sum` of logits in the order of the model's steps: they are NaN only if the model is."""
    targets = torch.where(weight > 0, targets, 0)
    return _NLLSum.apply(logits, targets, weight)  # type: ignore[no-any-return]


class _NLLSum(torch.autograd.Function):
    """Sum of weight x cross-entropy, whose gradient takes the memory of what is kept for it."""

    @staticmethod
    def forward(ctx, logits, targets, weight):
        targets, weight = targets[..., None], weight[..., None]
        log_shares = logits.log_softmax(-1, dtype=torch.float32)
        ctx.save_for_backward(log_shares, targets, weight)
        ctx.dtype = logits.dtype
        return -(log_shares.gather(-1, targets) * weight).sum()

    @staticmethod
    def backward(ctx, grad):
        log_shares, targets, weight = ctx.saved_tensors
        weight = weight * grad
        logits_grad = log_shares.exp_().mul_(weight).scatter_add_(-1, targets, -weight)
        return logits_grad.to(ctx.dtype), None, None


def text_loss(
    model: LMModel, hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Sum of weight x loss of the text head; hidden `[N, C]`, targets and weight `[N]`."""

    def part(frames: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        logits = linear(model.text_linear, frames)
        return _nll_sum(logits, targets[start:stop], weight[start:stop])

    trained = [p for p in model.text_linear.parameters() if p.requires_grad]
    return loss_in_parts(part, hidden, TEXT_FRAMES, trained)


def audio_loss(
    model: LMModel,
    hidden: torch.Tensor,
    codes: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Sum of weight x loss of the depformer.

    Args:
        hidden: `[N, C]`.
        codes: what the frames' steps predict, `[N, 17]`.
        targets, weight: `[N, K]`.
    """
    depformer = Depformer(model)

    def part(frames: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        logits = depformer.logits(codes[start:stop], frames)
        return _nll_sum(logits, targets[start:stop].t(), weight[start:stop].t())

    return loss_in_parts(part, hidden, DEPFORMER_FRAMES, depformer.trained())


def loss_in_parts(
    part: PartOfLoss, hidden: torch.Tensor, frames: int, trained: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The sum of `part` over all frames of `hidden` `[N, C]`, at most `frames` at a time, differentiable.

    Args:
        trained: what else `part` computes with that needs gradients.
    """
    if torch.is_grad_enabled() and (trained or hidden.requires_grad):
        return _LossInParts.apply(part, frames, hidden, *trained)  # type: ignore[no-any-return]
    sums = [part(hidden[start:stop], start, stop) for start, stop in _parts(hidden.shape[0], frames)]
    return torch.stack(sums).sum()


def _parts(total: int, most: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of parts as equal as can be, at most `most` long: kernels are compiled for few sizes."""
    size = -(-total // -(-total // most))
    for start in range(0, total, size):
        yield start, min(start + size, total)


class _LossInParts(torch.autograd.Function):
    """Forward and backward of each part at once. What is kept are the gradients of the sum."""

    @staticmethod
    def forward(ctx, part, frames, hidden, *trained):
        # Sums over parts are float32, as sums inside a product are.
        sums: list[torch.Tensor] = []
        hidden_grad = torch.empty_like(hidden) if hidden.requires_grad else None
        losses = []
        for start, stop in _parts(hidden.shape[0], frames):
            leaf = hidden[start:stop].detach().requires_grad_(hidden_grad is not None)
            with torch.enable_grad():
                loss = part(leaf.view_as(leaf), start, stop)  # module hooks of torch want no leaf
            inputs = [*trained, leaf] if hidden_grad is not None else list(trained)
            grads = list(torch.autograd.grad(loss, inputs))
            if hidden_grad is not None:
                hidden_grad[start:stop] = grads.pop()
            if losses:
                for total, grad in zip(sums, grads, strict=True):
                    total.add_(grad)
            else:  # products and sums over frames, each in memory of its own
                sums = [grad.float() for grad in grads]
            losses.append(loss.detach())
        ctx.save_for_backward(hidden_grad, *sums)
        ctx.dtypes = [x.dtype for x in trained]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, *sums = ctx.saved_tensors
        # In float32: a factor rounded to bfloat16 would be off for all alike.
        scaled = [total.mul_(grad).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)]
        if hidden_grad is not None:
            hidden_grad = (hidden_grad.float() * grad).to(hidden_grad.dtype)
        return None, None, hidden_grad, *scaled


def loss_of_logits(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`_nll_sum` of all frames' logits `[N, card]`, which become float32 a part at a time.

    For heads that are split over processes: their weights are whole in one call only.
    """
    sums = []
    for rows in zip(*(x.split(TEXT_FRAMES) for x in (logits, targets, weight)), strict=True):
        if torch.is_grad_enabled():
            sums.append(checkpoint(_nll_sum, *rows, use_reentrant=False, preserve_rng_state=False))
        else:
            sums.append(_nll_sum(*rows))
    return torch.stack(sums).sum()
