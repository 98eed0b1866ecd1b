"""The gradient of the inner loss at the last layer's output, and the way back through it."""

import torch

from moshi_ttt.inner_network import LAYER_NORM_EPS, InnerNorm


class LossGradient:
    """G = J a of a group of mini-batches, with a = weight (weight n + bias - target).

    n is z normalised, r its inverse deviation, and J = r (1 - mean - n mean(n .)) the Jacobian of n(z), which
    is symmetric and depends on z itself through n and r.

    Args:
        z: outputs of the last layer `[M, N, K, D]`.
        target: `[M, N, K, D]`.

    Attributes:
        grad: G.
    """

    def __init__(self, z: torch.Tensor, target: torch.Tensor, norm: InnerNorm):
        self.z, self.norm, self.square = z, norm, norm.weight**2
        self.normed, self.mean, self.inv_std = torch.native_layer_norm(
            z, z.shape[-1:], None, None, LAYER_NORM_EPS
        )
        self.error = torch.addcmul(norm.bias - target, self.normed, norm.weight)
        self.a = self.error * norm.weight
        self.grad = _through_normed(self.a, z, self.mean, self.inv_std)
        self.r_a_n = self.inv_std * (self.a * self.normed).mean(-1, keepdim=True)
        # r has the derivative -r^2 n / D, and dr = (dG . G) / r.
        self.along = torch.stack((self.normed * self.inv_std, self.grad * self.inv_std), 1)
        self.d_a = torch.empty_like(z)

    def backward(self, index: int, d_grad: torch.Tensor) -> torch.Tensor:
        """dz of a mini-batch."""
        z, normed, mean, inv_std = (x[index] for x in (self.z, self.normed, self.mean, self.inv_std))
        d_a = _through_normed(d_grad, z, mean, inv_std)
        self.d_a[index] = d_a
        r_g_n, d_r_by_r = (self.along[index] * d_grad).mean(-1, keepdim=True)
        d_normed = d_a.mul_(self.square).addcmul_(d_grad, self.r_a_n[index], value=-1)
        d_normed.addcmul_(self.a[index], r_g_n, value=-1)
        return _through_normed(d_normed, z, mean, inv_std).addcmul_(normed, d_r_by_r, value=-1)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dtarget of the group `[M, N, K, D]`, and what LayerNorm's weight and bias get, `[N, 1, D]`."""
        d_error = self.d_a * self.norm.weight
        d_weight = (self.d_a * self.error + d_error * self.normed).sum((0, 2))[:, None]
        return d_error.neg(), d_weight, d_error.sum((0, 2))[:, None]


def _through_normed(
    grad: torch.Tensor, z: torch.Tensor, mean: torch.Tensor, inv_std: torch.Tensor
) -> torch.Tensor:
    """The gradient at z that a gradient at n gives: J times it."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, z, z.shape[-1:], mean, inv_std, None, None, [True, False, False]
    )[0]
