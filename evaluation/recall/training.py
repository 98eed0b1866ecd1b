"""Teaching one arm to recall."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel

from evaluation.recall.arms import Arm, non_causal_update
from evaluation.recall.task import TEXT, Episodes, Vocabulary, draw_episodes
from finetune.loss import LossWeights, loss_sums, weighted_targets

# Padding is nine tenths of the text stream; at full weight it would drown the answers.
_WEIGHTS = LossWeights(first_codebook=1.0, text_padding=0.01)
_CHECK_EVERY = 100
_CHECK_EPISODES = 128
_VALIDATION_SEED = 1_000_003


@dataclass
class Training:
    """How an arm learns. Pairs and distance are drawn anew for every batch, up to these."""

    max_pairs: int = 6
    max_distance_frames: int = 64
    questions: int = 3
    batch_size: int = 32
    max_steps: int = 1500
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    cooldown_steps: int = 200
    """The rate falls to 0 over these, once what is asked is learned or `max_steps` leave no more."""

    learned: float = 0.99
    """Share of right answers at which the cooldown begins."""


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


def text_predictions(model: LMModel, codes: torch.Tensor, rows: int = 64) -> torch.Tensor:
    """Likeliest text token of every frame, `[B, T]`, in whole passes over at most `rows` rows."""
    with torch.no_grad():
        return torch.cat([model(part).text_logits[:, 0].argmax(-1) for part in codes.split(rows)])


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
            losses.append(_train_step(model, optimizer, episodes))
            step += 1
            on_step(step, losses[-1])
            if step % _CHECK_EVERY == 0 and step < cooldown_at:
                right = check.accuracy(text_predictions(model, check.codes))
                cooldown_at = step if right >= training.learned else cooldown_at
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


def _train_step(model: LMModel, optimizer: torch.optim.Optimizer, episodes: Episodes) -> float:
    targets = weighted_targets(model, episodes.codes, _WEIGHTS)
    totals = targets.totals().float()
    means = loss_sums(model(episodes.codes), targets) / totals
    optimizer.zero_grad()
    means.sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise RuntimeError("the gradient became NaN or infinite; lower learning_rate or ttt.base_lr")
    optimizer.step()
    return means[TEXT].item()
