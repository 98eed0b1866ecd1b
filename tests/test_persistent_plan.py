"""The plan counts what rows carry."""

import torch
from test_plan import plan

from moshi_ttt.carried import carried_bytes

CHUNKS = ("duration_sec=2.56", "ttt.ttt_layer_context=25", "ttt.non_ttt_layer_context=50")


def test_the_plan_counts_the_carried_state(build):
    off = plan("ttt.persistent_states=false", *CHUNKS)
    one, two = (plan("ttt.persistent_states=true", *CHUNKS, f"num_microbatches={n}") for n in (1, 2))
    config = {"layers": "middle", "mini_batch_size": 16, "ttt_layer_context": 25, "non_ttt_layer_context": 50}
    expected = sum(carried_bytes(build(**config), 2).values())
    positions_and_codes = 2 * 8 + 2 * 17 * 2 * 8
    assert off.carried == 0
    assert one.carried == expected + positions_and_codes
    assert two.carried == 2 * one.carried
    assert one.memory == one.weights + one.optimizer + one.carried + one.step_peak
    # The state that a step makes lives beside the one that it reads.
    assert one.step_peak > off.step_peak + one.carried // 2
    assert one.flops_per_step > off.flops_per_step  # carried keys are attended to
    assert torch.get_default_device().type == "cpu"
