"""The streaming state of a module as named tensors, and back.

Moshi keeps the state of a stream in one dataclass for each streaming module: KV caches, convolutions'
pasts, offsets, delayed codes, and TTT layers their inner weights. All of it is read, by type and not by name,
so that what a later release adds is either kept or refused.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, is_dataclass
from types import FunctionType
from typing import Any

import torch
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import RingKVCache
from moshi.utils.compile import CUDAGraphed

# What belongs to the process and not to the stream: it is made anew.
_PROCESS = (torch.device, CUDAGraphed, ExitStack, FunctionType)

# Sizes. They come from the model's settings, so a state with others is another model's.
_SIZES = ("batch_size", "capacity", "respect_exec_mask")


@dataclass
class _Leaf:
    """A tensor or a number of a state: where it is held."""

    holder: Any
    field: str
    value: torch.Tensor | int

    @property
    def tensor(self) -> torch.Tensor:
        return self.value if isinstance(self.value, torch.Tensor) else torch.tensor(self.value)

    @property
    def is_size(self) -> bool:
        return self.field in _SIZES


def _leaves(name: str, holder: Any, field: str, value: Any) -> Iterator[tuple[str, _Leaf]]:
    if isinstance(value, torch.Tensor | int):
        yield name, _Leaf(holder, field, value)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            # A tuple cannot take a new number; tensors are restored in place.
            if not isinstance(item, torch.Tensor):
                raise TypeError(
                    f"{name}.{index} of the streaming state is a {type(item).__name__} in a tuple"
                )
            yield f"{name}.{index}", _Leaf(value, str(index), item)
    elif is_dataclass(value) or isinstance(value, RingKVCache):
        for key, item in vars(value).items():
            yield from _leaves(f"{name}.{key}", value, key, item)
    elif value is not None and not isinstance(value, _PROCESS):
        raise TypeError(
            f"{name} of the streaming state is a {type(value).__name__}, which no session can hold"
        )


def _live_state(module: StreamingModule) -> dict[str, _Leaf]:
    if not module.is_streaming:
        raise ValueError(
            f"this {type(module).__name__} is not streaming, so it has no session; start with streaming()"
        )
    states = module.get_streaming_state().items()
    return dict(leaf for name, state in states for leaf in _leaves(name or "self", None, "", state))


def session_tensors(module: StreamingModule) -> dict[str, torch.Tensor]:
    """Copies on the CPU of every tensor and every number in the streaming state of a module, by name.

    Modules that are detached, as LMGen's model is, have a state of their own.

    Raises:
        ValueError: the module is not streaming.
        TypeError: the state holds something of a kind that this function does not know.
    """
    return {
        name: leaf.tensor.detach().to("cpu", copy=True).contiguous()
        for name, leaf in _live_state(module).items()
    }


@torch.no_grad()
def restore_session(module: StreamingModule, tensors: dict[str, torch.Tensor]) -> None:
    """Put a state that `session_tensors` gave into a module that streams, in place.

    All is checked before anything is changed. Tensors stay where they are, as captured GPU graphs need.

    Raises:
        ValueError: the module is not streaming, or the state is that of a module with other settings.
    """
    live = _live_state(module)
    missing, extra = sorted(live.keys() - tensors.keys()), sorted(tensors.keys() - live.keys())
    if missing or extra:
        raise ValueError(
            f"the session does not fit this {type(module).__name__}: {len(missing)} parts missing "
            f"{missing[:3]}, {len(extra)} unknown {extra[:3]}; restore it onto the model it was saved from"
        )
    for name, leaf in live.items():
        _refuse_other(name, tensors[name], leaf)
    for name, leaf in live.items():
        if isinstance(leaf.value, torch.Tensor):
            leaf.value.copy_(tensors[name])
        elif not leaf.is_size:
            setattr(leaf.holder, leaf.field, tensors[name].item())


def _refuse_other(name: str, saved: torch.Tensor, leaf: _Leaf) -> None:
    expected = leaf.tensor
    found = f"{saved.dtype} {list(saved.shape)}"
    wanted = f"{expected.dtype} {list(expected.shape)}"
    if leaf.is_size:
        found, wanted = f"{found} = {saved.tolist()}", f"{wanted} = {expected.tolist()}"
    if found != wanted:
        raise ValueError(
            f"the session's {name} is {found}, this model's is {wanted}; restore it onto a model with the "
            "settings that it was saved with"
        )
