"""Whether TTT weights persist can be read, only read, and is judged rightly when something is broken."""

import logging
import re
import sys
import zlib

import pytest
import torch
from training import compose_config, dialogue, own_logging, run, run_python

from inference import describe, verify_persistence
from inference.stream import Sampling, open_stream
from inference.verify_persistence import VerifyPersistenceConfig, find_recording, stream_verdicts
from moshi_ttt import checkpoint
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.inner_loop import inner_loop
from moshi_ttt.integration import temporal_attentions, ttt_layers
from moshi_ttt.loading import load_mimi
from moshi_ttt.persistence import enable_ttt_persistence_logging, stream_weights
from moshi_ttt.verdict import PersistenceProbe, Verdict

K = 4  # the mini-batch of `build`
TIGHT = {"max_inner_change": 0.01}  # mini-batches end on the bound
KINDS = [{"ssm_layer": "ttt_linear"}, {}, {"ttt_mlp_layers": 3}, TIGHT]


def inner_layer(model, index):
    return dict(ttt_layers(model))[index].seq_modeling_block.ttt_layer.ttt


def weights_after(ttt, inputs):
    """Weights that the last token of a sequence leaves, drawn back where a whole mini-batch ends."""
    edge = inputs[0].shape[1] // K * K
    parts = [[x[:, :edge] for x in inputs], [x[:, edge:] for x in inputs]]
    weights, bound = ttt.initial_weights(1), ttt.bound(ttt.initial_weights(1))
    for part, limit in zip(parts, (bound, None), strict=True):
        if part[0].shape[1]:
            _, weights = inner_loop(*part, weights, ttt.norm(1), ttt.step_scale(), bound=limit)
    return weights


def lines(caplog, tag, layer=1):
    """What was logged with a tag of a layer."""
    return [
        record.getMessage() for record in caplog.records if f"[{tag}] Layer {layer} " in record.getMessage()
    ]


def numbers(line, what):
    """W1, W2, ... of a line."""
    found = re.findall(rf"W(\d)_{what}=([\d.]+)", line)
    assert [int(index) for index, _ in found] == list(range(1, len(found) + 1))
    return [float(value) for _, value in found]


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, "moshi_ttt.persistence")
    return caplog


