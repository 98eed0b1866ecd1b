"""Backward pass of a group of mini-batches of the inner loop's dual form.

The chain rule through the equations of `moshi_ttt/inner_loop.py`. The tests hold it against autograd of the
reference. As in the forward pass, what does not wait for the mini-batch after is done for all of a group at
once. In the comments `dX` is the gradient of the outer loss at X; names without d are those of the forward
pass. Tensors of a group are `[M, N, K, ...]`.
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
    keys = _Keys(trace, queries, rules)
    for index in reversed(range(d_out.shape[0])):
        if index in trace.outside:
            _backward_bound(trace.outside[index], rules, d)
        keys.backward(index, d)
    d_eta = queries.d_eta
    for d_scaled, grad in zip(keys.d_scaled, trace.keys.grads, strict=True):
        d_eta[:, :, -1] += (d_scaled * grad).sum(-1)
    d_target = keys.loss.finish(d)
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
        d_answers: of the outputs of each layer for the queries.
    """

    def __init__(self, trace: Trace, d_out: torch.Tensor, rules: Rules, d: Gradients):
        keys, eta = trace.keys, trace.eta
        self.d_eta = torch.zeros_like(eta)
        self.d_inputs, self.d_grads, self.d_answers = [], [], []
        d_z = _backward_layer_norm(trace.answers[-1], d_out, rules.norm, d)
        d_x = d_z
        for layer in reversed(range(len(trace.starts.weights))):
            x, key, grad = trace.queries[layer], keys.inputs[layer], keys.grads[layer]
            ones = _bmm(x, key.mT).add_(1)
            d_steps = _bmm(d_z, grad.mT).neg_()
            self.d_eta.addcmul_(d_steps, ones)
            d_products = d_steps.mul_(eta)
            self.d_grads.append(_bmm(ones.mul_(eta).mT, d_z).neg_())
            self.d_inputs.append(_bmm(d_products.mT, x))
            self.d_answers.append(d_z)
            d_x = _bmm(d_z, trace.starts.weights[layer][:-1].mT)
            d_x.flatten(0, 1).baddbmm_(d_products.flatten(0, 1), key.flatten(0, 1))
            if layer > 0:
                d_z = gelu_backward(d_x, trace.answers[layer - 1])
        self.d_q = d_x.add_(d_out)
        for of_layers in (self.d_inputs, self.d_grads, self.d_answers):
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
    """Backward pass of the keys of a group, a mini-batch at a time.

    `left` and `right` are the factors of what a mini-batch adds to the gradient of a layer's weight: of its
    queries, of its keys and, in all layers but the first, of G W^T; one product for all three.
    """

    def __init__(self, trace: Trace, queries: _Queries, rules: Rules):
        keys = trace.keys
        self.trace, self.keys, self.size = trace, keys, trace.eta.shape[-1]
        self.d_inputs, self.d_grads = queries.d_inputs, queries.d_grads
        self.step = trace.eta[:, :, -1, :, None]
        self.scaled = [self.step * grad for grad in keys.grads]
        self.d_scaled = [torch.empty_like(grad) for grad in keys.grads]
        # With U_l = G_(l+1) W_(l+1)^T, G_l is gelu'(Z_l) U_l.
        hidden = zip(keys.outputs[:-1], keys.throughs, strict=True)
        self.curves = [gelu_second(z).mul_(through) for z, through in hidden]
        self.loss = _LossGrad(keys.outputs[-1], trace.tokens.target, rules.norm)
        self.left, self.right = [], []
        for layer, (x, answer) in enumerate(zip(trace.queries, queries.d_answers, strict=True)):
            left, right = [x, keys.inputs[layer]], [answer, torch.empty_like(answer)]
            if layer > 0:
                left.append(torch.empty_like(keys.inputs[layer]))
                right.append(keys.grads[layer])
            self.left.append(torch.cat(left, 2))
            self.right.append(torch.cat(right, 2))

    def backward(self, index: int, d: Gradients) -> None:
        """Of one mini-batch: `d.state` as in `backward_group`, and the group's gradients at `index`."""
        keys, size = self.keys, self.size
        d_inputs, d_grads = ([x[index] for x in xs] for xs in (self.d_inputs, self.d_grads))
        # W' = W - X^T (step G), b' = b - sum(step G)
        for layer, (d_weight, d_bias) in enumerate(zip(d.weights, d.biases, strict=True)):
            d_scaled = self.d_scaled[layer][index]
            torch.baddbmm(d_bias, keys.inputs[layer][index], d_weight, beta=-1, alpha=-1, out=d_scaled)
            d_grads[layer].addcmul_(d_scaled, self.step[index])
            d_inputs[layer].baddbmm_(self.scaled[layer][index], d_weight.mT, alpha=-1)
        d_outputs = [right[index][:, size : 2 * size] for right in self.right]
        starts = [weight[index] for weight in self.trace.starts.weights]
        for layer, curve in enumerate(self.curves):
            torch.mul(curve[index], d_grads[layer], out=d_outputs[layer])
            d_through = self.left[layer + 1][index][:, 2 * size :]
            torch.mul(d_grads[layer], keys.slopes[layer][index], out=d_through)
            d_grads[layer + 1].baddbmm_(d_through, starts[layer + 1])
        d_outputs[-1].copy_(self.loss.backward(index, d_grads[-1]))
        for layer in reversed(range(len(starts))):
            d_inputs[layer].baddbmm_(d_outputs[layer], starts[layer].mT)
            if layer > 0:
                d_outputs[layer - 1].addcmul_(d_inputs[layer], keys.slopes[layer - 1][index])
            right = self.right[layer][index]
            d.weights[layer].baddbmm_(self.left[layer][index].mT, right)
            d.biases[layer].add_(right[:, : 2 * size].sum(1, keepdim=True))


