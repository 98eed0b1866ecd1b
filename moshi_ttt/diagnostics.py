"""What attention and TTT do in each hybrid layer: numbers of a step, recorded now and then.

Let a be attention's update, m the TTT layer's output and w its effective weight in the gate in use. Of a
recorded step each hybrid layer gives one flat record. `mean` is over the rows and frames of the step (and
over channels, where values of one channel are named), `norm` the L2 norm of a frame's vector over its
channels, as the root of the mean square over rows and frames. Rows that rest (`exec_mask`) do not count.

* `attention_norm`, `ttt_norm`, `combined_norm`, `ttt_raw_norm`, `ratio`: norms of a, of the gated TTT update
  w m, of *combined*, of m before the gate; and `ttt_norm / attention_norm`. Combined is all that the two add
  to the residual stream: a + w m with the residual gate, (1 - w) a + w m with the convex one.
* `gate_mean`, `gate_std`, `gate_min`, `gate_max`: of the gate's raw parameter alpha over channels.
  `ttt_weight`, `ttt_weight_abs`: mean of w and of |w|; w is tanh(alpha), or 1 - sigmoid(alpha) if convex.
* `cos_attention_ttt`, `cos_attention_combined`, `cos_ttt_combined`: mean cosine of the frames' vectors a, w m
  and combined; 0 where one of them is 0.
* `X_mean`, `X_std`, `X_sparsity` for X = attention, ttt, combined: over all values of a, w m, combined.
  Sparsity is the share of values near zero: not above a tenth of their own root mean square in absolute value
  (8 % of normally distributed values are).
* `X_change`, `X_change_relative`: norm of the difference of the row's last frame to that of the previous
  recorded step, and that over the norm of the last frame. In streaming only, from the second record on:
  elsewhere the two are frames of different recordings.
* `inner_norm_L`, `inner_change_L`, `inner_step_L` for each inner layer L = 1, 2, ...: Frobenius norm, over
  all heads, of the weight W_L that the last frame was answered with (pending updates included); of its
  difference to the learned one; and of a frame's own update of W_L and b_L before the factor
  1 / (position + 1). Root of the mean square over rows; the step, in training, over frames too.
* `inner_loss_at_start`, `inner_loss_before`, `inner_loss_after`: mean inner loss, as in
  `moshi_ttt.inner_losses`. In streaming of the last frame of a call, in training of all frames.

Recording reads; it changes no tensor of the model. What it costs falls on recorded steps alone: there, values
are computed on the device and fetched at once at the end of the step. On other steps a hook counts frames.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.utils.compile import in_cuda_graph, no_cuda_graph
from torch import nn
from torch.utils.hooks import RemovableHandle

from moshi_ttt.hybrid_layer import Gate, HybridStreamingTransformerLayer
from moshi_ttt.inner_losses import LOSSES, inner_report
from moshi_ttt.inner_tokens import InnerTokens
from moshi_ttt.integration import ttt_layers

NEAR_ZERO = 0.1  # of the root mean square
_PARTS = ("attention", "ttt", "combined")

Record = dict[str, Any]


class TTTDiagnostics:
    """Records diagnostics of every TTT layer of a model while it runs.

    Args:
        model (LMModel): with TTT layers.
        every (int): record every N-th step, from the first: frames in streaming, counted from the start of
            the stream; forward passes otherwise. 0 records only what `record_next` asks for.
        track_history (bool): keep all records, for `layer.get_diagnostic_history()`.
        sink: called with the records of each recorded step, one for each TTT layer.
    Raises:
        ValueError: no TTT layers, or a negative `every`.
    """

    def __init__(
        self,
        model: LMModel,
        every: int,
        track_history: bool = False,
        sink: Callable[[list[Record]], None] | None = None,
    ):
        layers = ttt_layers(model)
        if not layers:
            raise ValueError(
                "no TTT layers found in this model, so there is nothing to diagnose; is it a checkpoint of a "
                "run with ttt.enable=true?"
            )
        if every < 0:
            raise ValueError(f"diagnostics every {every} steps: expected 1 or more, or 0 for never")
        self.every = every
        self.sink = sink
        self._observers = [_LayerObserver(index, layer) for index, layer in layers]
        for _, layer in layers:
            layer.diagnostic_history = [] if track_history else None
        self.layers = layers
        self._transformer = model.transformer
        self._stream: object = None  # the transformer's streaming state: another one is another stream
        self._count = 0  # frames or passes seen
        self._asked: int | None = None
        self._recording: Record | None = None
        self._inside_step = False
        # `forward_chunk` runs these as every forward pass does, but its layers one by one.
        self._hooks = [
            model.text_emb.register_forward_pre_hook(self._before),
            model.out_norm.register_forward_pre_hook(self._after),
        ]

    def close(self) -> None:
        """Stop; the layers keep their histories."""
        self._stop_observing()
        for hook in self._hooks:
            hook.remove()

    def record_next(self, step: int) -> None:
        """Record the next forward pass, under this number."""
        self._asked = step

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context for one streamed frame. Needed where steps are captured as CUDA graphs: `LMGen` on a GPU.

        A frame to be recorded runs outside the graph, on the same buffers; the others run as ever. A replayed
        graph runs no hook, so its frame is counted here.
        """
        self._follow_stream()
        before = self._count
        self._inside_step = True
        try:
            with no_cuda_graph() if self._is_due(1) else nullcontext():
                yield
        finally:
            self._inside_step = False
        if self._count == before:
            self._count += 1

    def finish(self) -> None:
        """The stream is over."""

    def _follow_stream(self) -> None:
        if self._transformer._streaming_state is not self._stream:
            self._stream = self._transformer._streaming_state
            self._count = 0
            for observer in self._observers:
                observer.forget()

    def _is_due(self, length: int) -> bool:
        """Whether a multiple of `every` is among the next `length` steps."""
        if self.every == 0:
            return False
        last = self._count + length - 1
        return last // self.every * self.every >= self._count

    def _before(self, text_emb: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """The temporal transformer is about to run, on as many frames as this text `[B, T]` has."""
        if self._recording is not None:  # by a pass that failed
            self._stop_observing()
        self._follow_stream()
        if self.every > 0 and in_cuda_graph() and not self._inside_step:
            raise ValueError(
                "the model's steps are captured as CUDA graphs, where diagnostics would see nothing: run "
                "each step in `with diagnostics.step():`"
            )
        streaming = self._stream is not None
        length = args[0].shape[1] if streaming else 1
        if self._asked is not None:
            self._recording = {"step": self._asked}
            self._asked = None
        elif self._is_due(length):
            # As training counts: the first pass is step 1, the first frame is frame 0.
            last = self._count + length - 1
            self._recording = {"frame": last} if streaming else {"step": last + 1}
        if self._recording is not None:
            assert not in_cuda_graph(), "a recorded step runs outside of graphs"
            for observer in self._observers:
                observer.start()
        self._count += length

    def _after(self, out_norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """The temporal transformer has run."""
        if self._recording is None:
            return
        number = self._recording
        self._stop_observing()
        values = fetched([observer.values for observer in self._observers])
        records = [
            number | {"layer": index} | layer_values
            for (index, _), layer_values in zip(self.layers, values, strict=True)
        ]
        for (_, layer), record in zip(self.layers, records, strict=True):
            if layer.diagnostic_history is not None:
                layer.diagnostic_history.append(record)
        if self.sink is not None:
            self.sink(records)

    def _stop_observing(self) -> None:
        # Before backward: activation checkpointing runs the layers again, which would be recorded again.
        self._recording = None
        for observer in self._observers:
            observer.stop()


class _LayerObserver:
    """Computes one layer's numbers while it runs. They stay on the device."""

    def __init__(self, index: int, layer: HybridStreamingTransformerLayer):
        self.index = index
        self.block = layer.seq_modeling_block
        self.values: dict[str, torch.Tensor] = {}
        self._previous: list[torch.Tensor] | None = None
        self._hook: RemovableHandle | None = None

    def forget(self) -> None:
        """There is no previous step."""
        self._previous = None

    def start(self) -> None:
        self.values = {}
        ttt = self.block.ttt_layer.ttt
        if ttt.observer is not None:
            raise ValueError(
                f"layer {self.index} is observed by other diagnostics; close() those before enabling new ones"
            )
        ttt.observer = self._on_tokens
        self._hook = self.block.gate.register_forward_hook(self._on_gate)

    def stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self.block.ttt_layer.ttt.observer = None

    def _rows(self, count: int, device: torch.device) -> torch.Tensor:
        """Which rows count, `[B]`."""
        state = self.block.ttt_layer.ttt._streaming_state
        return torch.ones(count, dtype=torch.bool, device=device) if state is None else state.exec_mask

    @torch.no_grad()
    def _on_gate(self, gate: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(gate, Gate)
        _, update, ttt_out = args
        rows = self._rows(update.shape[0], update.device)
        attention, ttt = gate.parts(update, ttt_out)
        parts = [part.float() for part in (update, ttt, attention.float() + ttt.float())]
        self.values |= gate_values(gate) | branch_values(parts, ttt_out.float(), rows)
        if self.block.ttt_layer.ttt._streaming_state is not None:
            last = [part[:, -1:].clone() for part in parts]
            if self._previous is not None:
                self.values |= change_values(last, self._previous, rows)
            self._previous = last

    @torch.no_grad()
    def _on_tokens(self, tokens: InnerTokens) -> None:
        ttt = self.block.ttt_layer.ttt
        count = tokens.k.shape[0] // ttt.num_heads
        learned = ttt.initial_weights(count)
        report = inner_report(tokens, learned)
        rows = self._rows(count, tokens.k.device)
        losses = report.losses.unflatten(1, (count, -1)).mean(dim=(2, 3))  # [3, B]
        for name, loss in zip(LOSSES, losses, strict=True):
            self.values[f"inner_loss_{name}"] = row_mean(loss, rows)
        steps = report.steps.unflatten(1, (count, -1)).square().sum(2).mean(-1)  # [layers, B]
        weights = zip(report.weights.weights, learned.weights, steps, strict=True)
        for index, (now, start, step) in enumerate(weights, start=1):
            squares = {
                "norm": now.square().sum((1, 2)).view(count, -1).sum(1),
                "change": (now - start).square().sum((1, 2)).view(count, -1).sum(1),
                "step": step,
            }
            for name, square in squares.items():
                self.values[f"inner_{name}_{index}"] = row_mean(square, rows).sqrt()


def row_mean(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean of values `[B, ...]` over the rows that count `[B]` and all other axes; 0 if none does."""
    others = max(1, math.prod(values.shape[1:]))
    shaped = rows.view(-1, *[1] * (values.dim() - 1))
    # Not a product: what a resting row was fed may be NaN.
    return torch.where(shaped, values, 0).sum() / (rows.sum() * others).clamp(min=1)


def gate_values(gate: Gate) -> dict[str, torch.Tensor]:
    """Numbers of the gate alone."""
    alpha, weight = gate.alpha, gate.ttt_weight()
    return {
        "gate_mean": alpha.mean(),
        "gate_std": alpha.std(correction=0),
        "gate_min": alpha.min(),
        "gate_max": alpha.max(),
        "ttt_weight": weight.mean(),
        "ttt_weight_abs": weight.abs().mean(),
    }


def branch_values(
    parts: Sequence[torch.Tensor], ttt_out: torch.Tensor, rows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Numbers of attention's update, the gated TTT update and combined.

    Args:
        parts: the three, `[B, T, C]` each, float32.
        ttt_out: the TTT output before the gate.
        rows: which rows count, `[B]`.
    """
    values = {}
    for name, part in zip(_PARTS, parts, strict=True):
        mean, square = row_mean(part, rows), row_mean(part.square(), rows)
        values[f"{name}_norm"] = row_mean(part.square().sum(-1), rows).sqrt()
        values[f"{name}_mean"] = mean
        values[f"{name}_std"] = row_mean((part - mean).square(), rows).sqrt()
        values[f"{name}_sparsity"] = row_mean((part.abs() <= NEAR_ZERO * square.sqrt()).float(), rows)
    values["ttt_raw_norm"] = row_mean(ttt_out.square().sum(-1), rows).sqrt()
    values["ratio"] = values["ttt_norm"] / values["attention_norm"]
    attention, ttt, combined = parts
    for name, (one, other) in {
        "attention_ttt": (attention, ttt),
        "attention_combined": (attention, combined),
        "ttt_combined": (ttt, combined),
    }.items():
        values[f"cos_{name}"] = row_mean(nn.functional.cosine_similarity(one, other, dim=-1), rows)
    return values


def change_values(
    now: Sequence[torch.Tensor], previous: Sequence[torch.Tensor], rows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Difference of the last frames `[B, 1, C]` to those of the previous recorded step."""
    values = {}
    for name, part, before in zip(_PARTS, now, previous, strict=True):
        change = row_mean((part - before).square().sum(-1), rows).sqrt()
        values[f"{name}_change"] = change
        values[f"{name}_change_relative"] = change / row_mean(part.square().sum(-1), rows).sqrt()
    return values


def fetched(layers: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Scalars of all layers as numbers, fetched from the device in one transfer."""
    numbers = torch.stack([value for values in layers for value in values.values()]).tolist()
    iterator = iter(numbers)
    return [{name: next(iterator) for name in values} for values in layers]


def format_record(record: Record) -> str:
    """A record in words, for logs."""
    when = f"Frame {record['frame']}" if "frame" in record else f"Step {record['step']}"

    def line(title: str, *items: tuple[str, str, str]) -> str:
        shown = [f"{label} {record[key]:{form}}" for label, key, form in items if key in record]
        return f"  {title + ':':<15}{'  '.join(shown)}"

    number = 1
    inner = []
    while f"inner_norm_{number}" in record:
        inner += [
            (f"W{number} norm", f"inner_norm_{number}", ".4f"),
            ("change", f"inner_change_{number}", ".4f"),
            ("step", f"inner_step_{number}", ".2e"),
        ]
        number += 1
    lines = [
        f"TTT Diagnostics - Layer {record['layer']} - {when}",
        line("Magnitude", *[(p, f"{p}_norm", ".4f") for p in _PARTS], ("TTT/attention", "ratio", ".4f")),
        line(
            "Gate",
            *[(f"alpha {n}", f"gate_{n}", ".6f") for n in ("mean", "std", "min", "max")],
            ("effective TTT weight", "ttt_weight", ".6f"),
        ),
        line(
            "Cosine",
            ("attention-ttt", "cos_attention_ttt", ".4f"),
            ("attention-combined", "cos_attention_combined", ".4f"),
            ("ttt-combined", "cos_ttt_combined", ".4f"),
        ),
        *[
            line(
                p,
                ("mean", f"{p}_mean", ".5f"),
                ("std", f"{p}_std", ".5f"),
                ("near zero", f"{p}_sparsity", ".1%"),
                ("change", f"{p}_change", ".5f"),
                ("relative", f"{p}_change_relative", ".4f"),
            )
            for p in _PARTS
        ],
        line("Inner weights", *inner),
        line("Inner loss", *[(n.replace("_", " "), f"inner_loss_{n}", ".5f") for n in LOSSES]),
    ]
    return "\n".join(lines)
