"""What a run needs, before it starts: `python -m finetune.plan experiment=moshi_7b_ttt data.train=- gpu=h100`

One training step is run on meta tensors: the real model and loss, with shapes and no numbers. Live bytes are
followed storage by storage through forward and backward, FLOPs by torch's own counter, so a change of the
model changes the plan.
"""

import logging
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import hydra
import torch
from hydra.core.config_store import ConfigStore
from moshi.models import loaders
from moshi.models.lm import LMModel
from omegaconf import DictConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from finetune.config import TrainConfig, to_typed
from finetune.loss import LossModel, LossWeights, weighted_step_targets
from finetune.run_dir import start_logging
from finetune.sharding import gathered_bytes, shard_count
from finetune.speed import PEAK_TFLOPS
from moshi_ttt.carried import CarriedState, fresh_state
from moshi_ttt.integration import apply_ttt_to_model, set_activation_checkpointing
from moshi_ttt.loading import find_lm_config, refuse_other_models
from moshi_ttt.lora import apply_lora_to_model
from moshi_ttt.parameters import named_groups, set_trainable
from moshi_ttt.warm_start import holds_base_weights

logger = logging.getLogger(__name__)

FRAME_RATE = 12.5
# Name, shape and place of a tensor in a file of the resume checkpoint.
_HEADER_BYTES = 200
GIB = 1 << 30


def _product_flops(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    """Of `[..., M, K]` times `[..., K, N]`, added to a third."""
    return 2 * math.prod(left) * right[-1]


# Products that torch's counter does not know in this form.
_IN_PLACE_FLOPS = {torch.ops.aten.addmm_: _product_flops, torch.ops.aten.baddbmm_: _product_flops}


@dataclass(frozen=True)
class GPU:
    """Vendor's figures: memory in GiB, dense bfloat16 peak in TFLOP/s."""

    memory_gib: float
    peak_tflops: float


GPUS = {
    "h100": GPU(80.0, PEAK_TFLOPS["h100"]),
    "h200": GPU(141.0, PEAK_TFLOPS["h200"]),
    "a100": GPU(80.0, PEAK_TFLOPS["a100"]),
    "a100-40": GPU(40.0, PEAK_TFLOPS["a100"]),
    "l40s": GPU(48.0, PEAK_TFLOPS["l40s"]),
    "l4": GPU(24.0, PEAK_TFLOPS["l4"]),
}


@dataclass
class PlanConfig(TrainConfig):
    """A training config and the machine to plan it for."""

    gpu: str = "h100"
    """One of the names in finetune/plan.py."""

    gpus: int = 1
    """How many."""

    mfu: float = 0.2
    """Assumed share of the peak that the step reaches; moshi-finetune's published figure is 0.044."""

    run_dir: str = "-"


@dataclass
class Plan:
    """What a run needs. Bytes are those of one GPU.

    Args:
        parameters, trainable: counts.
        weights: bytes of all parameters.
        optimizer: AdamW's two moments and the float32 masters of bfloat16 parameters.
        step_peak: most bytes alive beside weights, optimiser state and carried state in a step: activations,
            gradients, temporaries.
        flops_per_step: on one GPU, recomputation included.
        checkpoint: bytes of one checkpoint, with what resuming needs.
        frames_per_step: on all GPUs.
        carried: bytes of what the rows of all micro-batches carry from chunk to chunk.
        gathered: bytes of parameters that a sharded model gathers at a time.
    """

    parameters: int
    trainable: int
    weights: int
    optimizer: int
    step_peak: int
    flops_per_step: int
    checkpoint: int
    frames_per_step: int
    carried: int = 0
    gathered: int = 0

    @property
    def memory(self) -> int:
        return self.weights + self.optimizer + self.carried + self.gathered + self.step_peak


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of storages made while active; `peak` is the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._follow, result)
        return result

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these storages: they were there before."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = True

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def build_on_meta(config: TrainConfig) -> LMModel:
    """The run's model without numbers."""
    lm_config = find_lm_config(config.model)
    model = loaders.get_moshi_lm(None, lm_kwargs=lm_config, device="meta", dtype=config.settings.dtype)
    refuse_other_models(model)
    if config.lora.enable:
        apply_lora_to_model(model, config.lora)
    with torch.device("meta"):
        apply_ttt_to_model(model, config.ttt)
    set_trainable(model, config.mode)
    set_activation_checkpointing(model, config.gradient_checkpointing)
    return model.train()


