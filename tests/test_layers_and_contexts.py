"""Which layers become hybrid, which attention windows are live, and how a model says so."""

import pytest
import torch

from moshi_ttt import integration
from moshi_ttt.config import TTTConfig, ttt_layer_indices
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.integration import (
    apply_ttt_to_model,
    context_line,
    describe,
    live_contexts,
    live_settings,
    set_attention_context,
    temporal_attentions,
    ttt_layers,
    verify_contexts,
    verify_ttt_layers,
)


@pytest.mark.parametrize(
    "text, indices",
    [
        ("middle", range(8, 24)),
        ("all", range(32)),
        ("none", []),
        ("29,30,31", [29, 30, 31]),
        ("15,16,31", [15, 16, 31]),
        ("8-23", range(8, 24)),
        ("0-1,3", [0, 1, 3]),
        (" 3, 1 ,1", [1, 3]),
        ("Middle", range(8, 24)),
        ("5-5", [5]),
    ],
)
def test_a_choice_names_these_of_32_layers(text, indices):
    assert ttt_layer_indices(text, 32) == list(indices)


@pytest.mark.parametrize(
    "text, message",
    [
        ("31,32", r"'31,32' names layer 32, but the model has 32 layers: 0 to 31"),
        ("30-40", r"names layer 32, but the model has 32 layers"),
        ("23-8", r"empty range '23-8'; write the lower index first"),
        ("middel", r'must be "all", "middle", "none" or indices.*got \'middel\''),
        ("", r"must be .*got ''"),
        ("1,,2", r"must be .*got '1,,2'"),
        ("1-", r"must be .*got '1-'"),
        ("-1", r"must be .*got '-1'"),
        ("1-2-3", r"must be .*got '1-2-3'"),
        ("1.5", r"must be .*got '1.5'"),
        ("\N{SUPERSCRIPT TWO}", r'must be "all"'),  # a digit to Python, no number
    ],
)
def test_a_choice_that_cannot_be_is_an_error_that_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        ttt_layer_indices(text, 32)


@pytest.mark.parametrize("layers, indices", [("1,2", [1, 2]), ("middle", [1, 2]), ("all", [0, 1, 2, 3])])
def test_the_chosen_layers_are_hybrid_and_no_others(build, layers, indices):
    model = build(layers=layers)
    assert [index for index, _ in ttt_layers(model)] == indices
    hybrid = [isinstance(layer, HybridStreamingTransformerLayer) for layer in model.transformer.layers]
    assert [index for index, is_ttt in enumerate(hybrid) if is_ttt] == indices


def test_ttt_without_a_layer_is_an_error(build):
    with pytest.raises(ValueError, match=r"ttt.enable=true but ttt.layers='none' names none of the 4 layers"):
        build(layers="none")
    assert ttt_layers(build(layers="none", enable=False)) == []
    assert ttt_layers(build(layers="all", enable=False)) == []


def test_a_layer_beyond_the_model_is_an_error(build):
    with pytest.raises(ValueError, match="names layer 4, but the model has 4 layers: 0 to 3"):
        build(layers="1,4")


def test_layers_that_do_not_add_up_are_an_error(build):
    model, config = build(layers="1,2"), TTTConfig(layers="1,2")
    verify_ttt_layers(model, config)
    hybrid = model.transformer.layers[2]
    model.transformer.layers[2] = hybrid.original_layer
    with pytest.raises(
        ValueError, match=r"asks for TTT layers \[1, 2\] of 4, the live model has \[1\] and 3"
    ):
        verify_ttt_layers(model, config)
    model.transformer.layers[2] = torch.nn.Identity()
    with pytest.raises(
        ValueError, match="temporal layer 2 is a Identity; expected StreamingTransformerLayer"
    ):
        verify_ttt_layers(model, config)
    model.transformer.layers[2] = hybrid
    with pytest.raises(ValueError, match=r"asks for TTT layers \[\] of 4, the live model has \[1, 2\] and 2"):
        verify_ttt_layers(model, TTTConfig(enable=False))


def test_ttt_is_applied_once_and_before_streaming(build):
    with pytest.raises(ValueError, match="has TTT layers already"):
        apply_ttt_to_model(build(), TTTConfig(layers="1"))
    plain = build(enable=False)
    with plain.streaming(1):
        pass
    with pytest.raises(ValueError, match="has streamed before"):
        apply_ttt_to_model(plain, TTTConfig(layers="1"))


