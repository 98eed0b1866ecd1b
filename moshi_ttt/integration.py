"""Grafting TTT layers onto a Moshi, and reading back what a live model is made of."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingMultiheadAttention, StreamingTransformerLayer
from torch import nn

from moshi_ttt.config import TTTConfig, ttt_layer_indices
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.streaming import refuse_large_chunks
from moshi_ttt.whole import whole

logger = logging.getLogger(__name__)

FRAME_RATE = 12.5


def ttt_layers(model: LMModel) -> list[tuple[int, HybridStreamingTransformerLayer]]:
    """The hybrid layers of a model with their indices: the one answer to "which layers are TTT layers"."""
    layers = enumerate(model.transformer.layers)
    return [(i, layer) for i, layer in layers if isinstance(layer, HybridStreamingTransformerLayer)]


def temporal_attentions(model: LMModel) -> Iterator[tuple[int, bool, StreamingMultiheadAttention]]:
    """(index, is a TTT layer, self-attention) of every temporal layer.

    Raises:
        ValueError: a layer is neither Moshi's nor ours.
    """
    for index, layer in enumerate(model.transformer.layers):
        if isinstance(layer, HybridStreamingTransformerLayer):
            yield index, True, layer.original_layer.self_attn
        elif isinstance(layer, StreamingTransformerLayer):
            yield index, False, layer.self_attn
        else:
            raise ValueError(
                f"temporal layer {index} is a {type(layer).__name__}; expected StreamingTransformerLayer or "
                "HybridStreamingTransformerLayer. Is something else grafted onto this model?"
            )


def apply_ttt_to_model(model: LMModel, config: TTTConfig, device: torch.device | None = None) -> LMModel:
    """Turn the layers that `config` names into hybrid layers, in place, and set the attention contexts.

    Only the temporal transformer is touched. New parameters get the device and dtype of the model, but for
    those that are always float32.

    Args:
        model (LMModel): a Moshi that has not streamed yet: streaming remembers the modules it found.
        config (TTTConfig): settings.
        device: where to put the new parameters, if not where the model's are. On meta they get no numbers.
    Returns:
        The same model.
    Raises:
        ValueError: the settings cannot work on this model, or it is hybrid already.
    """
    config.validate()
    if ttt_layers(model):
        raise ValueError("this model has TTT layers already; apply_ttt_to_model takes a plain Moshi")
    if model._cached_children is not None:
        raise ValueError("this model has streamed before; graft TTT layers before its first streaming()")
    num_layers = len(model.transformer.layers)
    indices = ttt_layer_indices(config.layers, num_layers) if config.enable else []
    if config.enable and not indices:
        raise ValueError(
            f"ttt.enable=true but ttt.layers={config.layers!r} names none of the {num_layers} layers; name "
            'layers such as "middle", or set ttt.enable=false'
        )
    for index in indices:
        original = model.transformer.layers[index]
        assert isinstance(original, StreamingTransformerLayer)
        if original.skip_self_attn:
            raise ValueError(f"temporal layer {index} has no self-attention to put a TTT layer behind")
        target = model.device if device is None else device
        with torch.device("meta") if target.type == "meta" else nullcontext():
            hybrid = HybridStreamingTransformerLayer(original, config, index)
        hybrid.seq_modeling_block.to(device=target, dtype=model.dtype)
        hybrid.train(original.training)
        model.transformer.layers[index] = hybrid
    verify_ttt_layers(model, config)
    if indices:
        total = sum(layer.seq_modeling_block.ttt_layer.ttt.inner_parameters for _, layer in ttt_layers(model))
        logger.info("TTT layers: %s; inner parameters: %s in %d layers", indices, f"{total:,}", len(indices))
    set_attention_context(model, config.ttt_layer_context, config.non_ttt_layer_context)
    verify_contexts(model, config)
    model.transformer.register_forward_pre_hook(refuse_large_chunks)
    return model


def verify_ttt_layers(model: LMModel, config: TTTConfig) -> None:
    """Raise ValueError unless the live TTT layers are exactly those that `config` names."""
    num_layers = len(model.transformer.layers)
    expected = ttt_layer_indices(config.layers, num_layers) if config.enable else []
    kinds = [is_ttt for _, is_ttt, _ in temporal_attentions(model)]
    live = [index for index, is_ttt in enumerate(kinds) if is_ttt]
    if live != expected or len(live) + kinds.count(False) != num_layers:
        raise ValueError(
            f"the config asks for TTT layers {expected} of {num_layers}, the live model has {live} and "
            f"{kinds.count(False)} other layers"
        )


def verify_contexts(model: LMModel, config: TTTConfig) -> None:
    """Raise ValueError unless every live attention context is the one that `config` asks for.

    A context that the config leaves open is the host's.
    """
    for index, is_ttt, attention in temporal_attentions(model):
        name = "ttt_layer_context" if is_ttt else "non_ttt_layer_context"
        asked = config.ttt_layer_context if is_ttt else config.non_ttt_layer_context
        expected = model.context if asked is None else asked
        if attention.context != expected:
            source = "which is the host's context of" if asked is None else "which asks for"
            raise ValueError(
                f"temporal layer {index} has a live attention context of {attention.context} frames; the "
                f"config has ttt.{name}={'null' if asked is None else asked}, {source} {expected} frames. "
                "Change the config, or whatever set the context after the model was built"
            )


def set_attention_context(
    model: LMModel, ttt_layer_context: int | None, non_ttt_layer_context: int | None
) -> None:
    """Set the attention window of TTT and other temporal layers, in frames; None leaves a kind as it is.

    Raises:
        ValueError: the model is streaming, and its KV caches have their size already.
    """
    if model.is_streaming:
        raise ValueError("set attention contexts before streaming starts: they size the KV caches")
    for _, is_ttt, attention in temporal_attentions(model):
        context = ttt_layer_context if is_ttt else non_ttt_layer_context
        if context is not None:
            attention.context = context


def set_activation_checkpointing(model: LMModel, enable: bool) -> None:
    """Recompute each layer's activations in the backward pass, or keep them."""
    model.transformer.checkpointing = enable
    assert model.depformer is not None
    model.depformer.checkpointing = enable


