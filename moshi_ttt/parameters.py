"""Named groups of parameters, and which of them train in each mode."""

from collections.abc import Iterator

from moshi.models.lm import LMModel
from torch import nn

from moshi_ttt.integration import ttt_layers
from moshi_ttt.lora import lora_modules

GROUPS = ("base", "lora", "ttt", "gate")

TRAINABLE_GROUPS: dict[str, tuple[str, ...]] = {
    "frozen": (),
    "lora": ("lora",),
    "ttt": ("ttt", "gate"),
    "lora+ttt": ("lora", "ttt", "gate"),
    "full": ("base", "ttt", "gate"),
}


def _group_by_id(model: LMModel) -> dict[int, str]:
    """Group of every parameter that is not base, by the identity of the tensor: decided by module type."""
    groups: dict[int, str] = {}
    for _, layer in ttt_layers(model):
        block = layer.seq_modeling_block
        groups.update({id(p): "ttt" for p in block.parameters()})
        groups.update({id(p): "gate" for p in block.gate.parameters()})
    for _, module in lora_modules(model):
        for factor in (module.lora_A, module.lora_B):
            groups.update({id(p): "lora" for p in factor.parameters()})
    return groups


def named_groups(model: LMModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(group, name, parameter) of every parameter of the model."""
    groups = _group_by_id(model)
    for name, parameter in model.named_parameters():
        yield groups.get(id(parameter), "base"), name, parameter


def set_trainable(model: LMModel, mode: str) -> dict[str, int]:
    """Let exactly the groups of `mode` require gradients.

    Args:
        model (LMModel): the model, with LoRA and TTT in place.
        mode (str): frozen, lora, ttt, lora+ttt or full.
    Returns:
        Number of parameters (elements) that train, by group.
    Raises:
        ValueError: an unknown mode, or one whose groups the model lacks or would leave in an odd state.
    """
    if mode not in TRAINABLE_GROUPS:
        raise ValueError(f"mode must be one of {', '.join(TRAINABLE_GROUPS)}; got {mode!r}")
    wanted = TRAINABLE_GROUPS[mode]
    present = {group for group, _, _ in named_groups(model)}
    for group, remedy in (("lora", "set lora.enable=true"), ("ttt", "set ttt.enable=true")):
        if group in mode.split("+") and group not in present:
            raise ValueError(f"mode={mode} trains {group} parameters, but the model has none; {remedy}")
    if mode == "full" and "lora" in present:
        raise ValueError("mode=full trains the weights under LoRA; set lora.enable=false or mode=lora+ttt")
    counts: dict[str, int] = dict.fromkeys(GROUPS, 0)
    for group, _, parameter in named_groups(model):
        parameter.requires_grad_(group in wanted)
        if group in wanted:
            counts[group] += parameter.numel()
    return {group: count for group, count in counts.items() if count}
