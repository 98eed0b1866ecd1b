"""What TTT layers add to a frame of Moshi 7B inside CUDA graphs.

Random bfloat16 weights made on the GPU: speed does not depend on them. All models share those of Moshi and
have the attention windows of configs/experiment/moshi_7b_ttt.yaml. A frame is one `LMGen.step` and a wait for
its tokens, as a live conversation needs them; models take turns in blocks of one mini-batch (16 frames, one
of which folds the updates into the inner weights), and a model's time is the median of its blocks.
"""

import copy
import statistics
from contextlib import ExitStack

import torch
from moshi.models.lm import LMGen, LMModel
from moshi.models.loaders import get_moshi_lm

from benchmarks.gpu.clock import copy_bandwidth, interleaved, seconds, synchronize
from benchmarks.gpu.results import Results
from moshi_ttt.config import TTTConfig, ttt_layer_indices
from moshi_ttt.integration import apply_ttt_to_model, temporal_attentions, ttt_layers
from moshi_ttt.kernels.choice import forced
from moshi_ttt.ttt_layer import TTTBase

MINI_BATCH = 16
TTT_CONTEXT, OTHER_CONTEXT = 50, 100
BUDGET_MS = 80.0
ROUNDS = 15


def moshi_7b(device: torch.device) -> LMModel:
    """Moshi 7B with random weights."""
    return get_moshi_lm(None, device=device, dtype=torch.bfloat16).eval()


def with_short_windows(model: LMModel) -> LMModel:
    """A model without TTT that shares all weights with `model` and has a hybrid one's attention windows."""
    plain = sharing(model)
    short = ttt_layer_indices("middle", len(plain.transformer.layers))
    for index, _, attention in temporal_attentions(plain):
        attention.context = TTT_CONTEXT if index in short else OTHER_CONTEXT
    return plain


def with_ttt(model: LMModel, heads: int) -> LMModel:
    """The same with TTT-MLP of so many heads in the middle half of the layers."""
    hybrid = sharing(model)
    config = TTTConfig(num_heads=heads, mini_batch_size=MINI_BATCH)
    config.ttt_layer_context, config.non_ttt_layer_context = TTT_CONTEXT, OTHER_CONTEXT
    with torch.device(model.device):
        apply_ttt_to_model(hybrid, config)
    return hybrid.eval()


def sharing(model: LMModel) -> LMModel:
    """A copy of a model's modules on the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def inner_layers(model: LMModel) -> list[TTTBase]:
    return [layer.seq_modeling_block.ttt_layer.ttt for _, layer in ttt_layers(model)]


def bytes_of_a_frame(model: LMModel, rows: int) -> int:
    """Bytes that the TTT layers of a model must move for a frame of `rows` streams.

    Projections and inner weights once, the updates of half a mini-batch, and once in a mini-batch the inner
    weights again, read and written.
    """
    total = 0
    for ttt in inner_layers(model):
        linears = (ttt.wq, ttt.wk, ttt.wv, ttt.wo)
        total += sum(p.nbytes for linear in linears for p in linear.parameters())
        inner = rows * ttt.inner_parameters * ttt.ttt_norm_weight.itemsize
        widths = sum(ttt.inner_dims[:-1]) + sum(ttt.inner_dims[1:])
        pending = rows * ttt.num_heads * ttt.mini_batch_size * widths * ttt.ttt_norm_weight.itemsize
        total += inner + pending // 2 + 2 * inner // ttt.mini_batch_size
    return total


class Conversation:
    """Rows of a model that streams, fed the same codes forever."""

    def __init__(self, model: LMModel, rows: int):
        self.model = model
        self.generator = LMGen(model)
        count = model.num_codebooks - model.dep_q - 1
        self.codes = torch.randint(0, model.card, (rows, count, 1), device=model.device)

    def frame(self) -> None:
        self.generator.step(self.codes)
        synchronize(self.model.device)

    def mini_batch(self) -> None:
        for _ in range(MINI_BATCH):
            self.frame()


def times(models: dict[str, LMModel], rows: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of a frame of each model."""
    with ExitStack() as stack, torch.no_grad():
        conversations = {name: Conversation(model, rows) for name, model in models.items()}
        for conversation in conversations.values():
            stack.enter_context(conversation.generator.streaming(rows))
        works = {name: conversation.mini_batch for name, conversation in conversations.items()}
        device = next(iter(models.values())).device
        medians = interleaved(works, device, rounds, warm_up=2)
    return {name: 1e3 * value / MINI_BATCH for name, value in medians.items()}


