"""The inner state over a stream of 100,000 frames (2.2 hours): `python -m benchmarks.inner_state`

Three rows stream through the tiny Moshi with default TTT settings in its middle layers: white noise, silence,
and the sample dialogues over and over. All go through Mimi; both of Moshi's audio streams get the same codes,
the text stream padding. It is run without and with the default bound (`ttt.max_inner_change`). Written are
the distances of the inner weights from the learned ones, the inner losses, and their picture.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.config import TTTConfig
from moshi_ttt.inner_losses import LOSSES, recorded_inner_losses
from moshi_ttt.integration import FRAME_RATE, ttt_layers
from moshi_ttt.loading import ModelConfig, find_base, load_mimi
from moshi_ttt.lora import LoRAConfig
from moshi_ttt.streaming import streaming
from moshi_ttt.ttt_layer import TTTBase

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
FRAMES, CHUNK, RECORD_EVERY = 100_000, 80, 1_600  # both multiples of the mini-batch: W(start) is all there is
KINDS = ("noise", "silence", "speech")
COLOURS = dict(zip(KINDS, ("tab:orange", "tab:grey", "tab:blue"), strict=True))


@dataclass
class Sample:
    """The inner state after some frames.

    Args:
        frame: frames streamed.
        norm: of the inner weights of each TTT layer, inner layer and row, all heads, `[layers][inner][rows]`.
        change: distance of weight and bias from the learned ones in the furthest head, in units of
            `TTTBase.unit_norm`, likewise.
        losses: mean inner losses of the last chunk of frames, `[layers][LOSSES][rows]`.
    """

    frame: int
    norm: list[Any]
    change: list[Any]
    losses: list[Any]


def sounds(samples_per_chunk: int) -> Iterator[torch.Tensor]:
    """Chunks `[3, 1, samples]` of noise, silence and speech, without end."""
    paths = sorted((ROOT / "sample_data/audio").glob("*.flac"))
    speech = np.concatenate([soundfile.read(path, dtype="float32")[0].sum(axis=1) for path in paths])
    generator = torch.Generator().manual_seed(1)
    start = 0
    while True:
        noise = 0.1 * torch.randn(samples_per_chunk, generator=generator)
        part = np.take(speech, range(start, start + samples_per_chunk), mode="wrap")
        start = (start + samples_per_chunk) % len(speech)
        yield torch.stack((noise, torch.zeros_like(noise), torch.from_numpy(part)))[:, None]


def inner_state(ttt: TTTBase) -> tuple[list[list[float]], list[list[float]]]:
    """Norms and changes of a streaming TTT layer at the edge of a mini-batch, `[inner][rows]` each."""
    state = ttt._streaming_state
    assert state is not None
    assert not state.position.any()
    norms, changes = [], []
    for layer, (weight, bias) in enumerate(zip(state.inner.weights, state.inner.biases, strict=True)):
        pairs = ((weight, state.initial.weights[layer]), (bias, state.initial.biases[layer]))
        square = sum(
            (now.unflatten(0, (-1, ttt.num_heads)) - start).square().sum((2, 3)) for now, start in pairs
        )
        assert isinstance(square, torch.Tensor)
        changes.append((square.sqrt().amax(1) / ttt.unit_norm(layer)).tolist())
        norms.append(weight.unflatten(0, (-1, ttt.num_heads)).square().sum((1, 2, 3)).sqrt().tolist())
    return norms, changes


@torch.no_grad()
def stream(model: LMModel, mimi: MimiModel, frames: int) -> list[Sample]:
    """Stream the three rows and look at the inner state now and then."""
    samples = []
    source = sounds(CHUNK * mimi.frame_size)
    layers = [layer.seq_modeling_block.ttt_layer.ttt for _, layer in ttt_layers(model)]
    with mimi.streaming(len(KINDS)), streaming(model, len(KINDS), CHUNK):
        for frame in range(CHUNK, frames + 1, CHUNK):
            codes = mimi.encode(next(source))
            text = torch.full_like(codes[:, :1], model.text_padding_token_id)
            sequence = torch.cat((text, codes, codes), dim=1)
            if frame % RECORD_EVERY and frame not in (CHUNK, 5 * CHUNK):
                model.forward_text(sequence)
                continue
            with recorded_inner_losses(model) as found:
                model.forward_text(sequence)
            losses = [torch.cat(parts, -1).mean((2, 3)).tolist() for parts in found.values()]
            states = [inner_state(ttt) for ttt in layers]
            samples.append(Sample(frame, [n for n, _ in states], [c for _, c in states], losses))
            if frame % (10 * RECORD_EVERY) == 0:
                logger.info("%d frames: largest changes %s", frame, np.round(samples[-1].change, 2).tolist())
    return samples


def run(config: TTTConfig, frames: int) -> list[Sample]:
    """One stream through a fresh tiny model."""
    torch.manual_seed(0)
    base = find_base(ModelConfig("tiny"))
    model = build_model(ModelSettings(ModelConfig("tiny"), "float32", LoRAConfig(), config), base)
    started = time.perf_counter()
    samples = stream(model, load_mimi(base, "cpu"), frames)
    logger.info("%d frames of 3 rows in %.0f s", frames, time.perf_counter() - started)
    return samples


def draw(runs: dict[str, list[Sample]], bound: float | None, title: str, path: Path) -> None:
    """Changes of each inner layer and losses of the first TTT layer over time, with and without the bound."""
    inner = len(next(iter(runs.values()))[0].change[0])
    figure = Figure(figsize=(5.2 * (inner + 1), 4.6), layout="constrained")
    axes = figure.subplots(1, inner + 1)
    for (name, samples), style in zip(runs.items(), ("--", "-"), strict=True):
        minutes = [sample.frame / FRAME_RATE / 60 for sample in samples]
        for row, kind in enumerate(KINDS):
            look = {"color": COLOURS[kind], "linestyle": style, "label": f"{kind}, {name}"}
            for layer in range(inner):
                axes[layer].loglog(minutes, [s.change[0][layer][row] for s in samples], **look)
            before = LOSSES.index("before")
            axes[inner].semilogx(minutes, [s.losses[0][before][row] for s in samples], **look)
    for layer in range(inner):
        axes[layer].set_title(f"inner layer {layer + 1}: distance from its learned weights")
        axes[layer].set_ylabel("distance, furthest head (unit-scale norms)")
        if bound is not None:
            axes[layer].axhline(bound, color="black", linewidth=0.8, linestyle=":", label="bound")
    axes[inner].set_title("inner loss before each frame's step")
    axes[inner].set_ylabel("inner loss per head (1/2 squared error)")
    axes[inner].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("minutes streamed (750 frames each)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def finish(config: TTTConfig, runs: dict[str, list[Sample]]) -> None:
    """Write the numbers and the picture."""
    result = ROOT / "benchmarks/results/inner_state_100k_frames.json"
    content = {"config": asdict(config), "kinds": KINDS, "losses": LOSSES}
    content["runs"] = {name: [asdict(sample) for sample in samples] for name, samples in runs.items()}
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.5g}"))
    result.write_text(json.dumps(rounded) + "\n")
    picture = ROOT / "docs/inner_state_100k_frames.png"
    title = "Inner state of the first TTT layer over 100,000 frames: tiny Moshi, TTT-MLP, default settings"
    draw(runs, config.max_inner_change, title, picture)
    logger.info("wrote %s and %s", result, picture)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    config = TTTConfig(ttt_layer_context=50, non_ttt_layer_context=100)
    unbounded = run(replace(config, max_inner_change=None), FRAMES)
    finish(config, {"no bound": unbounded, "default": run(config, FRAMES)})


if __name__ == "__main__":
    main()
