"""Likelihoods of answers after a long past, exact, in bounded memory.

The past of an episode is passed once, in chunks that carry their state (`moshi_ttt.carried`). At each
distance the state is copied for every question with every candidate, and the copies go on with a few frames.
That is, to rounding, one whole pass over past, question and candidate for each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from moshi.models.lm import LMModel
from torch.nn import functional as F

from evaluation.recall.probe_words import Episodes
from moshi_ttt.carried import CarriedState, ChunkOutput, forward_chunk
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.memory_arms import mini_batch_frames

Change = Callable[[CarriedState], CarriedState]


def rows_of(carried: CarriedState, rows: torch.Tensor) -> CarriedState:
    """Copies of some rows of a state; `rows` holds their indices, any number of times."""
    batch = carried.position.shape[0]

    def pick(now: torch.Tensor) -> torch.Tensor:
        return now.unflatten(0, (batch, -1))[rows].flatten(0, 1)

    def pick_inner(inner: InnerWeights | None) -> InnerWeights | None:
        if inner is None:
            return None
        return InnerWeights(tuple(map(pick, inner.weights)), tuple(map(pick, inner.biases)))

    layers = (
        replace(layer, keys=pick(layer.keys), values=pick(layer.values), inner=pick_inner(layer.inner))
        for layer in carried.layers
    )
    return CarriedState(tuple(layers), pick(carried.codes), pick(carried.position))


@torch.no_grad()
def likelihoods(
    model: LMModel,
    episodes: Episodes,
    past: torch.Tensor,
    batch_size: int,
    chunk_frames: int,
    changes: Sequence[Change],
    on_frames: Callable[[int], object],
) -> torch.Tensor:
    """Negative log-likelihoods of every candidate after every question, in nats.

    Args:
        past: `[B, 17, T]`: what is passed before the questions, `episodes.told` or `episodes.untold`.
        batch_size: rows of one pass, at most.
        chunk_frames: frames of one pass of the past, at most; whole mini-batches.
        changes: what is done to the state when the question comes, one result for each.
        on_frames: called with the frames passed, rows counted one by one.
    Returns:
        float64 `[changes, distances, B, questions, candidates, streams]`: summed over the value's frames;
        streams are text and Moshi's codebooks.
    """
    batches = []
    for first in range(0, past.shape[0], batch_size):
        rows = slice(first, first + batch_size)
        part = episodes.rows(rows)
        carried, position, distances = None, 0, []
        for end in episodes.ends:
            for chunk in past[rows, :, position:end].split(chunk_frames, dim=-1):
                _, carried = forward_chunk(model, chunk, carried)
                on_frames(chunk.shape[0] * chunk.shape[-1])
            assert carried is not None
            position = end
            after = past[rows, :, end : end + max(model.delays)]
            answers = [_answers(model, part, after, change(carried), batch_size) for change in changes]
            on_frames(len(changes) * part.questions_frames)
            distances.append(torch.stack(answers))
        batches.append(torch.stack(distances, dim=1))
    found = torch.cat(batches, dim=2)
    if not found.isfinite().all():
        raise RuntimeError("a likelihood is NaN or infinite: the checkpoint's weights or its inner state are")
    return found


def _answers(
    model: LMModel, episodes: Episodes, after: torch.Tensor, carried: CarriedState, batch_size: int
) -> torch.Tensor:
    """Likelihoods at one distance, `[B, questions, candidates, streams]`.

    Args:
        after: frames that follow the value `[B, 17, max_delay]`: delayed codebooks are predicted during them.
    """
    batch, pairs = episodes.keys.shape[:2]
    shape = (batch, pairs, pairs, -1, -1, -1)
    keys = episodes.keys[:, :, None].expand(*shape[:4], *episodes.keys.shape[3:])
    values = episodes.values[:, None].expand(*shape[:4], *episodes.values.shape[3:])
    ends = after[:, None, None].expand(batch, pairs, pairs, *after.shape[1:])
    codes = torch.cat((keys, values, ends), dim=-1).flatten(0, 2)
    # Behind the last target: no embedding and no target.
    codes = F.pad(codes, (0, -codes.shape[-1] % mini_batch_frames(model)), value=model.zero_token_id)
    rows = torch.arange(batch, device=codes.device).repeat_interleave(pairs**2)
    sums = []
    for part, source in zip(codes.split(batch_size), rows.split(batch_size), strict=True):
        output, _ = forward_chunk(model, part, rows_of(carried, source))
        sums.append(value_nll(model, output, keys.shape[-1], values.shape[-1]))
    return torch.cat(sums).unflatten(0, (batch, pairs, pairs))


def value_nll(model: LMModel, output: ChunkOutput, start: int, frames: int) -> torch.Tensor:
    """Negative log-likelihood of frames `start` ... of a chunk, in nats, float64 `[B, streams]`.

    A codebook that is delayed by d is predicted d steps after its frame.
    """

    def nll(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, delay: int) -> torch.Tensor:
        steps = slice(start + delay, start + delay + frames)
        assert mask[:, steps].all(), "a value has a frame without a code"
        # At least float32; a float64 model keeps its precision.
        logits = logits[:, steps].to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.log_softmax(-1).gather(-1, targets[:, steps, None])
        return -chosen.double().sum(dim=(1, 2))

    assert output.text_logits is not None
    assert output.text_mask is not None
    assert output.logits is not None
    assert output.mask is not None
    sums = [nll(output.text_logits[:, 0], output.text_targets[:, 0], output.text_mask[:, 0], model.delays[0])]
    for book in range(model.dep_q):
        delay = model.delays[model.audio_offset + book]
        sums.append(nll(output.logits[:, book], output.targets[:, book], output.mask[:, book], delay))
    return torch.stack(sums, dim=1)
