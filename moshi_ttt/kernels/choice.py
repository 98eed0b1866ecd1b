"""Which implementation of the inner loop runs, in training and in streaming: the one place that decides."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.kernels.native_build import compiler

logger = logging.getLogger(__name__)

KERNELS = ("auto", "eager", "native", "triton")
_WIDTHS = (16, 32, 64, 128)
# Inner layers and widths whose scan has been run on a GPU (an H100) and was right; others must be asked for.
_TRIED_SCANS = ((2, 128),)
_MOST_TOKENS = 64
_forced: str | None = None


def refusal(weights: InnerWeights, mini_batch_size: int) -> str | None:
    """Why the Triton kernels cannot run an inner network; None if they can.

    Args:
        weights: of the inner network.
        mini_batch_size: tokens of a mini-batch.
    """
    first = weights.weights[0]
    if first.dtype != torch.float32:
        return f"they work in float32, not {first.dtype}"
    layers, (_, width, outputs) = len(weights.weights), first.shape
    if layers > 2:
        return f"they are written for one or two inner layers, not for {layers}"
    needed = f"they need heads of {', '.join(map(str, _WIDTHS))}"
    if layers == 1 and (width not in _WIDTHS or outputs != width):
        return f"{needed}; got {width} and outputs of {outputs}"
    if layers == 2 and (width not in _WIDTHS or outputs != 4 * width):
        return f"{needed} and a hidden width of 4 times that; got {width} and {outputs}"
    if mini_batch_size > _MOST_TOKENS:
        return f"they take mini-batches of at most {_MOST_TOKENS} tokens, not {mini_batch_size}"
    return None


def scan_kernel(asked: str, weights: InnerWeights, mini_batch_size: int) -> str:
    """What runs whole mini-batches, as in training: "eager", "native" or "triton".

    With `auto`, the Triton kernels on a CUDA device where they can and have been tried, and the C++ code on
    the CPU where there is a compiler.

    Raises:
        ValueError: what was asked for cannot run this.
    """
    if use_native(asked, weights):
        return "native"
    kind = len(weights.weights), weights.weights[0].shape[1]
    if (_forced or asked) == "auto" and kind not in _TRIED_SCANS:
        return "eager"
    return "triton" if use_triton(asked, weights, mini_batch_size) else "eager"


def use_native(asked: str, weights: InnerWeights) -> bool:
    """Whether the C++ code runs: where asked for, or with `auto` on the CPU where there is a compiler.

    Raises:
        ValueError: it was asked for and cannot run this.
    """
    asked, device = _forced or asked, weights.weights[0].device.type
    if asked == "native" and device != "cpu":
        raise ValueError(f"ttt.kernel=native runs on the CPU, not on {device}; use ttt.kernel=auto")
    return asked == "native" or (asked == "auto" and device == "cpu" and _has_compiler())


@cache
def _has_compiler() -> bool:
    if compiler() is None:
        logger.warning(
            "no C++ compiler found: the inner loop runs in torch's operations, at less than half the speed; "
            "install g++, or set ttt.kernel=eager to have it so"
        )
    return compiler() is not None


def use_triton(asked: str, weights: InnerWeights, mini_batch_size: int) -> bool:
    """Whether the Triton kernels run: where asked for, or with `auto` on a CUDA device where they can.

    Raises:
        ValueError: the kernels were asked for and cannot run this.
    """
    asked = _forced or asked
    assert asked in KERNELS, asked
    if asked in ("eager", "native") or (asked == "auto" and weights.weights[0].device.type != "cuda"):
        return False
    reason = refusal(weights, mini_batch_size)
    if reason is not None and asked == "triton":
        raise ValueError(
            f"ttt.kernel=triton, but the Triton kernels cannot run this: {reason}; use ttt.kernel=auto"
        )
    return reason is None


def steps_in_triton(asked: str, weights: InnerWeights, mini_batch_size: int) -> bool:
    """Whether single tokens of a stream run in Triton kernels; those are for TTT-MLP of two layers alone.

    With one layer what was asked for is the scan: its streams run in torch's operations.

    Raises:
        ValueError: the kernels were asked for and can run neither scan nor steps.
    """
    return use_triton(asked, weights, mini_batch_size) and len(weights.weights) == 2


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Use "eager", "native" or "triton", whatever was asked for, for what is run or captured meanwhile.

    Raises:
        ValueError: another name.
    """
    global _forced
    if kernel not in KERNELS[1:]:
        raise ValueError(f"an inner loop is eager, native or triton; got {kernel!r}")
    before, _forced = _forced, kernel
    try:
        yield
    finally:
        _forced = before
