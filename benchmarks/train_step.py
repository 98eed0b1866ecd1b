"""The training step: plain Moshi as moshi-finetune trains it against ours, and what each lever gives.

`python -m benchmarks.train_step` measures the model that fits the machine: Moshi 7B with random weights on a
GPU, 100 s x 16 clips; the tiny one on a CPU. `--levers` takes each lever away from ours in turn.
`--moshi-finetune PATH` takes loss and precision handling of the plain step from a checkout of it; without,
the plain step has our optimiser and the same loss.
"""

import argparse
import gc
import importlib.util
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from torch.optim import AdamW

import moshi_ttt.temporal
from finetune.config import OptimConfig
from finetune.loss import LossModel, LossWeights, loss_sums, weighted_step_targets, weighted_targets
from finetune.optimizer import Optimizer
from finetune.speed import TOKENS_PER_FRAME, flops_per_frame, peak_flops
from moshi_ttt.attention import forced_kernel
from moshi_ttt.config import TTTConfig
from moshi_ttt.integration import apply_ttt_to_model, set_activation_checkpointing
from moshi_ttt.lora import LoRAConfig, apply_lora_to_model
from moshi_ttt.parameters import set_trainable
from moshi_ttt.temporal import Running
from moshi_ttt.tiny_model import LM_CONFIG

logger = logging.getLogger(__name__)

WEIGHTS = LossWeights(first_codebook=100.0, text_padding=0.5)
GOAL_TOKENS_PER_S = 60_000.0
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """A way to take a training step.

    Args:
        name: for the table.
        plain: Moshi's own forward pass, loss over whole logits, moshi-finetune's optimiser.
        checkpoint: layers that recompute their activations; None for all, 0 for none.
        compiled, attention, heads, lora, fused: the levers; see LEVERS.
    """

    name: str
    plain: bool = False
    checkpoint: int | None = None
    compiled: bool | None = None
    attention: bool = True
    heads: bool = True
    lora: bool = True
    fused: bool = True


# Each lever taken away from ours.
LEVERS = {
    "attention by windows: a T x T mask": {"attention": False},
    "heads in parts: all frames, Moshi's depformer": {"heads": False},
    "LoRA in the product: Moshi's layers": {"lora": False},
    "compiling": {"compiled": False},
    "the fused optimiser": {"fused": False},
    "layers that keep activations": {"checkpoint": None},
}


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Args:
        clips, frames: shape of a batch.
        ttt_heads: heads of TTT-MLP in the middle layers; 0 for none.
        context: attention window of all layers in frames; None is Moshi's.
        rank: of LoRA.
        checkpoint: layers of ours that recompute; None for all, 0 for none.
    """

    device: torch.device
    clips: int = 16
    frames: int = 1250
    ttt_heads: int = 0
    context: int | None = None
    rank: int = 128
    checkpoint: int | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds of a step are the median of those after the first. Peak is None on a CPU."""

    name: str
    device: str
    step_sec: float
    first_step_sec: float
    tokens_per_s: float
    frames_per_s: float
    peak_gb: float | None
    mfu: float | None
    loss: float


def build(setting: Setting) -> LMModel:
    """Moshi 7B on a GPU, else the tiny one, with random weights and LoRA, made where it trains."""
    gpu = setting.device.type == "cuda"
    config = loaders._lm_kwargs if gpu else LM_CONFIG
    dtype = torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    model = loaders.get_moshi_lm(None, lm_kwargs=dict(config), device="meta", dtype=dtype)
    model = model.to_empty(device=setting.device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1.0)
    with setting.device:
        apply_lora_to_model(model, LoRAConfig(True, setting.rank), setting.device)
    if setting.context is not None:
        for layer in model.transformer.layers:
            layer.self_attn.context = setting.context  # type: ignore[union-attr]
    set_trainable(model, "lora")
    return model.train()


def add_ttt(model: LMModel, heads: int) -> None:
    """TTT-MLP of so many heads in the middle layers of a model that has LoRA."""
    with model.device:
        apply_ttt_to_model(model, TTTConfig(layers="middle", num_heads=heads))
    set_trainable(model, "lora+ttt")


def random_codes(model: LMModel, setting: Setting) -> torch.Tensor:
    """Codes `[B, 17, T]`; most of the text is padding, as in speech."""
    generator = torch.Generator(setting.device).manual_seed(1)
    shape = (setting.clips, model.num_codebooks, setting.frames)
    codes = torch.randint(0, model.card, shape, generator=generator, device=setting.device)
    padding = torch.rand(codes[:, 0].shape, generator=generator, device=setting.device) < 0.65
    codes[:, 0] = torch.where(padding, model.text_padding_token_id, codes[:, 0])
    return codes


