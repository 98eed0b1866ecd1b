"""What the inner learner achieves: its loss at the learned weights, and before and after each token's step.

For token t with key k_t the loss `1/2 || LN(f(k_t; W)) - target_t ||^2` is taken at

* the learned weights W_0: what a layer without memory would have,
* W(t - 1), the weights that answered the token before: what has been learnt so far,
* W(t), the weights that answer token t: its own step included.

That memory helps at all shows in the second being below the first; that the inner learning rate fits, in the
third being below the second. (Figure 5 of arXiv 2407.04620 shows the three.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel

from moshi_ttt.inner_network import InnerNorm, answer, fold, gelu, key_pass, layer_norm
from moshi_ttt.inner_tokens import InnerTokens
from moshi_ttt.inner_weights import InnerWeights, within
from moshi_ttt.integration import ttt_layers
from moshi_ttt.ttt_layer import TTTBase

LOSSES: tuple[str, ...] = ("at_start", "before", "after")


@dataclass
class InnerReport:
    """What the inner learner did with some tokens.

    Args:
        losses: at the learned weights, before and after each token's step, `[3, N, T]`.
        steps: size of each token's own step in each inner layer, `lr || X^T G ||` of weight and bias
            together, before the factor 1 / (position + 1), `[layers, N, T]`.
        weights: after the last token, its step included.
    """

    losses: torch.Tensor
    steps: torch.Tensor
    weights: InnerWeights


@torch.no_grad()
def inner_report(tokens: InnerTokens, learned: InnerWeights) -> InnerReport:
    """Losses and steps of tokens that the inner learner is about to see.

    Args:
        tokens: a sequence, or one streamed token of every row.
        learned: the learned weights of every row and head.
    """
    at_start = _loss(_predict(tokens.k, learned, tokens.norm), tokens.target)
    if tokens.pending is not None:
        return _streamed(tokens, at_start)
    size, state, parts = tokens.step_scale.shape[0], tokens.weights, []
    splits = zip(*(x.split(size, 1) for x in (tokens.k, tokens.target, tokens.lr)), strict=True)
    for k, target, lr in splits:
        keys = key_pass(k, target, state, tokens.norm)
        inputs, grads = keys.inputs, keys.grads
        scale = tokens.step_scale[: k.shape[1], : k.shape[1]]
        etas = (_one_token_earlier(scale) * lr[:, None], scale * lr[:, None])
        losses = [_loss(answer(k, eta, inputs, grads, state, tokens.norm) - k, target) for eta in etas]
        parts.append((torch.stack(losses), _steps(lr, inputs, grads)))
        state = within(fold(inputs, grads, etas[1][:, -1], state), tokens.bound)
    before_after = torch.cat([losses for losses, _ in parts], dim=-1)
    steps = torch.cat([step for _, step in parts], dim=-1)
    return InnerReport(torch.cat((at_start[None], before_after)), steps, state)


def _streamed(tokens: InnerTokens, at_start: torch.Tensor) -> InnerReport:
    pending, position = tokens.pending, tokens.position
    assert pending is not None
    assert position is not None
    state, norm = tokens.weights, tokens.norm
    scales = _one_token_earlier(tokens.step_scale)[position], tokens.step_scale[position]
    etas = [scale * pending.lr for scale in scales]
    answers = [answer(tokens.k, eta[:, None], pending.inputs, pending.grads, state, norm) for eta in etas]
    losses = [_loss(out - tokens.k, tokens.target) for out in answers]
    nets = torch.arange(position.shape[0], device=position.device)
    inputs = [x[nets, position][:, None] for x in pending.inputs]
    grads = [g[nets, position][:, None] for g in pending.grads]
    return InnerReport(
        torch.stack([at_start, *losses]),
        _steps(tokens.lr, inputs, grads),
        fold(pending.inputs, pending.grads, etas[1], state),
    )


def _one_token_earlier(step_scale: torch.Tensor) -> torch.Tensor:
    """Row t has the scales of W(t - 1): none for the first token, which finds the mini-batch's start."""
    return torch.cat((torch.zeros_like(step_scale[:1]), step_scale[:-1]))


def _loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[N, T]`. The prediction is what the inner network answers to a key, the key itself not added."""
    return 0.5 * (prediction - target).square().sum(-1)


def _predict(k: torch.Tensor, weights: InnerWeights, norm: InnerNorm) -> torch.Tensor:
    x = k
    for index, (weight, bias) in enumerate(zip(weights.weights, weights.biases, strict=True)):
        x = torch.baddbmm(bias, gelu(x) if index else x, weight)
    return layer_norm(x, norm)


def _steps(lr: torch.Tensor, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> torch.Tensor:
    # X^T G of one token has rank 1: its norm is the product of two. The bias adds an input of 1.
    sizes = [
        (x.square().sum(-1) + 1).sqrt() * torch.linalg.vector_norm(g, dim=-1)
        for x, g in zip(inputs, grads, strict=True)
    ]
    return lr * torch.stack(sizes)


@contextmanager
def recorded_inner_losses(model: LMModel) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Collect the inner losses of every TTT layer while the model runs.

    Yields:
        For each TTT layer's index one tensor `[3, B, H, T]` a call (a frame, in streaming), on the CPU: see
        `LOSSES`.
    """
    layers = ttt_layers(model)
    if not layers:
        raise ValueError("no TTT layers found in this model: it has no inner losses")
    found: dict[int, list[torch.Tensor]] = {index: [] for index, _ in layers}

    def watch(index: int, ttt: TTTBase) -> None:
        def observe(tokens: InnerTokens) -> None:
            rows = tokens.k.shape[0] // ttt.num_heads
            report = inner_report(tokens, ttt.initial_weights(rows))
            found[index].append(report.losses.unflatten(1, (rows, -1)).cpu())

        assert ttt.observer is None, "one observer at a time"
        ttt.observer = observe

    for index, layer in layers:
        watch(index, layer.seq_modeling_block.ttt_layer.ttt)
    try:
        yield found
    finally:
        for _, layer in layers:
            layer.seq_modeling_block.ttt_layer.ttt.observer = None
