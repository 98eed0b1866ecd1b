"""Whole tensors of a model whose parameters may be split over processes."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or gathered where it is split: then every process must call this, in one order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of every parameter, gathered one at a time."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach())