def test_enabling_says_how_many_layers_and_refuses_none(build, logged):
    enable_ttt_persistence_logging(build(layers="1-3"))
    assert logged.messages == ["Enabled persistence logging for 3 TTT layers"]
    with pytest.raises(
        ValueError, match="persistence logging found 0 TTT layers; expected a model after apply"
    ):
        enable_ttt_persistence_logging(build(enable=False))
    with pytest.raises(ValueError, match="every_frames must be at least 1, got 0"):
        enable_ttt_persistence_logging(build(), every_frames=0)
    model = build()
    logging_on = enable_ttt_persistence_logging(model)
    with pytest.raises(ValueError, match="enabled already; call disable"):
        enable_ttt_persistence_logging(model)
    logging_on.disable()
    enable_ttt_persistence_logging(model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_streaming_logs_the_weights_that_each_token_is_answered_with(build, random_codes, logged, kind):
    model = build(**kind)
    ttt, calls, weights = inner_layer(model, 1), [], []
    ttt.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    enable_ttt_persistence_logging(model)
    with model.streaming(1):
        for _ in range(2 * K + 2):
            model.forward_text(random_codes(1, 1))
            weights.append(stream_weights(ttt, ttt._streaming_state).weights)
    checks, updates, scans = (
        lines(logged, f"TTT-{name}") for name in ("PERSIST-CHECK", "INNER-UPDATE", "SCAN-OUTPUT")
    )
    assert len(checks) == len(updates) == len(scans) == 2 * K + 2
    assert len(set(checks)) == len(checks)
    # Another way to the same weights: the whole sequence up to a token at once.
    before = ttt.initial_weights(1).weights
    for token in range(2 * K + 2):
        assert checks[token].startswith(f"[TTT-PERSIST-CHECK] Layer 1 Token {token}: W1_hash=")
        assert updates[token].startswith(f"[TTT-INNER-UPDATE] Layer 1 Position {token % K}: W1_change=")
        hashes = [zlib.crc32(weight.numpy().tobytes()) for weight in weights[token]]
        assert numbers(checks[token], "hash") == hashes
        x = torch.cat(calls[: token + 1], dim=1)
        inputs = ttt.project(x, torch.arange(token + 1)[None] % K, ttt.norm(1))
        after = weights_after(ttt, inputs).weights
        for live, exact in zip(weights[token], after, strict=True):
            assert torch.allclose(live, exact, atol=1e-5)
        changes = [(b - a).norm().item() for a, b in zip(before, after, strict=True)]
        for line in (updates[token], scans[token]):
            assert numbers(line, "change") == pytest.approx(changes, rel=1e-3, abs=1e-4)
        before = after
    assert scans[0].endswith("(kept for the next call, began from the learned weights)")
    assert all(line.endswith("(kept for the next call)") for line in scans[1:])


@torch.no_grad()
def test_a_reset_shows_in_the_log_and_a_new_stream_counts_anew(build, random_codes, logged):
    model = build()
    enable_ttt_persistence_logging(model)
    with model.streaming(2):
        for step in range(3):
            if step == 2:
                model.reset_streaming()
            model.forward_text(random_codes(2, 1))
    begins = ["began from the learned weights" in line for line in lines(logged, "TTT-SCAN-OUTPUT")]
    assert begins == [True, False, True]
    logged.clear()
    with model.streaming(1):
        model.forward_text(random_codes(1, 1))
    assert "Token 0:" in lines(logged, "TTT-PERSIST-CHECK", layer=2)[0]


@torch.no_grad()
def test_some_frames_only_and_calls_of_several(build, random_codes, logged):
    model = build()
    enable_ttt_persistence_logging(model, every_frames=5)
    with model.streaming(1):
        for _ in range(12):
            model.forward_text(random_codes(1, 1))
    assert [line.split()[4] for line in lines(logged, "TTT-PERSIST-CHECK")] == ["0:", "5:", "10:"]
    logged.clear()
    model(random_codes(1, 12))  # offline
    assert [line.split()[4] for line in lines(logged, "TTT-PERSIST-CHECK")] == ["0:", "5:", "10:"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_offline_logs_the_same_changes_and_says_that_nothing_is_kept(build, random_codes, logged, kind):
    model, codes = build(**kind), random_codes(1, 2 * K + 1)
    enable_ttt_persistence_logging(model)
    model.forward_text(codes)
    offline = [numbers(line, "change") for line in lines(logged, "TTT-INNER-UPDATE")]
    (scan,) = lines(logged, "TTT-SCAN-OUTPUT")
    assert scan.endswith("(not streaming: the next call begins from the learned weights)")
    logged.clear()
    with model.streaming(1):
        for frame in codes.split(1, dim=2):
            model.forward_text(frame)
        ttt = inner_layer(model, 1)
        last = stream_weights(ttt, ttt._streaming_state).weights
    streamed = [numbers(line, "change") for line in lines(logged, "TTT-INNER-UPDATE")]
    assert len(offline) == 2 * K + 1
    for one, two in zip(offline, streamed, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    total = [(w - start).norm().item() for w, start in zip(last, ttt.initial_weights(1).weights, strict=True)]
    assert numbers(scan, "change") == pytest.approx(total, rel=1e-4)


def test_training_is_not_logged(build, random_codes, logged):
    model = build().train()
    with enable_ttt_persistence_logging(model):
        model(random_codes(1, K)).text_logits.nansum().backward()
    assert lines(logged, "TTT-PERSIST-CHECK") == []


@torch.no_grad()
def test_logging_and_probing_change_no_bit_and_leave_nothing(
    build, tiny_base, random_codes, streaming_tensors, logged
):
    model, mimi = build(), load_mimi(tiny_base, "cpu")
    recording = torch.from_numpy(dialogue(4)[14400:30000, 1].copy())
    codes = random_codes(2, 9)

    def outputs():
        offline = [model.forward_text(codes)[0]]
        with open_stream(model, mimi, Sampling(seed=3)) as stream:
            frames = [part for frame in stream.hear(recording) for part in (frame.tokens, frame.audio)]
            return offline + frames + [t.clone() for t in streaming_tensors(model).values()]

    hooks = [
        [dict(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        for module in model.modules()
    ]
    attributes = [dict(vars(inner_layer(model, index))) for index in (1, 2)]
    off = outputs()
    with enable_ttt_persistence_logging(model), PersistenceProbe(model):
        on = outputs()
        assert lines(logged, "TTT-PERSIST-CHECK")
    logged.clear()
    again = outputs()
    assert logged.messages == []
    for one, two, three in zip(off, on, again, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    # Off is really off: the very same code runs.
    assert hooks == [
        [dict(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        for module in model.modules()
    ]
    assert [vars(inner_layer(model, index)).keys() for index in (1, 2)] == [a.keys() for a in attributes]


def reset_before_each_call(layer):
    def reset(module, args):
        module._streaming_state.reset(torch.tensor([True]))

    layer.seq_modeling_block.ttt_layer.ttt.register_forward_pre_hook(reset)


def reset_within_each_call(layer):
    ttt = layer.seq_modeling_block.ttt_layer.ttt
    forward = ttt.forward

    def forgetful(x):
        ttt._streaming_state.reset(torch.tensor([True]))
        return forward(x)

    ttt.forward = forgetful


def reset_after_each_call(layer):
    ttt = layer.seq_modeling_block.ttt_layer.ttt
    forward = ttt.forward

    def forgetful(x):
        out = forward(x)
        ttt._streaming_state.reset(torch.tensor([True]))
        return out

    ttt.forward = forgetful


def lose_the_mini_batch(layer):
    ttt = layer.seq_modeling_block.ttt_layer.ttt
    ttt._finish_mini_batches = lambda state: state.position.masked_fill_(state.position == K, 0)


def stay_outside_the_stream(layer):
    layer.seq_modeling_block.ttt_layer.ttt.set_streaming_detached(True)


def forget_half(layer):
    def halve(module, args):
        state = module._streaming_state
        state.inner.weights[0].lerp_(state.initial.weights[0], 0.5)

    layer.seq_modeling_block.ttt_layer.ttt.register_forward_pre_hook(halve)


def no_inner_learning_rate(layer):
    layer.seq_modeling_block.ttt_layer.ttt.base_lr = 0.0


def learned_learning_rate_of_0(layer):
    layer.seq_modeling_block.ttt_layer.ttt.learnable_ttt_lr_bias.fill_(-1e9)


def close_the_gate(layer):
    layer.seq_modeling_block.gate.alpha.fill_(0.0)


def no_output(layer):
    layer.seq_modeling_block.ttt_layer.ttt.wo.weight.zero_()


def learned_nan(layer):
    layer.seq_modeling_block.ttt_layer.ttt.b1.fill_(float("nan"))


FAULTS = [
    (
        reset_before_each_call,
        Verdict.RESETS,
        r"back at the learned start in frames 1, 2, 3, 4, 5, \.\.\. \(\d+ in",
    ),
    (reset_within_each_call, Verdict.RESETS, "back at the learned start in frames 1, 2, 3, 4, 5"),
    (reset_after_each_call, Verdict.RESETS, "back at the learned start in frames 0, 1, 2, 3, 4"),
    (lose_the_mini_batch, Verdict.RESETS, "back at the learned start in frames 3, 7, 11"),
    (
        stay_outside_the_stream,
        Verdict.RESETS,
        "not part of the stream: frames 0, 1, .* began from the learned",
    ),
    (forget_half, Verdict.RESETS, "what was learned before did not enter the weights of frame"),
    (no_inner_learning_rate, Verdict.FROZEN, r"the inner learning rate is 0 \(ttt.base_lr=0\)"),
    (learned_learning_rate_of_0, Verdict.FROZEN, "the learned inner learning rate is 0 in every frame"),
    (close_the_gate, Verdict.FROZEN, "the gate is closed: the effective weight of the TTT output is 0"),
    (no_output, Verdict.FROZEN, "the output does not depend on what the layer learns"),
    (learned_nan, Verdict.FROZEN, "not finite from frame 0 on"),
]


@pytest.fixture(scope="module")
def run_dir(private_cache, tmp_path_factory):
    return run(tmp_path_factory.mktemp("persistence") / "run", f"ttt.mini_batch_size={K}")


def judged(loaded, frames=14):
    mimi = load_mimi(loaded.base, "cpu")
    recording = torch.from_numpy(dialogue(4)[14400 : 14400 + frames * 1920, 1].copy())
    return {v.layer: v for v in stream_verdicts(loaded.model, mimi, recording, Sampling())}


@torch.no_grad()
def test_the_layers_of_a_checkpoint_persist(run_dir):
    loaded = load_checkpoint(run_dir)
    verdicts = judged(loaded)
    assert [v.verdict for v in verdicts.values()] == [Verdict.PERSISTS] * 2
    assert verdicts.keys() == {1, 2}
    assert verdicts[1].frames == 15  # LMGen is given the first frame twice
    assert verdicts[1].drift > 1e-3
    assert verdicts[1].effect > 0.01


@pytest.mark.parametrize("plant, verdict, why", FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
@torch.no_grad()
def test_a_planted_fault_is_named(run_dir, plant, verdict, why):
    loaded = load_checkpoint(run_dir)
    plant(dict(ttt_layers(loaded.model))[1])
    verdicts = judged(loaded)
    assert verdicts[1].verdict is verdict, verdicts[1]
    assert re.search(why, verdicts[1].why), verdicts[1]
    if plant is not learned_nan:  # which spreads
        assert verdicts[2].verdict is Verdict.PERSISTS, verdicts[2]


@torch.no_grad()
def test_weights_that_the_bound_draws_back_persist(build, tiny_base):
    model = build(**TIGHT)
    recording = torch.from_numpy(dialogue(4)[14400 : 14400 + 15 * 1920, 1].copy())  # 4 mini-batches
    verdicts = stream_verdicts(model, load_mimi(tiny_base, "cpu"), recording, Sampling())
    assert [v.verdict for v in verdicts] == [Verdict.PERSISTS] * 2, verdicts
    inner_layer(model, 1).max_inner_change = None
    free = stream_verdicts(model, load_mimi(tiny_base, "cpu"), recording, Sampling())
    assert free[0].drift > 1.5 * verdicts[0].drift, "the bound of this test is not idle"


@pytest.mark.parametrize("kind", [*KINDS, {"gate": "convex"}, {"learned_token_scale": True}])
@torch.no_grad()
def test_every_kind_of_layer_persists_and_a_closed_gate_is_frozen(build, tiny_base, kind):
    recording = torch.from_numpy(dialogue(4)[14400 : 14400 + 9 * 1920, 1].copy())
    for gate_init, expected in ((0.3, Verdict.PERSISTS), (0.0, Verdict.FROZEN)):
        for param_dtype in ("float32", "bfloat16"):
            model = build(param_dtype, gate_init=gate_init, **kind)
            verdicts = stream_verdicts(model, load_mimi(tiny_base, "cpu"), recording, Sampling())
            assert [v.verdict for v in verdicts] == [expected] * 2, verdicts


def command(monkeypatch, main, *arguments):
    """Run a command's main here; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        with own_logging():
            main()
    except SystemExit as error:
        return error.code
    return 0


def test_the_command_prints_the_verdicts_and_exits_accordingly(run_dir, tmp_path, monkeypatch, capsys):
    printed = run_python(
        *("-m", "inference.verify_persistence", f"checkpoint={run_dir}"),
        *("seconds=1", "log_every_frames=5", "device=cpu"),
    )
    assert "Set context: 250 \u2192 TTT layers: 25 (2 layers), Non-TTT: 50 (2 layers)" in printed
    assert re.search(r"hearing 1.00 s of .*sample_data/audio/dialogue_1.flac", printed)
    assert "Enabled persistence logging for 2 TTT layers" in printed
    assert "[TTT-PERSIST-CHECK] Layer 2 Token 10: W1_hash=" in printed
    rows = [line.split() for line in printed.splitlines() if re.match(r"\d  ", line)]
    assert [row[:3] for row in rows] == [["1", "PERSISTS", "13"], ["2", "PERSISTS", "13"]]
    assert printed.splitlines()[-1] == "2 of 2 TTT layers persist"

    frozen = run(tmp_path / "frozen", "ttt.base_lr=0", "max_steps=1")
    verify = verify_persistence.main
    arguments = ("seconds=0.5", "device=cpu")
    assert command(monkeypatch, verify, f"checkpoint={frozen}", *arguments) == 2
    assert "FROZEN" in (out := capsys.readouterr().out)
    assert "0 of 2 TTT layers persist" in out
    for bad in (f"checkpoint={tmp_path}", "device=cpu"):
        assert command(monkeypatch, verify, bad) == 1
    plain = run(tmp_path / "plain", "ttt=none", "mode=lora", "max_steps=1")
    assert command(monkeypatch, verify, f"checkpoint={plain}", *arguments) == 1
    assert "found 0 TTT layers" in capsys.readouterr().err


def test_what_cannot_be_verified_is_an_error_that_says_what_to_give(tmp_path, monkeypatch):
    for seconds in (0.0, 30.5, -1.0):
        with pytest.raises(ValueError, match="seconds must be above 0 and at most 30, got"):
            find_recording(VerifyPersistenceConfig(seconds=seconds))
    with pytest.raises(ValueError, match=r"log_every_frames must be 0 \(never\) or more, got -1"):
        find_recording(VerifyPersistenceConfig(log_every_frames=-1))
    monkeypatch.setattr(verify_persistence, "_SAMPLE", tmp_path / "dialogue.flac")
    with pytest.raises(
        ValueError, match="missing input: .* does not exist here; give a recording as input=FILE"
    ):
        find_recording(VerifyPersistenceConfig())


def test_describe_prints_the_live_table_and_where_it_comes_from(run_dir, monkeypatch, capsys):
    assert command(monkeypatch, describe.main, f"checkpoint={run_dir}") == 0
    out = capsys.readouterr().out
    folder = run_dir / "checkpoints/checkpoint_000002/consolidated"
    assert out.startswith(f"checkpoint  {folder}, step 2\nsettings    {folder / 'training_config.json'}")
    loaded = load_checkpoint(run_dir)
    assert out == describe.description(loaded) + "\n"
    assert re.search(r"^1 +TTT +25 +2.0 +2 +4 x 32-128-32, K 4, lr 8 +residual 0\.\d+ +\d", out, re.M)
    # Live: what a module has is what the table says.
    attention = next(a for index, _, a in temporal_attentions(loaded.model) if index == 3)
    attention.context = 125
    assert re.search(r"^3 +attention +125 +10.0 ", describe.description(loaded), re.M)
    assert compose_config(name="describe").device == "cpu"


@pytest.mark.parametrize("room", ["inference", "training"])
def test_a_model_whose_live_contexts_are_not_the_configs_is_refused(run_dir, tmp_path, monkeypatch, room):
    import finetune.train as train

    module = checkpoint if room == "inference" else train
    build = module.build_model

    def tampered(*arguments):
        model = build(*arguments)
        dict(ttt_layers(model))[2].original_layer.self_attn.context = 3000
        return model

    monkeypatch.setattr(module, "build_model", tampered)
    message = (
        "temporal layer 2 has a live attention context of 3000 frames; .*ttt_layer_context=25, which asks"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(run_dir) if room == "inference" else run(tmp_path / "run")
