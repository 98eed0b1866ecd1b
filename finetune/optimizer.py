"""AdamW with a learning rate for each group, float32 masters of bfloat16 parameters, OneCycle."""

import math

import torch
from moshi.models.lm import LMModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from finetune.config import OptimConfig
from moshi_ttt.parameters import named_groups
from moshi_ttt.whole import whole


class Optimizer:
    """Updates the trainable parameters of a model.

    A parameter that is not float32 has a float32 master that is updated in its place and copied back, so
    that small updates are not lost to rounding.

    Args:
        model: with `requires_grad` set as the run wants it, and sharded if it is to be: the optimiser of a
            sharded model has its shards of masters and moments.
        config: rates and decay.
        max_steps: length of the schedule.
    """

    def __init__(self, model: LMModel, config: OptimConfig, max_steps: int):
        rates = {"base": config.lr, "lora": config.lr, "ttt": config.ttt_lr, "gate": config.gate_lr}
        decays = {"base": config.weight_decay, "lora": config.weight_decay, "ttt": config.ttt_weight_decay}
        members: dict[str, list[nn.Parameter]] = {}
        self.names: dict[nn.Parameter, str] = {}
        for group, name, parameter in named_groups(model):
            if parameter.requires_grad:
                members.setdefault(group, []).append(parameter)
                self.names[parameter] = name
        assert members, "an optimiser needs something to train"
        self.max_norm = config.max_norm
        self.parameters = [p for group in members.values() for p in group]
        self.masters = {p: p.detach().float().clone() for p in self.parameters if p.dtype != torch.float32}
        self.groups = list(members)
        self.adamw = AdamW(
            [
                {
                    "params": [self.masters.get(p, p) for p in group],
                    "lr": rates[name],
                    "weight_decay": decays.get(name, 0.0),
                }
                for name, group in members.items()
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=True,  # one pass over each parameter and its state
        )
        self.schedule = OneCycleLR(
            self.adamw,
            max_lr=[rates[name] for name in members],
            total_steps=max_steps,
            pct_start=_usable_pct_start(config.pct_start, max_steps),
        )

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self) -> torch.Tensor:
        """Scale all gradients down to the configured norm; returns the norm they had."""
        return whole(nn.utils.clip_grad_norm_(self.parameters, self.max_norm))

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters and move the schedule on. Nothing waits for the device."""
        moving = [(p, master) for p, master in self.masters.items() if p.grad is not None]
        for _, master in moving:
            master.grad = torch.empty_like(master)
        _copy([master.grad for _, master in moving], [p.grad for p, _ in moving])
        self.adamw.step()
        for _, master in moving:
            master.grad = None
        _copy([p for p, _ in moving], [master for _, master in moving])
        self.schedule.step()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """All tensors that a step changes, by kind and parameter name, as `{"exp_avg": {NAME: ...}, ...}`.

        Kinds: parameter, master (of parameters that are not float32), step, exp_avg, exp_avg_sq. They are the
        live ones: what is copied into them is what the next step goes on from. Of a sharded model they are
        DTensors: `torch.distributed.checkpoint.save` writes each process's shards, `load` fills them in
        place, also for another number of processes.
        """
        kinds = ("parameter", "master", "step", "exp_avg", "exp_avg_sq")
        found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
        for parameter, name in self.names.items():
            updated = self.masters.get(parameter, parameter)
            state = self.adamw.state[updated]
            if not state:  # as AdamW has it before its first step
                state["step"] = torch.zeros((), device=updated.device)
                state["exp_avg"] = torch.zeros_like(updated, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(updated, requires_grad=False)
            found["parameter"][name] = parameter.detach()
            if updated is not parameter:
                found["master"][name] = updated
            for kind in state:
                found[kind][name] = state[kind]
        return found

    def progress(self) -> int:
        """Steps of the schedule that are done; `tensors()` and this are the whole state.

        Rates and betas follow from it and the settings, so those of another run apply where they may.
        """
        return self.schedule.last_epoch

    def set_progress(self, steps: int) -> None:
        """Go on behind the step at which `progress` returned `steps`."""
        self.schedule.load_state_dict({"last_epoch": steps - 1, "_step_count": steps})
        self.schedule.step()

    def learning_rates(self) -> dict[str, float]:
        """The current rate of each group."""
        return {name: group["lr"] for name, group in zip(self.groups, self.adamw.param_groups, strict=True)}


def _usable_pct_start(pct_start: float, max_steps: int) -> float:
    """OneCycle divides by pct_start x max_steps - 1; where that is 0, the rates rise a little longer."""
    return pct_start + 1e-6 if math.isclose(pct_start * max_steps, 1) else pct_start


def _copy(targets: list[torch.Tensor | None], sources: list[torch.Tensor | None]) -> None:
    """Copy each source to its target, all in a few kernels. What is split is copied shard by shard."""
    if targets:
        torch._foreach_copy_(  # type: ignore[reportPrivateImportUsage]
            [_local(t) for t in targets], [_local(s) for s in sources]
        )


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