@contextmanager
def levers(arm: Arm) -> Iterator[None]:
    """What of our forward pass an arm goes without."""

    def call(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x)

    mask: AbstractContextManager[None] = nullcontext() if arm.attention else forced_kernel("mask")
    linear = nullcontext() if arm.lora else patch.object(moshi_ttt.temporal, "linear", call)
    with mask, linear:
        yield


def our_step(model: LMModel, codes: torch.Tensor, arm: Arm) -> Step:
    """A step as `finetune.trainer` takes it on one process; returns the loss, on the device."""
    root = LossModel(model, Running(arm.checkpoint or None, arm.compiled))
    root.split = not arm.heads
    set_activation_checkpointing(model, arm.checkpoint != 0)
    optimizer = Optimizer(model, OptimConfig(), 1000)
    if not arm.fused:
        for group in optimizer.adamw.param_groups:
            group["fused"] = False

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        targets = weighted_step_targets(model, codes, None, WEIGHTS)
        sums, _ = root(codes, targets)
        losses = sums / targets.totals().float()
        losses.sum().backward()
        norm = optimizer.clip()
        values = torch.stack((losses.sum().detach(), norm.float())).tolist()
        optimizer.step()
        return torch.tensor(values[0])

    return step


def plain_step(model: LMModel, codes: torch.Tensor, checkout: Path | None) -> Step:
    """Moshi's own forward pass, all activations recomputed, the loss over all logits in float32."""
    set_activation_checkpointing(model, True)
    if checkout is not None:
        return _peer_step(model, codes, checkout)
    optimizer = Optimizer(model, OptimConfig(), 1000)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        targets = weighted_targets(model, codes, WEIGHTS)
        losses = loss_sums(model(codes), targets) / targets.totals().float()
        losses.sum().backward()
        optimizer.clip()
        optimizer.step()
        return losses.sum().detach()

    return step


