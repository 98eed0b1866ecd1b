"""The scan over mini-batches by the Triton kernels, group by group, forward and back: what all of them share.

Kernels do what passes over the inner weights (`mlp_scan.py`, `linear_scan.py`); what is done for all
mini-batches of a group alike, before or after them, are batched operations of torch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from moshi_ttt.inner_network import LAYER_NORM_EPS
from moshi_ttt.kernels.packing import MiniBatches, packed
from moshi_ttt.mini_batches import Rules


@dataclass(frozen=True)
class Launch:
    """How the kernels are cut into pieces.

    Args:
        rows: a mini-batch is filled up to so many, a power of 2 of at least 16, Triton's least.
        block: hidden units of a program; with one inner layer, rows of the weights worked on at once.
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


class Group(ABC):
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
        missing = sizes.rows - sizes.size
        self.scale = F.pad(rules.scale, (0, missing, 0, missing))  # [R, R]
        lengths = torch.full((self.count,), sizes.size, device=tokens.q.device)
        lengths[-1] = last
        self.last_row = lengths - 1  # [M]
        self.eta = self.scale * tokens.lr[:, :, None, :]  # [M, N, R, R]
        self.step = (self.scale[self.last_row][:, None] * tokens.lr).contiguous()  # [M, N, R]
        self.ones1 = tokens.q @ tokens.k.transpose(2, 3) + 1
        bound = rules.bound
        # The type says Any: what follows these in a call is, to the type checker, more of them.
        self.radii: Any = (1.0, 1.0) if bound is None else bound.radii
        # Where nothing bounds the weights, the kernels read no center.
        self.center = tokens.q if bound is None else packed(bound.center.weights, bound.center.biases)

    def empty(self, *shape: int) -> torch.Tensor:
        return self.tokens.q.new_empty(shape)

    def constants(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return {
            "KP": self.sizes.rows,
            "D": self.sizes.width,
            "BOUND": self.rules.bound is not None,
            "P": precision(),
            "num_warps": self.launch.warps,
            "num_stages": 1,
        }

    @abstractmethod
    def forward(self, states: torch.Tensor, keep: bool) -> "Kept":
        """Run the mini-batches from `states[0]`.

        With `keep`, the weights after mini-batch i go to `states[i + 1]`; without, they are changed in place.
        """

    def outputs(self, kept: "Kept") -> torch.Tensor:
        """`q + LN(answers)`, `[M, N, R, D]`."""
        normed = F.layer_norm(kept.answers, kept.answers.shape[-1:], eps=LAYER_NORM_EPS)
        return self.tokens.q + torch.addcmul(self.rules.norm.bias, normed, self.rules.norm.weight)

    def sums(self, d_state: torch.Tensor, end: torch.Tensor | None) -> "Sums":
        """What a backward pass that begins with this group, the last one, adds to.

        Args:
            d_state: gradient of the last weights `[N, SIZE]`, changed in place from here on.
            end: the last weights `[N, SIZE]`; None without a bound.
        """
        norm = self.rules.norm
        return Sums(
            state=d_state,
            center=d_state if end is None else torch.zeros_like(d_state),
            alongs=d_state.new_empty(0),
            norm_weight=torch.zeros_like(norm.weight),
            norm_bias=torch.zeros_like(norm.bias),
            scale=torch.zeros_like(self.scale),
            target=d_state.new_empty(0),
        )

    def backward(self, kept: "Kept", d_out: torch.Tensor, d: "Sums") -> MiniBatches:
        """Gradients of the tokens from those of the outputs `[M, N, R, D]`; the rest is added to `d`."""
        normed, d_answers = self._through_output(kept.answers, d_out)
        d.norm_weight += (d_out * normed).sum((0, 2))[:, None]
        d.norm_bias += d_out.sum((0, 2))[:, None]
        # The last layer's answers are x W + b - (eta * (x X^T + 1)) G.
        d_steps = -(d_answers @ kept.g.transpose(2, 3))
        d_g = -((kept.ones * self.eta).transpose(2, 3) @ d_answers)
        found = self._through_layers(kept, d, d_answers, d_steps, d_g)
        index = self.last_row[:, None, None, None].expand(-1, self.sizes.nets, 1, self.sizes.rows)
        d_eta = found.eta.scatter_add_(2, index, found.last[:, :, None])
        d_products1 = found.steps1 * self.eta
        d_q = found.q + d_products1 @ self.tokens.k + d_out
        d_k = found.k + d_products1.transpose(2, 3) @ self.tokens.q
        d.scale += (d_eta * self.tokens.lr[:, :, None, :]).sum((0, 1))
        return MiniBatches(d_q, d_k, d.target, (d_eta * self.scale).sum(2))

    @abstractmethod
    def _through_layers(
        self, kept: "Kept", d: "Sums", d_answers: torch.Tensor, d_steps: torch.Tensor, d_g: torch.Tensor
    ) -> "Found":
        """Through the layers and the weights of all mini-batches, last to first.

        Args:
            d_answers: at the last layer's answers, `[M, N, R, D]`.
            d_steps: at its `eta * (x X^T + 1)`, `[M, N, R, R]`.
            d_g: at its G, as far as the answers read it, `[M, N, R, D]`.
        """

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


@dataclass
class Kept:
    """What a forward pass over a group leaves to its backward pass.

    Args:
        states: `[M + 1, N, SIZE]`; `[1, N, SIZE]` where they were changed in place: no way back.
        trace: what the kernels wrote down for their way back.
        factors: of the bound, for each state that it was applied to.
        g: G of the last layer, `[M, N, R, D]`.
        ones: X of queries times X of keys in the last layer, and 1, `[M, N, R, R]`.
        answers: Z of the queries in the last layer, `[M, N, R, D]`.
    """

    states: torch.Tensor
    trace: torch.Tensor
    factors: torch.Tensor
    g: torch.Tensor
    ones: torch.Tensor
    answers: torch.Tensor


@dataclass
class Found:
    """Gradients of a group that the way through its layers gives.

    Args:
        q, k: without what the first layer's `x X^T + 1` gives them, `[M, N, R, D]`.
        steps1: at the first layer's `eta * (x X^T + 1)`, `[M, N, R, R]`.
        eta: at the step sizes, as far as the answers read them, `[M, N, R, R]`.
        last: at those that the weights after a mini-batch are made with, `[M, N, R]`.
    """

    q: torch.Tensor
    k: torch.Tensor
    steps1: torch.Tensor
    eta: torch.Tensor
    last: torch.Tensor


@dataclass
class Sums:
    """What the backward pass adds up over groups, last to first.

    Args:
        state: gradient of the weights that the group ended with, changed in place, `[N, SIZE]`.
        center: of the bound's center for each net `[N, SIZE]`; `state`, and not written, without a bound.
        alongs: of TTT-MLP, (W - center) . dW of either layer, in parts `[N, J, 2]`.
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
