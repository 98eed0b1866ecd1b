"""Every number of TTT diagnostics is what a direct computation gives, and recording disturbs nothing."""

import logging
import math

import numpy as np
import pytest
import torch
from moshi.models.lm import LMGen
from moshi.utils.compile import in_cuda_graph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from inference.enable_ttt_diagnostics import enable_ttt_diagnostics
from moshi_ttt.diagnostics import TTTDiagnostics, format_record
from moshi_ttt.integration import ttt_layers
from moshi_ttt.reference import _network, reference_inner_loop
from moshi_ttt.streaming import streaming

K = 4
CONTEXTS = {"ttt_layer_context": 6, "non_ttt_layer_context": 9}


class Watcher:
    """What went into each gate and TTT layer, taken by hooks of its own: `[layer][call]`."""

    def __init__(self, model):
        self.gates = {index: [] for index, _ in ttt_layers(model)}
        self.inputs = {index: [] for index, _ in ttt_layers(model)}
        self.hooks: list[RemovableHandle] = []
        for index, layer in ttt_layers(model):
            block = layer.seq_modeling_block

            def on_gate(gate, args, output, index=index):
                self.gates[index].append([x.detach().clone() for x in (*args, output)])

            def on_norm(norm, args, output, index=index):
                self.inputs[index].append(output.detach().clone())

            self.hooks += [
                block.gate.register_forward_hook(on_gate),
                block.norm.register_forward_hook(on_norm),
            ]


def numpy(tensor):
    return tensor.detach().double().numpy()


def direct_branches(gate, update, ttt_out):
    """Magnitudes, gate, cosines and distributions in float64."""
    alpha, a, m = numpy(gate.alpha), numpy(update), numpy(ttt_out)
    convex = type(gate).__name__ == "ConvexGate"
    weight = 1 - 1 / (1 + np.exp(-alpha)) if convex else np.tanh(alpha)
    gated = weight * m
    combined = ((1 - weight) * a if convex else a) + gated
    parts = {"attention": a, "ttt": gated, "combined": combined}
    frames = a.shape[0] * a.shape[1]

    def norm(z):
        return math.sqrt((z**2).sum() / frames)

    def cosine(y, z):
        return ((y * z).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(z, axis=-1)).mean()

    values = {
        "ttt_raw_norm": norm(m),
        "ratio": norm(gated) / norm(a),
        "gate_mean": alpha.mean(),
        "gate_std": alpha.std(),
        "gate_min": alpha.min(),
        "gate_max": alpha.max(),
        "ttt_weight": weight.mean(),
        "ttt_weight_abs": np.abs(weight).mean(),
        "cos_attention_ttt": cosine(a, gated),
        "cos_attention_combined": cosine(a, combined),
        "cos_ttt_combined": cosine(gated, combined),
    }
    for name, z in parts.items():
        values[f"{name}_norm"] = norm(z)
        values[f"{name}_mean"] = z.mean()
        values[f"{name}_std"] = z.std()
        values[f"{name}_sparsity"] = (np.abs(z) <= 0.1 * math.sqrt((z**2).mean())).mean()
    return values, parts


