"""What the inner loop in C++ is handed: the structures of `native/problem.h` and `native/step.h`."""

import ctypes
from typing import Any

import torch

from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.kernels.native_build import library
from moshi_ttt.mini_batches import Rules, Tokens


def address(x: torch.Tensor) -> int:
    """Of a tensor's numbers."""
    assert x.is_contiguous()
    assert x.device.type == "cpu"
    return x.data_ptr()


def addresses(tensors: list[torch.Tensor]) -> Any:
    """Of several tensors' numbers, as a list."""
    return (ctypes.c_void_p * len(tensors))(*map(address, tensors))


class _Structure(ctypes.Structure):
    """Fields that are numbers, or addresses of what is given for them: a tensor, several, or an array.

    What the addresses point at lives as long as the structure.
    """

    def __init__(self, **given: Any):
        assert given.keys() <= {name for name, *_ in self._fields_}
        self.held = {name: addresses(x) if isinstance(x, list) else x for name, x in given.items()}
        self.given = given
        super().__init__(**{name: self._number(x) for name, x in self.held.items() if x is not None})

    @staticmethod
    def _number(x: Any) -> int:
        if isinstance(x, torch.Tensor):
            return address(x)
        return ctypes.addressof(x) if isinstance(x, ctypes.Array) else x


def _addresses_of(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


class Problem(_Structure):
    """See `native/problem.h`."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("nets", "heads", "tokens", "size", "depth", "group", "threads")),
        *_addresses_of("widths", "factors", "radii", "q", "k", "target", "lr"),
        *_addresses_of("norm_weight", "norm_bias", "scale", "center"),
        *_addresses_of("starts", "key_outputs", "query_outputs", "shrinks"),
    )


class Gradients(_Structure):
    """See `native/problem.h`."""

    _fields_ = _addresses_of(
        *("out", "q", "k", "target", "lr", "norm_weight", "norm_bias", "scale", "state", "center")
    )


class Pending(_Structure):
    """See `native/step.h`."""

    _fields_ = _addresses_of("inputs", "grads", "lr", "positions", "finished")


def sequence(tokens: Tokens, state: InnerWeights, rules: Rules, group_size: int = 0, **kept: Any) -> Problem:
    """A sequence, or one token of a stream, of which all tensors are contiguous and of one dtype.

    Args:
        group_size: mini-batches of a group; 0: all.
        kept: fields of what is kept for the backward pass.
    """
    length, size, norm = tokens.q.shape[1], rules.scale.shape[0], rules.norm
    return network(
        state,
        rules.scale,
        rules.bound,
        tokens=length,
        group=group_size or max(1, -(-length // size)),
        factors=(ctypes.c_double * len(state.weights))(*(norm.factors or (1.0,) * len(state.weights))),
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        **{name: getattr(tokens, name) for name in ("q", "k", "target", "lr")},
        **kept,
    )


def network(state: InnerWeights, scale: torch.Tensor, bound: InnerBound | None, **more: Any) -> Problem:
    """What is known of a problem without its tokens.

    Args:
        scale: step scales, `[K, K]`.
    """
    nets, width, _ = state.weights[0].shape
    depth = len(state.weights)
    if bound is not None:
        more["center"] = [*bound.center.weights, *bound.center.biases]
        more["radii"] = (ctypes.c_double * depth)(*bound.radii)
    found = Problem(
        nets=nets,
        heads=nets if bound is None else bound.center.weights[0].shape[0],
        size=scale.shape[0],
        depth=depth,
        threads=torch.get_num_threads(),
        widths=(ctypes.c_long * (depth + 1))(width, *(w.shape[2] for w in state.weights)),
        scale=scale,
        **more,
    )
    given = (x for x in found.given.values() if isinstance(x, torch.Tensor))
    assert all(x.dtype == state.weights[0].dtype for x in given), "one dtype for all"
    return found


def call(name: str, given: Problem, *arguments: _Structure | list[torch.Tensor] | torch.Tensor) -> None:
    """Call a function of the library."""
    function = getattr(library(), f"{name}_{str(given.given['scale'].dtype).removeprefix('torch.')}")
    function(ctypes.byref(given), *map(_argument, arguments))


def _argument(x: _Structure | list[torch.Tensor] | torch.Tensor) -> Any:
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(address(x))
    return addresses(x) if isinstance(x, list) else ctypes.byref(x)