def run_pass(
    root: LossModel, codes: torch.Tensor, weights: LossWeights, carried: CarriedState | None
) -> CarriedState | None:
    """Forward and backward of one micro-batch, and the state that it leaves."""
    losses, after = root(codes, weighted_step_targets(root.lm, codes, carried, weights), carried)
    losses.sum().backward()
    return after


def measure_step(
    root: LossModel,
    codes: torch.Tensor,
    weights: LossWeights,
    num_microbatches: int = 1,
    carried: CarriedState | None = None,
) -> tuple[int, int]:
    """Peak of the live bytes of a step, and FLOPs of one of its passes; works on any device.

    From the second micro-batch on, the gradients of those before lie beside the activations. A carried state
    is not counted, the one that a pass makes in its place is.
    """
    memory = LiveBytes()
    memory.ignore((*root.parameters(), *root.buffers(), codes))
    memory.ignore([] if carried is None else carried.tensors())
    with memory:
        for _ in range(min(num_microbatches, 2)):
            run_pass(root, codes, weights, carried)
    # A pass of its own: torch's counter keeps what activation checkpointing recomputes alive.
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE_FLOPS) as flops:
        run_pass(root, codes, weights, carried)
    return memory.peak, flops.get_total_flops()


def make_plan(config: TrainConfig, gpus: int) -> Plan:
    """Count what a run of `config` needs on each of `gpus` GPUs, which share the model as it says."""
    shards = shard_count(config.fsdp, gpus)
    model = build_on_meta(config)
    seconds_to_frames = round if config.ttt.persistent_states else math.ceil
    frames = seconds_to_frames(config.duration_sec * FRAME_RATE)
    codes = torch.zeros(config.batch_size, model.num_codebooks, frames, dtype=torch.long, device="meta")
    weights = LossWeights(config.first_codebook_weight_multiplier, config.text_padding_weight)
    trainable = [p for p in model.parameters() if p.requires_grad]
    state = fresh_state(model, config.batch_size) if config.ttt.persistent_states else None
    peak = flops = 0
    if trainable:
        root = LossModel(model, config.running)
        root.split = shards > 1
        peak, flops = measure_step(root, codes, weights, config.num_microbatches, state)
    # While masters are updated, their float32 gradients lie beside the parameters'.
    update_peak = sum(
        p.numel() * (p.element_size() + (0 if p.dtype == torch.float32 else 4)) for p in trainable
    )
    return Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trainable),
        weights=_share(sum(p.numel() * p.element_size() for p in model.parameters()), shards),
        optimizer=_share(sum((8 if p.dtype == torch.float32 else 12) * p.numel() for p in trainable), shards),
        step_peak=max(peak, update_peak),
        flops_per_step=flops * config.num_microbatches,
        checkpoint=checkpoint_bytes(config, model, gpus),
        frames_per_step=config.batch_size * config.num_microbatches * frames * gpus,
        carried=carried_bytes(config, model),
        gathered=gathered_bytes(model) if shards > 1 else 0,
    )


def _share(size: int, shards: int) -> int:
    return math.ceil(size / shards)


def carried_bytes(config: TrainConfig, model: LMModel) -> int:
    """What the rows of all micro-batches of one process carry from chunk to chunk."""
    if not config.ttt.persistent_states:
        return 0
    state = fresh_state(model, config.batch_size)
    return config.num_microbatches * sum(tensor.nbytes for tensor in state.tensors())


def checkpoint_bytes(config: TrainConfig, model: LMModel, processes: int = 1) -> int:
    """Size of one checkpoint of a run of `config`, whose model is on any device: weights to use, and what it
    is resumed from."""
    return consolidated_bytes(config, model) + resume_bytes(config, model, processes)


