"""What diagnostics at the default frequency cost.

* generation: the tiny Moshi, all layers TTT, frames of `LMGen` with and without diagnostics every 100 frames;
* training: its training step (forward and backward of 4 clips of 125 frames), every 100 steps;
* layer: a hybrid layer of Moshi 7B's size (dimension 4096, 8 TTT heads, float32) streaming one frame.

Rounds with and without alternate. A median is taken of ordinary steps and of recorded ones, each against the
median of plain steps: the cost is (99 ordinary + 1 recorded) / 100 plain - 1.
"""

import statistics

import torch
from moshi.models.lm import LMGen, LMModel

from benchmarks.harness import Entry, Options, cpu_sec, lower_is_better
from benchmarks.streaming_step import DIM, moshi_layer
from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.config import TTTConfig
from moshi_ttt.diagnostics import TTTDiagnostics, _LayerObserver, fetched
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.loading import ModelConfig, find_base
from moshi_ttt.lora import LoRAConfig

EVERY, GOAL = 100, 0.99


def tiny_model() -> LMModel:
    config = TTTConfig(layers="all", ttt_layer_context=50)
    base = find_base(ModelConfig("tiny"))
    return build_model(ModelSettings(ModelConfig("tiny"), "float32", LoRAConfig(), config), base)


def generation(rounds: int = 16, frames: int = 50) -> dict[str, list[float]]:
    """Seconds of frames of LMGen: plain, ordinary and recorded."""
    model, times = tiny_model(), {"plain": [], "ordinary": [], "recorded": []}
    lm_gen, codes = LMGen(model), torch.randint(0, 256, (1, 8, 1))
    with torch.no_grad(), lm_gen.streaming(1):
        for _ in range(20):
            lm_gen.step(codes)
        for _ in range(rounds):
            times["plain"] += [cpu_sec(lambda: lm_gen.step(codes)) for _ in range(frames)]
            diagnostics = TTTDiagnostics(model, EVERY)

            def watched(diagnostics: TTTDiagnostics = diagnostics) -> None:
                with diagnostics.step():
                    lm_gen.step(codes)

            for frame in range(frames):
                recorded = frame % 10 == 0
                if recorded:
                    diagnostics.record_next(frame)
                times["recorded" if recorded or frame == 0 else "ordinary"].append(cpu_sec(watched))
            diagnostics.close()
    return times


def training(rounds: int = 12) -> dict[str, list[float]]:
    """Seconds of training steps."""
    model = tiny_model().train()
    codes = torch.randint(0, 256, (4, 17, 125))
    times: dict[str, list[float]] = {"plain": [], "ordinary": [], "recorded": []}

    def step() -> None:
        output = model(codes)
        assert output.text_logits is not None
        (
            output.logits.nan_to_num().square().mean() + output.text_logits.nan_to_num().square().mean()
        ).backward()

    step()
    for _ in range(rounds):
        times["plain"].append(cpu_sec(step))
        diagnostics = TTTDiagnostics(model, 0)
        times["ordinary"].append(cpu_sec(step))
        diagnostics.record_next(1)
        times["recorded"].append(cpu_sec(step))
        diagnostics.close()
    return times


@torch.no_grad()
def layer(rounds: int = 48) -> dict[str, list[float]]:
    """Seconds of a frame of one hybrid layer of Moshi 7B's size; between records it runs nothing of ours."""
    hybrid = HybridStreamingTransformerLayer(moshi_layer(), TTTConfig(num_heads=8), 0)
    observer, x = _LayerObserver(0, hybrid), torch.randn(1, 1, DIM)
    times: dict[str, list[float]] = {"plain": [], "recorded": []}
    ttt = hybrid.seq_modeling_block.ttt_layer.ttt

    def recorded() -> None:
        observer.start()
        hybrid(x)
        observer.stop()
        fetched([observer.values])

    with ttt.streaming(1), hybrid.original_layer.streaming(1):
        for _ in range(rounds):
            times["plain"].append(cpu_sec(lambda: hybrid(x)))
            times["recorded"].append(cpu_sec(recorded))
    times["ordinary"] = times["plain"]
    return times


def entry(name: str, times: dict[str, list[float]]) -> Entry:
    middle = {key: statistics.median(values) for key, values in times.items()}
    step = ((EVERY - 1) * middle["ordinary"] + middle["recorded"]) / EVERY
    record = (middle["recorded"] - middle["plain"]) / EVERY / middle["plain"]
    return lower_is_better(
        f"diagnostics every {EVERY} steps, {name}",
        1e3 * step,
        1e3 * middle["plain"],
        GOAL,
        "ms",
        "the same without diagnostics",
        cost_of_records=round(record, 5),
        times={key: round(1e3 * value, 3) for key, value in middle.items()},
    )


def entries(options: Options) -> list[Entry]:
    works = {"generation": generation, "training": training, "layer": layer}
    return [entry(name, work()) for name, work in works.items()]
