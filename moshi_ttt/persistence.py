"""Persistence verification logs: do TTT weights live on from one frame to the next?

    [TTT-PERSIST-CHECK] Layer 29 Token 4: W1_hash=123456789, W2_hash=789012345
    [TTT-INNER-UPDATE] Layer 29 Position 4: W1_change=0.00420000, W2_change=0.00350000
    [TTT-SCAN-OUTPUT] Layer 29 Token 4: W1_change=0.00420000, W2_change=0.00350000 (kept for the next call)

All numbers are of the effective weights, of all rows and heads together: those that a token is answered with,
the updates of its unfinished mini-batch included; at the end of a mini-batch, drawn back into
`ttt.max_inner_change`. Hashes that change from token to token persist; hashes
that stay, or come back, do not. Reading is done by forward hooks, so a model without them runs the same code.
"""

import logging
import weakref
import zlib
from collections.abc import Iterator

import torch
from moshi.models.lm import LMModel
from torch import nn

from moshi_ttt.inner_loop import effective_weights
from moshi_ttt.inner_network import fold, key_pass
from moshi_ttt.inner_weights import InnerWeights, within
from moshi_ttt.integration import ttt_layers
from moshi_ttt.ttt_layer import TTTBase
from moshi_ttt.ttt_state import TTTState

logger = logging.getLogger(__name__)


def stream_weights(ttt: TTTBase, state: TTTState) -> InnerWeights:
    """Copies of the weights that each row's last token was answered with."""
    position = ttt._nets(state.position)
    return effective_weights(position, state.inner, state.pending, state.step_scale)


def offline_weights(ttt: TTTBase, x: torch.Tensor) -> Iterator[tuple[int, InnerWeights]]:
    """Tokens and the weights they are answered with, when a sequence `[B, T, C]` is processed afresh."""
    norm, scale = ttt.norm(x.shape[0]), ttt.step_scale()
    positions = torch.arange(x.shape[1], device=x.device)[None] % ttt.mini_batch_size
    _, k, target, lr = ttt.project(x, positions, norm)
    weights, bound = ttt.initial_weights(x.shape[0]), ttt.bound(ttt.initial_weights(1))
    for start in range(0, x.shape[1], ttt.mini_batch_size):
        end = min(start + ttt.mini_batch_size, x.shape[1])
        keys = key_pass(k[:, start:end], target[:, start:end], weights, norm)
        answered = weights
        for position in range(end - start):
            step = scale[position, : end - start] * lr[:, start:end]
            answered = fold(keys.inputs, keys.grads, step, weights)
            if position + 1 == ttt.mini_batch_size:
                answered = within(answered, bound)
            yield start + position, answered
        weights = answered


def weight_hashes(weights: InnerWeights) -> str:
    """`W1_hash=..., W2_hash=...`: CRC-32 of the bytes of each layer's weights."""
    values = [zlib.crc32(weight.detach().cpu().contiguous().numpy().data) for weight in weights.weights]
    return ", ".join(f"W{index}_hash={value}" for index, value in enumerate(values, start=1))


def weight_changes(before: InnerWeights, after: InnerWeights) -> str:
    """`W1_change=..., W2_change=...`: Frobenius norm of the difference, over all rows and heads."""
    norms = [(b - a).norm().item() for a, b in zip(before.weights, after.weights, strict=True)]
    return ", ".join(f"W{index}_change={norm:.8f}" for index, norm in enumerate(norms, start=1))


