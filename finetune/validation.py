"""What is measured while training: the validation loss, and an answer to a fixed prompt."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from finetune.data.chunks import ChunkEncoder, by_recording
from finetune.data.clips import Clip, Encoder
from finetune.distributed import Process, sum_over_processes
from finetune.loss import LossModel, LossWeights, weighted_step_targets
from inference.stream import Answer, Sampling, answer, write_wav
from moshi_ttt.carried import fresh_state

Item = TypeVar("Item")


@contextmanager
def evaluation_mode(model: LMModel) -> Iterator[None]:
    """Evaluate without gradients, then go on as before."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def validation_loss(
    model: LossModel,
    encoder: Encoder,
    clips: Sequence[Clip],
    batch_size: int,
    weights: LossWeights,
    process: Process,
) -> dict[str, float]:
    """Loss over all clips, the same at every call for the same weights.

    Returns:
        loss, text_loss, audio_loss in nats (weighted means over all targets) and perplexity = exp(loss).
    """
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    with evaluation_mode(model.lm):
        for whole in _rounds(clips, batch_size, process):
            mine = whole[process.rank :: process.world_size]
            codes = encoder.encode(mine or whole[:1]).codes
            idle = torch.full((codes.shape[0],), not mine, device=codes.device)
            targets = weighted_step_targets(model.lm, codes, None, weights).without(idle)
            sums[:2] += model(codes, targets)[0].double()
            sums[2:] += targets.totals()
    return _means(sums, process)


def carried_validation_loss(
    model: LossModel,
    encoder: ChunkEncoder,
    clips: Sequence[Clip],
    batch_size: int,
    weights: LossWeights,
    process: Process,
) -> dict[str, float]:
    """`validation_loss` where each clip continues from those before it in its recording, as in a stream.

    The states are this measurement's own: those of the rows in training stay as they are.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)
    with evaluation_mode(model.lm):
        for whole in _rounds(by_recording(clips), batch_size, process):
            mine = whole[process.rank :: process.world_size]
            rows = mine or whole[:1]
            carried = fresh_state(model.lm, len(rows))
            for step in range(max(map(len, whole))):
                # The row of a recording that has ended gets its last chunk again, which counts for nothing.
                codes = encoder.encode([row[min(step, len(row) - 1)] for row in rows]).codes
                ended = torch.tensor([not mine or step >= len(row) for row in rows], device=codes.device)
                targets = weighted_step_targets(model.lm, codes, carried, weights).without(ended)
                losses, carried = model(codes, targets, carried)
                sums[:2] += losses.double()
                sums[2:] += targets.totals()
    return _means(sums, process)


def _rounds(items: Sequence[Item], batch_size: int, process: Process) -> Iterator[Sequence[Item]]:
    """What all processes work on at a time, dealt out one by one.

    All have as many forward passes, since a sharded model needs every process in each: one that gets nothing
    repeats an item that does not count.
    """
    step = batch_size * process.world_size
    for start in range(0, len(items), step):
        yield items[start : start + step]


def _means(sums: torch.Tensor, process: Process) -> dict[str, float]:
    """Losses from this process's sums of losses and of weights, text and audio, `[4]`."""
    text, audio, text_total, audio_total = sum_over_processes(sums, process).tolist()
    losses = {"text_loss": text / text_total, "audio_loss": audio / audio_total}
    loss = sum(losses.values())
    return {"loss": loss, **losses, "perplexity": math.exp(min(loss, 700.0))}


def answer_prompt(
    model: LMModel,
    mimi: MimiModel,
    tokenizer: sentencepiece.SentencePieceProcessor,
    prompt: torch.Tensor,
    seed: int,
    stem: Path,
) -> Answer:
    """Let the model answer, and write STEM.wav and STEM.json."""
    with evaluation_mode(model):
        result = answer(model, mimi, tokenizer, prompt, Sampling(seed=seed))
    write_wav(stem.with_suffix(".wav"), [result.audio], mimi.sample_rate)
    content = {"text": result.text, "words": [asdict(word) for word in result.words]}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return result
