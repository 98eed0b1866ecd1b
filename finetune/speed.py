"""How fast training is: the time of a step's phases, tokens a second, and the share of the device's peak."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn

from finetune.distributed import Process
from moshi_ttt.integration import temporal_attentions, ttt_layers

# As moshi-finetune counts them: text and Moshi's eight codebooks, which are what is predicted.
TOKENS_PER_FRAME = 9

# Vendors' figures for dense bfloat16 with tensor cores, in TFLOP/s.
PEAK_TFLOPS = {"h100": 989.0, "h200": 989.0, "a100": 312.0, "l40s": 362.0, "l4": 121.0}

_PHASES = ("forward", "backward", "optimizer")


@dataclass
class Phases:
    """Times the phases of steps without waiting for the device: on a GPU by events, read once it passed them.

    Args:
        device: where the phases compute.
    """

    device: torch.device
    _marks: list[tuple[str, "float | torch.cuda.Event"]] = field(default_factory=list)

    def begin(self, name: str) -> None:
        """A phase of this name begins here, and the one before it ends."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call, up to the last phase begun: that counts to the next.

        To be called when the device has done what was asked of it before that phase began.
        """
        seconds: dict[str, float] = dict.fromkeys(_PHASES, 0.0)
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name in seconds:
                seconds[name] += _seconds_between(start, end)
        del self._marks[:-1]
        return seconds


def _seconds_between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - start


def speed_of_step(
    model: LMModel, shapes: list[torch.Size], elapsed: float, process: Process
) -> dict[str, float]:
    """Rates of a step over all processes.

    Args:
        shapes: of the codes of this process's micro-batches.
        elapsed: seconds of the step.
    Returns:
        frames_per_s, tokens_per_s, step_sec; mfu (of each device) where the device's peak is known.
    """
    rate = sum(rows * frames for rows, _, frames in shapes) / elapsed
    total = rate * process.world_size
    speed = {"frames_per_s": total, "tokens_per_s": TOKENS_PER_FRAME * total, "step_sec": elapsed}
    peak = peak_flops(process.device, model.dtype)
    if peak is not None:
        speed["mfu"] = rate * flops_per_frame(model, shapes[0][2]) / peak
    return speed


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak in FLOP/s with numbers of this dtype; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return next((1e12 * tflops for name, tflops in PEAK_TFLOPS.items() if name in words), None)


def flops_per_frame(model: LMModel, frames: int) -> float:
    """FLOPs of a training step for each of the frames of clips of `frames`, none counted twice.

    Products only: forward, gradients of inputs down to the lowest layer that trains, gradients of what
    trains. Recomputation is left out; of an inner network every token takes two forward passes and a backward
    pass, and the gradient of these twice that.
    """
    assert model.depformer is not None
    total = 0.0
    trains_below = any(p.requires_grad for p in _embedding_parameters(model))
    attentions = {index: attention for index, _, attention in temporal_attentions(model)}
    hybrid = dict(ttt_layers(model))
    for index, layer in enumerate(model.transformer.layers):
        trains_below = trains_below or any(p.requires_grad for p in layer.parameters())
        passes = 2 if trains_below else 1
        context, width = attentions[index].context, attentions[index].embed_dim
        seen = frames if context is None else min(context, frames)
        # The first queries see less than a whole window.
        keys = seen - seen * (seen - 1) / (2 * frames)
        total += _linear_flops(layer, passes) + 4 * width * keys * (2 * passes - 1)
        if index in hybrid:
            total += 24 * hybrid[index].seq_modeling_block.ttt_layer.ttt.inner_parameters
    steps = model.dep_q
    for layer in model.depformer.layers:
        assert isinstance(layer, StreamingTransformerLayer)
        total += 3 * 4 * steps * (steps + 1) / 2 * layer.self_attn.embed_dim
    above = (model.text_linear, model.depformer_in, model.depformer, model.linears)
    return total + sum(_linear_flops(module, 2) for module in above)


def _embedding_parameters(model: LMModel) -> Iterator[nn.Parameter]:
    for module in (model.emb, model.text_emb):
        yield from module.parameters()


def _linear_flops(module: nn.Module, passes: int) -> float:
    """FLOPs of the linear layers inside a module, each run once a frame in `passes` directions."""
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(2.0 * w.numel() * (passes + w.requires_grad) for w in weights)