def test_the_depformer_and_the_original_layers_are_untouched(build):
    plain, hybrid = build(enable=False), build(layers="all")
    before, after = plain.state_dict(), hybrid.state_dict()
    assert [type(m) for m in plain.depformer.modules()] == [type(m) for m in hybrid.depformer.modules()]
    names = {name.replace(".original_layer.", "."): name for name in after}
    assert all(torch.equal(before[name], after[names[name]]) for name in before)
    added = {name for short, name in names.items() if short not in before}
    assert all(".seq_modeling_block." in name for name in added)
    attention = hybrid.transformer.layers[3].original_layer.self_attn
    assert attention.embed_dim == 128  # the documented path to it


CONTEXTS = {"ttt_layer_context": 50, "non_ttt_layer_context": 100}


def test_contexts_are_live_in_the_modules_and_size_the_caches(build):
    model = build(**CONTEXTS)
    live = [(is_ttt, attention.context) for _, is_ttt, attention in temporal_attentions(model)]
    assert live == [(False, 100), (True, 50), (True, 50), (False, 100)]
    assert live_contexts(model) == {True: [50, 50], False: [100, 100]}
    assert live_settings(model)["contexts"] == [100, 50, 50, 100]
    with model.streaming(1):
        caches = [attention._streaming_state.kv_cache for _, _, attention in temporal_attentions(model)]
    assert [cache.capacity for cache in caches] == [100, 50, 50, 100]
    assert [cache.cache.shape[3] for cache in caches] == [100, 50, 50, 100]


def test_contexts_left_open_stay_the_hosts(build):
    assert live_settings(build(ttt_layer_context=50))["contexts"] == [250, 50, 50, 250]
    assert live_settings(build(non_ttt_layer_context=100))["contexts"] == [100, 250, 250, 100]
    assert live_settings(build(enable=False, non_ttt_layer_context=100))["contexts"] == [100] * 4


def test_depformer_contexts_stay(build):
    def depformer_contexts(model):
        return [layer.self_attn.context for layer in model.depformer.layers]

    assert depformer_contexts(build(layers="all", **CONTEXTS)) == depformer_contexts(build(enable=False))


@torch.no_grad()
def test_the_live_contexts_are_what_attention_sees(build, random_codes):
    # Windows of 1, 2, 2 and 1 frames let a frame reach two later ones, and no more, without TTT.
    model = build(gate_init=0.0, ttt_layer_context=2, non_ttt_layer_context=1)
    codes = random_codes(1, 10)
    changed = codes.clone()
    changed[:, :, 3] = (changed[:, :, 3] + 1) % 256
    difference = (model.forward_text(codes)[0] - model.forward_text(changed)[0]).abs().amax(dim=(0, 2))
    assert [t for t in range(10) if difference[t] > 0] == [3, 4, 5]


def test_the_context_lines_are_those_that_people_search_logs_for(build):
    model = build(**CONTEXTS)
    assert context_line(model) == "Set attention context: TTT layers=50 (2 layers), Non-TTT=100 (2 layers)"
    expected = "Set context: 250 \u2192 TTT layers: 50 (2 layers), Non-TTT: 100 (2 layers)"
    assert context_line(model, inference=True) == expected
    plain = "Set attention context: TTT layers=- (0 layers), Non-TTT=250 (4 layers)"
    assert context_line(build(enable=False)) == plain


def test_the_context_line_reads_the_live_modules(build):
    model = build(**CONTEXTS)
    model.transformer.layers[2].original_layer.self_attn.context = 7
    assert "TTT layers=7/50 (2 layers)" in context_line(model)


def test_a_live_context_that_the_config_does_not_ask_for_is_an_error(build):
    model = build(**CONTEXTS)
    config = TTTConfig(layers="1,2", **CONTEXTS)
    verify_contexts(model, config)
    for layer, name, wanted in ((2, "ttt_layer_context", 50), (3, "non_ttt_layer_context", 100)):
        attention = next(a for i, _, a in temporal_attentions(model) if i == layer)
        attention.context = 7
        message = (
            f"temporal layer {layer} has a live attention context of 7 frames; the config has ttt.{name}="
        )
        with pytest.raises(ValueError, match=f"{message}{wanted}, which asks for {wanted} frames"):
            verify_contexts(model, config)
        attention.context = wanted
    # Left open, it is the host's.
    open_config = TTTConfig(layers="1,2", ttt_layer_context=50)
    with pytest.raises(
        ValueError, match="layer 0 .* of 100 frames; .*=null, which is the host's context of 250"
    ):
        verify_contexts(model, open_config)
    verify_contexts(build(ttt_layer_context=50), open_config)


