"""The TTT-MLP of three layers and more: its size, its log lines, its forward pass."""

import logging
from itertools import pairwise

import pytest
import torch
from moshi.models.lm import LMModel

from moshi_ttt.config import TTTConfig
from moshi_ttt.integration import apply_ttt_to_model, ttt_layers
from moshi_ttt.ttt_layer import TTTMLP, TTTLinear, TTTMLPMultiLayer, TTTWrapper


@torch.no_grad()
def test_three_layers_at_moshis_size_log_their_dimensions_and_run(caplog):
    caplog.set_level(logging.INFO, "moshi_ttt")
    layer = TTTWrapper(4096, 32, TTTConfig(ttt_mlp_layers=3, mini_batch_size=2))
    assert "[TTT-MLP-MULTI] Number of layers: 3" in caplog.messages
    assert "[TTT-MLP-MULTI] Layer dimensions: [128, 512, 512, 128]" in caplog.messages
    assert "[TTT-MLP-MULTI] Total TTT parameters: 12,619,776" in caplog.messages
    out = layer(torch.randn(1, 3, 4096))
    assert out.shape == (1, 3, 4096)
    assert out.isfinite().all()
    assert out.std() > 0.1


def test_five_layers_of_32_heads_hold_63_098_880_inner_parameters(caplog):
    caplog.set_level(logging.INFO, "moshi_ttt")
    with torch.device("meta"):  # sizes alone: 63 M numbers need not be drawn
        model = LMModel(
            delays=[0, 0, 0],
            n_q=2,
            dep_q=1,
            card=8,
            text_card=8,
            dim=32,
            num_heads=2,
            num_layers=6,
            hidden_scale=1,
            context=10,
            causal=True,
            gating="silu",
            norm="rms_norm_f32",
            depformer_dim=32,
            depformer_num_heads=2,
            depformer_num_layers=1,
        )
        apply_ttt_to_model(model, TTTConfig(layers="1-5", ttt_mlp_layers=3, num_heads=32, head_dim=128))
    sizes = [layer.seq_modeling_block.ttt_layer.ttt.inner_parameters for _, layer in ttt_layers(model)]
    assert sizes == [12_619_776] * 5
    assert sum(sizes) == 63_098_880
    assert "TTT layers: [1, 2, 3, 4, 5]; inner parameters: 63,098,880 in 5 layers" in caplog.messages
    inner = [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-1] in ("W1", "W2", "W3", "b1", "b2", "b3")
    ]
    assert sum(parameter.numel() for parameter in inner) == 63_098_880


@pytest.mark.parametrize(
    "settings, kind, dims",
    [
        ({"ssm_layer": "ttt_linear"}, TTTLinear, [16, 16]),
        ({"ssm_layer": "ttt_linear", "ttt_mlp_layers": 3}, TTTLinear, [16, 16]),
        ({"ttt_mlp_layers": 2}, TTTMLP, [16, 64, 16]),
        ({"ttt_mlp_layers": 3}, TTTMLPMultiLayer, [16, 64, 64, 16]),
        ({"ttt_mlp_layers": 5}, TTTMLPMultiLayer, [16, 64, 64, 64, 64, 16]),
    ],
)
def test_the_settings_choose_the_kind_and_its_widths(settings, kind, dims):
    ttt = TTTWrapper(32, 2, TTTConfig(**settings)).ttt
    assert type(ttt) is kind
    assert ttt.inner_dims == dims
    assert [list(w.shape[1:]) for w in ttt.inner_weights] == [list(size) for size in pairwise(dims)]


def test_a_model_logs_which_layers_it_makes(build, caplog):
    caplog.set_level(logging.INFO, "moshi_ttt")
    build(ttt_mlp_layers=3)
    lines = [message for message in caplog.messages if message.startswith("[Hybrid]")]
    assert lines == [
        "[Hybrid] Layer 1: Creating TTT-MLP with 3 layers via TTTWrapper",
        "[Hybrid] Layer 2: Creating TTT-MLP with 3 layers via TTTWrapper",
    ]
