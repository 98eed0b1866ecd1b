"""What is measured while training: the validation loss, and an answer to a fixed prompt."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from finetune.data.chunks import ChunkEncoder, by_recording
from finetune.data.clips import Clip, Encoder
from finetune.distributed import Process, sum_over_processes
from finetune.loss import LossWeights, loss_sums, weighted_chunk_targets, weighted_targets
from inference.stream import Answer, Sampling, answer, write_wav
from moshi_ttt.carried import forward_chunk, fresh_state


@contextmanager
def evaluation_mode(model: LMModel) -> Iterator[None]:
    """Evaluate without gradients, then go on as before."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def validation_loss(
    model: LMModel,
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
    mine = clips[process.rank :: process.world_size]
    with evaluation_mode(model):
        for start in range(0, len(mine), batch_size):
            codes = encoder.encode(mine[start : start + batch_size]).codes
            targets = weighted_targets(model, codes, weights)
            sums[:2] += loss_sums(model(codes), targets).double()
            sums[2:] += targets.totals()
    return _means(sums, process)


def carried_validation_loss(
    model: LMModel,
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
    mine = by_recording(clips)[process.rank :: process.world_size]
    with evaluation_mode(model):
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            carried = fresh_state(model, len(rows))
            for step in range(max(map(len, rows))):
                # The row of a recording that has ended gets its last chunk again, which counts for nothing.
                codes = encoder.encode([row[min(step, len(row) - 1)] for row in rows]).codes
                ended = torch.tensor([step >= len(row) for row in rows], device=codes.device)
                targets = weighted_chunk_targets(model, codes, carried, weights).without(ended)
                output, carried = forward_chunk(model, codes, carried)
                sums[:2] += loss_sums(output, targets).double()
                sums[2:] += targets.totals()
    return _means(sums, process)


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