def _peer_step(model: LMModel, codes: torch.Tensor, checkout: Path) -> Step:
    """moshi-finetune's step, from its own functions."""
    loss = _load(checkout / "finetune/loss.py").compute_loss_with_mask
    precision = _load(checkout / "finetune/mixed_precision.py")
    optimizer = AdamW(model.parameters(), lr=2e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    precision.prepare_mixed_precision(model.parameters(), model.dtype, torch.float32)
    padding = {model.text_padding_token_id, model.end_of_text_padding_id}
    last = model.audio_offset + model.dep_q

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        output = model(codes=codes, condition_tensors=None)
        text = loss(
            output.text_logits,
            codes[:, : model.audio_offset],
            output.text_mask,
            mode="text",
            text_padding_weight=WEIGHTS.text_padding,
            text_padding_ids=padding,
        )
        audio = loss(
            output.logits,
            codes[:, model.audio_offset : last],
            output.mask,
            mode="audio",
            first_codebook_weight_multiplier=WEIGHTS.first_codebook,
        )
        (text + audio).backward()
        total = (text + audio).detach()
        output.text_mask.sum().item()
        output.mask.sum().item()
        precision.upcast_mixed_precision(model.parameters(), torch.float32)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        precision.downcast_mixed_precision(model.parameters(), model.dtype)
        return torch.tensor(total.item())

    return step


def _load(path: Path) -> ModuleType:
    """A file of another package whose name is also one of ours."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_arm(model: LMModel, setting: Setting, arm: Arm, steps: int, checkout: Path | None = None) -> Measured:
    """Take `steps` steps, of which the first is to warm up, and measure them."""
    codes, gpu = random_codes(model, setting), setting.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    step = plain_step(model, codes, checkout) if arm.plain else our_step(model, codes, arm)
    times, loss = [], torch.zeros(())
    with levers(arm):
        for _ in range(steps):
            started = time.perf_counter()
            loss = step()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    value = float(loss)
    model.zero_grad()
    del step
    gc.collect()
    frames = setting.clips * setting.frames
    seconds = statistics.median(times[1:] or times)
    peak = peak_flops(setting.device, model.dtype)
    flops = frames * flops_per_frame(model, setting.frames)
    memory = torch.cuda.max_memory_allocated() / 1e9 if gpu else None
    if gpu:
        torch.cuda.empty_cache()
    return Measured(
        arm.name,
        torch.cuda.get_device_name() if gpu else "cpu",
        seconds,
        times[0],
        TOKENS_PER_FRAME * frames / seconds,
        frames / seconds,
        memory,
        None if peak is None else flops / seconds / peak,
        value,
    )


def measure(
    setting: Setting,
    plain_steps: int = 3,
    our_steps: int = 5,
    with_levers: bool = False,
    checkout: Path | None = None,
) -> list[Measured]:
    """Plain Moshi's step, ours, ours without each lever if asked for, and ours with TTT."""
    model = build(setting)
    found = []

    def take(arm: Arm, steps: int) -> None:
        found.append(run_arm(model, setting, arm, steps, checkout))
        logger.info("%s", line_of(found[-1]))

    if plain_steps:
        take(Arm("plain Moshi", plain=True), plain_steps)
    ours = Arm("ours", checkpoint=setting.checkpoint)
    take(ours, our_steps)
    if with_levers:
        for name, change in LEVERS.items():
            take(replace(ours, name=f"without {name}", **change), 3)
    if setting.ttt_heads:
        add_ttt(model, setting.ttt_heads)
        take(replace(ours, name=f"ours, TTT-MLP of {setting.ttt_heads} heads"), our_steps)
    return found


def line_of(measured: Measured) -> str:
    """One line of the table."""
    memory = "" if measured.peak_gb is None else f"  {measured.peak_gb:5.1f} GB"
    mfu = "" if measured.mfu is None else f"  MFU {measured.mfu:.1%}"
    return (
        f"{measured.name:50}  {measured.step_sec:8.3f} s (first {measured.first_step_sec:.1f} s)  "
        f"{measured.tokens_per_s:9,.0f} tokens/s{memory}{mfu}  loss {measured.loss:.3f}"
    )


def entries(found: list[Measured], setting: Setting) -> list[dict[str, Any]]:
    """Entries of the benchmark's file: ratios above 1 are ours ahead."""
    by_name = {measured.name: measured for measured in found}
    gpu = setting.device.type == "cuda"
    ours, what = by_name["ours"], "plain Moshi, as moshi-finetune runs it"
    made: list[dict[str, Any]] = []

    def add(name: str, value: float, against: float, goal: float, of: str) -> None:
        values = {"name": name, "ratio": value / against, "goal": goal, "unit": "tokens/s", "ours": value}
        made.append(values | {"against": against, "against_what": of, "device": ours.device})

    if "plain Moshi" in by_name:
        add("train step", ours.tokens_per_s, by_name["plain Moshi"].tokens_per_s, 1.0 if gpu else 2.0, what)
    if gpu:
        published = "the goal of 60k tokens/s, 5 x moshi-finetune's 12k"
        add("train step, tokens/s", ours.tokens_per_s, GOAL_TOKENS_PER_S, 1.0, published)
    for name, measured in by_name.items():
        if name.startswith("ours, TTT"):
            step = name.replace("ours", "train step")
            add(step, measured.tokens_per_s, ours.tokens_per_s, 0.85, "ours without TTT")
    return made


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("moshi_ttt").setLevel(logging.WARNING)
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=16 if gpu else 2)
    parser.add_argument("--frames", type=int, default=1250)
    parser.add_argument("--ttt-heads", type=int, default=8 if gpu else 0)
    parser.add_argument("--context", type=int)
    # On a GPU as few as fit in 60 GB; the tiny model's own experiment recomputes nothing.
    parser.add_argument("--checkpoint", type=int, default=20 if gpu else 0, help="layers that recompute")
    parser.add_argument("--rank", type=int, default=128 if gpu else 16)
    parser.add_argument("--plain-steps", type=int, default=3)
    parser.add_argument("--our-steps", type=int, default=5)
    parser.add_argument("--levers", action="store_true")
    parser.add_argument("--moshi-finetune", type=Path)
    parser.add_argument("--out", type=Path, help="write entries and measurements to this JSON file")
    args = parser.parse_args()
    setting = Setting(
        torch.device("cuda" if gpu else "cpu"),
        args.clips,
        args.frames,
        args.ttt_heads,
        args.context,
        args.rank,
        args.checkpoint,
    )
    found = measure(setting, args.plain_steps, args.our_steps, args.levers, args.moshi_finetune)
    result = {"entries": entries(found, setting), "steps": [asdict(measured) for measured in found]}
    text = json.dumps(result, indent=2)
    logger.info("%s", text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
