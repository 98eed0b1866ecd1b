"""The scan over mini-batches by the Triton kernels, group by group, forward and back.

Kernels do what passes over the inner weights; what is done for all mini-batches of a group alike, before or
after them, are batched operations of torch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from moshi_ttt.inner_network import LAYER_NORM_EPS
from moshi_ttt.kernels.mlp_backward import into_weights, through_answers
from moshi_ttt.kernels.mlp_forward import answer, learn
from moshi_ttt.kernels.packing import MiniBatches, packed
from moshi_ttt.mini_batches import Rules


@dataclass(frozen=True)
class Launch:
    """How the kernels are cut into pieces.

    Args:
        rows: a mini-batch is filled up to so many, a power of 2 of at least 16, Triton's least.
        block: hidden units of a program.
        warps: warps of a program.
    """

    rows: int = 16
    block: int = 64
    warps: int = 8


def fitting(device: torch.device) -> Launch:
    """The launch on a device.

    On a GPU mini-batches are filled up to 64 rows: with 16 rows and 8 warps `learn` read where it must not
    (H100, Triton 3.6), with 64 all kernels were right to rounding. `benchmarks.gpu sections=launches` tries
    others.
    """
    return Launch(rows=64) if device.type == "cuda" else Launch()


@dataclass
class Sizes:
    """Sizes of a problem.

    Args:
        nets, heads: nets, and heads of one row: the bound's centers.
        length: tokens.
        size, rows: tokens of a mini-batch, and rows that hold them.
        width, hidden: of the inner network.
    """

    nets: int
    heads: int
    length: int
    size: int
    rows: int
    width: int
    hidden: int

    @property
    def mini_batches(self) -> int:
        return -(-self.length // self.size)


def precision() -> str:
    """How products of float32 are made: torch's own setting for matrix products decides.

    "highest", its default, is float32 to rounding (three products of tf32 each), "high" and "medium" are
    tf32.
    """
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Group:
    """Some mini-batches of a sequence, what the kernels need of them, and what they leave.

    Args:
        sizes: of the sequence.
        tokens: of these mini-batches.
        rules: LayerNorm, step scales, bound.
        last: how many tokens the last of them has.
        launch: how kernels are cut.
    """

    def __init__(self, sizes: Sizes, tokens: MiniBatches, rules: Rules, last: int, launch: Launch):
        self.sizes, self.tokens, self.rules, self.launch = sizes, tokens, rules, launch
        self.count = tokens.q.shape[0]
        self.blocks = max(1, sizes.hidden // launch.block)
        missing = sizes.rows - sizes.size
        self.scale = F.pad(rules.scale, (0, missing, 0, missing))  # [R, R]
        lengths = torch.full((self.count,), sizes.size, device=tokens.q.device)
        lengths[-1] = last
        self.last_row = lengths - 1  # [M]
        self.eta = self.scale * tokens.lr[:, :, None, :]  # [M, N, R, R]
        self.step = (self.scale[self.last_row][:, None] * tokens.lr).contiguous()  # [M, N, R]
        self.ones1 = tokens.q @ tokens.k.transpose(2, 3) + 1
        self.seen = self.eta * self.ones1
        bound = rules.bound
        # The type says Any: what follows these in a call is, to the type checker, more of them.
        self.radii: Any = (1.0, 1.0) if bound is None else bound.radii
        # Where nothing bounds the weights, the kernels read no center.
        self.center = tokens.q if bound is None else packed(bound.center.weights, bound.center.biases)

    def empty(self, *shape: int) -> torch.Tensor:
        return self.tokens.q.new_empty(shape)

    def parts(self, *shape: int) -> torch.Tensor:
        """Room for what each block gives to a sum, `[M, N, J, ...]`."""
        return self.empty(self.count, self.sizes.nets, self.blocks, *shape)

    def _constants(self) -> dict[str, Any]:
        return {
            "KP": self.sizes.rows,
            "D": self.sizes.width,
            "F": self.sizes.hidden,
            "BF": self.sizes.hidden // self.blocks,
            "BOUND": self.rules.bound is not None,
            "P": precision(),
            "num_warps": self.launch.warps,
            "num_stages": 1,
        }

    def forward(self, states: torch.Tensor, keep: bool) -> "Kept":
        """Run the mini-batches from `states[0]`.

        With `keep`, the weights after mini-batch i go to `states[i + 1]`; without, they are changed in place.
        """
        sizes, tokens, norm = self.sizes, self.tokens, self.rules.norm
        nets, rows, width, hidden = sizes.nets, sizes.rows, sizes.width, sizes.hidden
        trace = self.empty(self.count, nets, rows * (3 * hidden + 2 * width))
        answers, overlaps = self.parts(rows, width), self.parts(rows, rows)
        factors = self.empty(states.shape[0], nets, 2)
        outputs, squares = self.empty(nets, self.blocks, rows, width), self.empty(nets, self.blocks, 2)
        grid, constants = (nets, self.blocks), self._constants()

        def keys(slot: int, index: int, has_changed: int) -> None:
            of_net = tokens.k, states, self.center, squares, factors, trace, outputs
            where = nets, sizes.heads, slot, index, has_changed
            learn[grid](*of_net, *where, *self.radii, **constants)

        read = (tokens.q, tokens.k, tokens.target, self.seen, self.step, norm.weight, norm.bias)
        for i in range(self.count):
            slot, following = (i, i + 1) if keep else (0, 0)
            keys(slot, i, int(i > 0))
            written = states, self.center, squares, trace, outputs, answers, overlaps
            answer[grid](*read, *written, nets, sizes.heads, slot, following, i, **constants)
        if self.rules.bound is not None:
            keys(self.count if keep else 0, -1, 1)
        wide = trace[..., 3 * rows * hidden :].unflatten(2, (2, rows, width))
        g2, ones2 = wide[:, :, 1], overlaps.sum(2) + 1
        return Kept(states, trace, factors, g2, ones2, answers.sum(2) - (self.eta * ones2) @ g2)

    def outputs(self, kept: "Kept") -> torch.Tensor:
        """`q + LN(answers)`, `[M, N, R, D]`."""
        normed = F.layer_norm(kept.answers, kept.answers.shape[-1:], eps=LAYER_NORM_EPS)
        return self.tokens.q + torch.addcmul(self.rules.norm.bias, normed, self.rules.norm.weight)

    def backward(self, kept: "Kept", d_out: torch.Tensor, d: "Sums") -> MiniBatches:
        """Gradients of the tokens from those of the outputs `[M, N, R, D]`; the rest is added to `d`."""
        normed, d_answer2 = self._through_output(kept.answers, d_out)
        d.norm_weight += (d_out * normed).sum((0, 2))[:, None]
        d.norm_bias += d_out.sum((0, 2))[:, None]
        d_steps2 = -(d_answer2 @ kept.g2.transpose(2, 3))
        d_g2_base = -((kept.ones2 * self.eta).transpose(2, 3) @ d_answer2)
        found = self._launch_backward(kept, d, d_answer2, d_steps2 * self.eta, d_g2_base)
        d_q, d_k, d_steps1, d_last = (part.sum(2) for part in found)

        d_eta = d_steps2 * kept.ones2 + d_steps1 * self.ones1
        index = self.last_row[:, None, None, None].expand(-1, self.sizes.nets, 1, self.sizes.rows)
        d_eta.scatter_add_(2, index, d_last[:, :, None])
        d_products1 = d_steps1 * self.eta
        d_q += d_products1 @ self.tokens.k + d_out
        d_k += d_products1.transpose(2, 3) @ self.tokens.q
        d.scale += (d_eta * self.tokens.lr[:, :, None, :]).sum((0, 1))
        return MiniBatches(d_q, d_k, d.target, (d_eta * self.scale).sum(2))

    def _through_output(
        self, answers: torch.Tensor, d_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """LN(answers) without weight and bias, and the gradient at `answers`."""
        width = answers.shape[-1:]
        normed, mean, inv_std = torch.native_layer_norm(answers, width, None, None, LAYER_NORM_EPS)
        d_answers = torch.ops.aten.native_layer_norm_backward(
            d_out * self.rules.norm.weight, answers, width, mean, inv_std, None, None, [True, False, False]
        )[0]
        return normed, d_answers

    def _launch_backward(
        self,
        kept: "Kept",
        d: "Sums",
        d_answer2: torch.Tensor,
        d_products2: torch.Tensor,
        d_g2_base: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """What blocks give to dq, dk, the first layer's dsteps and deta's last row, `[M, N, J, ...]`."""
        sizes, tokens, norm = self.sizes, self.tokens, self.rules.norm
        nets, rows, width = sizes.nets, sizes.rows, sizes.width
        d_q, d_k = self.parts(rows, width), self.parts(rows, width)
        d_steps1, d_last = self.parts(rows, rows), self.parts(rows)
        d_g2, scratch = self.empty(nets, self.blocks, rows, width), self.empty(nets, 4 * rows * sizes.hidden)
        d.target = torch.empty_like(tokens.target)
        d_gamma, d_beta = self.empty(self.count, nets, width), self.empty(self.count, nets, width)
        grid, constants = (nets, self.blocks), self._constants()
        of_net = kept.states, self.center, kept.trace
        for i in reversed(range(self.count)):
            through_answers[grid](
                tokens.q, tokens.k, self.seen, self.step, *of_net, kept.factors, d.alongs, d_answer2,
                d_products2, d.state, d.center, d_q, d_k, d_steps1, d_last, d_g2, scratch,
                nets, sizes.heads, i, *self.radii, **constants,
            )  # fmt: skip
            into_weights[grid](
                tokens.q, tokens.k, tokens.target, norm.weight, norm.bias, *of_net, d.alongs, d_answer2,
                d_g2_base, d_g2, scratch, d.state, d_k, d.target, d_gamma, d_beta,
                nets, sizes.heads, i, **constants,
            )  # fmt: skip
        d.norm_weight += d_gamma.sum(0)[:, None]
        d.norm_bias += d_beta.sum(0)[:, None]
        return d_q, d_k, d_steps1, d_last


@dataclass
class Kept:
    """What a forward pass over a group leaves to its backward pass.

    Args:
        states: `[M + 1, N, SIZE]`; `[1, N, SIZE]` where they were changed in place: no way back.
        trace: see `moshi_ttt.kernels.mlp_forward`.
        factors: of the bound, for each state.
        g2: `[M, N, R, D]`.
        ones2: X2 of queries times X2 of keys, and 1, `[M, N, R, R]`.
        answers: Z2 of the queries, `[M, N, R, D]`.
    """

    states: torch.Tensor
    trace: torch.Tensor
    factors: torch.Tensor
    g2: torch.Tensor
    ones2: torch.Tensor
    answers: torch.Tensor


@dataclass
class Sums:
    """What the backward pass adds up over groups, last to first.

    Args:
        state: gradient of the weights that the group ended with, changed in place, `[N, SIZE]`.
        center: of the bound's center for each net `[N, SIZE]`; `state`, and not written, without a bound.
        alongs: (W - center) . dW of either layer, in parts `[N, J, 2]`.
        norm_weight, norm_bias: `[N, 1, D]`.
        scale: `[R, R]`.
        target: of the group that is being worked on.
    """

    state: torch.Tensor
    center: torch.Tensor
    alongs: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    scale: torch.Tensor
    target: torch.Tensor
