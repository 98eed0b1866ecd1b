"""Watching a stream's inner state for NaN and infinity."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import StreamingMultiheadAttention

from moshi_ttt.integration import ttt_layers
from moshi_ttt.ttt_state import TTTState

logger = logging.getLogger(__name__)


class NonFiniteStateError(RuntimeError):
    """The inner state of a TTT layer became NaN or infinite; the stream stops."""


@dataclass
class _Look:
    """Flags `[layers, B]` that are on their way to the host, true where the state is finite."""

    frame: int
    finite: torch.Tensor
    arrived: torch.cuda.Event | None


class FiniteStateCheck:
    """Looks at the inner state of every TTT layer every N frames of a stream, and tells of NaN and infinity.

    On a GPU the answer is fetched without waiting for it, so it comes a few frames later.

    Args:
        model (LMModel): with TTT layers, streaming.
        every (int): frames between looks.
        action (str): "stop" raises `NonFiniteStateError`. "restart" lets a row whose state is not finite go
            on from the learned weights, with empty attention windows, as they hold what came out of that
            state. "tell" leaves it to the caller to look at `broken`.
    Attributes:
        restarts: (layer, row, frame) of every non-finite state that led to a restart.
        broken: what was found in which row and not yet taken, when the caller is told.
    """

    def __init__(self, model: LMModel, every: int, action: str = "stop"):
        if every < 1:
            raise ValueError(f"the inner state is looked at every N frames, N at least 1; got {every}")
        assert action in ("stop", "restart", "tell")
        self.model = model
        self.every = every
        self.action = action
        self.restarts: list[tuple[int, int, int]] = []
        self.broken: dict[int, str] = {}
        self._layers = ttt_layers(model)
        self._frames = 0
        self._looks: list[_Look] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context for one streamed frame.

        Raises:
            NonFiniteStateError: on leaving it.
        """
        yield
        self._frames += 1
        if self._frames % self.every == 0:
            self._looks.append(self._look())
        self._judge(wait=False)

    def finish(self) -> None:
        """The stream is over: look once more, and wait for what is still on its way."""
        if self._frames % self.every:
            self._looks.append(self._look())
        self._judge(wait=True)

    def _states(self) -> Iterator[TTTState]:
        for index, layer in self._layers:
            state = layer.seq_modeling_block.ttt_layer.ttt._streaming_state
            assert state is not None, f"layer {index} is not streaming"
            yield state

    @torch.no_grad()
    def _look(self) -> _Look:
        flags = torch.stack([finite_rows(state) for state in self._states()])
        if flags.device.type != "cuda":
            return _Look(self._frames, flags, None)
        host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Look(self._frames, host, arrived)

    def _judge(self, wait: bool) -> None:
        while self._looks:
            look = self._looks[0]
            if look.arrived is not None:
                if wait:
                    look.arrived.synchronize()
                elif not look.arrived.query():
                    return
            del self._looks[0]
            if not look.finite.all():
                self._looks.clear()  # they saw the same
                self._act(look)

    def _act(self, look: _Look) -> None:
        bad = [(self._layers[i][0], row) for i, row in (~look.finite).nonzero().tolist()]
        layer, row = bad[0]
        since = max(0, look.frame - self.every)
        message = (
            f"the inner state of TTT layer {layer} is not finite in row {row} at frame {look.frame} (it was "
            f"at frame {since}); affected are {len({i for i, _ in bad})} layers and "
            f"{len({r for _, r in bad})} rows"
        )
        if self.action == "tell":
            self.broken |= {row: message for _, row in bad}
            return
        if self.action == "stop":
            raise NonFiniteStateError(
                f"{message}. Lower ttt.base_lr or set ttt.max_inner_change in training, or let such streams "
                "restart from the learned weights with inner_state.restart=true"
            )
        logger.warning("%s; the rows restart from the learned weights", message)
        self.restarts += [(layer, row, look.frame) for layer, row in bad]
        restart_rows(self.model, ~look.finite.all(dim=0))


def finite_rows(state: TTTState) -> torch.Tensor:
    """Whether all inner weights of each row and the updates that it has yet to fold in are finite, `[B]`."""
    pending = state.pending
    used = torch.arange(pending.lr.shape[1], device=pending.lr.device) < state.position[:, None]
    used = used.repeat_interleave(pending.lr.shape[0] // state.batch_size, 0)
    # A sum is finite only if every term is. Slots not in use hold anything.
    sums = [x.sum((1, 2)) for x in (*state.inner.weights, *state.inner.biases)]
    sums += [torch.where(used[..., None], x, 0).sum((1, 2)) for x in (*pending.inputs, *pending.grads)]
    return torch.stack(sums).isfinite().all(0).view(state.batch_size, -1).all(1)


@torch.no_grad()
def restart_rows(module: StreamingModule, rows: torch.Tensor) -> None:
    """Start rows `[B]` of a stream anew, in place: learned inner weights, empty attention windows."""
    module.reset_streaming(rows)
    for part in module.modules():
        if isinstance(part, StreamingMultiheadAttention):
            state = part._streaming_state
            if state is not None and state.kv_cache is not None:
                # Keys outside the window are masked, but 0 x NaN is NaN.
                state.kv_cache.cache[:, rows.to(state.device)] = 0
