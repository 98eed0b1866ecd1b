"""Which implementation of the inner loop runs: the one place that decides."""

import torch

KERNELS = ("auto", "eager", "triton")
_WIDTHS = (16, 32, 64, 128)
_MOST_TOKENS = 64


def refusal(q: torch.Tensor, widths: list[int], mini_batch_size: int) -> str | None:
    """Why the Triton kernels cannot run a problem; None if they can.

    Args:
        q: queries `[N, T, D]`.
        widths: of the inner network, from input to output.
        mini_batch_size: tokens of a mini-batch.
    """
    if q.dtype != torch.float32:
        return f"they work in float32, not {q.dtype}"
    if len(widths) != 3:
        return f"they are written for an inner MLP of two layers, not for {len(widths) - 1}"
    if widths[0] not in _WIDTHS or widths[1] % max(64, widths[0]):
        return (
            f"they need heads of {', '.join(map(str, _WIDTHS))} and a hidden width that 64 divides; "
            f"got {widths[0]} and {widths[1]}"
        )
    if mini_batch_size > _MOST_TOKENS:
        return f"they take mini-batches of at most {_MOST_TOKENS} tokens, not {mini_batch_size}"
    return None


def chosen(asked: str, q: torch.Tensor, widths: list[int], mini_batch_size: int) -> str:
    """`eager` or `triton`: what was asked for, or with `auto` the kernels on a CUDA device where they can run.

    Raises:
        ValueError: the kernels were asked for and cannot run this problem.
    """
    assert asked in KERNELS, asked
    if asked == "eager" or (asked == "auto" and q.device.type != "cuda"):
        return "eager"
    reason = refusal(q, widths, mini_batch_size)
    if reason is None:
        return "triton"
    if asked == "triton":
        raise ValueError(f"ttt.kernel=triton, but the Triton kernels cannot run this: {reason}; use ttt.kernel=auto")
    return "eager"
