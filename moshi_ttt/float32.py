"""Parameters that stay float32 whatever dtype their model is cast to."""

from collections.abc import Callable

import torch
from torch import nn


def keep_float32(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Let `nn.Module._apply` move tensors between devices, but not change their dtype."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


class Float32Module(nn.Module):
    """A module whose own parameters and buffers stay float32 whatever dtype the model is cast to.

    Its children are cast as usual.
    """

    def _apply(self, fn, recurse: bool = True):
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_float32(fn), recurse=False)