def resume_bytes(config: TrainConfig, model: LMModel, processes: int) -> int:
    """Trained parameters, float32 masters of those that are not, AdamW's moments and step count of each; what
    the rows of all processes carry, and their random numbers."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with_master = [p for p in trainable if p.dtype != torch.float32]
    parameters = sum(p.numel() * p.element_size() for p in trainable) + sum(
        4 * p.numel() for p in with_master
    )
    optimizer = sum(8 * p.numel() + 4 for p in trainable)
    names = _HEADER_BYTES * (4 * len(trainable) + len(with_master))
    own = carried_bytes(config, model) + torch.get_rng_state().nbytes
    return parameters + optimizer + names + processes * own


def consolidated_bytes(config: TrainConfig, model: LMModel) -> int:
    """Size of the part of a checkpoint that inference and evaluation use."""
    own_base = config.mode == "full" or (
        config.init_from is not None and holds_base_weights(config.init_from)
    )
    saved = {"lora", "ttt", "gate"} | ({"base"} if own_base else set())
    return sum(p.numel() * p.element_size() for g, _, p in named_groups(model) if g in saved)


def kept_checkpoints(config: TrainConfig) -> int:
    """How many checkpoints a finished run holds; the last step always has one."""
    every = config.checkpoint.every_steps
    written = math.ceil(config.max_steps / every) if every else 1
    return written if config.checkpoint.keep is None else min(written, config.checkpoint.keep)


def plan_text(plan: Plan, config: "PlanConfig") -> str:
    """The plan for a reader, with what it assumes."""
    gpu = GPUS[config.gpu]
    step_sec = plan.flops_per_step / (config.mfu * gpu.peak_tflops * 1e12)
    hours = step_sec * config.max_steps / 3600
    kept = kept_checkpoints(config)
    fits = "fits" if plan.memory < 0.92 * gpu.memory_gib * GIB else "DOES NOT FIT"
    audio_hours = plan.frames_per_step * config.max_steps / FRAME_RATE / 3600
    rows = [
        ("parameters", f"{plan.parameters:,}, {plan.trainable:,} train (mode {config.mode})"),
        ("memory per GPU", f"{plan.memory / GIB:.1f} GiB of {gpu.memory_gib:g}: {fits}"),
        ("  weights", f"{plan.weights / GIB:.1f} GiB"),
        ("  optimiser state", f"{plan.optimizer / GIB:.1f} GiB"),
        *([("  gathered weights", f"{plan.gathered / GIB:.1f} GiB")] if plan.gathered else []),
        *([("  carried state", f"{plan.carried / GIB:.1f} GiB")] if plan.carried else []),
        ("  peak of a step", f"{plan.step_peak / GIB:.1f} GiB (activations, gradients, temporaries)"),
        (
            "disk",
            f"{plan.checkpoint * (kept + 1) / GIB:.2f} GiB: {kept} kept checkpoints and one being written",
        ),
        ("compute per step", f"{plan.flops_per_step / 1e12:.1f} TFLOP on each GPU, recomputation included"),
        ("time per step", f"{step_sec:.2f} s at an assumed {config.mfu:.0%} of {gpu.peak_tflops:g} TFLOP/s"),
        ("time of the run", f"{hours:.1f} h for {config.max_steps:,} steps, {audio_hours:,.0f} h of audio"),
    ]
    width = max(len(name) for name, _ in rows)
    title = f"Plan for {config.gpus} x {config.gpu}, {config.duration_sec:g} s x {config.batch_size} clips"
    shards = shard_count(config.fsdp, config.gpus)
    caveat = "Every GPU holds the whole model." if shards == 1 else f"The model is split over {shards} GPUs."
    caveat += (
        " The peak counts attention scores in full, which fused kernels avoid, and gradients in full, also "
        "those of a split model; it leaves out fragmentation and the CUDA context (about 1 GiB)."
    )
    return "\n".join([title, *(f"{name.ljust(width)}  {value}" for name, value in rows), caveat])


ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="plan")
def main(config: DictConfig) -> None:
    start_logging(is_main=True)
    typed = to_typed(config)
    assert isinstance(typed, PlanConfig)
    if typed.gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}; got {typed.gpu!r}")
    logging.getLogger("moshi_ttt").setLevel(logging.WARNING)
    logger.info("%s", plan_text(make_plan(typed, typed.gpus), typed))


if __name__ == "__main__":
    main()
