"""Streaming with several frames a call.

Moshi's ring KV cache holds exactly `context` keys. Feeding n frames in one call overwrites the n - 1 oldest
keys that the first of them still attend to, so Moshi itself is exact for one frame a call only. With a
capacity of context + n - 1 every call of at most n frames is exact: the attention mask already enforces the
context.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.modules.transformer import (
    ProjectedTransformer,
    RingKVCache,
    StreamingMultiheadAttention,
    StreamingTransformer,
)
from torch import nn


@contextmanager
def streaming(model: LMModel, batch_size: int, max_chunk: int = 1) -> Iterator[None]:
    """Stream `batch_size` rows in calls of at most `max_chunk` frames each, exactly.

    For calls of one frame this is `model.streaming(batch_size)`.

    Raises:
        ValueError: max_chunk is below 1.
    """
    with model.streaming(batch_size):
        allow_chunks(model, max_chunk)
        yield


def allow_chunks(model: LMModel, max_chunk: int) -> None:
    """Let a model whose stream has just begun take calls of at most `max_chunk` frames.

    Raises:
        ValueError: max_chunk is below 1.
    """
    if max_chunk < 1:
        raise ValueError(f"max_chunk must be at least 1 frame, got {max_chunk}")
    for attention in _attentions(model.transformer):
        _set_capacity(attention, max_chunk)


@contextmanager
def encoding(mimi: MimiModel, batch_size: int, max_frames: int) -> Iterator[None]:
    """Encode `batch_size` rows of audio in calls of at most `max_frames` frames each, as one call would."""
    with mimi.streaming(batch_size):
        _set_codec_capacity(mimi, mimi.encoder_transformer, max_frames)
        yield


@contextmanager
def decoding(mimi: MimiModel, batch_size: int, max_frames: int) -> Iterator[None]:
    """Decode `batch_size` rows of codes in calls of at most `max_frames` frames each, as one call would."""
    with mimi.streaming(batch_size):
        _set_codec_capacity(mimi, mimi.decoder_transformer, max_frames)
        yield


def _set_codec_capacity(mimi: MimiModel, transformer: nn.Module | None, max_frames: int) -> None:
    assert isinstance(transformer, ProjectedTransformer)
    for attention in _attentions(transformer.transformer):
        _set_capacity(attention, round(max_frames * mimi.encoder_frame_rate / mimi.frame_rate))


def _attentions(transformer: StreamingTransformer) -> list[StreamingMultiheadAttention]:
    return [module for module in transformer.modules() if isinstance(module, StreamingMultiheadAttention)]


def _set_capacity(attention: StreamingMultiheadAttention, max_chunk: int) -> None:
    state = attention._streaming_state
    assert state is not None
    cache = state.kv_cache
    if cache is None:  # cross-attention
        return
    assert attention.context is not None
    _, batch_size, num_heads, _, dim_per_head = cache.cache.shape
    state.kv_cache = RingKVCache(
        batch_size,
        num_heads,
        dim_per_head,
        attention.context + max_chunk - 1,
        device=cache.cache.device,
        dtype=cache.cache.dtype,
    )


def refuse_large_chunks(transformer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Forward pre-hook of the temporal transformer: more frames in a call than its caches allow is an error.

    Raises:
        ValueError: with the number of frames that was declared.
    """
    assert isinstance(transformer, StreamingTransformer)
    if transformer._streaming_state is None:
        return
    frames = args[0].shape[1]
    if frames == 1:
        return
    for attention in _attentions(transformer):
        state = attention._streaming_state
        if state is None or state.kv_cache is None:
            continue
        assert attention.context is not None
        max_chunk = state.kv_cache.capacity - attention.context + 1
        if frames > max_chunk:
            raise ValueError(
                f"a streaming call got {frames} frames, but {max_chunk} were declared when streaming "
                f"started; start with moshi_ttt.streaming.streaming(model, batch_size, max_chunk={frames})"
            )
