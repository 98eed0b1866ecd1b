"""Moshi's depformer in training: the steps of all frames at once.

The depformer predicts the codebooks of a frame one after the other, each with weights of its own. In training
their codes are known. Moshi then takes the steps one by one and the frames as a batch of short sequences;
here the steps are the outer dimension, so that every layer is one batched product.
"""

import torch
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import StreamingMultiheadAttention, StreamingTransformerLayer
from torch import nn
from torch.nn import functional as F

from moshi_ttt.linear import linear, linear_per_step
from moshi_ttt.pointwise import gate, norm, rotate


def depformer_modules(model: LMModel) -> list[nn.Module]:
    """The modules that `depformer_logits` runs."""
    found = (
        model.depformer_in,
        model.depformer_text_emb,
        model.depformer_emb,
        model.depformer,
        model.depformer_norms,
        model.linears,
    )
    assert all(module is not None for module in found)
    return list(found)  # type: ignore[arg-type]


def depformer_logits(model: LMModel, codes: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """What `model.forward_depformer_training` computes, of N frames: `[K, N, card]`.

    Args:
        model: not split over processes.
        codes: what the frames' steps predict, `[N, 17]`: text first. Each codebook reads those before it.
        hidden: the temporal transformer's output, `[N, C]`.
    """
    assert model.depformer is not None
    assert model.depformer_emb is not None
    assert model.depformer_text_emb is not None
    steps, schedule = model.dep_q, model.depformer_weights_per_step_schedule
    first = model.audio_offset
    tokens = [model.depformer_text_emb(codes[:, 0])]
    tokens += [model.depformer_emb[k](codes[:, first + k]) for k in range(steps - 1)]
    inputs = hidden.expand(steps, *hidden.shape)
    x = linear_per_step(model.depformer_in, schedule, inputs) + torch.stack(tokens)
    for layer in model.depformer.layers:
        assert isinstance(layer, StreamingTransformerLayer)
        x = _layer(layer, x)
    if not isinstance(model.depformer_norms[0], nn.Identity):
        x = torch.cat([norm(module, x[k : k + 1]) for k, module in enumerate(model.depformer_norms)])
    return linear_per_step(model.linears, None, x)


def _layer(layer: StreamingTransformerLayer, x: torch.Tensor) -> torch.Tensor:
    """A layer of the depformer, `[K, N, C]` to `[K, N, C]`."""
    assert layer.cross_attention is None
    assert not layer.skip_self_attn
    update = layer.layer_scale_1(_attend(layer.self_attn, norm(layer.norm1, x)))
    x = x.to(update) + update
    normed = norm(layer.norm2, x)
    if isinstance(layer.gating, nn.ModuleList):
        schedule = layer.weights_per_step_schedule
        linear_in, linear_out = (
            [module.get_submodule(name) for module in layer.gating] for name in ("linear_in", "linear_out")
        )
        first = layer.gating[0]
        assert isinstance(first, ActivationGating)
        update = linear_per_step(
            linear_out, schedule, gate(linear_per_step(linear_in, schedule, normed), first.activation)
        )
    else:
        assert isinstance(layer.gating, ActivationGating), "Moshi's depformer is gated"
        hidden = gate(linear(layer.gating.linear_in, normed), layer.gating.activation)
        update = linear(layer.gating.linear_out, hidden)
    return x.to(update) + layer.layer_scale_2(update)


def _attend(attention: StreamingMultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Causal self-attention of each frame's steps, `[K, N, C]` to `[K, N, C]`."""
    assert attention.causal
    assert attention.context is None
    assert attention.kv_repeat == 1
    steps, frames, _ = x.shape
    projected = linear_per_step(attention.in_projs, attention.weights_per_step_schedule, x)
    q, k, v = projected.view(steps, frames, 3, attention.num_heads, -1).permute(2, 1, 0, 3, 4)
    if attention.rope is not None:
        q, k = (rotate(attention.rope, x, torch.zeros(1, device=x.device)) for x in (q, k))
    out = _short_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    out = out.permute(2, 0, 1, 3).flatten(2)
    return linear_per_step(attention.out_projs, attention.weights_per_step_schedule, out)


def _short_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention over a few steps, `[N, H, K, D]`.

    On a CPU the fused kernel spends its time on the ends of its blocks: written out it takes a fifth.
    """
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    steps = q.shape[2]
    later = torch.ones(steps, steps, device=q.device, dtype=torch.bool).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v
