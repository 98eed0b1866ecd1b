"""Training on chunks of a recording, each continuing from where the last one ended.

The state is an input that a forward pass only reads, and a second output. A layer that advanced a state of
its own would do so twice under activation checkpointing, whose backward pass runs the forward again, and get
wrong gradients without a warning. The caller keeps the new state once its backward pass is done.

Gradients stop at the edge of a chunk (truncated back-propagation): what is carried is detached. Moshi's
streaming caches are not used: they hold `context` keys, too few for a call of several frames.
"""

from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel, LMOutput
from moshi.modules.transformer import StreamingMultiheadAttention

from moshi_ttt.delays import Steps, frames_before, shift_codes
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.integration import temporal_attentions, ttt_layers
from moshi_ttt.temporal import CarriedLayer, Running, temporal_chunk


@dataclass(frozen=True)
class CarriedState:
    """What every batch row carries from one chunk of its recording to the next. Read only, detached.

    Args:
        layers: of the temporal transformer.
        codes: the last max_delay + 1 frames, `[B, 17, max_delay + 1]`.
        position: frames of the recording so far, `[B]`. A row at 0 is fresh: it starts from the model's
            learned inner weights, whatever they are by then, and its gradients reach them.
    """

    layers: tuple[CarriedLayer, ...]
    codes: torch.Tensor
    position: torch.Tensor

    def restarted(self, model: LMModel, rows: torch.Tensor) -> "CarriedState":
        """The same state with the rows where `rows` `[B]` is true fresh, to the last bit."""
        fresh = fresh_state(model, 1)

        def mix(start: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
            mask = rows.repeat_interleave(now.shape[0] // rows.shape[0]).view(-1, *[1] * (now.dim() - 1))
            return torch.where(mask, start.repeat(rows.shape[0], *[1] * (now.dim() - 1)), now)

        def mix_inner(start: InnerWeights | None, now: InnerWeights | None) -> InnerWeights | None:
            if start is None or now is None:
                return None
            return InnerWeights(
                tuple(map(mix, start.weights, now.weights)), tuple(map(mix, start.biases, now.biases))
            )

        layers = tuple(
            CarriedLayer(
                mix(start.keys, now.keys), mix(start.values, now.values), mix_inner(start.inner, now.inner)
            )
            for start, now in zip(fresh.layers, self.layers, strict=True)
        )
        return CarriedState(layers, mix(fresh.codes, self.codes), mix(fresh.position, self.position))

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state."""
        found = [self.codes, self.position]
        for layer in self.layers:
            found += [layer.keys, layer.values]
            if layer.inner is not None:
                found += [*layer.inner.weights, *layer.inner.biases]
        return found


@dataclass
class ChunkOutput(LMOutput):
    """Logits of a chunk and what they predict, both in the order of the model's steps.

    A codebook delayed by d is predicted d steps late, so that the first d targets of a chunk are the last
    frames of the chunk before. Masks are false where there is no target: before the first frame of a
    recording, and where the codes hold -1. No logit is NaN.

    Args:
        logits, mask: `[B, dep_q, T, card]` and `[B, dep_q, T]`.
        text_logits, text_mask: `[B, 1, T, text_card]` and `[B, 1, T]`.
        targets, text_targets: codes, `[B, dep_q, T]` and `[B, 1, T]`.
    """

    targets: torch.Tensor
    text_targets: torch.Tensor


def fresh_state(model: LMModel, batch_size: int) -> CarriedState:
    """The state before the first frame of a recording.

    Raises:
        ValueError: a layer has no attention context, so its keys would grow without end.
    """
    device = model.device
    inner = {index: layer.seq_modeling_block.ttt_layer.ttt for index, layer in ttt_layers(model)}
    layers = []
    for index, _, attention in temporal_attentions(model):
        head_dim = attention.embed_dim // attention.num_heads
        shape = (batch_size, attention.num_heads, _carried_frames(index, attention), head_dim)
        keys = torch.zeros(shape, device=device, dtype=model.dtype)
        weights = inner[index].blank_weights(batch_size) if index in inner else None
        layers.append(CarriedLayer(keys, torch.zeros_like(keys), weights))
    position = torch.zeros(batch_size, device=device, dtype=torch.long)
    return CarriedState(tuple(layers), frames_before(model, batch_size), position)


def _carried_frames(index: int, attention: StreamingMultiheadAttention) -> int:
    """Frames whose keys and values a layer carries."""
    if attention.context is None:
        raise ValueError(
            f"temporal layer {index} has no attention context, so the keys and values to carry would grow "
            "without end; set ttt.ttt_layer_context and ttt.non_ttt_layer_context"
        )
    return attention.context - 1


def chunk_steps(model: LMModel, codes: torch.Tensor, carried: CarriedState) -> Steps:
    """Inputs and targets of a chunk `[B, 17, T]`, known before its forward pass."""
    return shift_codes(model, codes, carried.codes, carried.position)


def forward_chunk(
    model: LMModel, codes: torch.Tensor, carried: CarriedState | None = None
) -> tuple[ChunkOutput, CarriedState]:
    """One chunk of each row's recording: `model(codes)` with a memory of the chunks before.

    Two chunks give the logits, and score the targets, of one pass over both.

    Args:
        model: a Moshi with or without TTT layers, not streaming.
        codes: `[B, 17, T]`, T a multiple of the TTT mini-batch; -1 is no code.
        carried: what the last chunk returned; None at the start of all rows' recordings. It is only read.
    Returns:
        Logits and targets, and the state for the next chunk. Keep that state once the backward pass is done.
    Raises:
        ValueError: a chunk that is no whole number of mini-batches, another batch size than carried, or a
            model that is streaming.
    """
    out, steps, after = hidden_of_chunk(model, codes, carried)
    text_logits = model.text_linear(out)[:, None]
    logits = model.forward_depformer_training(steps.targets, out)
    first, last = model.audio_offset, model.audio_offset + model.dep_q
    output = ChunkOutput(
        logits,
        steps.scored[:, first:last],
        text_logits,
        steps.scored[:, :first],
        targets=steps.targets[:, first:last],
        text_targets=steps.targets[:, :first],
    )
    return output, after


def hidden_of_chunk(
    model: LMModel, codes: torch.Tensor, carried: CarriedState | None = None, running: Running | None = None
) -> tuple[torch.Tensor, Steps, CarriedState]:
    """The part of `forward_chunk` below the heads: the temporal transformer's output `[B, T, C]`, the steps
    that it is of, and the state for the next chunk."""
    _refuse_chunk(model, codes, carried)
    if carried is None:
        carried = fresh_state(model, codes.shape[0])
    steps = chunk_steps(model, codes, carried)
    out, layers = temporal_chunk(model, steps.inputs, carried.layers, carried.position, running or Running())
    return out, steps, CarriedState(layers, steps.earlier, carried.position + codes.shape[-1])


def _refuse_chunk(model: LMModel, codes: torch.Tensor, carried: CarriedState | None) -> None:
    if model.is_streaming:
        raise ValueError("the model is streaming; forward_chunk is for training: leave streaming() first")
    rows, _, frames = codes.shape
    if carried is not None and carried.position.shape[0] != rows:
        raise ValueError(
            f"the carried state has {carried.position.shape[0]} rows, the chunk {rows}; keep one state for "
            "each batch, or start with carried=None"
        )
    for _, layer in ttt_layers(model):
        size = layer.seq_modeling_block.ttt_layer.ttt.mini_batch_size
        if frames % size:
            raise ValueError(
                f"a chunk of {frames} frames is no whole number of mini-batches of {size}; use "
                f"{frames // size * size} or {(frames // size + 1) * size} frames (a last chunk can be "
                f"filled up with {model.zero_token_id})"
            )


def carried_bytes(model: LMModel, rows: int) -> dict[str, int]:
    """Bytes that `rows` rows carry from chunk to chunk: attention keys and values, inner weights (float32).

    Raises:
        ValueError: a layer has no attention context.
    """
    sizes = {"attention": 0, "inner": 0}
    for index, _, attention in temporal_attentions(model):
        frames = _carried_frames(index, attention)
        sizes["attention"] += rows * frames * 2 * attention.embed_dim * model.dtype.itemsize
    for _, layer in ttt_layers(model):
        ttt = layer.seq_modeling_block.ttt_layer.ttt
        sizes["inner"] += rows * ttt.inner_parameters * ttt.ttt_norm_weight.dtype.itemsize
    return sizes
