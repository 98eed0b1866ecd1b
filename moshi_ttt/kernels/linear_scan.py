"""Launches of the kernels of TTT-Linear (one inner layer): one for a group of mini-batches, each way."""

from typing import Any

import torch

from moshi_ttt.kernels.linear_kernels import backward, forward
from moshi_ttt.kernels.scan import Found, Group, Kept, Sums


class LinearGroup(Group):
    """Of TTT-Linear: a program has a net."""

    def constants(self) -> dict[str, Any]:
        return {**super().constants(), "BLOCK": min(self.launch.block, self.sizes.width)}

    def forward(self, states: torch.Tensor, keep: bool) -> Kept:
        sizes, tokens, norm = self.sizes, self.tokens, self.rules.norm
        outputs, grads, answers = (torch.empty_like(tokens.q) for _ in range(3))
        factors = self.empty(self.count, sizes.nets)
        forward[(sizes.nets,)](
            tokens.q, tokens.k, tokens.target, self.step, norm.weight, norm.bias,
            states, self.center, factors, outputs, grads, answers,
            sizes.nets, sizes.heads, self.count, self.radii[0], **{**self.constants(), "KEEP": keep},
        )  # fmt: skip
        answers -= (self.eta * self.ones1) @ grads
        return Kept(states, outputs, factors, grads, self.ones1, answers)

    def _through_layers(
        self, kept: Kept, d: Sums, d_answers: torch.Tensor, d_steps: torch.Tensor, d_g: torch.Tensor
    ) -> Found:
        sizes, tokens, norm = self.sizes, self.tokens, self.rules.norm
        d.target, d_outputs, d_k = (torch.empty_like(tokens.k) for _ in range(3))
        d_last = torch.empty_like(tokens.lr)
        backward[(sizes.nets,)](
            tokens.q, tokens.k, tokens.target, self.step, norm.weight, norm.bias,
            kept.states, self.center, kept.factors, kept.trace, kept.g, d_answers, d_g,
            d.state, d.center, d_outputs, d_k, d_last, d.target, d.norm_weight, d.norm_bias,
            sizes.nets, sizes.heads, self.count, self.radii[0], **self.constants(),
        )  # fmt: skip
        width = sizes.width
        # W^T of each mini-batch's first weights: what reads them does not wait for the mini-batch after.
        turned = kept.states[:-1, :, : width * width].unflatten(2, (width, width)).transpose(2, 3)
        return Found(d_answers @ turned, d_k + d_outputs @ turned, d_steps, d_steps * kept.ones, d_last)
