"""Building a sharded model, in which no process holds the whole base model.

Every process builds the model without numbers and shards that. Then the main process reads the weights one
tensor at a time and sends each to all; each process keeps its shard. LoRA and TTT parts, a small share, are
made whole on the main process. There alone `whole_copy` also gathers all of the model, for the time of an
answer to eval.prompt; and a checkpoint of mode=full copies all weights to its host memory, off the device.
"""

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from moshi.models import loaders
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune.config import FSDPConfig
from finetune.distributed import Process, agree
from finetune.loss import LossModel
from finetune.sharding import shard
from moshi_ttt.building import ModelSettings, WeightFiles
from moshi_ttt.integration import apply_ttt_to_model
from moshi_ttt.loading import refuse_other_models
from moshi_ttt.lora import apply_lora_to_model
from moshi_ttt.parameters import set_trainable
from moshi_ttt.weight_reader import WeightReader, open_weights
from moshi_ttt.whole import whole_parameters

META = torch.device("meta")


def outline(
    settings: ModelSettings, base: CheckpointInfo, lora_on: torch.device = META, ttt_on: torch.device = META
) -> LMModel:
    """The model that `settings` describe, without the numbers of the base model.

    Args:
        lora_on, ttt_on: where the LoRA and TTT parameters are made. Anywhere but on meta they get the initial
            values that `build_model` gives them after the same `torch.manual_seed`.
    """
    model = loaders.get_moshi_lm(None, lm_kwargs=base.lm_config, device="meta", dtype=settings.dtype)
    refuse_other_models(model)
    if settings.lora.enable:
        apply_lora_to_model(model, settings.lora, lora_on)
    apply_ttt_to_model(model, settings.ttt, ttt_on)
    return model.eval()


@dataclass
class ShardedModel:
    """A model split over processes.

    Args:
        root: the model with its loss.
        trained: how many parameters of each group train.
        outline: the same model without numbers, on the main process: what it streams with is made from that.
    """

    root: LossModel
    trained: dict[str, int]
    outline: LMModel | None


def build_sharded(
    settings: ModelSettings,
    base: CheckpointInfo,
    weights: WeightFiles,
    mode: str,
    process: Process,
    mesh: DeviceMesh,
    config: FSDPConfig,
) -> ShardedModel:
    """The sharded model with the numbers that `build_model` gives.

    All processes must have called `torch.manual_seed` with the same seed.

    Raises:
        ValueError: settings that cannot work, or a file whose tensors are not exactly those expected; in
            every process.
    """
    if weights.lora is not None and not settings.lora.enable:
        raise ValueError(f"{weights.lora} holds LoRA weights; set lora.enable=true to use them")
    made: dict[str, torch.Tensor] = {}
    if process.is_main:
        model = outline(settings, base, process.device, torch.device("cpu"))
        values = [*model.named_parameters(), *model.named_buffers()]
        made = {name: tensor.detach() for name, tensor in values if not tensor.is_meta}
        model.to(META)
    else:
        model = outline(settings, base)
    plain = copy.deepcopy(model) if process.is_main else None
    sharded = ShardedModel(LossModel(model), set_trainable(model, mode), plain)
    shard(sharded.root, mesh, config)
    if plain is None:
        agree(None, process)
        _fill(sharded.root, made, None, process)
        return sharded
    with open_weights(plain, base, weights) as reader:
        agree(_problem(reader, plain), process)
        _fill(sharded.root, made, reader, process)
    return sharded


def _problem(reader: WeightReader, model: LMModel) -> str | None:
    """What is wrong with the files, so that all processes can say it, and none waits for the others."""
    try:
        reader.check(model)
    except ValueError as error:
        return str(error)
    return None


@torch.no_grad()
def _fill(
    root: LossModel, made: dict[str, torch.Tensor], reader: WeightReader | None, process: Process
) -> None:
    """Send every parameter and buffer from the main process, where `reader` is, and what it has `made`."""
    root.to_empty(device=process.device)
    values: list[tuple[str, torch.Tensor]] = [*root.lm.named_parameters(), *root.lm.named_buffers()]
    for name, tensor in values:
        if reader is None:
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=process.device)
        else:
            source = reader.read(name) if reader.has(name) else made.pop(name)
            full = source.to(process.device, tensor.dtype).contiguous()
        dist.broadcast(full, src=0)
        if isinstance(tensor, DTensor):
            # Without a source rank this only cuts: every process has the tensor by now.
            cut = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(cut.to_local())
        else:
            tensor.copy_(full)


@torch.no_grad()
def whole_copy(sharded: ShardedModel, process: Process) -> LMModel | None:
    """A plain copy of a sharded model on the main process, to stream with; None on the others.

    Every process must call this. It needs memory for the whole model on the main process.
    """
    filled = None
    if sharded.outline is not None:
        filled = copy.deepcopy(sharded.outline).to_empty(device=process.device)
        filled.requires_grad_(False)
        for name, buffer in sharded.root.lm.named_buffers():
            filled.get_buffer(name).copy_(buffer)
    for name, tensor in whole_parameters(sharded.root.lm):
        if filled is not None:
            filled.get_parameter(name).copy_(tensor)
    return filled
