"""Moshi's training loss: cross-entropy of text and audio tokens with moshi-finetune's weights."""

from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import nn
from torch.nn import functional as F

from moshi_ttt.carried import CarriedState, chunk_steps, forward_chunk
from moshi_ttt.delays import scored_in_clip


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


def weighted_nll_sum(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum of weight x cross-entropy in nats, a float32 scalar.

    Args:
        logits: `[B, K, T, card]`; NaN is allowed where the weight is 0.
        targets, weight: `[B, K, T]`.
    """
    counts = weight > 0
    # Out of place of the NaN: a product with 0 would keep it, and no host synchronisation is needed.
    logits = torch.where(counts[..., None], logits, 0).flatten(0, 2).float()
    nll = F.cross_entropy(logits, torch.where(counts, targets, 0).flatten(), reduction="none")
    return (nll * weight.flatten()).sum()


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
    """

    def __init__(self, lm: LMModel):
        super().__init__()
        self.lm = lm

    def forward(
        self, codes: torch.Tensor, targets: WeightedTargets, carried: CarriedState | None = None
    ) -> tuple[torch.Tensor, CarriedState | None]:
        """Weighted sums of the text and audio loss of codes `[B, 17, T]`, `[2]`, and the state to carry on.

        Args:
            codes, targets: whole clips; with `carried` the next chunks of recordings.
            carried: what the rows carry from their last chunks.
        """
        if carried is None:
            return loss_sums(self.lm(codes), targets), None
        output, after = forward_chunk(self.lm, codes, carried)
        return loss_sums(output, targets), after
