"""Moshi's depformer in training: the steps of all frames at once.

The depformer predicts the codebooks of a frame one after the other, each with weights of its own. In training
their codes are known. Moshi then takes the steps one by one and the frames as a batch of short sequences;
here the steps are the outer dimension, so that every layer is one batched product.
"""

from collections.abc import Sequence

import torch
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn
from torch.nn import functional as F

from moshi_ttt.linear import LinearPerStep
from moshi_ttt.pointwise import gate, norm, rotate


class Depformer:
    """A model's depformer with the weights of its steps stacked: once for all frames that it is to run on.

    Args:
        model: not split over processes.
    """

    def __init__(self, model: LMModel):
        assert model.depformer is not None
        assert model.depformer_emb is not None
        assert model.depformer_text_emb is not None
        self.model = model
        self.embeddings = [model.depformer_text_emb, *model.depformer_emb]
        steps = range(model.dep_q)
        self.linear_in = LinearPerStep(model.depformer_in, model.depformer_weights_per_step_schedule or steps)
        self.layers = [_Layer(layer, steps) for layer in model.depformer.layers]
        self.linear_out = LinearPerStep(model.linears, steps)

    def logits(self, codes: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What `model.forward_depformer_training` computes, of N frames: `[K, N, card]`.

        Args:
            codes: what the frames' steps predict, `[N, 17]`: text first. Each codebook reads those before it.
            hidden: the temporal transformer's output, `[N, C]`.
        """
        steps, first = self.model.dep_q, self.model.audio_offset
        columns = (0, *range(first, first + steps - 1))
        tokens = [embed(codes[:, k]) for embed, k in zip(self.embeddings, columns, strict=True)]
        x = self.linear_in(hidden.expand(steps, *hidden.shape)) + torch.stack(tokens)
        for layer in self.layers:
            x = layer(x)
        norms = self.model.depformer_norms
        if not isinstance(norms[0], nn.Identity):
            x = torch.cat([norm(module, x[k : k + 1]) for k, module in enumerate(norms)])
        return self.linear_out(x)

    def trained(self) -> list[torch.Tensor]:
        """All that has gradients and that `logits` computes with: stacks, and parameters that are in none."""
        linears = [self.linear_in, self.linear_out, *(x for layer in self.layers for x in layer.linears)]
        stacked = {id(p) for x in linears for p in x.parameters}
        model = self.model
        assert model.depformer is not None
        others = (model.depformer_in, model.depformer, model.depformer_norms, model.linears)
        modules = (*self.embeddings, *others)
        whole = (p for module in modules for p in module.parameters() if id(p) not in stacked)
        return [x for x in (*whole, *(stack for x in linears for stack in x.stacks)) if x.requires_grad]


class _Layer:
    """A layer of the depformer, `[K, N, C]` to `[K, N, C]`."""

    def __init__(self, layer: nn.Module, steps: Sequence[int]):
        assert isinstance(layer, StreamingTransformerLayer)
        assert layer.cross_attention is None
        assert not layer.skip_self_attn
        self.layer = layer
        attention = layer.self_attn
        schedule = attention.weights_per_step_schedule or steps
        projections = [LinearPerStep(x, schedule) for x in (attention.in_projs, attention.out_projs)]
        gatings = layer.gating if isinstance(layer.gating, nn.ModuleList) else [layer.gating]
        gatings = [gating for gating in gatings if isinstance(gating, ActivationGating)]
        assert gatings, "Moshi's depformer is gated"
        self.activation = gatings[0].activation
        schedule = layer.weights_per_step_schedule or steps
        gates = ([gating.get_submodule(name) for gating in gatings] for name in ("linear_in", "linear_out"))
        self.linears = (*projections, *(LinearPerStep(modules, schedule) for modules in gates))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer, (_, _, linear_in, linear_out) = self.layer, self.linears
        update = layer.layer_scale_1(self._attend(norm(layer.norm1, x)))
        x = x.to(update) + update
        update = linear_out(gate(linear_in(norm(layer.norm2, x)), self.activation))
        return x.to(update) + layer.layer_scale_2(update)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        """Causal self-attention of each frame's steps."""
        attention, (in_proj, out_proj, _, _) = self.layer.self_attn, self.linears
        assert attention.causal
        assert attention.context is None
        assert attention.kv_repeat == 1
        q, k, v = in_proj(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 1, 0, 3, 4)
        if attention.rope is not None:
            q, k = (rotate(attention.rope, x, torch.zeros(1, device=x.device)) for x in (q, k))
        out = _short_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out_proj(out.permute(2, 0, 1, 3).flatten(2))


def _short_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention over a few steps, `[N, H, K, D]`.

    On a CPU the fused kernel spends its time on the ends of its blocks: written out it takes a tenth.
    """
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    later = torch.full((shape[2], shape[2]), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=shape[3] ** -0.5)
    shares: torch.Tensor = _ShortSoftmax.apply(scores)  # type: ignore[assignment]
    return torch.bmm(shares, v).view(shape)


class _ShortSoftmax(torch.autograd.Function):
    """Over the last dimension. Torch's own takes six times as long for eight numbers."""

    @staticmethod
    def forward(ctx, x):
        wide = x.float()
        powers = (wide - wide.amax(-1, keepdim=True)).exp_()
        out = powers.div_(powers.sum(-1, keepdim=True)).to(x.dtype)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        wide = out.float()
        product = wide * grad
        return product.addcmul_(wide, product.sum(-1, keepdim=True), value=-1).to(out.dtype)
