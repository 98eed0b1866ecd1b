"""The inner network of a TTT layer in one mini-batch: forward, its own gradients, its update.

The maths is in `moshi_ttt/inner_loop.py`. Everything works on N = batch rows x heads nets at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moshi_ttt.inner_weights import InnerWeights

LAYER_NORM_EPS = 1e-6


@dataclass
class InnerNorm:
    """The LayerNorm of the inner loss, and how far each inner layer follows the gradients of that.

    Args:
        weight, bias: `[N, 1, D]`, one for each row and head.
        factors: of the step sizes of each inner layer; None: all are 1.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    factors: tuple[float, ...] | None = None

    def of_nets(self, nets: slice) -> "InnerNorm":
        """Of some nets."""
        return InnerNorm(self.weight[nets], self.bias[nets], self.factors)


def layer_norm(x: torch.Tensor, norm: InnerNorm) -> torch.Tensor:
    """LayerNorm over the last axis with one weight and bias for each row and head, `[N, T, D]`."""
    return torch.addcmul(norm.bias, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), norm.weight)


def layer_norm_l2_grad(z: torch.Tensor, target: torch.Tensor, norm: InnerNorm) -> torch.Tensor:
    """Gradient of `1/2 || LN(z) - target ||^2` with respect to z, `[N, T, D]`."""
    width = z.shape[-1:]
    normed, mean, inv_std = torch.native_layer_norm(z, width, None, None, LAYER_NORM_EPS)
    grad = torch.addcmul(norm.bias - target, normed, norm.weight) * norm.weight
    # Torch's own backward kernels: fused, and differentiable for the outer loss.
    return torch.ops.aten.native_layer_norm_backward(
        grad, z, width, mean, inv_std, None, None, [True, False, False]
    )[0]


def gelu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """GELU in its tanh form."""
    if out is None:
        return F.gelu(x, approximate="tanh")
    return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`grad` times the derivative of `gelu` at x."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def gelu_slope(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Derivative of `gelu` at x, written into `out`."""
    return torch.ops.aten.gelu_backward.grad_input(out.fill_(1), x, approximate="tanh", grad_input=out)


def gelu_second(x: torch.Tensor) -> torch.Tensor:
    """Second derivative of `gelu` at x.

    With a the argument of tanh, a' and a'' its derivatives and t = tanh(a), it is
    `(1 - t^2) (a' + x a'' / 2 - x t a'^2)`.
    """
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = (square * (scale * cubic)).add_(scale).mul_(x).tanh_()
    first = (square * (3 * scale * cubic)).add_(scale)  # a'
    inner = square.mul_(6 * scale * cubic).add_(scale)  # a' + x a'' / 2
    inner.sub_(first.mul_(first).mul_(x).mul_(t))
    return inner.addcmul_(inner, t.mul_(t), value=-1)


def _back_through(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`grad W^T`, `[N, T, d_in]`: the gradient `[N, T, d_out]` at a layer's input."""
    if grad.shape[1] == 1:
        # The same product, with the weight read in its own order: less than half the time for one token.
        return torch.bmm(weight, grad.transpose(1, 2)).view(grad.shape[0], 1, -1)
    return torch.bmm(grad, weight.transpose(1, 2))


@dataclass
class KeyPass:
    """What the inner network made of the keys of a mini-batch, at the weights at its start.

    Args:
        inputs: X of each layer, `[N, T, d_in]`.
        outputs: Z of each layer, before its GELU, `[N, T, d_out]`.
        grads: G of each layer, the loss gradients at Z, times the layer's step factor.
    """

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    grads: list[torch.Tensor]


def key_pass(k: torch.Tensor, target: torch.Tensor, state: InnerWeights, norm: InnerNorm) -> KeyPass:
    """X, Z and G of every layer for keys `[N, T, D]`, at the weights of `state`."""
    inputs, outputs = [k], []
    for index, (weight, bias) in enumerate(zip(state.weights, state.biases, strict=True)):
        outputs.append(torch.baddbmm(bias, inputs[-1], weight))
        if index + 1 < len(state.weights):
            inputs.append(gelu(outputs[-1]))
    grads = [layer_norm_l2_grad(outputs[-1], target, norm)]
    for weight, hidden in zip(reversed(state.weights[1:]), reversed(outputs[:-1]), strict=True):
        grads.append(gelu_backward(_back_through(weight, grads[-1]), hidden))
    grads.reverse()
    if norm.factors is not None:
        grads = [factor * grad for factor, grad in zip(norm.factors, grads, strict=True)]
    return KeyPass(inputs, outputs, grads)


def query_pass(
    q: torch.Tensor,
    eta: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    state: InnerWeights,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and outputs of every layer for queries `[N, T, D]`, each with its own weights W(t).

    No W(t) is formed.

    Args:
        eta: `[N, T, S]`, step size that token s contributes to the weights of token t; 0 hides it.
        inputs, grads: X and G of the S tokens, for every layer.
    """
    xs, zs = [q], []
    for index, (weight, bias) in enumerate(zip(state.weights, state.biases, strict=True)):
        # eta (x X^T + 1): the 1 is the input of the bias.
        steps = torch.addcmul(eta, torch.bmm(xs[-1], inputs[index].transpose(1, 2)), eta)
        zs.append(torch.baddbmm(torch.baddbmm(bias, xs[-1], weight), steps, grads[index], alpha=-1))
        if index + 1 < len(state.weights):
            xs.append(gelu(zs[-1]))
    return xs, zs


def answer(
    q: torch.Tensor,
    eta: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    state: InnerWeights,
    norm: InnerNorm,
) -> torch.Tensor:
    """Outputs for queries `[N, T, D]`; the arguments are those of `query_pass`."""
    _, zs = query_pass(q, eta, inputs, grads, state)
    return q + layer_norm(zs[-1], norm)


def fold(
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    step: torch.Tensor,
    state: InnerWeights,
    out: InnerWeights | None = None,
) -> InnerWeights:
    """Weights after the updates of S tokens with step sizes `[N, S]` (c times lr).

    Args:
        out: where to write them; None makes new ones.
    """
    weights, biases = [], []
    for layer, (x, g, weight, bias) in enumerate(
        zip(inputs, grads, state.weights, state.biases, strict=True)
    ):
        new_weight, new_bias = (None, None) if out is None else (out.weights[layer], out.biases[layer])
        # The steps go to the narrower factor.
        x, scaled = (x * step[..., None], g) if x.shape[-1] < g.shape[-1] else (x, g * step[..., None])
        weights.append(torch.baddbmm(weight, x.transpose(1, 2), scaled, alpha=-1, out=new_weight))
        biases.append(torch.baddbmm(bias, step[:, None], g, alpha=-1, out=new_bias))
    return InnerWeights(tuple(weights), tuple(biases))