@pytest.fixture
def forgotten_contexts(monkeypatch):
    """The bug of people who found out late: nothing sets the contexts."""
    monkeypatch.setattr(integration, "set_attention_context", lambda *arguments: None)


def test_a_model_whose_contexts_were_not_set_is_not_built(build, forgotten_contexts):
    with pytest.raises(ValueError, match="layer 0 has a live attention context of 250 frames"):
        build(**CONTEXTS)
    build()


def test_contexts_cannot_change_while_streaming(build):
    model = build()
    with model.streaming(1), pytest.raises(ValueError, match="before streaming starts"):
        set_attention_context(model, 50, 100)
    set_attention_context(model, 50, 100)
    assert live_settings(model)["contexts"] == [100, 50, 50, 100]


def test_describe_names_every_layer_with_its_kind_context_and_gate(build):
    model = build(ssm_layer="ttt_mlp", gate="convex", gate_init=0.1, **CONTEXTS)
    header, _, *rows, summary = describe(model).splitlines()
    assert header.split() == ["layer", "kind", "context", "seconds", "depth", "TTT", "gate", "parameters"]
    assert [row.split()[:5] for row in rows] == [
        ["0", "attention", "100", "8.0", "-"],
        ["1", "TTT", "50", "4.0", "2"],
        ["2", "TTT", "50", "4.0", "2"],
        ["3", "attention", "100", "8.0", "-"],
    ]
    assert "4 x 32-128-32, K 4, lr 8" in rows[1]
    assert "convex 0.100" in rows[1]
    parameters = sum(p.numel() for p in model.transformer.layers[1].parameters())
    assert rows[1].endswith(f" {parameters:,}")
    assert summary.startswith("2 TTT layers of 4; ")
    assert "reach 296 frames (24 s)" in summary  # 2 x 99 + 2 x 49


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ssm_layer": "mamba"}, "ttt.ssm_layer must be one of ttt_linear, ttt_mlp; got 'mamba'"),
        ({"gate": "open"}, "ttt.gate must be one of residual, convex; got 'open'"),
        ({"inner_init": "zero"}, "ttt.inner_init must be one of"),
        ({"mini_batch_size": 0}, "ttt.mini_batch_size must be at least 1; got 0"),
        ({"base_lr": -1.0}, "ttt.base_lr must be at least 0"),
        ({"base_lr": float("nan")}, "ttt.base_lr must be at least 0; got nan"),
        ({"ttt_mlp_layers": 1}, "ttt.ttt_mlp_layers must be at least 2; got 1 .*ttt_linear"),
        ({"ttt_layer_context": 0}, "ttt.ttt_layer_context must be at least 1"),
        ({"non_ttt_layer_context": -5}, "ttt.non_ttt_layer_context must be at least 1"),
        ({"num_heads": 0}, "ttt.num_heads must be at least 1"),
        ({"head_dim": 7}, r"ttt.head_dim must be even \(rotary pairs\), got 7"),
        ({"gate": "convex", "gate_init": 1.0}, r"ttt.gate_init of the convex gate.*got 1.0"),
        ({"inner_lr_factors": [1.0]}, r"ttt.inner_lr_factors must be 2 numbers of at least 0.*got \[1.0\]"),
        ({"inner_lr_factors": [1.0, -1.0]}, "ttt.inner_lr_factors must be 2 numbers of at least 0"),
        ({"inner_lr_factors": [0.0, 0.0]}, r"not all 0; got \[0.0, 0.0\] \(ttt.base_lr=0 freezes"),
        (
            {"inner_lr_factors": [1.0, 0.5], "kernel": "triton"},
            "ttt.kernel=triton takes no ttt.inner_lr_factors",
        ),
        ({"scan_checkpoint_group_size": -1}, "ttt.scan_checkpoint_group_size must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_they_should_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TTTConfig(**settings).validate()


def test_a_model_is_not_built_with_settings_that_cannot_work(build):
    with pytest.raises(ValueError, match="ttt.mini_batch_size must be at least 1; got 0"):
        build(mini_batch_size=0)
