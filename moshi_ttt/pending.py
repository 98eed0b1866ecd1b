"""The updates that the current mini-batch of a stream has gathered."""

from dataclasses import dataclass

import torch


@dataclass
class PendingUpdates:
    """Factors of the weight updates that the current mini-batch has gathered, one slot a token.

    Args:
        inputs: X of each layer, `[N, K, d_in]`.
        grads: G of each layer, `[N, K, d_out]`.
        lr: `[N, K]`.
    """

    inputs: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor, ...]
    lr: torch.Tensor

    @staticmethod
    def empty(nets: int, size: int, widths: list[int], like: torch.Tensor) -> "PendingUpdates":
        """Empty slots for N nets, mini-batches of K and an inner network of these widths."""
        return PendingUpdates(
            tuple(like.new_zeros(nets, size, width) for width in widths[:-1]),
            tuple(like.new_zeros(nets, size, width) for width in widths[1:]),
            like.new_zeros(nets, size),
        )

    def clear(self, nets: torch.Tensor) -> None:
        """Zero the slots where `nets` `[N]` is true."""
        for buffer in (*self.inputs, *self.grads):
            buffer.masked_fill_(nets[:, None, None], 0)
        self.lr.masked_fill_(nets[:, None], 0)

    def write(
        self, position: torch.Tensor, inputs: list[torch.Tensor], grads: list[torch.Tensor], lr: torch.Tensor
    ) -> None:
        """Put one token, `[N, 1, ...]` each, into slot `position` `[N]`."""
        nets = torch.arange(position.shape[0], device=position.device)
        for buffer, new in zip((*self.inputs, *self.grads, self.lr), (*inputs, *grads, lr), strict=True):
            buffer[nets, position] = new[:, 0]
