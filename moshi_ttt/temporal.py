"""The temporal transformer in training: whole clips, and chunks of recordings with what they carry.

The modules are Moshi's and ours; only how they are run is written here. What runs in streaming is Moshi's own
forward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from moshi_ttt.attention import windowed_attention
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.linear import linear
from moshi_ttt.pointwise import compiling, gate, is_compiling, norm, rotate


@dataclass(frozen=True)
class CarriedLayer:
    """What one temporal layer leaves to the next chunk.

    Args:
        keys, values: of the last context - 1 frames, rotated, `[B, H, context - 1, D]`, model's dtype.
        inner: weights of the inner network, `[B * H, ...]` float32; None in a layer without TTT.
    """

    keys: torch.Tensor
    values: torch.Tensor
    inner: InnerWeights | None


@dataclass(frozen=True)
class Running:
    """How layers are run. The values are the same up to rounding.

    Args:
        recomputed: where activation checkpointing is on, how many layers from the first one on recompute all
            of their activations; None: all layers. The others keep the results of their products, and
            recompute norms and gates. They are the last: their activations are the first to go in the
            backward pass, before anything is recomputed beside them.
        compiled: whether norms, rotations and gates are compiled; None: on a GPU.
    """

    recomputed: int | None = None
    compiled: bool | None = None

    def compiling(self, device: torch.device) -> AbstractContextManager[None]:
        """Context in which Moshi's and our functions are compiled, or not."""
        return compiling(device.type == "cuda" if self.compiled is None else self.compiled)


def temporal_clips(model: LMModel, inputs: torch.Tensor, running: Running) -> torch.Tensor:
    """The temporal transformer's output `[B, T, C]` for whole clips of delayed codes `[B, 17, T]`."""
    out, _ = _temporal(model, inputs, [None] * len(model.transformer.layers), None, running)
    return out


def temporal_chunk(
    model: LMModel,
    inputs: torch.Tensor,
    carried: tuple[CarriedLayer, ...],
    position: torch.Tensor,
    running: Running,
) -> tuple[torch.Tensor, tuple[CarriedLayer, ...]]:
    """The temporal transformer's output `[B, T, C]` for the next chunk, and what its layers carry on.

    Args:
        inputs: delayed codes `[B, 17, T]`.
        carried: what each layer carries.
        position: frames of each row's recording before the chunk, `[B]`.
    """
    out, after = _temporal(model, inputs, list(carried), position, running)
    assert all(layer is not None for layer in after)
    return out, tuple(after)  # type: ignore[arg-type]