def over_time(model: LMModel, rows: int, frames: int = 1000) -> dict[str, float | bool]:
    """Milliseconds of the first and the last 100 frames, growth of memory, and whether the state stays."""
    conversation, spent = Conversation(model, rows), []

    def state() -> list[int]:
        states = [ttt._streaming_state for ttt in inner_layers(model)]
        return [w.data_ptr() for s in states if s is not None for w in (*s.inner.weights, *s.pending.inputs)]

    with torch.no_grad(), conversation.generator.streaming(rows):
        conversation.mini_batch()
        places, held = state(), allocated(model.device)
        for _ in range(frames):
            spent.append(1e3 * seconds(conversation.frame, model.device))
        return {
            "first": statistics.median(spent[:100]),
            "last": statistics.median(spent[-100:]),
            "slowest": max(spent),
            "grown_bytes": allocated(model.device) - held,
            "state_stays": state() == places,
        }


def allocated(device: torch.device) -> int:
    synchronize(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def report_extra(results: Results, models: dict[str, LMModel], rows: int, bandwidth: float) -> None:
    """Entries of what TTT adds, for so many streams."""
    ms = times(models, rows)
    plain, streams = ms["plain"], "1 stream" if rows == 1 else f"{rows} streams"
    shown = {name: round(value, 3) for name, value in ms.items()}
    results.add(
        f"streaming, {streams}: extra time of TTT-MLP, 8 heads",
        max(1e-6, ms["8 heads"] - plain),
        0.1 * plain,
        "10 % of Moshi's frame",
        "ms",
        1.0,
        share=round(ms["8 heads"] / plain - 1, 4),
        frame_ms=shown,
    )
    moved = bytes_of_a_frame(models["32 heads"], rows)
    results.add(
        f"streaming, {streams}: extra time of TTT-MLP, 32 heads",
        max(1e-6, ms["32 heads"] - plain),
        1.2e3 * moved / bandwidth,
        f"1.2 x the time to move its {moved / 1e9:.2f} GB at {bandwidth / 1e12:.2f} TB/s",
        "ms",
        1.0,
        share=round(ms["32 heads"] / plain - 1, 4),
        frame_ms=shown,
    )
    results.add(
        f"streaming, {streams}: frame with TTT-MLP, 8 heads",
        ms["8 heads"],
        BUDGET_MS,
        "a frame's length",
        "ms",
        1.0,
    )


def run(results: Results) -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    base = moshi_7b(device)
    models = {"plain": with_short_windows(base), "8 heads": with_ttt(base, 8), "32 heads": with_ttt(base, 32)}
    with forced("eager"):
        naive = times({name: models[name] for name in ("plain", "8 heads")}, 1, 5)
    results.add(
        "streaming, 1 stream: extra time of TTT-MLP, 8 heads, in torch's operations",
        max(1e-6, naive["8 heads"] - naive["plain"]),
        0.1 * naive["plain"],
        "10 % of Moshi's frame",
        "ms",
        None,
        frame_ms=naive,
    )
    report_extra(results, models, 1, bandwidth)
    over = over_time(models["8 heads"], 1)
    assert over["grown_bytes"] == 0, over
    assert over["state_stays"], over
    results.add(
        "streaming: last 100 of 1,000 frames, 8 heads",
        float(over["last"]),
        float(over["first"]),
        "the first 100 frames",
        "ms",
        0.97,
        slowest_ms=round(float(over["slowest"]), 3),
        grown_bytes=over["grown_bytes"],
    )
    report_extra(results, models, 8, bandwidth)
    window = times({"published": base, "plain": models["plain"]}, 1)
    results.add(
        "streaming: Moshi with windows of 50 and 100 frames",
        window["plain"],
        window["published"],
        "Moshi with windows of 3000",
        "ms",
        None,
    )
