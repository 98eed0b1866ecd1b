"""Moshi's training loss: cross-entropy of text and audio tokens with moshi-finetune's weights."""

from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import nn

from finetune.scoring import audio_loss, loss_of_logits, text_loss, weighted_nll_sum
from moshi_ttt.carried import CarriedState, chunk_steps, hidden_of_chunk
from moshi_ttt.delays import clip_steps, scored_in_clip
from moshi_ttt.temporal import Running, temporal_clips


@dataclass(frozen=True)
class LossWeights:
    """How much targets count.

    Args:
        first_codebook: weight of the semantic codebook; acoustic ones weigh 1.
        text_padding: weight of padding and end-of-padding in the text stream; words weigh 1.
    """

    first_codebook: float
    text_padding: float


@dataclass
class WeightedTargets:
    """Targets and their weights for one batch, known before the forward pass.

    Args:
        text: `[B, 1, T]`, weight 0 where there is no target.
        audio: `[B, dep_q, T]` likewise.
    """

    text: torch.Tensor
    text_weight: torch.Tensor
    audio: torch.Tensor
    audio_weight: torch.Tensor

    def without(self, rows: torch.Tensor) -> "WeightedTargets":
        """The same with no target in the rows where `rows` `[B]` is true."""
        text, audio = (
            weight.masked_fill(rows[:, None, None], 0) for weight in (self.text_weight, self.audio_weight)
        )
        return WeightedTargets(self.text, text, self.audio, audio)

    def totals(self) -> torch.Tensor:
        """Sum of the text and of the audio weights, `[2]`, float64."""
        return torch.stack((self.text_weight.double().sum(), self.audio_weight.double().sum()))


def weighted_targets(model: LMModel, codes: torch.Tensor, weights: LossWeights) -> WeightedTargets:
    """Targets of whole clips `[B, 17, T]`: what `model(codes)` predicts, and with which weight."""
    return _weigh(model, codes, scored_in_clip(model, codes), weights)


def weighted_chunk_targets(
    model: LMModel, codes: torch.Tensor, carried: CarriedState, weights: LossWeights
) -> WeightedTargets:
    """Targets of the next chunk `[B, 17, T]` of each row's recording, in the order of `forward_chunk`."""
    steps = chunk_steps(model, codes, carried)
    return _weigh(model, steps.targets, steps.scored, weights)


def weighted_step_targets(
    model: LMModel, codes: torch.Tensor, carried: CarriedState | None, weights: LossWeights
) -> WeightedTargets:
    """Targets of codes `[B, 17, T]` in the order of the model's steps, as `LossModel` takes them: of whole
    clips, or with `carried` of the next chunk of each row's recording."""
    if carried is not None:
        return weighted_chunk_targets(model, codes, carried, weights)
    steps = clip_steps(model, codes)
    return _weigh(model, steps.targets, steps.scored, weights)


def _weigh(
    model: LMModel, targets: torch.Tensor, scored: torch.Tensor, weights: LossWeights
) -> WeightedTargets:
    first, last = model.audio_offset, model.audio_offset + model.dep_q
    text, audio = targets[:, :first], targets[:, first:last]
    text_weight = scored[:, :first].float()
    padding = (text == model.text_padding_token_id) | (text == model.end_of_text_padding_id)
    text_weight = torch.where(padding, text_weight * weights.text_padding, text_weight)
    audio_weight = scored[:, first:last].float()
    audio_weight[:, 0] *= weights.first_codebook
    return WeightedTargets(text, text_weight, audio, audio_weight)


def loss_sums(output: LMOutput, targets: WeightedTargets) -> torch.Tensor:
    """Weighted sums of the text and of the audio loss, `[2]`, float32, differentiable."""
    text = weighted_nll_sum(output.text_logits, targets.text, targets.text_weight)
    audio = weighted_nll_sum(output.logits, targets.audio, targets.audio_weight)
    return torch.stack((text, audio))


class LossModel(nn.Module):
    """A Moshi with its loss as output: what training runs forward and backward, and what FSDP2 shards.

    FSDP2 finds the tensors whose gradients start the backward pass in the output of the root module, but does
    not look into an `LMOutput`: with a Moshi as the root nothing would train, without an error.

    Args:
        lm: the model.
        running: how its layers are run.
    Attributes:
        split: whether the model's parameters are split over processes.
    """

    def __init__(self, lm: LMModel, running: Running | None = None):
        super().__init__()
        self.lm = lm
        self.running = running or Running()
        self.split = False

    def forward(
        self, codes: torch.Tensor, targets: WeightedTargets, carried: CarriedState | None = None
    ) -> tuple[torch.Tensor, CarriedState | None]:
        """Weighted sums of the text and audio loss of codes `[B, 17, T]`, `[2]`, and the state to carry on.

        Args:
            codes: whole clips; with `carried` the next chunks of recordings.
            targets: of `weighted_step_targets`.
            carried: what the rows carry from their last chunks.
        """
        after = None
        if carried is None:
            steps = clip_steps(self.lm, codes)
            hidden = temporal_clips(self.lm, steps.inputs, self.running)
        else:
            hidden, steps, after = hidden_of_chunk(self.lm, codes, carried, self.running)
        heads = self._split_heads if self.split else self._heads
        with self.running.compiling(codes.device):
            return torch.stack(heads(hidden, steps.targets, targets)), after

    def _heads(
        self, hidden: torch.Tensor, codes: torch.Tensor, targets: WeightedTargets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and audio loss of hidden states `[B, T, C]` whose steps predict `codes` `[B, 17, T]`."""
        frames = hidden.flatten(0, 1)
        text = text_loss(self.lm, frames, targets.text.flatten(), targets.text_weight.flatten())
        codes, goals, weight = (
            x.transpose(1, 2).flatten(0, 1) for x in (codes, targets.audio, targets.audio_weight)
        )
        return text, audio_loss(self.lm, frames, codes, goals, weight)

    def _split_heads(
        self, hidden: torch.Tensor, codes: torch.Tensor, targets: WeightedTargets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_heads` of a model that is split over processes: each of its modules runs once."""
        text_logits = self.lm.text_linear(hidden).flatten(0, 1)
        logits = self.lm.forward_depformer_training(codes, hidden)
        return (
            loss_of_logits(text_logits, targets.text.flatten(), targets.text_weight.flatten()),
            loss_of_logits(logits.flatten(0, 2), targets.audio.flatten(), targets.audio_weight.flatten()),
        )
