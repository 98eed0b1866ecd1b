"""The inner learner by autograd, one token and one weight matrix at a time: slow, obvious, the ground truth.

Nothing here shares code with `inner_loop`, so that a mistake there shows.
"""

import torch
from torch.nn import functional as F

Weights = list[torch.Tensor]


def _network(x: torch.Tensor, weights: Weights, biases: Weights) -> torch.Tensor:
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if index > 0:
            x = F.gelu(x, approximate="tanh")
        x = x @ weight + bias
    return x


def reference_inner_loop(
    q: torch.Tensor,
    k: torch.Tensor,
    target: torch.Tensor,
    lr: torch.Tensor,
    weights: Weights,
    biases: Weights,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    token_scale: torch.Tensor,
    factors: list[float] | None = None,
) -> tuple[torch.Tensor, Weights, Weights]:
    """The inner learner of one batch row and one head.

    Args:
        q, k, target: `[T, D]`.
        lr: `[T]`.
        weights: n tensors `[d_in, d_out]`.
        biases: n tensors `[d_out]`.
        norm_weight, norm_bias: `[D]`.
        token_scale: c of each position in a mini-batch, `[K]`.
        factors: of the step sizes of each layer; None: all are 1.
    Returns:
        Outputs `[T, D]` and the weights and biases after the last token. Differentiable in every argument.
    """
    size = token_scale.shape[0]
    num_layers = len(weights)
    outs = []
    now = [*weights, *biases]
    for t in range(q.shape[0]):
        position = t % size
        if position == 0:
            start = now
            gradient_sum = [torch.zeros_like(p) for p in start]
        prediction = _network(k[t], start[:num_layers], start[num_layers:])
        normed = F.layer_norm(prediction, prediction.shape, norm_weight, norm_bias, eps=1e-6)
        loss = 0.5 * (normed - target[t]).square().sum()
        gradients = torch.autograd.grad(loss, start, create_graph=True)
        rates = [lr[t] * factor for factor in factors or [1.0] * num_layers] * 2  # weights, then biases
        gradient_sum = [
            total + rate * g for total, rate, g in zip(gradient_sum, rates, gradients, strict=True)
        ]
        now = [p - token_scale[position] * g for p, g in zip(start, gradient_sum, strict=True)]
        out = _network(q[t], now[:num_layers], now[num_layers:])
        outs.append(q[t] + F.layer_norm(out, out.shape, norm_weight, norm_bias, eps=1e-6))
    return torch.stack(outs), now[:num_layers], now[num_layers:]
