"""FSDP2: a Moshi whose parameters, gradients and optimiser state are split over processes.

`fully_shard` changes the class of a module, which Moshi's streaming modules do not allow. So units are lists
of plain leaf modules (norms, projections, gatings, embeddings), whose names stay as they are, and the root is
`LossModel`. A list is gathered before the first of its modules runs and freed after the last, and gathered
again for the backward pass when the gradient of that last output comes: in every list here the last module to
run is the first that the backward pass comes to, and needs a gradient if any other does.

Parameters keep the dtype they have in one process (`param_dtype`; gates and inner weights float32), so that
every number of processes trains, and saves, the same values. Only gradients are reduced in another dtype.
"""

import logging
from collections.abc import Iterator

import torch
from moshi.models.lm import LMModel
from moshi.modules.streaming import StreamingModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from finetune.config import FSDPConfig
from finetune.distributed import Process
from finetune.loss import LossModel
from moshi_ttt.float32 import Float32Module
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.loading import DTYPES

logger = logging.getLogger(__name__)


def shard_count(config: FSDPConfig, processes: int) -> int:
    """Into how many parts the model is split; 1 where it is not.

    Raises:
        ValueError: the mesh that the config asks for is not one of this many processes.
    """
    if config.shard == "hybrid":
        assert config.replicate is not None, "the config was validated"
        if processes % config.replicate or processes == config.replicate:
            raise ValueError(
                f"fsdp.shard=hybrid with fsdp.replicate={config.replicate} needs that number times 2 or more "
                f"processes, there are {processes}; choose another fsdp.replicate, or fsdp.shard=full"
            )
        return processes // config.replicate
    return 1 if config.shard == "none" else processes


def make_mesh(config: FSDPConfig, process: Process) -> DeviceMesh | None:
    """The processes as FSDP2 uses them: in a line, or replicas x shards. None where nothing is sharded.

    Raises:
        ValueError: the mesh that the config asks for is not one of this many processes.
    """
    shards = shard_count(config, process.world_size)
    if shards == 1:
        return None
    if config.shard == "hybrid":
        shape, names = (process.world_size // shards, shards), ("replicate", "shard")
    else:
        shape, names = (shards,), ("shard",)
    return init_device_mesh(process.device.type, shape, mesh_dim_names=names)


def shard(root: LossModel, mesh: DeviceMesh, config: FSDPConfig) -> None:
    """Split every parameter of `root.lm` over the mesh, in place. To be called before an optimiser is built.

    Raises:
        ValueError: a model whose depformer steps share weights.
    """
    if root.lm.depformer_weights_per_step_schedule is not None:
        raise ValueError(
            "this model's depformer steps share weights (depformer_weights_per_step_schedule), which FSDP2 "
            "cannot gather as one unit; use fsdp.shard=none"
        )
    shards = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(_split_dimension(parameter.shape, shards))

    policy = MixedPrecisionPolicy(reduce_dtype=DTYPES[config.reduce_dtype], cast_forward_inputs=False)
    units = 0
    for unit in _units(root.lm):
        fully_shard(
            unit,  # type: ignore[arg-type]
            mesh=mesh,
            reshard_after_forward=config.reshard_after_forward,
            shard_placement_fn=placement,
            mp_policy=policy,
        )
        units += 1
    fully_shard(root, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)
    root.split = True
    for layer in root.lm.transformer.layers:
        if isinstance(layer, HybridStreamingTransformerLayer):
            register_fsdp_forward_method(layer.seq_modeling_block, "forward_from")
    for module in _sharded_modules(root):
        # Losses are divided by the targets of all processes, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    logger.info("FSDP2: %d units over a mesh of %s", units, " x ".join(map(str, mesh.shape)))


def reduce_gradients(root: LossModel, enable: bool) -> None:
    """Whether the next backward pass reduces gradients over the processes, or only adds them up."""
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(enable)


def reshard(root: LossModel) -> None:
    """Free what a forward pass without a backward pass has left gathered."""
    for module in _sharded_modules(root):
        module.reshard()


def _sharded_modules(root: nn.Module) -> Iterator[FSDPModule]:
    for module in root.modules():
        if isinstance(module, FSDPModule):
            yield module


def _split_dimension(shape: torch.Size, shards: int) -> int:
    """Dimension to split: the first, unless it has fewer entries than there are shards and another divides.

    Norms and gates are `[1, 1, C]`; inner weights `[heads, ...]`, with fewer heads than a large mesh has
    ranks.
    """
    if shape[0] >= shards:
        return 0
    return next((dim for dim, size in enumerate(shape) if size and size % shards == 0), 0)


def gathered_bytes(model: LMModel) -> int:
    """Bytes of parameters that are gathered at a time at most: a unit in use, and the next on its way."""
    seen: set[nn.Parameter] = set()
    sizes = [0, 0]
    for unit in _units(model):
        modules = [unit] if isinstance(unit, nn.Module) else unit
        new = {p for module in modules for p in module.parameters()} - seen
        seen |= new
        sizes.append(sum(p.numel() * p.element_size() for p in new))
    return sum(sorted(sizes)[-2:])


def _units(model: LMModel) -> Iterator[list[nn.Module] | nn.Module]:
    """What is gathered and freed together, inner units first."""
    assert model.depformer is not None
    assert model.depformer_emb is not None
    assert model.depformer_text_emb is not None
    yield [*model.emb, model.text_emb]
    for layer in model.transformer.layers:
        if isinstance(layer, HybridStreamingTransformerLayer):
            yield list(_plain_parts(layer.original_layer))
            yield list(_plain_parts(layer.seq_modeling_block))
            # The rest is float32: a unit's gradients must be of one dtype.
            yield layer.seq_modeling_block
        else:
            yield list(_plain_parts(layer))
    yield [model.out_norm, model.text_linear]
    yield list(model.depformer_in)
    # Apart from depformer_in: where they are frozen, their outputs would not call for its weights.
    yield [model.depformer_text_emb, *model.depformer_emb]
    for layer in model.depformer.layers:
        yield list(_plain_parts(layer))
    yield [*_with_parameters(model.depformer_norms), *model.linears]


def _with_parameters(modules: nn.ModuleList) -> Iterator[nn.Module]:
    for module in modules:
        if next(module.parameters(), None) is not None:
            yield module


def _plain_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules inside `module` that have parameters and hold no streaming module."""
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if isinstance(child, nn.ModuleList) or any(isinstance(m, StreamingModule) for m in child.modules()):
            yield from _plain_parts(child)
        elif not isinstance(child, Float32Module):
            yield child
