"""TTT layers: projections around the inner learner, and their streaming state.

`TTTWrapper` is the entry point; it holds a `TTTLinear`, `TTTMLP` or `TTTMLPMultiLayer` as `.ttt`. The parts
around the inner learner follow ttt-video-dit (arXiv 2504.05298), made causal.
"""

import logging
import math
from collections.abc import Callable

import torch
from moshi.modules.streaming import StreamingModule
from torch import nn
from torch.nn import functional as F

from moshi_ttt.config import TTTConfig
from moshi_ttt.float32 import Float32Module
from moshi_ttt.inner_loop import fold_finished, inner_loop, inner_step, step_scale
from moshi_ttt.inner_network import LAYER_NORM_EPS, InnerNorm, layer_norm
from moshi_ttt.inner_tokens import InnerTokens
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.kernels.choice import steps_in_triton
from moshi_ttt.pending import PendingUpdates
from moshi_ttt.projection import Projection
from moshi_ttt.ttt_state import TTTState

logger = logging.getLogger(__name__)

_NORM_EPS = 1e-12  # as F.normalize has it


class TTTBase(Float32Module, StreamingModule[TTTState]):
    """A TTT layer: `[B, T, C]` to `[B, T, C]`, causal, with memory beyond any attention window.

    Outside `streaming()` every sequence starts from the learned weights. In streaming the state lives from
    `streaming()` on; any split of a sequence into calls gives the outputs of one whole call.

    Args:
        dim (int): width C of the model.
        num_heads (int): TTT heads.
        head_dim (int): width of a head.
        config (TTTConfig): the other settings.
    Attributes:
        observer: called with every `InnerTokens` while diagnostics record a step; None otherwise.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, config: TTTConfig):
        super().__init__()
        self.observer: Callable[[InnerTokens], None] | None = None
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.mini_batch_size = config.mini_batch_size
        self.base_lr = config.base_lr
        self.normalize_target = config.normalize_target
        self.max_inner_change = config.max_inner_change
        self.checkpoint_group_size = config.scan_checkpoint_group_size
        self.inner_lr_factors = None if config.inner_lr_factors is None else tuple(config.inner_lr_factors)
        # The kernels know no factors.
        self.kernel = config.kernel if self.inner_lr_factors is None else "eager"
        self.inner_dims = self._inner_dims(head_dim, config)
        width = num_heads * head_dim
        self.wq = Projection(dim, width)
        self.wk = Projection(dim, width)
        self.wv = Projection(dim, width)
        self.wo = Projection(width, dim)
        self.post_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(num_heads, dim))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.empty(num_heads))
        self.ttt_norm_weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.ttt_norm_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        sizes = list(zip(self.inner_dims[:-1], self.inner_dims[1:], strict=True))
        for index, (width_in, width_out) in enumerate(sizes, start=1):
            self.register_parameter(f"W{index}", nn.Parameter(torch.empty(num_heads, width_in, width_out)))
            self.register_parameter(f"b{index}", nn.Parameter(torch.empty(num_heads, 1, width_out)))
        self.token_scale_offset: nn.Parameter | None = None
        if config.learned_token_scale:
            self.token_scale_offset = nn.Parameter(torch.empty(config.mini_batch_size))
        exponent = torch.arange(0, head_dim, 2) / head_dim
        angles = torch.arange(config.mini_batch_size)[:, None] * config.rope_theta**-exponent
        self.rope: torch.Tensor  # [K, D / 2, 2], cosine and sine
        self.register_buffer("rope", torch.stack((angles.cos(), angles.sin()), dim=-1), persistent=False)
        self._init_parameters(config.inner_init)

    @staticmethod
    def _inner_dims(head_dim: int, config: TTTConfig) -> list[int]:
        """Widths of the inner network, input and output included."""
        hidden = [4 * head_dim] * (config.inner_layers - 1)
        return [head_dim, *hidden, head_dim]

    @torch.no_grad()
    def _init_parameters(self, inner_init: str) -> None:
        for linear in (self.wq, self.wk, self.wv, self.wo):
            # Unit scale in, unit scale out at any width; close to the published 0.02 at Moshi's 4096.
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.learnable_ttt_lr_weight, std=0.02)
        nn.init.zeros_(self.learnable_ttt_lr_bias)
        nn.init.ones_(self.ttt_norm_weight)
        nn.init.zeros_(self.ttt_norm_bias)
        for index, (weight, bias) in enumerate(zip(self.inner_weights, self.inner_biases, strict=True)):
            if inner_init == "published" or len(self.inner_weights) == 1:
                std = 0.02
            else:
                # Keys have norm 1, so unit deviation gives the first hidden layer unit scale.
                std = 1.0 if index == 0 else weight.shape[1] ** -0.5
            nn.init.normal_(weight, std=std)
            nn.init.zeros_(bias)
        if self.token_scale_offset is not None:
            nn.init.zeros_(self.token_scale_offset)

    @property
    def inner_weights(self) -> list[nn.Parameter]:
        """W1, W2, ... `[H, d_in, d_out]`: the learned start of the inner network."""
        return [self.get_parameter(f"W{index}") for index in range(1, len(self.inner_dims))]

    @property
    def inner_biases(self) -> list[nn.Parameter]:
        """b1, b2, ... `[H, 1, d_out]`."""
        return [self.get_parameter(f"b{index}") for index in range(1, len(self.inner_dims))]

    @property
    def inner_parameters(self) -> int:
        """Size of the inner networks of all heads, biases counted."""
        return sum(p.numel() for p in (*self.inner_weights, *self.inner_biases))

    def norm(self, batch_size: int) -> InnerNorm:
        """The inner LayerNorm of every row and head, and the step factors."""
        return InnerNorm(
            self.ttt_norm_weight[:, None].repeat(batch_size, 1, 1),
            self.ttt_norm_bias[:, None].repeat(batch_size, 1, 1),
            self.inner_lr_factors,
        )

    def step_scale(self) -> torch.Tensor:
        """Step scales of a mini-batch, `[K, K]`: 1 / (position + 1) plus the learned offset, at least 0."""
        positions = torch.arange(self.mini_batch_size, device=self.ttt_norm_weight.device)
        scale = 1.0 / (positions + 1).to(self.ttt_norm_weight.dtype)
        if self.token_scale_offset is not None:
            scale = (scale + self.token_scale_offset).clamp(min=0)
        return step_scale(scale)

    def initial_weights(self, batch_size: int) -> InnerWeights:
        """The learned weights for every row and head."""
        return InnerWeights(
            tuple(w.repeat(batch_size, 1, 1) for w in self.inner_weights),
            tuple(b.repeat(batch_size, 1, 1) for b in self.inner_biases),
        )

    def blank_weights(self, batch_size: int) -> InnerWeights:
        """Zeros in the shapes of `initial_weights`: the carried weights of rows that have seen nothing."""

        def blank(p: nn.Parameter) -> torch.Tensor:  # plain, where new_zeros of a sharded one is sharded
            heads, *shape = p.shape
            return torch.zeros(batch_size * heads, *shape, dtype=p.dtype, device=p.device)

        return InnerWeights(tuple(map(blank, self.inner_weights)), tuple(map(blank, self.inner_biases)))

    def start_weights(self, carried: InnerWeights, fresh: torch.Tensor) -> InnerWeights:
        """The learned weights in the rows where `fresh` `[B]` is true, `carried` in the others.

        The learned weights are always part of the graph, so that they have a gradient on every process.
        """
        mask = self._nets(fresh)[:, None, None]
        learned = self.initial_weights(fresh.shape[0])

        def pick(start: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
            return torch.where(mask, start, now)

        return InnerWeights(
            tuple(map(pick, learned.weights, carried.weights)),
            tuple(map(pick, learned.biases, carried.biases)),
        )

    def bound(self, learned: InnerWeights) -> InnerBound | None:
        """How far the inner weights may go from the learned ones, of one row; None for anywhere."""
        if self.max_inner_change is None:
            return None
        return InnerBound(
            learned,
            tuple(self.max_inner_change * self.unit_norm(layer) for layer in range(len(learned.weights))),
        )

    def unit_norm(self, layer: int) -> float:
        """Norm per head of an inner weight whose outputs have unit scale: the unit of `max_inner_change`."""
        width_in, width_out = self.inner_dims[layer : layer + 2]
        # Keys have norm 1; what later layers read has unit scale.
        return math.sqrt(width_out if layer else width_in * width_out)

    def _nets(self, rows: torch.Tensor) -> torch.Tensor:
        """A value for each row `[B]` to one for each row and head `[N]`."""
        return rows[:, None].expand(-1, self.num_heads).flatten()

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, H * D]` in the model's dtype to `[B, H, T, D]` in the inner state's."""
        x = x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        return x.to(self.ttt_norm_weight.dtype)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary embedding (adjacent pairs) of `[B, H, T, D]` by positions `[B or 1, T]`."""
        rotation = torch.view_as_complex(self.rope[positions])[:, None]
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2)

    def project(
        self, x: torch.Tensor, positions: torch.Tensor, norm: InnerNorm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs of the inner learner.

        Args:
            x: `[B, T, C]`.
            positions: positions inside the mini-batch, `[B or 1, T]`.
            norm: LayerNorm of the inner loss.
        Returns:
            q, k, target `[N, T, D]` and the inner learning rate `[N, T]`, N = B * H, all float32.
        """
        qk = self._heads(torch.cat((self.wq(x), self.wk(x)), dim=-1))
        qk = qk / torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp_min(_NORM_EPS)
        q, k = self._rotate(qk, positions).chunk(2, dim=1)
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        target = self._heads(self.wv(x)).flatten(0, 1) - k
        if self.normalize_target:
            target = layer_norm(target, norm)
        logits = F.linear(
            x.to(self.learnable_ttt_lr_weight.dtype), self.learnable_ttt_lr_weight, self.learnable_ttt_lr_bias
        )
        lr = (self.base_lr / self.head_dim) * torch.sigmoid(logits)
        return q, k, target, lr.transpose(1, 2).flatten(0, 1)

    def _output(self, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[N, T, D]` to `[B, T, C]` in the model's dtype."""
        joined = out.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2)
        return self.wo(self.post_norm(joined.to(self.post_norm.weight.dtype))).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, C]` to `[B, T, C]`. Continues the stream when streaming, else starts afresh."""
        state = self._streaming_state
        if state is not None:
            assert x.shape[0] == state.batch_size, f"streaming {state.batch_size} rows, got {x.shape[0]}"
            return self._step(x, state) if x.shape[1] == 1 else self._call(x, state)
        return self.forward_from(x, self.initial_weights(x.shape[0]))[0]

    def forward_from(self, x: torch.Tensor, start: InnerWeights) -> tuple[torch.Tensor, InnerWeights]:
        """A sequence `[B, T, C]` that begins at a mini-batch edge with the weights `start`.

        Returns:
            `[B, T, C]` and the weights after the last token, to continue from if T is a multiple of K.
        """
        norm = self.norm(x.shape[0])
        positions = torch.arange(x.shape[1], device=x.device)[None] % self.mini_batch_size
        q, k, target, lr = self.project(x, positions, norm)
        scale, bound = self.step_scale(), self.bound(self.initial_weights(1))
        if self.observer is not None:
            self.observer(InnerTokens(k, target, lr, start, norm, scale, bound))
        out, end = inner_loop(
            q, k, target, lr, start, norm, scale, self.checkpoint_group_size, bound, self.kernel
        )
        return self._output(out, x.dtype), end

    @torch.no_grad()
    def _init_streaming_state(self, batch_size: int) -> TTTState:
        like = self.ttt_norm_weight
        pending = PendingUpdates.empty(
            batch_size * self.num_heads, self.mini_batch_size, self.inner_dims, like
        )
        return TTTState(
            batch_size,
            like.device,
            inner=self.initial_weights(batch_size),
            pending=pending,
            position=torch.zeros(batch_size, device=like.device, dtype=torch.long),
            initial=self.initial_weights(1),
            norm=self.norm(batch_size),
            step_scale=self.step_scale(),
        )

    @torch.no_grad()
    def _call(self, x: torch.Tensor, state: TTTState) -> torch.Tensor:
        """Several frames `[B, T, C]` of each stream; what fills mini-batches is done as in training."""
        first, last = self._whole_mini_batches(x.shape[1], state)
        parts = [self._step(x[:, t : t + 1], state) for t in range(first)]
        if last > first:
            out, end = self.forward_from(x[:, first:last], state.inner)
            rows = self._nets(state.exec_mask)[:, None, None]
            current = (*state.inner.weights, *state.inner.biases)
            for now, new in zip(current, (*end.weights, *end.biases), strict=True):
                now.copy_(torch.where(rows, new, now))
            parts.append(out)
        parts += [self._step(x[:, t : t + 1], state) for t in range(last, x.shape[1])]
        return torch.cat(parts, dim=1)

    def _whole_mini_batches(self, length: int, state: TTTState) -> tuple[int, int]:
        """The frames [first, last) of a call in which the rows that execute fill mini-batches together."""
        positions = state.position[state.exec_mask].unique().tolist()
        if len(positions) != 1 or self.observer is not None:  # who looks on wants to see the last frame
            return 0, 0
        first = -positions[0] % self.mini_batch_size
        count = max(0, length - first) // self.mini_batch_size
        return (first, first + count * self.mini_batch_size) if count else (0, 0)

    @torch.no_grad()
    def _step(self, x: torch.Tensor, state: TTTState) -> torch.Tensor:
        """One frame `[B, 1, C]` of every row's stream."""
        if self._steps_in_kernels(state):
            return self._fused_step(x, state)
        q, k, target, lr = self.project(x, state.position[:, None], state.norm)
        nets = self._nets(state.position)
        constants = state.norm, state.step_scale
        out = inner_step(q, k, target, lr, nets, state.inner, state.pending, *constants, self.kernel)
        if self.observer is not None:
            self.observer(
                InnerTokens(k, target, lr, state.inner, *constants, pending=state.pending, position=nets)
            )
        state.position.add_(state.exec_mask)
        self._finish_mini_batches(state)
        return self._output(out, x.dtype)

    def step_in_kernels(self, x: torch.Tensor) -> bool:
        """Whether a call with x `[B, T, C]` is a step of a stream in the few kernels made for it."""
        state = self._streaming_state
        return state is not None and x.shape[1] == 1 and self._steps_in_kernels(state)

    def _steps_in_kernels(self, state: TTTState) -> bool:
        # They give no InnerTokens to look at.
        return self.observer is None and steps_in_triton(self.kernel, state.inner, self.mini_batch_size)

    def _fused_step(self, x: torch.Tensor, state: TTTState) -> torch.Tensor:
        """The same in GPU kernels made for it."""
        from moshi_ttt.kernels.streaming_step import StepRules, fused_step  # Triton is not everywhere

        lr = (self.learnable_ttt_lr_weight, self.learnable_ttt_lr_bias, self.base_lr / self.head_dim)
        rules = StepRules(self.rope, *lr, self.normalize_target, self.bound(state.initial))
        out = fused_step(self.wq(x), self.wk(x), self.wv(x), x, rules, state)
        return self.wo(self.post_norm(out)).to(x.dtype)

    def _finish_mini_batches(self, state: TTTState) -> None:
        finished = state.position == self.mini_batch_size
        if state.position.device.type == "cpu":
            # On a GPU, asking would stall the stream and break graph capture; there the fold always runs.
            if not finished.any():
                return
            nets = None if finished.all() else self._nets(finished)
        else:
            nets = self._nets(finished)
        bound = self.bound(state.initial)
        fold_finished(nets, state.inner, state.pending, state.step_scale, bound, self.kernel)
        state.position.masked_fill_(finished, 0)


class TTTLinear(TTTBase):
    """TTT with one inner linear layer."""


class TTTMLP(TTTBase):
    """TTT with an inner MLP of two linear layers, hidden width 4 x head width."""


class TTTMLPMultiLayer(TTTBase):
    """TTT with an inner MLP of three or more linear layers."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, config: TTTConfig):
        super().__init__(dim, num_heads, head_dim, config)
        logger.info("[TTT-MLP-MULTI] Number of layers: %d", config.inner_layers)
        logger.info("[TTT-MLP-MULTI] Layer dimensions: %s", self.inner_dims)
        logger.info("[TTT-MLP-MULTI] Total TTT parameters: %s", f"{self.inner_parameters:,}")


class TTTWrapper(nn.Module):
    """Builds the TTT layer that the config asks for and stands for it: `forward(x)`, `[B, T, C]`.

    Args:
        dim (int): width of the host model.
        host_num_heads (int): the host's attention heads, used where the config leaves sizes open.
        config (TTTConfig): settings, validated.
    """

    def __init__(self, dim: int, host_num_heads: int, config: TTTConfig):
        super().__init__()
        config.validate()
        num_heads = config.num_heads or host_num_heads
        head_dim = config.head_dim or dim // host_num_heads
        if head_dim % 2:
            raise ValueError(f"the host's head width {head_dim} is odd; set ttt.head_dim to an even number")
        kinds = {1: TTTLinear, 2: TTTMLP}
        kind = kinds.get(config.inner_layers, TTTMLPMultiLayer)
        self.ttt: TTTBase = kind(dim, num_heads, head_dim, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ttt(x)
