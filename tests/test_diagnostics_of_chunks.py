"""Diagnostics of training on chunks with carried state: the numbers of one long pass, disturbing nothing."""

import math

import pytest
import torch
from training import losses, records, run

from moshi_ttt.carried import forward_chunk
from moshi_ttt.diagnostics import TTTDiagnostics
from moshi_ttt.integration import set_activation_checkpointing

CHUNK = 12
SETTINGS = {"ttt_layer_context": 6, "non_ttt_layer_context": 9, "mini_batch_size": 4}


@torch.no_grad()
@pytest.mark.parametrize("max_inner_change", [None, 0.02])
def test_numbers_of_two_chunks_are_those_of_the_whole_pass(build, perturb, random_codes, max_inner_change):
    model = perturb(build(**SETTINGS, max_inner_change=max_inner_change))
    codes, found = random_codes(2, 2 * CHUNK), []
    diagnostics = TTTDiagnostics(model, 0, sink=found.append)
    diagnostics.record_next(1)
    model(codes)
    carried = None
    for chunk in codes.split(CHUNK, dim=-1):
        diagnostics.record_next(1)
        _, carried = forward_chunk(model, chunk, carried)
    for whole, first, second in zip(*found, strict=True):
        assert whole.keys() == first.keys() == second.keys()
        for name in whole.keys() - {"ratio"}:
            if name.endswith(("_mean", "_weight", "_weight_abs")) or name.startswith(("cos_", "inner_loss_")):
                expected = (first[name] + second[name]) / 2
            elif name.endswith("_norm") or name.startswith("inner_step_"):
                expected = math.sqrt((first[name] ** 2 + second[name] ** 2) / 2)
            elif name.startswith(("inner_norm_", "inner_change_")):
                expected = second[name]
            else:
                continue
            assert whole[name] == pytest.approx(expected, rel=1e-3, abs=1e-6), name
        assert second["inner_change_2"] > first["inner_change_2"] or max_inner_change
        assert first["inner_loss_at_start"] != pytest.approx(second["inner_loss_before"], rel=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recording_a_chunk_changes_no_gradient(build, perturb, random_codes, checkpointing):
    model = perturb(build(**SETTINGS)).train()
    set_activation_checkpointing(model, checkpointing)
    codes, found = random_codes(2, 2 * CHUNK), []

    def gradients():
        model.zero_grad()
        carried = None
        for chunk in codes.split(CHUNK, dim=-1):
            output, carried = forward_chunk(model, chunk, carried)
            output.text_logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    diagnostics = TTTDiagnostics(model, 0, sink=found.append)
    diagnostics.record_next(5)
    assert all(map(torch.equal, plain, gradients()))
    # One pass was asked for: neither the second chunk nor what backward runs again is recorded.
    assert [[(r["step"], r["layer"]) for r in pass_] for pass_ in found] == [[(5, 1), (5, 2)]]


def test_persistent_training_writes_diagnostics_and_trains_the_same(tmp_path):
    settings = ("ttt.persistent_states=true", "duration_sec=0.64", "ttt.mini_batch_size=4", "max_steps=4")
    settings += ("gradient_checkpointing=true", "num_microbatches=2", "batch_size=1")
    watched = run(tmp_path / "watched", *settings, "diagnostics.every_steps=2")
    plain = run(tmp_path / "plain", *settings, "diagnostics.every_steps=0")
    assert losses(watched) == losses(plain)
    for layer in (1, 2):
        found = records(watched, f"diagnostics/layer_{layer}")
        assert [record["step"] for record in found] == [1, 2, 4]
        # Chunks of one recording: what is carried goes further from the learned weights.
        changes = [record["inner_change_2"] for record in found]
        assert changes == sorted(set(changes))
    assert "TTT Diagnostics - Layer 2 - Step 4" in (watched / "train.log").read_text()
