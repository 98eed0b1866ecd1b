"""The models that are compared: one small Moshi with different memories, equal in size.

Every arm is a real `LMModel`. Those with smaller memories get wider feed-forward blocks in the temporal
layers, so that all have the parameters of the largest within a fraction of a per cent.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from moshi.models.lm import LMModel

from evaluation.recall.task import Vocabulary
from moshi_ttt.config import TTTConfig
from moshi_ttt.integration import apply_ttt_to_model, ttt_layers
from moshi_ttt.ttt_layer import TTTBase


@dataclass
class Size:
    """The small Moshi. All arms share it but for the width of the feed-forward blocks."""

    dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    window_frames: int = 8

    @property
    def receptive_field(self) -> int:
        """Frames that the stacked windows reach: the layers' context - 1 each."""
        return self.num_layers * (self.window_frames - 1)


@dataclass(frozen=True)
class Arm:
    """One memory.

    Args:
        memory: None for attention alone, else "ttt_linear" or "ttt_mlp".
        depth: linear layers of the inner MLP.
        full_context: attention sees everything.
        ttt: settings of `TTTConfig` that differ from the benchmark's.
        non_causal: train with the update that sees the future of its mini-batch (to show the leak).
        carry: train on chunks of an episode, each continuing from the state of the one before (True:
            persistent training) or from the learned weights (False). None: on whole episodes.
        reset: forget the inner state when the question comes, at evaluation.
        trained_as: the arm whose trained model this one evaluates, if not its own.
    """

    memory: str | None = None
    depth: int = 2
    full_context: bool = False
    ttt: dict[str, Any] = field(default_factory=dict)
    non_causal: bool = False
    carry: bool | None = None
    reset: bool = False
    trained_as: str | None = None


ARMS = {
    "attention_window": Arm(),
    "attention_full": Arm(full_context=True),
    "ttt_linear": Arm("ttt_linear"),
    "ttt_mlp": Arm("ttt_mlp"),
    "ttt_mlp_3": Arm("ttt_mlp", depth=3),
    "inner_lr_0": Arm("ttt_mlp", ttt={"base_lr": 0.0}),
    "state_reset": Arm("ttt_mlp", reset=True, trained_as="ttt_mlp"),
    "non_causal": Arm("ttt_mlp", non_causal=True),
    "persistent_on": Arm("ttt_mlp", carry=True),
    "persistent_off": Arm("ttt_mlp", carry=False),
}
_LARGEST = Arm("ttt_mlp", depth=3)
FULL_CONTEXT = 1 << 12  # frames; longer than any episode


def _lm(size: Size, vocabulary: Vocabulary, context: int, feedforward: int) -> LMModel:
    return LMModel(
        **vocabulary.model_kwargs(),
        dim=size.dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        hidden_scale=feedforward / size.dim,  # type: ignore[arg-type]
        context=context,
        causal=True,
        layer_scale=None,
        max_period=10000,
        gating="silu",
        norm="rms_norm_f32",
        positional_embedding="rope",
        depformer_dim=32,
        depformer_dim_feedforward=64,
        depformer_num_heads=2,
        depformer_num_layers=1,
        depformer_layer_scale=None,
        depformer_multi_linear=True,
        depformer_context=2,
        depformer_max_period=10000,
        depformer_gating="silu",
        depformer_pos_emb="none",
        depformer_weights_per_step=True,
    )


def _assemble(
    arm: Arm, size: Size, vocabulary: Vocabulary, settings: dict[str, Any], feedforward: int
) -> LMModel:
    context = FULL_CONTEXT if arm.full_context else size.window_frames
    model = _lm(size, vocabulary, context, feedforward)
    if arm.memory is not None:
        config = TTTConfig(
            layers="all",
            ssm_layer=arm.memory,
            ttt_mlp_layers=arm.depth,
            scan_checkpoint_group_size=0,
            **(settings | arm.ttt),
        )
        apply_ttt_to_model(model, config)
    return model


def parameters(model: LMModel) -> int:
    return sum(p.numel() for p in model.parameters())


def matched_feedforward(arm: Arm, size: Size, vocabulary: Vocabulary, settings: dict[str, Any]) -> int:
    """Width of the feed-forward blocks with which `arm` has the parameters of the largest arm."""
    narrowest = 4 * size.dim
    # Factors are no parameters, and there is one for each layer of the arm's own memory.
    settings = {name: value for name, value in settings.items() if name != "inner_lr_factors"}
    with torch.device("meta"):
        target, own = (
            parameters(_assemble(a, size, vocabulary, settings, narrowest)) for a in (_LARGEST, arm)
        )
    # A gated block of width F has 3 x dim weights for each of its 2 F / 3 units: 2 x dim for one of F.
    return narrowest + round((target - own) / (size.num_layers * 2 * size.dim))


def build_arm(arm: Arm, size: Size, vocabulary: Vocabulary, settings: dict[str, Any], seed: int) -> LMModel:
    """A new model of an arm, its weights drawn from `seed`."""
    feedforward = matched_feedforward(arm, size, vocabulary, settings)
    torch.manual_seed(seed)
    return _assemble(arm, size, vocabulary, settings, feedforward)


def _layers(model: LMModel) -> list[TTTBase]:
    return [layer.seq_modeling_block.ttt_layer.ttt for _, layer in ttt_layers(model)]


@contextmanager
def non_causal_update(model: LMModel) -> Iterator[None]:
    """Let every token of a mini-batch see the updates of all of it, also of later tokens.

    This is the update of the published video model (arXiv 2504.05298). It exists here alone, to show what it
    does to a language model. It acts on whole sequences; a stream has no future to look at.
    """
    with ExitStack() as stack:
        for ttt in _layers(model):
            assert not ttt.is_streaming
            causal = ttt.step_scale()
            ttt.step_scale = _everything_of(causal)  # type: ignore[method-assign]
            stack.callback(delattr, ttt, "step_scale")
        yield


def _everything_of(causal: torch.Tensor):
    """Step scales `[K, K]` without the mask: c of the row's token for every column."""
    everything = causal[:, :1].expand_as(causal)
    return lambda: everything


def forget(model: LMModel) -> None:
    """Put the inner state of a streaming model back to the learned weights."""
    for ttt in _layers(model):
        state = ttt._streaming_state
        assert state is not None
        state.reset(torch.ones(state.batch_size, dtype=torch.bool, device=state.device))


@contextmanager
def forgetting_at(model: LMModel, step: int) -> Iterator[None]:
    """Whole sequences start afresh from the learned weights at this step, as `forget` does in a stream."""
    with ExitStack() as stack:
        for ttt in _layers(model):
            ttt.forward = _in_two_parts(ttt, step)  # type: ignore[method-assign]
            stack.callback(delattr, ttt, "forward")
        yield


def _in_two_parts(ttt: TTTBase, step: int):
    def forward(x: torch.Tensor) -> torch.Tensor:
        parts = [
            ttt.forward_from(part, ttt.initial_weights(x.shape[0]))[0] for part in x.tensor_split([step], 1)
        ]
        return torch.cat(parts, dim=1)

    return forward
