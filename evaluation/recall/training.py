"""Teaching one arm to recall."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from torch.nn import functional as F

from evaluation.recall.arms import Arm, non_causal_update
from evaluation.recall.task import TEXT, Episodes, Vocabulary, draw_episodes
from finetune.loss import LossWeights, loss_sums, weighted_chunk_targets, weighted_targets
from moshi_ttt.carried import forward_chunk, fresh_state

# Padding is nine tenths of the text stream; at full weight it would drown the answers.
_WEIGHTS = LossWeights(first_codebook=1.0, text_padding=0.01)
_CHUNK_FRAMES = 192  # a whole number of mini-batches of 1 to 64 frames, and of 48
_CHECK_EVERY = 100
_CHECK_EPISODES = 128
_VALIDATION_SEED = 1_000_003


@dataclass
class Training:
    """How an arm learns. Pairs and distance are drawn anew for every batch, up to these."""

    max_pairs: int = 6
    max_distance_frames: int = 64
    questions: int = 3
    batch_size: int = 64
    max_steps: int = 2500
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    cooldown_steps: int = 300
    """The rate falls to 0 over these, once what is asked is learned, or the arm is given up, or `max_steps`
    leave no more."""

    chunk_frames: int = 48
    """Length of the chunks of an episode, for the arms that train on chunks."""

    learned: float = 0.995
    """Share of right answers at which the cooldown begins."""

    give_up_steps: int = 1000
    """An arm that does no better than twice chance from this step on learns nothing: its cooldown begins."""


@dataclass
class Learned:
    """What training came to.

    Args:
        steps: optimiser steps taken.
        loss: mean text loss in nats over the last hundred steps.
        accuracy: share of right answers at `max_pairs` and `max_distance_frames`, the true answers given.
    """

    steps: int
    loss: float
    accuracy: float


@torch.no_grad()
def text_predictions(model: LMModel, codes: torch.Tensor, rows: int = 64) -> torch.Tensor:
    """Likeliest text token of every frame, `[B, T]` on the CPU, in passes over at most `rows` rows.

    A pass carries its state from chunk to chunk: the attention scores of a whole episode in one piece take
    memory and time with the square of its length.
    """
    predictions = []
    for part in codes.to(model.device).split(rows):
        carried, tokens = None, []
        for chunk in _chunks(model, part, _CHUNK_FRAMES):
            output, carried = forward_chunk(model, chunk, carried)
            tokens.append(output.text_logits[:, 0].argmax(-1))
        predictions.append(torch.cat(tokens, dim=1).cpu())
    return torch.cat(predictions)[:, : codes.shape[-1]]


def _chunks(model: LMModel, codes: torch.Tensor, chunk_frames: int) -> Sequence[torch.Tensor]:
    """Codes `[B, 5, T]` in equal chunks; the last is filled up with no code: no embedding and no target."""
    padding = -codes.shape[-1] % chunk_frames
    return F.pad(codes, (0, padding), value=model.zero_token_id).split(chunk_frames, dim=-1)


def train_arm(
    model: LMModel,
    arm: Arm,
    training: Training,
    vocabulary: Vocabulary,
    speech: torch.Tensor,
    seed: int,
    on_step: Callable[[int, float], None],
) -> Learned:
    """Train a model in place.

    Args:
        speech: codes of speech `[2, N]`.
        seed: of the episodes; arms with one seed see the same ones.
        on_step: called with the step and its text loss in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    check = _episodes(
        training, vocabulary, speech, torch.Generator().manual_seed(_VALIDATION_SEED), full=True
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    cooldown_at = training.max_steps - training.cooldown_steps
    losses: list[float] = []
    step = 0
    model.train()
    with non_causal_update(model) if arm.non_causal else nullcontext():
        while step < cooldown_at + training.cooldown_steps:
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * _rate(step, training, cooldown_at)
            episodes = _episodes(training, vocabulary, speech, generator)
            chunk_frames = None if arm.carry is None else training.chunk_frames
            losses.append(_train_step(model, optimizer, episodes, chunk_frames, arm.carry is True))
            step += 1
            on_step(step, losses[-1])
            if step % _CHECK_EVERY == 0 and step < cooldown_at:
                right = check.accuracy(text_predictions(model, check.codes))
                hopeless = step >= training.give_up_steps and right <= 2 * vocabulary.chance
                cooldown_at = step if right >= training.learned or hopeless else cooldown_at
        model.eval()
        accuracy = check.accuracy(text_predictions(model, check.codes))
    recent = losses[-_CHECK_EVERY:]
    return Learned(step, sum(recent) / len(recent), accuracy)


def _rate(step: int, training: Training, cooldown_at: int) -> float:
    warm = min(1.0, (step + 1) / training.warmup_steps)
    left = cooldown_at + training.cooldown_steps - step
    return min(warm, left / training.cooldown_steps)


def _episodes(
    training: Training,
    vocabulary: Vocabulary,
    speech: torch.Tensor,
    generator: torch.Generator,
    full: bool = False,
) -> Episodes:
    pairs, distance, batch = training.max_pairs, training.max_distance_frames, _CHECK_EPISODES
    if not full:
        pairs = int(torch.randint(1, pairs + 1, (), generator=generator))
        distance = int(torch.randint(0, distance + 1, (), generator=generator))
        batch = training.batch_size
    questions = min(training.questions, pairs)
    return draw_episodes(vocabulary, speech, batch, pairs, distance, questions, generator)


def _train_step(
    model: LMModel,
    optimizer: torch.optim.Optimizer,
    episodes: Episodes,
    chunk_frames: int | None,
    carry: bool,
) -> float:
    codes = episodes.codes.to(model.device)
    targets = weighted_targets(model, codes, _WEIGHTS)
    optimizer.zero_grad()
    if chunk_frames is None:
        means = loss_sums(model(codes), targets) / targets.totals().float()
        means.sum().backward()
    else:
        means = _backward_in_chunks(model, codes, targets.totals().float(), chunk_frames, carry)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise RuntimeError("the gradient became NaN or infinite; lower learning_rate or ttt.base_lr")
    optimizer.step()
    return means[TEXT].item()


def _backward_in_chunks(
    model: LMModel, codes: torch.Tensor, totals: torch.Tensor, chunk_frames: int, carry: bool
) -> torch.Tensor:
    """Gradients of the mean losses `[2]` over an episode, cut at the edges of chunks; returns the losses."""
    means = torch.zeros(2, device=codes.device)
    carried = None
    for chunk in _chunks(model, codes, chunk_frames):
        carried = carried if carry and carried is not None else fresh_state(model, codes.shape[0])
        targets = weighted_chunk_targets(model, chunk, carried, _WEIGHTS)
        output, carried = forward_chunk(model, chunk, carried)
        loss = loss_sums(output, targets) / totals
        loss.sum().backward()
        means += loss.detach()
    return means
