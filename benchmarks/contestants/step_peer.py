"""Training steps of moshi-finetune: its loss, mixed precision and clip encoder, on the CPU.

Its loop is bound to CUDA and to torchrun; what it does in a step is called here in the same order. Its calls
of `.cuda()` leave tensors where they are.
"""

from collections.abc import Callable
from pathlib import Path

import sphn
import torch
from finetune.mixed_precision import (  # type: ignore[import-not-found]
    downcast_mixed_precision,
    prepare_mixed_precision,
    upcast_mixed_precision,
)
from moshi.models.lm import LMModel
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.contestants.rounds import serve, settings
from finetune.data.interleaver import (
    Batch,  # type: ignore[attr-defined]
    InterleavedTokenizer,  # type: ignore[attr-defined]
    Interleaver,  # type: ignore[attr-defined]
)
from finetune.loss import compute_loss_with_mask  # type: ignore[import-not-found]
from moshi_ttt.loading import ModelConfig, find_base, load_mimi, load_tokenizer


def build(rank: int, checkpointing: bool) -> LMModel:
    """The tiny Moshi with Moshi's own LoRA, which alone trains."""
    lora = {"lora": True, "lora_rank": rank, "lora_scaling": 2.0, "gradient_checkpointing": checkpointing}
    model = find_base(ModelConfig("tiny")).get_moshi("cpu", torch.float32, lm_kwargs_overrides=lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return model.train()


def clips(model: LMModel, paths: list[Path], duration_sec: float) -> Callable[[], torch.Tensor]:
    """What its loader does for a batch: decode, encode with Mimi, interleave."""
    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign]
    base = find_base(ModelConfig("tiny"))
    mimi, special = load_mimi(base, "cpu"), (model.end_of_text_padding_id, model.zero_token_id)
    interleaver = Interleaver(
        load_tokenizer(base),
        mimi.frame_rate,
        model.text_padding_token_id,
        *special,
        keep_main_only=True,
        device="cpu",
    )
    tokenizer = InterleavedTokenizer(mimi, interleaver, duration_sec)

    def read(path: Path) -> Batch:
        samples, rate = sphn.read(str(path), duration_sec=duration_sec)
        samples = sphn.resample(samples, rate, mimi.sample_rate) if rate != mimi.sample_rate else samples
        return tokenizer(samples, 0.0, str(path))

    return lambda: Batch.collate([read(path) for path in paths]).codes


def main() -> None:
    given = settings()
    model = build(given["rank"], given["checkpointing"])
    optimizer = AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    schedule = OneCycleLR(optimizer, max_lr=1e-5, total_steps=1000, pct_start=0.05)
    prepare_mixed_precision(model.parameters(), param_dtype=torch.float32, optim_dtype=torch.float32)
    batch = clips(model, [Path(path) for path in given["paths"]], given["duration_sec"])
    codes = None if given["data"] else batch()
    padding = {model.text_padding_token_id, model.end_of_text_padding_id}

    def step() -> float:
        now = batch() if codes is None else codes
        optimizer.zero_grad()
        output = model(codes=now, condition_tensors=None)
        first, last = model.audio_offset, model.audio_offset + model.dep_q
        text = compute_loss_with_mask(
            output.text_logits,
            now[:, :first],
            output.text_mask,
            mode="text",
            text_padding_weight=0.5,
            text_padding_ids=padding,
        )
        audio = compute_loss_with_mask(
            output.logits,
            now[:, first:last],
            output.mask,
            mode="audio",
            first_codebook_weight_multiplier=100.0,
        )
        (text + audio).backward()
        upcast_mixed_precision(model.parameters(), optim_dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        downcast_mixed_precision(model.parameters(), param_dtype=torch.float32)
        schedule.step()
        return (text + audio).item()

    serve(step, fresh_memory=False)


if __name__ == "__main__":
    main()