def direct_inner(ttt, x, last):
    """Inner norms, changes, steps and losses after frames x `[B, T, C]`, by autograd.

    Args:
        last: how many of the last frames the losses and steps are of.
    """
    length, depth = x.shape[1], len(ttt.inner_weights)
    positions = torch.arange(length)[None] % ttt.mini_batch_size
    _, k, target, lr = (z.double() for z in ttt.project(x, positions, ttt.norm(x.shape[0])))
    scale = ttt.step_scale().diagonal().double()
    squares = {f"inner_{name}_{i}": 0.0 for name in ("norm", "change", "step") for i in range(1, depth + 1)}
    losses = {"at_start": [], "before": [], "after": []}
    for net in range(k.shape[0]):
        head = net % ttt.num_heads
        learned = [w[head].double() for w in ttt.inner_weights] + [
            b[head, 0].double() for b in ttt.inner_biases
        ]
        norm = ttt.ttt_norm_weight[head].double(), ttt.ttt_norm_bias[head].double()
        # after[t]: the weights that answer token t; before[t]: those that answered the one before it.
        after = [
            sum(
                reference_inner_loop(
                    k[net, :t], k[net, :t], target[net, :t], lr[net, :t],
                    learned[:depth], learned[depth:], *norm, scale,
                )[1:],
                [],
            )
            for t in range(1, length + 1)
        ]  # fmt: skip
        before = [learned, *after[:-1]]
        for t in range(length - last, length):
            for name, weights in (("at_start", learned), ("before", before[t]), ("after", after[t])):
                losses[name].append(inner_loss(k[net, t], target[net, t], weights, norm).item())
            start = before[t - t % ttt.mini_batch_size]
            step = own_step(k[net, t], target[net, t], start, norm)
            for i in range(depth):
                size = step[i].square().sum() + step[depth + i].square().sum()
                squares[f"inner_step_{i + 1}"] += (lr[net, t] ** 2 * size).item() / last
        for i in range(depth):
            squares[f"inner_norm_{i + 1}"] += after[-1][i].square().sum().item()
            squares[f"inner_change_{i + 1}"] += (after[-1][i] - learned[i]).square().sum().item()
    values = {name: math.sqrt(square / x.shape[0]) for name, square in squares.items()}
    return values | {f"inner_loss_{name}": np.mean(found) for name, found in losses.items()}


def inner_loss(k, target, weights, norm):
    depth = len(weights) // 2
    out = _network(k, weights[:depth], weights[depth:])
    return 0.5 * (torch.nn.functional.layer_norm(out, out.shape, *norm, eps=1e-6) - target).square().sum()


def own_step(k, target, weights, norm):
    leaves = [w.detach().requires_grad_() for w in weights]
    return torch.autograd.grad(inner_loss(k, target, leaves, norm), leaves)


def assert_close(record, expected, tolerance=2e-4):
    assert expected.keys() <= record.keys()
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name


