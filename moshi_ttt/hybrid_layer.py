"""A Moshi transformer layer with a TTT layer between its attention and its feed-forward block."""

import abc
import logging
import math
from contextlib import ExitStack
from typing import Any

import torch
from moshi.modules.transformer import RMSNorm, StreamingTransformerLayer
from moshi.utils.compile import no_compile
from torch import nn

from moshi_ttt.config import TTTConfig
from moshi_ttt.float32 import Float32Module
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.ttt_layer import TTTWrapper

logger = logging.getLogger(__name__)


class Gate(Float32Module, abc.ABC):
    """How much of the TTT output enters the residual stream, per channel. float32, always.

    `off` is the value of the parameter at which that is nothing.
    """

    off: float

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((dim,), float(initial)))

    @abc.abstractmethod
    def ttt_weight(self) -> torch.Tensor:
        """Effective weight of the TTT output, `[C]`."""

    @abc.abstractmethod
    def parts(self, update: torch.Tensor, ttt_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention's update a and the TTT output m add to the residual stream, `[B, T, C]` each."""

    def forward(self, x: torch.Tensor, update: torch.Tensor, ttt_out: torch.Tensor) -> torch.Tensor:
        """Join x, attention's update a and the TTT output m, all `[B, T, C]`."""
        attention, ttt = self.parts(update, ttt_out)
        return x + attention + ttt


class ResidualGate(Gate):
    """x + a + tanh(alpha) m (ttt-video-dit). alpha = 0 leaves the host as it is."""

    off = 0.0

    def __init__(self, dim: int, gate_init: float):
        super().__init__(dim, gate_init)

    def ttt_weight(self) -> torch.Tensor:
        return torch.tanh(self.alpha)

    def parts(self, update: torch.Tensor, ttt_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return update, self.ttt_weight().to(ttt_out.dtype) * ttt_out


class ConvexGate(Gate):
    """x + s a + (1 - s) m with s = sigmoid(alpha): more memory means less attention."""

    off = 30.0  # sigmoid(30) is exactly 1 in float32

    def __init__(self, dim: int, gate_init: float):
        super().__init__(dim, self.off if gate_init == 0 else math.log((1 - gate_init) / gate_init))

    def ttt_weight(self) -> torch.Tensor:
        return 1 - torch.sigmoid(self.alpha)

    def parts(self, update: torch.Tensor, ttt_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.ttt_weight()
        return (1 - weight).to(update.dtype) * update, weight.to(ttt_out.dtype) * ttt_out


class HybridSeqModelingBlock(nn.Module):
    """The TTT branch of a hybrid layer: norm, TTT layer, gate.

    The TTT layer reads the residual stream after attention, normalised as every block of Moshi normalises
    its input: the inner learning rate is a function of it, and its scale grows with depth.

    Args:
        dim (int): width of the host.
        host_num_heads (int): heads of the host's attention.
        config (TTTConfig): settings.
    """

    def __init__(self, dim: int, host_num_heads: int, config: TTTConfig):
        super().__init__()
        self.norm = RMSNorm(dim, eps=1e-8, dtype=torch.float)
        self.ttt_layer = TTTWrapper(dim, host_num_heads, config)
        gates = {"residual": ResidualGate, "convex": ConvexGate}
        self.gate: Gate = gates[config.gate](dim, config.gate_init)

    def forward(self, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """The residual stream `[B, T, C]` after attention's `update` and the TTT layer's."""
        if isinstance(self.gate, ResidualGate) and self.ttt_layer.ttt.step_in_kernels(x):
            from moshi_ttt.kernels.residual import gated_sum, normed_sum  # Triton is not everywhere

            normed = normed_sum(x, update, self.norm.alpha, self.norm.eps)
            return gated_sum(x, update, self.ttt_layer(normed), self.gate.alpha)
        return self.gate(x, update, self.ttt_layer(self.norm(x + update)))

    def forward_from(
        self, x: torch.Tensor, update: torch.Tensor, carried: InnerWeights, fresh: torch.Tensor
    ) -> tuple[torch.Tensor, InnerWeights]:
        """`forward` from `carried` inner weights, or the learned ones in rows where `fresh` `[B]` is true.

        Also returns the inner weights after the last token. The learned weights are read in here, and not by
        the caller: where they are split over processes, they are whole only while this runs.
        """
        ttt = self.ttt_layer.ttt
        ttt_out, end = ttt.forward_from(self.norm(x + update), ttt.start_weights(carried, fresh))
        return self.gate(x, update, ttt_out), end


class HybridStreamingTransformerLayer(nn.Module):
    """A `StreamingTransformerLayer` whose attention is followed by a TTT layer.

    It takes the original layer over as `original_layer`, unchanged; only the TTT branch
    `seq_modeling_block` is new. Moshi's streaming finds the states of both by itself.

    Args:
        original_layer (StreamingTransformerLayer): the layer to extend.
        config (TTTConfig): settings of the TTT branch.
        layer_id (int): its index, for logs.
    """

    def __init__(self, original_layer: StreamingTransformerLayer, config: TTTConfig, layer_id: int):
        super().__init__()
        attention = original_layer.self_attn
        logger.info(
            "[Hybrid] Layer %d: Creating %s with %d layers via TTTWrapper",
            layer_id,
            "TTT-Linear" if config.inner_layers == 1 else "TTT-MLP",
            config.inner_layers,
        )
        self.layer_id = layer_id
        self.diagnostic_history: list[dict[str, Any]] | None = None
        self.original_layer = original_layer
        self.seq_modeling_block = HybridSeqModelingBlock(attention.embed_dim, attention.num_heads, config)

    def get_diagnostic_history(self) -> list[dict[str, Any]]:
        """What diagnostics recorded of this layer, oldest first (see `moshi_ttt.diagnostics`).

        Raises:
            ValueError: no history is kept.
        """
        if self.diagnostic_history is None:
            raise ValueError(
                f"layer {self.layer_id} keeps no diagnostic history; call "
                "enable_ttt_diagnostics(model, log_frequency=100, track_history=True) first"
            )
        return self.diagnostic_history

    def forward(self, x: torch.Tensor, cross_attention_src: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, T, C]` to `[B, T, C]`, as the original layer's forward with the TTT branch added."""
        layer = self.original_layer
        with ExitStack() as stack:
            if x.device.type != "cuda":
                stack.enter_context(no_compile())
            normed = layer.norm1(x)
            update = layer.layer_scale_1(layer.self_attn(normed, normed, normed))
            x = self.seq_modeling_block(x.to(update), update)
            if layer.cross_attention is not None:
                assert cross_attention_src is not None
                x = layer._cross_attention_block(x, cross_attention_src)
            x = layer._ff_block(x)
            state = layer._streaming_state
            if state is not None:
                state.offset_cpu += x.shape[1]
        return x