class _LayerLog:
    """Forward hook of one TTT layer, and with `before_call` its forward pre-hook.

    Args:
        index (int): of the temporal layer.
        every_frames (int): log tokens 0, every_frames, 2 every_frames, ... of each stream.
    """

    def __init__(self, index: int, every_frames: int):
        self.index = index
        self.every_frames = every_frames
        self.token = 0
        self.before: InnerWeights | None = None
        self.stream: weakref.ref[TTTState] | None = None

    @torch.no_grad()
    def before_call(self, ttt: nn.Module, args: tuple[torch.Tensor]) -> None:
        assert isinstance(ttt, TTTBase)
        state = ttt._streaming_state
        if state is None:
            return
        _refuse_capture()
        if self.stream is None or self.stream() is not state:
            self.stream, self.token = weakref.ref(state), 0
        self.before = stream_weights(ttt, state) if self._is_due(args[0].shape[1]) else None

    @torch.no_grad()
    def __call__(self, ttt: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        """After a call."""
        assert isinstance(ttt, TTTBase)
        state = ttt._streaming_state
        if state is None:
            # In training, layers are recomputed in the backward pass, and would be logged twice.
            if not ttt.training:
                self._log_offline(ttt, args[0])
            return
        self.token += args[0].shape[1]
        if self.before is None:
            return
        after, last = stream_weights(ttt, state), self.token - 1
        position = (int(state.position[0]) - 1) % ttt.mini_batch_size
        changes = weight_changes(self.before, after)
        logger.info("[TTT-PERSIST-CHECK] Layer %d Token %d: %s", self.index, last, weight_hashes(after))
        logger.info("[TTT-INNER-UPDATE] Layer %d Position %d: %s", self.index, position, changes)
        start = ", began from the learned weights" if _same(self.before, state.initial) else ""
        logger.info(
            "[TTT-SCAN-OUTPUT] Layer %d Token %d: %s (kept for the next call%s)",
            self.index,
            last,
            changes,
            start,
        )
        self.before = None

    def _is_due(self, frames: int) -> bool:
        """Whether a token to be logged is among the next frames."""
        return -(-self.token // self.every_frames) * self.every_frames < self.token + frames

    def _log_offline(self, ttt: TTTBase, x: torch.Tensor) -> None:
        learned = before = weights = ttt.initial_weights(x.shape[0])
        for token, weights in offline_weights(ttt, x):
            if token % self.every_frames == 0:
                hashes, changes = weight_hashes(weights), weight_changes(before, weights)
                logger.info("[TTT-PERSIST-CHECK] Layer %d Token %d: %s", self.index, token, hashes)
                position = token % ttt.mini_batch_size
                logger.info("[TTT-INNER-UPDATE] Layer %d Position %d: %s", self.index, position, changes)
            before = weights
        logger.info(
            "[TTT-SCAN-OUTPUT] Layer %d Token %d: %s (not streaming: the next call begins from the learned "
            "weights)",
            self.index,
            x.shape[1] - 1,
            weight_changes(learned, weights),
        )


def _same(weights: InnerWeights, learned: InnerWeights) -> bool:
    """Whether all rows have the learned weights of one row."""
    rows = weights.weights[0].shape[0] // learned.weights[0].shape[0]
    pairs = zip(weights.weights, learned.weights, strict=True)
    return all(torch.equal(now, start.repeat(rows, 1, 1)) for now, start in pairs)


def _refuse_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "persistence logging reads weights on the host, which a captured CUDA graph cannot; stream in "
            "moshi.utils.compile.no_cuda_graph(), or set NO_CUDA_GRAPH=1"
        )


class PersistenceLogging:
    """Logging that is on; `disable()` takes it away again. Also a context manager."""

    def __init__(self, hooks: list[torch.utils.hooks.RemovableHandle]):
        self._hooks = hooks

    def disable(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "PersistenceLogging":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def enable_ttt_persistence_logging(model: LMModel, every_frames: int = 1) -> PersistenceLogging:
    """Log hashes and changes of each TTT layer's effective weights, while streaming and, in evaluation mode,
    offline. It only reads: outputs stay the same to the last bit.

    A streaming call of several frames is logged once, for its last. Hooks do not run in captured CUDA graphs:
    stream within `moshi.utils.compile.no_cuda_graph()`.

    Args:
        model: with TTT layers.
        every_frames: log every so many frames of a stream; each logged frame copies the inner weights.
    Returns:
        What `disable()` is called on.
    Raises:
        ValueError: the model has no TTT layers, or is logged already.
    """
    layers = [(index, layer.seq_modeling_block.ttt_layer.ttt) for index, layer in ttt_layers(model)]
    if not layers:
        raise ValueError(
            "persistence logging found 0 TTT layers; expected a model after apply_ttt_to_model, "
            "or a checkpoint trained with ttt.enable=true"
        )
    if every_frames < 1:
        raise ValueError(f"every_frames must be at least 1, got {every_frames}")
    hooks = []
    for index, ttt in layers:
        if any(isinstance(hook, _LayerLog) for hook in ttt._forward_hooks.values()):
            raise ValueError("persistence logging is enabled already; call disable() on what it returned")
        log = _LayerLog(index, every_frames)
        hooks.append(ttt.register_forward_pre_hook(log.before_call))
        hooks.append(ttt.register_forward_hook(log))
    logger.info("Enabled persistence logging for %d TTT layers", len(layers))
    return PersistenceLogging(hooks)