def _temporal(
    model: LMModel,
    inputs: torch.Tensor,
    carried: list[CarriedLayer | None],
    position: torch.Tensor | None,
    running: Running,
) -> tuple[torch.Tensor, list[CarriedLayer | None]]:
    x = _embed(model, inputs)
    dtype = x.dtype
    recomputed = 0
    if model.transformer.checkpointing and torch.is_grad_enabled():
        recomputed = len(carried) if running.recomputed is None else running.recomputed
    after = []
    for index, (layer, before) in enumerate(zip(model.transformer.layers, carried, strict=True)):
        if index < recomputed:
            result = _recomputed(_layer, layer, x, before, position, running, False)
        else:
            result = _layer(layer, x, before, position, running, recomputed > 0)
        x, left = result
        after.append(left)
    with running.compiling(x.device):
        return model.out_norm(x.to(dtype)), after


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, run again in the backward pass as far as that needs it."""
    compiled = is_compiling()

    def run(*arguments: Any) -> Any:
        with compiling(compiled):
            return function(*arguments)

    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)


def _embed(model: LMModel, sequence: torch.Tensor) -> torch.Tensor:
    """Sum of the embeddings of codes `[B, 17, T]`, `[B, T, C]`, added up as `LMModel.forward_text` does."""
    x = model.emb[0](sequence[:, model.audio_offset])
    for index in range(1, model.num_audio_codebooks):
        x = x + model.emb[index](sequence[:, index + model.audio_offset])
    return x + model.text_emb(sequence[:, 0])


def _layer(
    layer: nn.Module,
    x: torch.Tensor,
    carried: CarriedLayer | None,
    position: torch.Tensor | None,
    running: Running,
    lean: bool,
) -> tuple[torch.Tensor, CarriedLayer | None]:
    """A temporal layer's forward `[B, T, C]` with its state as input and output; the same at every call.

    Args:
        lean: keep neither norms nor gates for the backward pass.
    """
    hybrid = isinstance(layer, HybridStreamingTransformerLayer)
    original = layer.original_layer if hybrid else layer
    assert isinstance(original, StreamingTransformerLayer)
    assert original.cross_attention is None
    assert not original.skip_self_attn
    inner = None
    part = _recomputed if lean else _once
    with running.compiling(x.device):
        update, keys, values = _attend(original, x, carried, position, part)
        update = original.layer_scale_1(update)
        if not hybrid:
            x = x.to(update) + update
        elif carried is None:
            x = layer.seq_modeling_block(x.to(update), update)
        else:
            assert carried.inner is not None
            assert position is not None
            block = layer.seq_modeling_block
            x, inner = block.forward_from(x.to(update), update, carried.inner, position == 0)
            inner = inner.detach()
        x = _feed_forward(original, x, part)
    if carried is None:
        return x, None
    return x, CarriedLayer(_kept(keys, x.shape[1]), _kept(values, x.shape[1]), inner)


def _once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _normed_linear(before: nn.Module, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(module, norm(before, x))


def _gated_linear(gating: ActivationGating, x: torch.Tensor) -> torch.Tensor:
    return linear(gating.linear_out, gate(x, gating.activation))


def _attend(
    layer: StreamingTransformerLayer,
    x: torch.Tensor,
    carried: CarriedLayer | None,
    position: torch.Tensor | None,
    part: Callable[..., Any] = _once,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Self-attention of the normed `[B, T, C]` over its frames and the carried keys, within `context`.

    Returns:
        The output `[B, T, C]`, and all keys and values, `[B, S, H, D]`.
    """
    attention = layer.self_attn
    assert attention.causal
    assert attention.kv_repeat == len(attention.in_projs) == 1
    rows, length, _ = x.shape
    projected = part(_normed_linear, layer.norm1, attention.in_projs[0], x)
    projected = projected.view(rows, length, 3, attention.num_heads, -1)
    q, k, v = projected.unbind(2)
    if attention.rope is not None:
        first = torch.zeros(1, device=x.device) if position is None else position
        q, k = (rotate(attention.rope, frames, first) for frames in (q, k))
        v = v.contiguous()  # else the backward pass would keep the queries and keys before rotation too
    if carried is not None:
        assert carried.keys.shape[2] + 1 == attention.context, "the context changed between chunks"
        k = torch.cat((carried.keys.transpose(1, 2), k), dim=1)
        v = torch.cat((carried.values.transpose(1, 2), v), dim=1)
    out = windowed_attention(q, k, v, attention.context, position)
    return linear(attention.out_projs[0], out.flatten(2)), k, v


def _kept(frames: torch.Tensor, length: int) -> torch.Tensor:
    """Keys or values behind the first `length`, `[B, H, context - 1, D]`, detached.

    A copy: a slice would keep those of the whole chunk alive.
    """
    return frames[:, length:].transpose(1, 2).detach().clone(memory_format=torch.contiguous_format)


def _feed_forward(
    layer: StreamingTransformerLayer, x: torch.Tensor, part: Callable[..., Any]
) -> torch.Tensor:
    gating = layer.gating
    assert isinstance(gating, ActivationGating), "Moshi's temporal layers are gated"
    if isinstance(gating, FSDPModule):
        update = gating(norm(layer.norm2, x))
    else:
        update = part(_gated_linear, gating, part(_normed_linear, layer.norm2, gating.linear_in, x))
    return x.to(update) + layer.layer_scale_2(update)
