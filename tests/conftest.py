"""What the tests share: no compiler, no network, a cache of their own, and small models."""

import os

# Read when moshi and huggingface_hub are imported.
os.environ["NO_TORCH_COMPILE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined: Triton then interprets it on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from moshi.modules.transformer import RingKVCache

from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.config import TTTConfig
from moshi_ttt.kernels.choice import forced
from moshi_ttt.kernels.native_build import compiler
from moshi_ttt.loading import ModelConfig, find_base
from moshi_ttt.lora import LoRAConfig
from moshi_ttt.parameters import named_groups
from moshi_ttt.ttt_layer import TTTWrapper

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tiny model is made afresh: what lies in the user's cache decides no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSHI_TTT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_base(private_cache: None) -> CheckpointInfo:
    return find_base(ModelConfig("tiny"))


@pytest.fixture
def build(tiny_base: CheckpointInfo) -> Callable[..., LMModel]:
    """Builds a tiny hybrid model: TTT settings by name, with a gate open enough to show what TTT does."""

    def build(param_dtype: str = "float32", lora: LoRAConfig | None = None, **ttt: Any) -> LMModel:
        config = TTTConfig(**{"layers": "1,2", "mini_batch_size": 4, "gate_init": 0.5} | ttt)
        settings = ModelSettings(ModelConfig("tiny"), param_dtype, lora or LoRAConfig(), config)
        return build_model(settings, tiny_base)

    return build


@pytest.fixture
def ttt_layer() -> Callable[..., TTTWrapper]:
    """Builds a small TTT layer (2 heads of 16) that is not at its initial values."""

    def ttt_layer(**settings: Any) -> TTTWrapper:
        layer = TTTWrapper(32, 2, TTTConfig(**settings))
        # Biases start as 0 and norms as 1, where something left out would not show.
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return layer

    return ttt_layer


@pytest.fixture(params=["eager", "native"])
def each_cpu_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs with the inner loop in torch's operations, and again with the one in C++."""
    if request.param == "native" and compiler() is None:
        pytest.skip("no C++ compiler: g++ is missing")
    with forced(request.param):
        yield


@pytest.fixture
def perturb() -> Callable[..., LMModel]:
    """Moves parameters off their initial values, as training does: all, or those of the groups named."""

    @torch.no_grad()
    def perturb(model: LMModel, *groups: str) -> LMModel:
        for group, _, parameter in named_groups(model):
            if not groups or group in groups:
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    return perturb


@pytest.fixture
def random_codes() -> Callable[..., torch.Tensor]:
    """Draws codes `[B, 17, T]` for the tiny model: text, 8 of Moshi's codebooks, 8 of the user's."""

    def random_codes(batch_size: int, frames: int) -> torch.Tensor:
        return torch.randint(0, 256, (batch_size, 17, frames))

    return random_codes


@pytest.fixture
def streaming_tensors() -> Callable[[LMModel], dict[str, torch.Tensor]]:
    """Reads every tensor of a model's streaming state, by name."""

    def walk(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                yield from walk(f"{name}.{index}", item)
        elif is_dataclass(value) or isinstance(value, RingKVCache):
            for key, item in vars(value).items():
                yield from walk(f"{name}.{key}", item)

    def streaming_tensors(model: LMModel) -> dict[str, torch.Tensor]:
        states = model.get_streaming_state().items()
        return {key: tensor for name, state in states for key, tensor in walk(name, state)}

    return streaming_tensors


@pytest.fixture
def trained(tiny_base, perturb):
    """Builds a model whose LoRA and TTT parameters are not the initial ones."""
    return lambda settings: perturb(build_model(settings, tiny_base), "lora", "ttt", "gate")
