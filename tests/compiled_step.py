"""What `test_pointwise.py` runs where the compiler is on: a step with and without compiled functions.

`python tests/compiled_step.py` prints the largest relative difference of the gradients and the functions that
were compiled without and with `compiled`.
"""

import torch
from moshi.models.lm import LMModel

from finetune.loss import LossModel, LossWeights, weighted_step_targets
from moshi_ttt import pointwise
from moshi_ttt.integration import set_activation_checkpointing
from moshi_ttt.lora import LoRAConfig, apply_lora_to_model
from moshi_ttt.parameters import set_trainable
from moshi_ttt.temporal import Running
from moshi_ttt.tiny_model import LM_CONFIG


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = {"num_layers": 2, "depformer_num_layers": 1}
    model = LMModel(**(LM_CONFIG | small), device="cpu", dtype=torch.float32)
    apply_lora_to_model(model, LoRAConfig(True, 4))
    set_trainable(model, "lora")
    set_activation_checkpointing(model, True)
    codes = torch.randint(0, 256, (1, 17, 8))
    targets = weighted_step_targets(model, codes, None, LossWeights(100.0, 0.5))
    compiled, gradients = [], []
    compile_now = torch.compile

    def counted(function, **settings):
        compiled.append(function.__name__)
        return compile_now(function, **settings)

    torch.compile = counted
    pointwise.torch.compile = counted
    for enable in (False, True):
        model.zero_grad()
        losses, _ = LossModel(model, Running(recomputed=1, compiled=enable))(codes, targets)
        losses.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        print(f"compiled {sorted(set(compiled))}")
    pairs = zip(*gradients, strict=True)
    print(f"difference {max(float((a - b).norm() / a.norm().clamp(min=1e-9)) for a, b in pairs)}")


if __name__ == "__main__":
    main()