SETTINGS = [
    {"gate": "residual"},
    {"gate": "convex"},
    {"ssm_layer": "ttt_linear", "learned_token_scale": True},
    {"ttt_mlp_layers": 3, "normalize_target": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_streaming_numbers_are_right(build, perturb, random_codes, settings):
    model = perturb(build(mini_batch_size=K, **CONTEXTS, **settings))
    records, watcher = [], Watcher(model)
    TTTDiagnostics(model, 3, sink=records.extend)
    codes = random_codes(2, 7)
    with torch.no_grad(), streaming(model, 2):
        for frame in codes.split(1, dim=2):
            model.forward_text(frame)
    assert [(r["frame"], r["layer"]) for r in records] == [(f, i) for f in (0, 3, 6) for i in (1, 2)]
    previous = {}
    for record in records:
        frame, index = record["frame"], record["layer"]
        block = model.transformer.layers[index].seq_modeling_block
        _, update, ttt_out, _ = watcher.gates[index][frame]
        expected, parts = direct_branches(block.gate, update, ttt_out)
        for name, part in parts.items() if index in previous else ():
            change = np.sqrt(((part - previous[index][name]) ** 2).sum(-1).mean())
            expected[f"{name}_change"] = change
            expected[f"{name}_change_relative"] = change / np.sqrt((part**2).sum(-1).mean())
        previous[index] = parts
        x = torch.cat(watcher.inputs[index][: frame + 1], dim=1)
        expected |= direct_inner(block.ttt_layer.ttt, x, last=1)
        assert_close(record, expected)
        assert set(record) == {"frame", "layer", *expected}, "no number goes unchecked"


def test_training_numbers_are_right(build, perturb, random_codes):
    model = perturb(build(mini_batch_size=K, **CONTEXTS)).train()
    records, watcher = [], Watcher(model)
    TTTDiagnostics(model, 0, sink=records.extend).record_next(7)
    model(random_codes(2, 10))
    assert [(r["step"], r["layer"]) for r in records] == [(7, 1), (7, 2)]
    for record in records:
        block = model.transformer.layers[record["layer"]].seq_modeling_block
        (_, update, ttt_out, _), (x,) = watcher.gates[record["layer"]][0], watcher.inputs[record["layer"]]
        expected, _ = direct_branches(block.gate, update, ttt_out)
        expected |= direct_inner(block.ttt_layer.ttt, x, last=x.shape[1])
        assert_close(record, expected)
        assert set(record) == {"step", "layer", *expected}


def test_combined_is_what_is_added_to_the_stream(build, perturb, random_codes):
    for gate in ("residual", "convex"):
        model = perturb(build(gate=gate))
        records, watcher = [], Watcher(model)
        TTTDiagnostics(model, 1, sink=records.extend)
        with torch.no_grad():
            model.forward_text(random_codes(2, 9))
        for record in records:
            x, _, _, out = watcher.gates[record["layer"]][0]
            added = (out - x).square().sum(-1).mean().sqrt().item()
            assert record["combined_norm"] == pytest.approx(added, rel=1e-4)


@pytest.mark.parametrize("sizes", [[1] * 23, [5, 5, 5, 5, 3], [7, 1, 7, 8]], ids=str)
@torch.no_grad()
def test_every_nth_frame_is_recorded_however_calls_are_cut(build, random_codes, sizes):
    model = build(**CONTEXTS)
    records = []
    TTTDiagnostics(model, 6, sink=records.extend)
    for _ in range(2):  # a new stream counts anew
        with streaming(model, 1, max_chunk=8):
            for chunk in random_codes(1, 23).split(sizes, dim=2):
                model.forward_text(chunk)
        ends = np.cumsum(sizes)
        due = sorted({int(ends[np.searchsorted(ends, f, side="right")]) - 1 for f in (0, 6, 12, 18)})
        assert [r["frame"] for r in records if r["layer"] == 1] == due
        assert "ttt_change" not in records[0]
        assert "ttt_change" in records[-1]
        records.clear()


class Operations(TorchDispatchMode):
    """Names of all tensor operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_other_steps_run_the_same_operations_and_nothing_changes(build, random_codes, streaming_tensors):
    codes = random_codes(1, 8)

    def run(model):
        operations, outputs = [], []
        with streaming(model, 1):
            for frame in codes.split(1, dim=2):
                with Operations() as mode:
                    outputs.append(model.forward_text(frame)[0])
                operations.append(mode.names)
            return operations, torch.cat(outputs), {k: v.clone() for k, v in streaming_tensors(model).items()}

    model = build(**CONTEXTS)
    plain, outputs, state = run(model)
    records = []
    diagnostics = TTTDiagnostics(model, 5, sink=records.extend)
    watched, same_outputs, same_state = run(model)
    assert [i for i in range(8) if plain[i] != watched[i]] == [0, 5]
    assert len(records) == 4
    assert torch.equal(outputs, same_outputs)
    assert all(torch.equal(state[name], same_state[name]) for name in state)
    diagnostics.close()
    assert run(model)[0] == plain


def lm_gen_steps(model, diagnostics, watched=True):
    """Tokens of 9 frames of an LMGen whose steps are "captured", as on a GPU (all are warm-up steps here)."""
    inside = []
    gate = ttt_layers(model)[0][1].seq_modeling_block.gate
    hook = gate.register_forward_pre_hook(lambda *_: inside.append(in_cuda_graph()))
    lm_gen = LMGen(model, use_sampling=False)
    with torch.no_grad(), lm_gen.streaming(1):
        state = lm_gen._streaming_state
        state.graphed_main.disable, state.graphed_main.warmup_steps = False, 10**9
        tokens = []
        for codes in torch.randint(0, 256, (9, 1, 8, 1), generator=torch.Generator().manual_seed(3)):
            if watched:
                with diagnostics.step():
                    tokens.append(lm_gen.step(codes))
            else:
                tokens.append(lm_gen.step(codes))
    hook.remove()
    return inside, [t for t in tokens if t is not None]


def test_recorded_frames_run_outside_of_cuda_graphs(build):
    model = build(**CONTEXTS)
    records = []
    _, plain = lm_gen_steps(model, None, watched=False)
    diagnostics = TTTDiagnostics(model, 4, sink=records.extend)
    inside, tokens = lm_gen_steps(model, diagnostics)
    assert [not i for i in inside] == [frame % 4 == 0 for frame in range(9)]
    assert [r["frame"] for r in records if r["layer"] == 2] == [0, 4, 8]
    assert all(torch.equal(a, b) for a, b in zip(plain, tokens, strict=True))
    with pytest.raises(ValueError, match=r"with diagnostics\.step\(\)"):
        lm_gen_steps(model, diagnostics, watched=False)


@torch.no_grad()
def test_a_replayed_graph_counts_as_a_frame(build, random_codes):
    model = build(**CONTEXTS)
    records = []
    diagnostics = TTTDiagnostics(model, 3, sink=records.extend)
    with streaming(model, 1):
        for frame in range(7):
            with diagnostics.step():
                if frame % 3 == 0:  # a replay runs no Python, hence no hook
                    model.forward_text(random_codes(1, 1))
    assert [r["frame"] for r in records if r["layer"] == 1] == [0, 3, 6]


@torch.no_grad()
def test_resting_rows_do_not_count(build, random_codes):
    model, codes = build(**CONTEXTS), random_codes(2, 6)

    def record(batch, fed, mask=None):
        records = []
        diagnostics = TTTDiagnostics(model, 2, sink=records.extend)
        with streaming(model, batch):
            if mask is not None:
                model.set_exec_mask(mask)
            for frame in fed.split(1, dim=2):
                model.forward_text(frame)
        diagnostics.close()
        return records

    alone = record(1, codes[:1])
    beside = record(2, codes, torch.tensor([True, False]))
    for one, other in zip(alone, beside, strict=True):
        assert_close(other, one, 1e-5)


def test_history_and_log(build, random_codes, caplog):
    model = build(**CONTEXTS)
    layer = model.transformer.layers[1]
    with pytest.raises(ValueError, match="track_history=True"):
        layer.get_diagnostic_history()
    with caplog.at_level(logging.INFO, "inference.enable_ttt_diagnostics"):
        enable_ttt_diagnostics(model, log_frequency=2, track_history=True)
        with torch.no_grad(), streaming(model, 1):
            for _ in range(3):
                model.forward_text(random_codes(1, 1))
    history = layer.get_diagnostic_history()
    assert [record["frame"] for record in history] == [0, 2]
    assert {record["layer"] for record in history} == {1}
    assert "TTT Diagnostics - Layer 1 - Frame 2" in caplog.text
    assert f"TTT/attention {history[-1]['ratio']:.4f}" in caplog.text
    assert format_record(history[-1]) in caplog.text


@torch.no_grad()
def test_two_diagnostics_of_one_step_are_refused(build, random_codes):
    model = build(**CONTEXTS)
    first = enable_ttt_diagnostics(model, log_frequency=1)
    enable_ttt_diagnostics(model, log_frequency=1)
    with pytest.raises(ValueError, match=r"close\(\)"):
        model.forward_text(random_codes(1, 2))
    first.close()
    model.forward_text(random_codes(1, 2))


def test_a_model_without_ttt_is_refused(build):
    model = build(enable=False, layers="none")
    with pytest.raises(ValueError, match="no TTT layers"):
        enable_ttt_diagnostics(model)
    with pytest.raises(ValueError, match="-1"):
        enable_ttt_diagnostics(build(), log_frequency=-1)
