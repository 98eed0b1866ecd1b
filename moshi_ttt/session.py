"""The streaming state of one row of a module as named tensors, and back.

Moshi keeps the state of a stream in one dataclass for each streaming module: KV caches, convolutions'
pasts, offsets, delayed codes, and TTT layers their inner weights. All of it is read, by type and not by name,
so that what a later release adds is either kept or refused. A row is kept as the only row of a batch of one
would be, so that it goes on in any row of any batch.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, is_dataclass
from types import FunctionType
from typing import Any

import torch
from moshi.models.lm import _LMGenState
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import RingKVCache
from moshi.utils.compile import CUDAGraphed

from moshi_ttt.ttt_state import TTTState

# What belongs to the process and not to the stream: it is made anew.
_PROCESS = (torch.device, CUDAGraphed, ExitStack, FunctionType)

# Learned values, and tokens that are the same for every row: they come from the model.
_CONSTANTS = {TTTState: ("initial", "norm", "step_scale"), _LMGenState: ("initial",)}

# Sizes. They come from the model's settings, so a state with others is another model's.
_SIZES = ("capacity", "respect_exec_mask")

# Numbers for the whole batch: its size, and a count that only a depformer's weights depend on.
_OF_THE_BATCH = ("batch_size", "offset_cpu")


@dataclass
class _Leaf:
    """A tensor or a size of a row's state.

    Args:
        value: the row's part of the tensor, a view with a leading dimension for the row; or the size.
        is_size: must be equal and is not restored.
    """

    value: torch.Tensor
    is_size: bool


def _row_of(name: str, tensor: torch.Tensor, row: int, batch_size: int, dim: int) -> torch.Tensor:
    """A view of one row's part of a tensor, which holds one or several entries (heads) a row."""
    if tensor.dim() <= dim or tensor.shape[dim] % batch_size:
        raise TypeError(
            f"{name} of the streaming state is {list(tensor.shape)}, which has no part for each of "
            f"{batch_size} rows"
        )
    each = tensor.shape[dim] // batch_size
    return tensor.narrow(dim, row * each, each)


def _leaves(name: str, value: Any, row: int, batch_size: int, dim: int = 0) -> Iterator[tuple[str, _Leaf]]:
    if isinstance(value, torch.Tensor):
        yield name, _Leaf(_row_of(name, value, row, batch_size, dim), False)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}.{index}", item, row, batch_size)
    elif is_dataclass(value) or isinstance(value, RingKVCache):
        constants = _CONSTANTS.get(type(value), ())
        for key, item in vars(value).items():
            if isinstance(item, int) and key in _SIZES:
                yield f"{name}.{key}", _Leaf(torch.tensor(item), True)
            elif key not in constants and not (isinstance(item, int) and key in _OF_THE_BATCH):
                # Keys and values come as one tensor, [2, B, H, T, D].
                dim = 1 if isinstance(value, RingKVCache) and key == "cache" else 0
                yield from _leaves(f"{name}.{key}", item, row, batch_size, dim)
    elif value is not None and not isinstance(value, _PROCESS):
        raise TypeError(
            f"{name} of the streaming state is a {type(value).__name__}, which no session can hold"
        )


def _live_state(module: StreamingModule, row: int) -> dict[str, _Leaf]:
    root = module._streaming_state
    if root is None:
        raise ValueError(
            f"this {type(module).__name__} is not streaming, so it has no session; start with streaming()"
        )
    assert isinstance(root, State)
    states = module.get_streaming_state().items()
    size = root.batch_size
    return dict(leaf for name, state in states for leaf in _leaves(name or "self", state, row, size))


def session_tensors(module: StreamingModule, row: int = 0) -> dict[str, torch.Tensor]:
    """Copies on the CPU of everything in the streaming state of a module that belongs to a row, by name.

    Modules that are detached, as LMGen's model is, have a state of their own.

    Raises:
        ValueError: the module is not streaming.
        TypeError: the state holds something of a kind that this function does not know.
    """
    return {
        name: leaf.value.detach().to("cpu", copy=True).contiguous()
        for name, leaf in _live_state(module, row).items()
    }


@torch.no_grad()
def restore_session(module: StreamingModule, tensors: dict[str, torch.Tensor], row: int = 0) -> None:
    """Put a state that `session_tensors` gave into a row of a module that streams, in place.

    All is checked before anything is changed. Tensors stay where they are, as captured GPU graphs need.

    Raises:
        ValueError: the module is not streaming, or the state is that of a module with other settings.
    """
    live = _live_state(module, row)
    missing, extra = sorted(live.keys() - tensors.keys()), sorted(tensors.keys() - live.keys())
    if missing or extra:
        raise ValueError(
            f"the session does not fit this {type(module).__name__}: {len(missing)} parts missing "
            f"{missing[:3]}, {len(extra)} unknown {extra[:3]}; restore it onto the model it was saved from"
        )
    for name, leaf in live.items():
        _refuse_other(name, tensors[name], leaf)
    for name, leaf in live.items():
        if not leaf.is_size:
            leaf.value.copy_(tensors[name])


def _refuse_other(name: str, saved: torch.Tensor, leaf: _Leaf) -> None:
    expected = leaf.value
    found = f"{saved.dtype} {list(saved.shape)}"
    wanted = f"{expected.dtype} {list(expected.shape)}"
    if leaf.is_size:
        found, wanted = f"{found} = {saved.tolist()}", f"{wanted} = {expected.tolist()}"
    if found != wanted:
        raise ValueError(
            f"the session's {name} is {found}, this model's is {wanted}; restore it onto a model with the "
            "settings that it was saved with"
        )
