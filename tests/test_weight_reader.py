"""Weights read tensor by tensor are those that `build_model` loads, whatever names their files use."""

import shutil
from dataclasses import asdict, replace

import pytest
import torch
from moshi.models.loaders import MOSHI_NAME
from safetensors.torch import load_file, save_file
from test_distributed import free_port
from training import TINY, start_python

from finetune.sharded_build import outline
from moshi_ttt.building import ModelSettings, WeightFiles, build_model
from moshi_ttt.checkpoint import save_checkpoint, weight_paths
from moshi_ttt.config import TTTConfig
from moshi_ttt.loading import ModelConfig
from moshi_ttt.lora import LoRAConfig
from moshi_ttt.tiny_model import tiny_model_folder
from moshi_ttt.weight_reader import open_weights, plain_name

SETTINGS = ModelSettings(
    ModelConfig("tiny"),
    "float32",
    LoRAConfig(enable=True, rank=4),
    TTTConfig(layers="1,2", mini_batch_size=4),
)


@pytest.fixture
def split_names(tiny_base, tmp_path):
    """The tiny base model under the names that the live model has, where the tiny one has the hub's."""
    plain = build_model(
        ModelSettings(ModelConfig("tiny"), "bfloat16", ttt=TTTConfig(enable=False)), tiny_base
    )
    path = tmp_path / "split.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, path)
    assert load_file(path).keys() != load_file(tiny_base.moshi_weights).keys()
    return path


def read_all(base, files, settings=SETTINGS):
    meta = outline(settings, base)
    with open_weights(meta, base, files) as reader:
        reader.check(meta)
        return {name: reader.read(name) for name, _ in meta.named_parameters() if reader.has(name)}


def test_base_weights_are_found_under_both_kinds_of_names(tiny_base, split_names):
    live = dict(build_model(SETTINGS, tiny_base).named_parameters())
    for files in (WeightFiles(), WeightFiles(base=split_names)):
        read = read_all(tiny_base, files)
        # What is new is in no file.
        assert {name for name in live if ".lora_" not in name and ".seq_modeling_block." not in name} == set(
            read
        )
        for name, tensor in read.items():
            assert tensor.shape == live[name].shape
            assert torch.equal(tensor.float(), live[name])


def test_weights_of_a_checkpoint_are_read(tiny_base, perturb, tmp_path):
    model = perturb(build_model(SETTINGS, tiny_base))
    folder = save_checkpoint(tmp_path, 1, model, asdict(SETTINGS), tiny_base, save_base=True)
    read = read_all(tiny_base, weight_paths(folder))
    live = dict(model.named_parameters())
    assert read.keys() == live.keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in read.items())


def test_files_that_do_not_fit_are_refused(tiny_base, split_names, tmp_path):
    state = load_file(split_names)
    some = "transformer.layers.1.norm1.alpha"

    def refused(changed, message):
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match=message):
            read_all(tiny_base, WeightFiles(base=tmp_path / "changed.safetensors"))

    refused({k: v for k, v in state.items() if k != some}, f"base weights .* 1 tensors missing .*{some}")
    refused(state | {"more": torch.zeros(1)}, r"0 tensors missing \[\], 1 unexpected \['more'\]")
    refused(state | {some: torch.zeros(1, 1, 3)}, rf"{some} has shape \[1, 1, 3\], the settings make it")
    other = replace(SETTINGS, lora=LoRAConfig(enable=True, rank=8))
    model = build_model(SETTINGS, tiny_base)
    folder = save_checkpoint(tmp_path, 1, model, asdict(SETTINGS), tiny_base, save_base=False)
    with pytest.raises(ValueError, match="lora weights: .* has shape .*; load it with the settings it was"):
        read_all(tiny_base, weight_paths(folder), other)
    pickled = tmp_path / "weights.bin"
    pickled.write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.bin is not safetensors; pickled weights are not loaded"):
        read_all(tiny_base, WeightFiles(base=pickled))


def test_a_name_in_plain_moshi():
    name = "transformer.layers.1.original_layer.self_attn.in_projs.0.frozen_W.weight"
    assert plain_name(name) == "transformer.layers.1.self_attn.in_projs.0.weight"


def test_every_process_says_what_is_wrong_with_the_weights(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder(), folder)
    path = folder / MOSHI_NAME
    state = load_file(path)
    save_file({name: tensor for name, tensor in state.items() if name != "out_norm.alpha"}, path)
    process = start_python(
        *("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"),
        *("-m", "finetune.train", *TINY, f"run_dir={tmp_path / 'run'}", f"model.source={folder}"),
    )
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert printed.count("ValueError: the base weights do not fit the settings: 1 tensors missing") == 2
    assert not (tmp_path / "run").exists()