def live_contexts(model: LMModel) -> dict[bool, list[int]]:
    """Attention contexts in frames as the modules have them, of TTT layers (True) and the others (False)."""
    contexts: dict[bool, list[int]] = {True: [], False: []}
    for index, is_ttt, attention in temporal_attentions(model):
        if attention.context is None:
            raise ValueError(f"temporal layer {index} has no attention context; Moshi's is 3000 frames")
        contexts[is_ttt].append(attention.context)
    return contexts


def context_line(model: LMModel, inference: bool = False) -> str:
    """One line that says which attention contexts are live, in the words people grep logs for."""
    live = live_contexts(model)
    ttt, others = (_one_number(live[kind]) for kind in (True, False))
    counts = f"{len(live[True])} layers", f"{len(live[False])} layers"
    if inference:
        before = f"Set context: {model.context}"
        return f"{before} → TTT layers: {ttt} ({counts[0]}), Non-TTT: {others} ({counts[1]})"
    return f"Set attention context: TTT layers={ttt} ({counts[0]}), Non-TTT={others} ({counts[1]})"


def _one_number(contexts: list[int]) -> str:
    distinct = sorted(set(contexts))
    return "/".join(map(str, distinct)) if distinct else "-"


def receptive_field(model: LMModel) -> int:
    """Frames that information can travel through the stacked attention windows, without TTT."""
    live = live_contexts(model)
    return sum(context - 1 for context in (*live[True], *live[False]))


def live_settings(model: LMModel) -> dict[str, Any]:
    """Every setting that reached the model, read from its modules, to compare with another model."""
    settings: dict[str, Any] = {
        "num_layers": len(model.transformer.layers),
        "dtype": str(model.dtype),
        "contexts": [attention.context for _, _, attention in temporal_attentions(model)],
        "checkpointing": model.transformer.checkpointing,
    }
    for index, layer in ttt_layers(model):
        ttt, gate = layer.seq_modeling_block.ttt_layer.ttt, layer.seq_modeling_block.gate
        settings[f"ttt.{index}"] = {
            "kind": type(ttt).__name__,
            "inner_dims": ttt.inner_dims,
            "num_heads": ttt.num_heads,
            "head_dim": ttt.head_dim,
            "mini_batch_size": ttt.mini_batch_size,
            "base_lr": ttt.base_lr,
            "inner_lr_factors": ttt.inner_lr_factors,
            "normalize_target": ttt.normalize_target,
            "max_inner_change": ttt.max_inner_change,
            "learned_token_scale": ttt.token_scale_offset is not None,
            "rope": ttt.rope.tolist(),
            "scan_checkpoint_group_size": ttt.checkpoint_group_size,
            "kernel": ttt.kernel,
            "gate": type(gate).__name__,
            "inner_dtype": str(ttt.ttt_norm_weight.dtype),
            "projection_dtype": str(ttt.wq.weight.dtype),
        }
    return settings


def describe(model: LMModel) -> str:
    """A table of every temporal layer: kind, live context, TTT depth and settings, gate, parameters.

    Where parameters are split over processes, all must call this.
    depth: linear layers of the inner network. TTT: heads x widths of the inner network, mini-batch size and
    inner learning rate. gate: its kind and the mean weight that it gives to the TTT output.
    """
    rows = [("layer", "kind", "context", "seconds", "depth", "TTT", "gate", "parameters")]
    for index, is_ttt, attention in temporal_attentions(model):
        layer = model.transformer.layers[index]
        context = attention.context
        seconds = "-" if context is None else f"{context / FRAME_RATE:.1f}"
        rows.append(
            (str(index), "TTT" if is_ttt else "attention", str(context), seconds)
            + _ttt_columns(layer)
            + (f"{sum(p.numel() for p in layer.parameters()):,}",)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    total = sum(p.numel() for p in model.parameters())
    reach = receptive_field(model)
    lines.append(
        f"{len(ttt_layers(model))} TTT layers of {len(rows) - 1}; {total:,} parameters; stacked attention "
        f"windows reach {reach:,} frames ({reach / FRAME_RATE:.0f} s)"
    )
    return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def _ttt_columns(layer: nn.Module) -> tuple[str, str, str]:
    if not isinstance(layer, HybridStreamingTransformerLayer):
        return "-", "-", "-"
    ttt, gate = layer.seq_modeling_block.ttt_layer.ttt, layer.seq_modeling_block.gate
    dims = "-".join(map(str, ttt.inner_dims))
    kind = type(gate).__name__.removesuffix("Gate").lower()
    return (
        str(len(ttt.inner_weights)),
        f"{ttt.num_heads} x {dims}, K {ttt.mini_batch_size}, lr {ttt.base_lr:g}",
        f"{kind} {whole(gate.ttt_weight().mean()).item():.3f}",
    )
