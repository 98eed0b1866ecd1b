"""The inner loop in C++ for the CPU: one differentiable function, in the place of `DualForm`.

The code is in `moshi_ttt/kernels/native`; it takes inner networks of any depth, in float32 and float64.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moshi_ttt.dual_form import differentiable, flat, unpacked
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.kernels.native_problem import Gradients, call, sequence
from moshi_ttt.mini_batches import Rules, Tokens


@dataclass
class _Kept:
    """What the backward pass needs of the forward pass: fields of a `Problem`.

    Args:
        starts: weights, then biases, that each group of mini-batches starts with, one group after the other.
        key_outputs, query_outputs: of the last layer, before its LayerNorm, `[N, T, D]`.
        shrinks: what the bound drew the weights back by, `[mini-batches, N, depth]`; None: there is no bound.
    """

    starts: list[torch.Tensor]
    key_outputs: torch.Tensor
    query_outputs: torch.Tensor
    shrinks: torch.Tensor | None

    @staticmethod
    def room(tokens: Tokens, state: InnerWeights, rules: Rules, group_size: int) -> "_Kept":
        """For a sequence that starts at `state`."""
        nets, length, _ = tokens.q.shape
        starts = [*state.weights, *state.biases]
        count = -(-length // rules.scale.shape[0])
        groups = -(-count // group_size) if group_size else 1
        starts += [torch.empty_like(x) for _ in range(1, groups) for x in starts]
        shrinks = None if rules.bound is None else tokens.q.new_empty(count, nets, len(state.weights))
        return _Kept(starts, torch.empty_like(tokens.k), torch.empty_like(tokens.q), shrinks)

    def is_drawn(self) -> bool:
        """Whether the bound has acted."""
        return self.shrinks is not None and bool((self.shrinks != 1).any())


def _scan(
    tokens: Tokens, state: InnerWeights, rules: Rules, group_size: int, kept: dict[str, Any]
) -> tuple[torch.Tensor, InnerWeights]:
    out, end = torch.empty_like(tokens.q), state.clone()
    call("forward", sequence(tokens, state, rules, group_size, **kept), [*end.weights, *end.biases], out)
    return out, end


class NativeForm(torch.autograd.Function):
    """The scan over mini-batches in C++; arguments and results are those of
    `moshi_ttt.dual_form.DualForm`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group_size: int,
        radii: tuple[float, ...] | None,
        factors: tuple[float, ...] | None,
        *tensors: torch.Tensor,
    ) -> Any:
        tensors = tuple(x.contiguous() for x in tensors)
        tokens, state, rules = unpacked(tensors, radii, factors)
        ctx.kept = _Kept.room(tokens, state, rules, group_size)
        out, end = _scan(tokens, state, rules, group_size, vars(ctx.kept))
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.group_size, ctx.radii, ctx.factors = group_size, radii, factors
        return out, *end.weights, *end.biases

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor | None, *d_ends: torch.Tensor | None) -> Any:
        tokens, state, rules = unpacked(ctx.saved_tensors, ctx.radii, ctx.factors)
        ends = (*state.weights, *state.biases)
        d = Gradients(
            out=torch.zeros_like(tokens.q) if d_out is None else d_out.contiguous(),
            **{name: torch.empty_like(getattr(tokens, name)) for name in ("q", "k", "target", "lr")},
            norm_weight=torch.zeros_like(rules.norm.weight),
            norm_bias=torch.zeros_like(rules.norm.bias),
            scale=rules.scale.new_zeros(tokens.q.shape[0], *rules.scale.shape),
            state=[
                torch.zeros_like(x) if given is None else given.clone(memory_format=torch.contiguous_format)
                for given, x in zip(d_ends, ends, strict=True)
            ],
            center=[torch.zeros_like(x) for x in ends] if ctx.kept.is_drawn() else None,
        )
        call("backward", sequence(tokens, state, rules, ctx.group_size, **vars(ctx.kept)), d)
        found = d.given
        of_tokens = [found[name] for name in ("q", "k", "target", "lr", "norm_weight", "norm_bias")]
        rest = (*found["state"], *_of_center(found["center"], rules))
        return None, None, None, *of_tokens, found["scale"].sum(0), *rest


def _of_center(of_nets: list[torch.Tensor] | None, rules: Rules) -> list[torch.Tensor]:
    """Gradients of the bound's center, summed over rows; none without a bound."""
    if rules.bound is None:
        return []
    centers = [*rules.bound.center.weights, *rules.bound.center.biases]
    if of_nets is None:
        return [torch.zeros_like(x) for x in centers]
    return [d.unflatten(0, (-1, x.shape[0])).sum(0) for d, x in zip(of_nets, centers, strict=True)]


def native_form(
    tokens: Tokens, state: InnerWeights, rules: Rules, checkpoint_group_size: int
) -> tuple[torch.Tensor, InnerWeights]:
    """Outputs `[N, T, D]` and last weights of a sequence; see `moshi_ttt.inner_loop.inner_loop`."""
    if torch.is_grad_enabled():
        return differentiable(NativeForm, tokens, state, rules, checkpoint_group_size)
    tensors = tuple(x.contiguous() for x in flat(tokens, state, rules))
    radii = None if rules.bound is None else rules.bound.radii
    return _scan(*unpacked(tensors, radii, rules.norm.factors), checkpoint_group_size, {})
