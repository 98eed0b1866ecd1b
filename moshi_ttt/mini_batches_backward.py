"""Backward pass of a group of mini-batches of the inner loop's dual form.

The chain rule through the equations of `moshi_ttt/inner_loop.py`. The tests hold it against autograd of the
reference. What does not wait for the mini-batch after is done for all of a group at once. In the comments
`dX` is the gradient of the outer loss at X; names without d are those of the forward pass.
Tensors of a group are `[M, N, K, ...]`.
"""

from dataclasses import dataclass

import torch

from moshi_ttt.inner_network import LAYER_NORM_EPS, InnerNorm, gelu_backward, gelu_second
from moshi_ttt.inner_weights import InnerBound, InnerWeights, within
from moshi_ttt.mini_batches import Rules, Tokens, Trace


@dataclass
class Gradients:
    """Gradients that a backward pass over mini-batches, last to first, adds up.

    All of them are changed in place.

    Args:
        state: of the inner weights, then of the biases, at the mini-batch that is being worked on.
        norm_weight, norm_bias: of the LayerNorm `[N, 1, D]`.
        scale: of the step scales `[K, K]`.
        center: of the bound's center, weights then biases; empty without a bound.
    """

    state: list[torch.Tensor]
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    scale: torch.Tensor
    center: list[torch.Tensor]

    @staticmethod
    def begin(state: list[torch.Tensor], rules: Rules) -> "Gradients":
        """Those of the last weights and biases; zero for all else."""
        bound = rules.bound
        centers = () if bound is None else (*bound.center.weights, *bound.center.biases)
        return Gradients(
            state,
            torch.zeros_like(rules.norm.weight),
            torch.zeros_like(rules.norm.bias),
            torch.zeros_like(rules.scale),
            [torch.zeros_like(x) for x in centers],
        )

    def of_nets(self, nets: slice, rules: Rules) -> "Gradients":
        """Views for some nets; what is shared stays whole."""
        heads = slice(0) if rules.bound is None else rules.bound.heads_of(nets)
        return Gradients(
            [x[nets] for x in self.state],
            self.norm_weight[nets],
            self.norm_bias[nets],
            self.scale,
            [x[heads] for x in self.center],
        )

    @property
    def weights(self) -> list[torch.Tensor]:
        """Of the inner weights."""
        return self.state[: len(self.state) // 2]

    @property
    def biases(self) -> list[torch.Tensor]:
        """Of the inner biases."""
        return self.state[len(self.state) // 2 :]


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Products of the matrices of a group."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def backward_group(trace: Trace, d_out: torch.Tensor, rules: Rules, d: Gradients) -> Tokens:
    """Gradients of the group's tokens; those of the rest are added to `d`.

    On entry `d.state` is the gradient of the weights that it ended with, on return that of the weights that
    it started from.

    Args:
        d_out: of its outputs.
    """
    queries = _Queries(trace, d_out, rules, d)
    keys = _Keys(trace, queries)
    for index in reversed(range(d_out.shape[0])):
        if index in trace.outside:
            _backward_bound(trace.outside[index], rules, d)
        keys.backward(index, d)
    d_eta = queries.d_eta
    for factor, d_scaled, grad in zip(trace.factors, keys.d_scaled, trace.grads, strict=True):
        d_eta[:, :, -1].add_((d_scaled * grad).sum(-1), alpha=factor)
    d_target, d_weight, d_bias = trace.loss.finish()
    d.norm_weight += d_weight
    d.norm_bias += d_bias
    length = d_eta.shape[-1]
    scale = rules.scale[:length, :length]
    d.scale[:length, :length].add_((d_eta * trace.tokens.lr[:, :, None, :]).sum((0, 1)))
    return Tokens(queries.d_q, keys.d_inputs[0], d_target, (d_eta * scale).sum(2))


def _backward_bound(folded: InnerWeights, rules: Rules, d: Gradients) -> None:
    """Through the bound, which rarely acts: by autograd."""
    assert rules.bound is not None
    center = rules.bound.center
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (*folded.weights, *folded.biases)]
        centers = [x.detach().requires_grad_() for x in (*center.weights, *center.biases)]
        depth = len(folded.weights)
        state = InnerWeights(tuple(leaves[:depth]), tuple(leaves[depth:]))
        bound = InnerBound(InnerWeights(tuple(centers[:depth]), tuple(centers[depth:])), rules.bound.radii)
        end = within(state, bound)
    grads = torch.autograd.grad(
        [*end.weights, *end.biases],
        [*leaves, *centers],
        d.state,
        allow_unused=True,
        materialize_grads=True,
    )
    for now, new in zip(d.state, grads[: 2 * depth], strict=True):
        now.copy_(new)
    for total, new in zip(d.center, grads[2 * depth :], strict=True):
        total.add_(new)


class _Queries:
    """Backward pass of the queries of a group.

    Attributes:
        d_q: of the queries.
        d_eta: of the step sizes, without what the updates of the weights give.
        d_inputs, d_grads: of X and G of the keys of each layer, as far as the queries read them.
        d_reads: of the outputs of each layer for the queries.
    """

    def __init__(self, trace: Trace, d_out: torch.Tensor, rules: Rules, d: Gradients):
        self.d_eta = torch.zeros_like(trace.etas[0])
        self.d_inputs, self.d_grads, self.d_reads = [], [], []
        products = [*trace.products, _bmm(trace.queries[-1], trace.inputs[-1].mT).add_(1)]
        d_x = _backward_layer_norm(trace.reads[-1], d_out, rules.norm, d)
        for layer in reversed(range(len(products))):
            # z = x W + b - (eta * (x X^T + 1)) G
            d_z = d_x if layer + 1 == len(products) else gelu_backward(d_x, trace.reads[layer])
            x, key, grad = trace.queries[layer], trace.inputs[layer], trace.grads[layer]
            d_steps = _bmm(d_z, grad.mT).neg_()
            self.d_eta.addcmul_(d_steps, products[layer], value=trace.factors[layer])
            eta = trace.etas[layer]
            d_products = d_steps.mul_(eta)
            self.d_grads.append(_bmm(products[layer].mul_(eta).mT, d_z).neg_())
            self.d_inputs.append(_bmm(d_products.mT, x))
            self.d_reads.append(d_z)
            d_x = _bmm(d_z, trace.starts.weights[layer].mT)
            d_x.flatten(0, 1).baddbmm_(d_products.flatten(0, 1), key.flatten(0, 1))
        self.d_q = d_x.add_(d_out)
        for of_layers in (self.d_inputs, self.d_grads, self.d_reads):
            of_layers.reverse()


def _backward_layer_norm(z: torch.Tensor, d_out: torch.Tensor, norm: InnerNorm, d: Gradients) -> torch.Tensor:
    """Through LN(z): dz."""
    width = z.shape[-1:]
    normed, mean, inv_std = torch.native_layer_norm(z, width, None, None, LAYER_NORM_EPS)
    d.norm_weight += (d_out * normed).sum((0, 2))[:, None]
    d.norm_bias += d_out.sum((0, 2))[:, None]
    return torch.ops.aten.native_layer_norm_backward(
        d_out * norm.weight, z, width, mean, inv_std, None, None, [True, False, False]
    )[0]


class _Keys:
    """Backward pass of the keys of a group, a mini-batch at a time."""

    def __init__(self, trace: Trace, queries: _Queries):
        self.trace, self.d_reads = trace, queries.d_reads
        self.d_inputs, self.d_grads = queries.d_inputs, queries.d_grads
        self.steps = [eta[:, :, -1, :, None] for eta in trace.etas]
        self.ones = torch.ones_like(trace.etas[0][0, :, :1])
        self.d_scaled = [torch.empty_like(x) for x in trace.scaled]
        # With U_l = G_(l+1) W_(l+1)^T, G_l is gelu'(Z_l) U_l.
        hidden = zip(trace.outputs, trace.throughs, strict=True)
        self.curves = [gelu_second(z).mul_(through) for z, through in hidden]

    def backward(self, index: int, d: Gradients) -> None:
        """Of one mini-batch: `d.state` as in `backward_group`, and the group's gradients at `index`."""
        trace, depth = self.trace, len(self.d_reads)
        inputs, grads, scaled = ([x[index] for x in xs] for xs in (trace.inputs, trace.grads, trace.scaled))
        d_inputs, d_grads = ([x[index] for x in xs] for xs in (self.d_inputs, self.d_grads))
        starts = [weight[index] for weight in trace.starts.weights]
        # W' = W - X^T (step G), b' = b - sum(step G)
        for layer, (d_weight, d_bias) in enumerate(zip(d.weights, d.biases, strict=True)):
            d_scaled = self.d_scaled[layer][index]
            torch.baddbmm(d_bias, inputs[layer], d_weight, beta=-1, alpha=-1, out=d_scaled)
            d_grads[layer].addcmul_(d_scaled, self.steps[layer][index])
            d_inputs[layer].baddbmm_(scaled[layer], d_weight.mT, alpha=-1)
        slopes = [slope[index] for slope in trace.slopes]
        for layer, slope in enumerate(slopes):
            d_through = d_grads[layer] * slope
            d_grads[layer + 1].baddbmm_(d_through, starts[layer + 1])
            d.weights[layer + 1].baddbmm_(d_through.mT, grads[layer + 1])
        d_z = trace.loss.backward(index, d_grads[-1])
        for layer in reversed(range(depth)):
            d_read = self.d_reads[layer][index]
            d.weights[layer].baddbmm_(inputs[layer].mT, d_z)
            d.weights[layer].baddbmm_(trace.queries[layer][index].mT, d_read)
            d.biases[layer].baddbmm_(self.ones, d_z).baddbmm_(self.ones, d_read)
            d_inputs[layer].baddbmm_(d_z, starts[layer].mT)
            if layer > 0:
                d_z = (d_inputs[layer] * slopes[layer - 1]).addcmul_(
                    d_grads[layer - 1], self.curves[layer - 1][index]
                )
