"""Whether each TTT layer of a streaming model really learns, keeps what it learns, and uses it.

A probe watches every call of every TTT layer. From the state that the call before left it computes, with the
pure functions of the inner loop, what the layer should have made of the frame, and compares: the layer's own
word is not taken for anything.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from moshi.models.lm import LMModel
from torch import nn

from moshi_ttt.hybrid_layer import Gate
from moshi_ttt.inner_loop import effective_weights, inner_step
from moshi_ttt.inner_weights import InnerWeights, within
from moshi_ttt.integration import ttt_layers
from moshi_ttt.pending import PendingUpdates
from moshi_ttt.persistence import stream_weights
from moshi_ttt.ttt_layer import TTTBase

# Weights that are off by more than this share of what is at stake (what was learned before the frame) did not
# come from what the frame before left. Rounding adds a share of the weights themselves.
_OF_STAKE = 0.01
_OF_WEIGHTS = 1e-6


class Verdict(Enum):
    PERSISTS = "PERSISTS"
    """Every frame began from what the frame before left, and the output depends on it."""

    RESETS = "RESETS"
    """Frames began from other weights: what was learned is lost."""

    FROZEN = "FROZEN"
    """Nothing is learned, or nothing of it reaches the output."""


@dataclass
class LayerVerdict:
    """What was seen of one TTT layer.

    Args:
        layer: its index.
        verdict: PERSISTS, RESETS or FROZEN.
        why: in words.
        frames: calls seen.
        update: mean change of the weights by a frame, as a share of the learned weights' norm.
        drift: distance of the last weights from the learned ones, as a share of the latter's norm.
        effect: share of the gated TTT output that is there because of what was learned before the frame, as
            the norm of the difference without it.
    """

    layer: int
    verdict: Verdict
    why: str
    frames: int
    update: float
    drift: float
    effect: float


@dataclass
class _Memory:
    """Where a layer stands between two frames; copies."""

    inner: InnerWeights
    pending: PendingUpdates
    position: torch.Tensor

    @staticmethod
    def learned(ttt: TTTBase, batch_size: int, position: torch.Tensor) -> "_Memory":
        """Nothing seen yet, at these positions `[B]`."""
        nets = batch_size * ttt.num_heads
        pending = PendingUpdates.empty(nets, ttt.mini_batch_size, ttt.inner_dims, ttt.ttt_norm_weight)
        return _Memory(ttt.initial_weights(batch_size), pending, position)

    @staticmethod
    def live(ttt: TTTBase) -> "_Memory":
        state = ttt._streaming_state
        assert state is not None
        inner, pending = state.inner, state.pending
        return _Memory(
            InnerWeights(_copies(inner.weights), _copies(inner.biases)),
            PendingUpdates(_copies(pending.inputs), _copies(pending.grads), pending.lr.clone()),
            state.position.clone(),
        )

    def after(self, ttt: TTTBase, x: torch.Tensor) -> tuple[InnerWeights, torch.Tensor, float]:
        """Weights and output `[B, 1, C]` of a frame and its largest inner learning rate. Writes `pending`."""
        norm, scale = ttt.norm(x.shape[0]), ttt.step_scale()
        q, k, target, lr = ttt.project(x, self.position[:, None], norm)
        nets = ttt._nets(self.position)
        out = inner_step(q, k, target, lr, nets, self.inner, self.pending, norm, scale)
        weights = effective_weights(nets + 1, self.inner, self.pending, scale)
        if bool((self.position + 1 == ttt.mini_batch_size).all()):
            # Here the layer folds the updates in, and draws the weights back.
            weights = within(weights, ttt.bound(ttt.initial_weights(1)))
        return weights, ttt._output(out, x.dtype), lr.max().item()


def _copies(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


def _distance(a: InnerWeights, b: InnerWeights) -> float:
    pairs = zip((*a.weights, *a.biases), (*b.weights, *b.biases), strict=True)
    return torch.stack([(x - y).double().square().sum() for x, y in pairs]).sum().sqrt().item()


def _size(weights: InnerWeights) -> float:
    parts = (*weights.weights, *weights.biases)
    return torch.stack([part.double().square().sum() for part in parts]).sum().sqrt().item()


class _LayerProbe:
    """Forward hook of one TTT layer that collects what a verdict needs."""

    def __init__(self, index: int, gate: Gate):
        self.index = index
        self.gate = gate
        self.frames = 0
        self.memory: _Memory | None = None
        self.weights: InnerWeights | None = None
        self.max_lr = self.asked = self.changed = self.drift = 0.0
        self.effect = self.output = 0.0
        self.outside_stream: list[int] = []
        self.lost: list[int] = []
        self.at_start: list[int] = []
        self.not_finite: int | None = None

    @torch.no_grad()
    def __call__(self, ttt: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        assert isinstance(ttt, TTTBase)
        x, frame, state = args[0], self.frames, ttt._streaming_state
        self.frames += 1
        if state is None:
            self.outside_stream.append(frame)
            return
        assert x.shape[1] == 1, f"verdicts need one frame a call, got {x.shape[1]}"
        now = stream_weights(ttt, state)
        if self.not_finite is None and not all(w.isfinite().all() for w in (*now.weights, *now.biases)):
            self.not_finite = frame
        learned = ttt.initial_weights(x.shape[0])
        before = self.weights or learned
        memory = self.memory or _Memory.learned(ttt, x.shape[0], torch.zeros_like(state.position))
        without = _Memory.learned(ttt, x.shape[0], memory.position).after(ttt, x)
        expected, _, lr = memory.after(ttt, x)
        self.max_lr = max(self.max_lr, lr)
        self.asked += _distance(expected, before)
        self.changed += _distance(now, before) / _size(learned)
        self.drift = _distance(now, learned) / _size(learned)
        tolerance = _OF_STAKE * _distance(expected, without[0]) + _OF_WEIGHTS * _size(expected)
        if _distance(now, expected) > tolerance:
            self.lost.append(frame)
            first = _Memory.learned(ttt, x.shape[0], torch.zeros_like(state.position)).after(ttt, x)[0]
            if min(_distance(now, start) for start in (first, learned)) <= tolerance:
                self.at_start.append(frame)
        weight = self.gate.ttt_weight().to(out.dtype)
        self.effect += (weight * (out - without[1])).double().square().sum().item()
        self.output += (weight * out).double().square().sum().item()
        self.memory, self.weights = _Memory.live(ttt), now

    def verdict(self, ttt: TTTBase) -> LayerVerdict:
        verdict, why = self._judge(ttt)
        effect = (self.effect / self.output) ** 0.5 if self.output else 0.0
        update = self.changed / max(self.frames, 1)
        return LayerVerdict(self.index, verdict, why, self.frames, update, self.drift, effect)

    def _judge(self, ttt: TTTBase) -> tuple[Verdict, str]:
        if self.frames == 0:
            return Verdict.FROZEN, "no frame reached the layer"
        if self.outside_stream:
            return Verdict.RESETS, (
                f"the layer is not part of the stream: {_some(self.outside_stream)} began from the learned "
                "weights"
            )
        if self.not_finite is not None:
            return Verdict.FROZEN, f"its weights are not finite from frame {self.not_finite} on"
        if self.asked == 0:
            return Verdict.FROZEN, self._why_nothing_is_learned(ttt)
        if self.lost:
            if self.at_start == self.lost:
                return Verdict.RESETS, f"the weights are back at the learned start in {_some(self.lost)}"
            return Verdict.RESETS, f"what was learned before did not enter the weights of {_some(self.lost)}"
        if self.effect == 0:
            if not self.gate.ttt_weight().any():
                return Verdict.FROZEN, (
                    "the gate is closed: the effective weight of the TTT output is 0 in every channel, so "
                    "nothing of what the layer learns is heard"
                )
            return Verdict.FROZEN, "the output does not depend on what the layer learns"
        return Verdict.PERSISTS, "every frame began from what the frame before left"

    def _why_nothing_is_learned(self, ttt: TTTBase) -> str:
        if ttt.base_lr == 0:
            return "the inner learning rate is 0 (ttt.base_lr=0)"
        if self.max_lr == 0:
            return f"the learned inner learning rate is 0 in every frame (ttt.base_lr={ttt.base_lr:g})"
        return f"the updates change no float32 weight (the inner learning rate is {self.max_lr:.3g} at most)"


def _some(frames: list[int]) -> str:
    shown = ", ".join(map(str, frames[:5]))
    more = f", ... ({len(frames)} in all)" if len(frames) > 5 else ""
    return f"frame{'s' if len(frames) > 1 else ''} {shown}{more}"


class PersistenceProbe:
    """Watches the TTT layers of a streaming model until it is closed. It only reads.

    Calls are of one frame, as LMGen makes them, and not in captured CUDA graphs.

    Raises:
        ValueError: the model has no TTT layers.
    """

    def __init__(self, model: LMModel):
        layers = ttt_layers(model)
        if not layers:
            raise ValueError("found 0 TTT layers: there is nothing whose persistence could be verified")
        self._layers = [
            (layer.seq_modeling_block.ttt_layer.ttt, _LayerProbe(index, layer.seq_modeling_block.gate))
            for index, layer in layers
        ]
        self._hooks = [ttt.register_forward_hook(probe) for ttt, probe in self._layers]

    def verdicts(self) -> list[LayerVerdict]:
        """One for each TTT layer, from all frames so far."""
        return [probe.verdict(ttt) for ttt, probe in self._layers]

    def __enter__(self) -> "PersistenceProbe":
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()


def verdict_table(verdicts: list[LayerVerdict]) -> str:
    """Verdicts as a table, then how many layers persist."""
    rows = [("layer", "verdict", "frames", "update", "drift", "effect", "why")]
    for v in verdicts:
        rows.append(
            (
                str(v.layer),
                v.verdict.value,
                str(v.frames),
                f"{v.update:.2e}",
                f"{v.drift:.2e}",
                f"{v.effect:.1%}",
                v.why,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    persist = sum(v.verdict is Verdict.PERSISTS for v in verdicts)
    return "\n".join([*lines, f"{persist} of {len(verdicts)} TTT layers persist"])
