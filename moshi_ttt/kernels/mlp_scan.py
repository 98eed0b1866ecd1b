"""Launches of the kernels of TTT-MLP (two inner layers): two for each mini-batch, each way."""

from typing import Any

import torch

from moshi_ttt.kernels.mlp_backward import into_weights, through_answers
from moshi_ttt.kernels.mlp_forward import answer, learn
from moshi_ttt.kernels.packing import MiniBatches
from moshi_ttt.kernels.scan import Found, Group, Kept, Launch, Sizes, Sums
from moshi_ttt.mini_batches import Rules


class MLPGroup(Group):
    """Of TTT-MLP: a program has a block of a net's hidden units."""

    def __init__(self, sizes: Sizes, tokens: MiniBatches, rules: Rules, last: int, launch: Launch):
        super().__init__(sizes, tokens, rules, last, launch)
        self.blocks = max(1, sizes.hidden // launch.block)
        self.seen = self.eta * self.ones1

    def parts(self, *shape: int) -> torch.Tensor:
        """Room for what each block gives to a sum, `[M, N, J, ...]`."""
        return self.empty(self.count, self.sizes.nets, self.blocks, *shape)

    def constants(self) -> dict[str, Any]:
        hidden = self.sizes.hidden
        return {**super().constants(), "F": hidden, "BF": hidden // self.blocks}

    def forward(self, states: torch.Tensor, keep: bool) -> Kept:
        sizes, tokens, norm = self.sizes, self.tokens, self.rules.norm
        nets, rows, width, hidden = sizes.nets, sizes.rows, sizes.width, sizes.hidden
        trace = self.empty(self.count, nets, rows * (3 * hidden + 2 * width))
        answers, overlaps = self.parts(rows, width), self.parts(rows, rows)
        factors = self.empty(states.shape[0], nets, 2)
        outputs, squares = self.empty(nets, self.blocks, rows, width), self.empty(nets, self.blocks, 2)
        grid, constants = (nets, self.blocks), self.constants()

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

    def sums(self, d_state: torch.Tensor, end: torch.Tensor | None) -> Sums:
        d = super().sums(d_state, end)
        d.alongs = d_state.new_zeros(self.sizes.nets, self.blocks, 2)
        if end is not None:
            change = end.unflatten(0, (-1, self.sizes.heads)) - self.center
            along = change.flatten(0, 1) * d_state
            first = self.sizes.hidden * (self.sizes.width + 1)
            d.alongs[:, 0, 0], d.alongs[:, 0, 1] = along[:, :first].sum(1), along[:, first:].sum(1)
        return d

    def _through_layers(
        self, kept: Kept, d: Sums, d_answers: torch.Tensor, d_steps: torch.Tensor, d_g: torch.Tensor
    ) -> Found:
        """What blocks give, `[M, N, J, ...]`, is added up in the end."""
        sizes, tokens, norm = self.sizes, self.tokens, self.rules.norm
        nets, rows, width = sizes.nets, sizes.rows, sizes.width
        d_q, d_k = self.parts(rows, width), self.parts(rows, width)
        d_steps1, d_last = self.parts(rows, rows), self.parts(rows)
        d_g2, scratch = self.empty(nets, self.blocks, rows, width), self.empty(nets, 4 * rows * sizes.hidden)
        d.target = torch.empty_like(tokens.target)
        d_gamma, d_beta = self.empty(self.count, nets, width), self.empty(self.count, nets, width)
        d_products2 = d_steps * self.eta
        grid, constants = (nets, self.blocks), self.constants()
        of_net = kept.states, self.center, kept.trace
        for i in reversed(range(self.count)):
            through_answers[grid](
                tokens.q, tokens.k, self.seen, self.step, *of_net, kept.factors, d.alongs, d_answers,
                d_products2, d.state, d.center, d_q, d_k, d_steps1, d_last, d_g2, scratch,
                nets, sizes.heads, i, *self.radii, **constants,
            )  # fmt: skip
            into_weights[grid](
                tokens.q, tokens.k, tokens.target, norm.weight, norm.bias, *of_net, d.alongs, d_answers,
                d_g, d_g2, scratch, d.state, d_k, d.target, d_gamma, d_beta,
                nets, sizes.heads, i, **constants,
            )  # fmt: skip
        d.norm_weight += d_gamma.sum(0)[:, None]
        d.norm_bias += d_beta.sum(0)[:, None]
        d_steps1 = d_steps1.sum(2)
        d_eta = d_steps * kept.ones + d_steps1 * self.ones1
        return Found(d_q.sum(2), d_k.sum(2), d_steps1, d_eta, d_last.sum(2))
