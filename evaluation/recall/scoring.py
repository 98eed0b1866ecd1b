"""Asking a trained arm: by streaming generation, and in whole passes."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from moshi.models.lm import LMGen, LMModel

from evaluation.recall.arms import Arm, forget, forgetting_at, non_causal_update
from evaluation.recall.task import TEXT, USER_SEMANTIC, Vocabulary, draw_episodes, told_until
from evaluation.recall.training import text_predictions

_ROWS_X_FRAMES_SQUARED = 100_000_000  # attention masks and scores of one whole pass, in elements


@dataclass
class Scoring:
    """What is asked.

    Args:
        capacity_pairs: numbers of pairs that are also told, each at `capacity_distance`, to see how many fit.
        pairs: pairs told in an episode; one of them is asked for.
        distances: frames of speech between the last pair and the question, in receptive fields.
        episodes: for each distance.
        seed: of the episodes, the same for all arms and never used in training.
    """

    capacity_pairs: list[int] = field(default_factory=list)
    capacity_distance: float = 10.0
    pairs: int = 6
    distances: list[float] = field(default_factory=lambda: [0.25, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 200.0])
    episodes: int = 128
    seed: int = 2_000_003


@dataclass
class Score:
    """Shares of right answers at one distance.

    Args:
        streaming: Moshi answers, frame by frame through `LMGen`, likeliest tokens, hearing its own.
        offline: one pass over the whole episode, the true answers given as in training.
        same: share of frames where a whole pass over what the stream heard and said picks the token that
            the stream picked: 1 means that streaming is offline.
    """

    streaming: float
    offline: float
    same: float


def score_arm(
    model: LMModel,
    arm: Arm,
    scoring: Scoring,
    vocabulary: Vocabulary,
    speech: torch.Tensor,
    receptive_field: int,
) -> Iterator[tuple[str, dict[str, float]]]:
    """(distance in receptive fields, its score) for each distance."""
    for distance in scoring.distances:
        generator = torch.Generator().manual_seed(scoring.seed)
        frames = round(distance * receptive_field)
        episodes = draw_episodes(vocabulary, speech, scoring.episodes, scoring.pairs, frames, 1, generator)
        # The step that hears the question's first frame. Earlier, the layers could learn again from what
        # attention still sees of the pairs.
        forget_at = told_until(scoring.pairs) + frames + 1 if arm.reset else None
        said = answer_stream(model, episodes.codes[:, USER_SEMANTIC:], forget_at)
        heard = torch.cat((said, episodes.codes[:, USER_SEMANTIC:]), dim=1)
        with non_causal_update(model) if arm.non_causal else nullcontext():
            offline = _whole_pass(model, episodes.codes, forget_at)
        # Where the stream said what is right, the passes over what it heard and over the truth are one.
        again = offline.clone()
        other = (heard != episodes.codes).flatten(1).any(1) | arm.non_causal
        again[other] = _whole_pass(model, heard[other], forget_at)
        same = (again == said[:, TEXT]).float().mean().item()
        yield (
            f"{distance:g}",
            asdict(Score(episodes.accuracy(said[:, TEXT]), episodes.accuracy(offline), same)),
        )


def capacity(
    model: LMModel, scoring: Scoring, vocabulary: Vocabulary, speech: torch.Tensor, receptive_field: int
) -> Iterator[tuple[str, float]]:
    """(pairs told, share of right answers in streaming) for each of `capacity_pairs`."""
    frames = round(scoring.capacity_distance * receptive_field)
    for pairs in scoring.capacity_pairs:
        generator = torch.Generator().manual_seed(scoring.seed)
        episodes = draw_episodes(vocabulary, speech, scoring.episodes, pairs, frames, 1, generator)
        said = answer_stream(model, episodes.codes[:, USER_SEMANTIC:])
        yield str(pairs), episodes.accuracy(said[:, TEXT])


def _whole_pass(model: LMModel, codes: torch.Tensor, forget_at: int | None) -> torch.Tensor:
    if codes.shape[0] == 0:
        return codes[:, TEXT]
    if forget_at is None:
        return text_predictions(model, codes)
    rows = max(1, _ROWS_X_FRAMES_SQUARED // codes.shape[-1] ** 2)
    with torch.no_grad(), forgetting_at(model, forget_at):
        parts = codes.to(model.device).split(rows)
        return torch.cat([model(part).text_logits[:, 0].argmax(-1) for part in parts]).cpu()


@torch.no_grad()
def answer_stream(model: LMModel, user: torch.Tensor, forget_at: int | None = None) -> torch.Tensor:
    """What Moshi says to the user's codes `[B, 2, T]`, likeliest tokens, `[B, 3, T]`: text and two codebooks.

    Both are on the CPU, wherever the model is.

    Args:
        forget_at: the inner state is put back to the learned weights before this step of the model.
    """
    lm_gen = LMGen(model, use_sampling=False)
    user, said = user.to(model.device), []
    frames = user.shape[-1]
    with lm_gen.streaming(user.shape[0]):
        for step in range(frames + lm_gen.max_delay):
            if step == forget_at:
                forget(model)
            # LMGen's first step hears initial tokens in place of the user's, so frame 0 is given twice.
            frame = min(max(step - 1, 0), frames - 1)
            tokens = lm_gen.step(user[:, :, frame : frame + 1])
            if tokens is not None:
                said.append(tokens)
    return torch.cat(said, dim=-1).cpu()
