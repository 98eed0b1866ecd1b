"""Settings with LoRA, and what two models are compared by."""

import torch

from moshi_ttt.building import ModelSettings
from moshi_ttt.config import TTTConfig
from moshi_ttt.loading import ModelConfig
from moshi_ttt.lora import LoRAConfig

LORA = LoRAConfig(enable=True, rank=4, scaling=3.0)
PLAIN = TTTConfig(enable=False)
TTT = TTTConfig(layers="1,2", mini_batch_size=4, gate_init=0.5)


def settings_of(lora=LORA, ttt=PLAIN):
    return ModelSettings(ModelConfig("tiny"), "float32", lora, ttt)


@torch.no_grad()
def logits(model):
    torch.manual_seed(3)
    out = model(torch.randint(0, 256, (1, 17, 9)))
    return torch.cat((out.logits.nan_to_num().flatten(), out.text_logits.flatten()))