class _LossGrad:
    """Backward pass through G = J a of the last layer, with a = weight (weight n + bias - target).

    n is z normalised, r its inverse deviation, and J = r (1 - mean - n mean(n .)) the Jacobian of n(z), which
    is symmetric and depends on z itself through n and r.
    """

    def __init__(self, z: torch.Tensor, target: torch.Tensor, norm: InnerNorm):
        self.z, self.norm, self.square = z, norm, norm.weight**2
        self.normed, self.mean, self.inv_std = torch.native_layer_norm(
            z, z.shape[-1:], None, None, LAYER_NORM_EPS
        )
        self.error = torch.addcmul(norm.bias - target, self.normed, norm.weight)
        self.a = self.error * norm.weight
        a_n = (self.a * self.normed).mean(-1, keepdim=True)
        self.r_a_n = self.inv_std * a_n
        # r has the derivative -r^2 n / D, and dr = (dG . G) / r.
        self.by_r = (self.a - self.a.mean(-1, keepdim=True)).addcmul_(self.normed, a_n, value=-1)
        self.by_r.mul_(self.inv_std**2)
        self.d_a = torch.empty_like(z)

    def backward(self, index: int, d_grad: torch.Tensor) -> torch.Tensor:
        """dz of a mini-batch."""
        normed, inv_std = self.normed[index], self.inv_std[index]

        def through_normed(grad: torch.Tensor) -> torch.Tensor:
            z, mean = self.z[index], self.mean[index]
            return torch.ops.aten.native_layer_norm_backward(
                grad, z, z.shape[-1:], mean, inv_std, None, None, [True, False, False]
            )[0]

        d_a = self.d_a[index].copy_(through_normed(d_grad))
        r_g_n = (d_grad * normed).mean(-1, keepdim=True).mul_(inv_std)
        d_normed = (d_a * self.square).addcmul_(d_grad, self.r_a_n[index], value=-1)
        d_normed.addcmul_(self.a[index], r_g_n, value=-1)
        d_r_by_r = (d_grad * self.by_r[index]).mean(-1, keepdim=True)
        return through_normed(d_normed).addcmul_(normed, d_r_by_r, value=-1)

    def finish(self, d: Gradients) -> torch.Tensor:
        """dtarget of the group; what the LayerNorm gets is added to `d`."""
        d_error = self.d_a * self.norm.weight
        d.norm_weight += (self.d_a * self.error + d_error * self.normed).sum((0, 2))[:, None]
        d.norm_bias += d_error.sum((0, 2))[:, None]
        return d_error.neg_()
