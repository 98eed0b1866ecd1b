"""Base models load from the hub's cache and from folders, in both key styles, and nothing else loads."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
import torch
from moshi.models.loaders import MIMI_NAME, MOSHI_NAME, TEXT_TOKENIZER_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moshi_ttt.digest import cached_sha256
from moshi_ttt.loading import (
    ModelConfig,
    base_fingerprint,
    find_base,
    load_mimi,
    load_moshi,
    load_tokenizer,
    refuse_other_models,
)
from moshi_ttt.tiny_model import write_tiny_model

REPO = "kyutai/moshiko-pytorch-bf16"
DIALOGUE = Path(__file__).parents[1] / "sample_data/audio/dialogue_1.flac"


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy of the tiny model's folder, to change."""
    return shutil.copytree(tiny_base.moshi_weights.parent, tmp_path / "model")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def logits(base, codes):
    with torch.no_grad():
        return load_moshi(base, "cpu", torch.float32)(codes)


def assert_same_logits(a, b):
    for name in ("logits", "text_logits"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)


def test_the_published_repo_id_loads_from_the_hubs_cache_without_a_network(
    tiny_base, folder, random_codes, tmp_path, monkeypatch
):
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo, commit = tmp_path / "hub/models--kyutai--moshiko-pytorch-bf16", "0123456789abcdef" * 2 + "01234567"
    snapshot = repo / "snapshots" / commit
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(folder, snapshot)
    for revision in (None, "main", commit):
        base = find_base(ModelConfig(REPO, revision))
        assert Path(base.moshi_weights).parent == snapshot
    codes = random_codes(1, 8)
    assert_same_logits(logits(base, codes), logits(tiny_base, codes))
    assert base_fingerprint(base) == base_fingerprint(tiny_base)


def test_a_folder_loads_what_the_tiny_model_is(tiny_base, folder, random_codes):
    base = find_base(ModelConfig(str(folder)))
    assert base.moshi_weights == folder / MOSHI_NAME
    codes = random_codes(1, 8)
    assert_same_logits(logits(base, codes), logits(tiny_base, codes))


@pytest.mark.parametrize("name", [MOSHI_NAME, MIMI_NAME])
def test_stored_files_have_the_key_names_of_published_checkpoints(folder, name):
    with safe_open(folder / name, "pt") as file:
        keys = list(file.keys())
    assert any(key.endswith(".self_attn.in_proj_weight") for key in keys)
    assert any(key.endswith(".self_attn.out_proj.weight") for key in keys)
    assert not any("in_projs" in key or "out_projs" in key for key in keys)


def test_new_key_names_load_too(tiny_base, folder, random_codes):
    mimi = load_mimi(tiny_base, "cpu")
    moshi = load_moshi(tiny_base, "cpu", torch.bfloat16)
    for name, model in ((MOSHI_NAME, moshi), (MIMI_NAME, mimi)):
        state = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
        assert any("in_projs.0.weight" in key for key in state)
        save_file(state, folder / name)
    base = find_base(ModelConfig(str(folder)))
    codes = random_codes(1, 8)
    assert_same_logits(logits(base, codes), logits(tiny_base, codes))
    audio = torch.randn(1, 1, 24000)
    assert torch.equal(load_mimi(base, "cpu").encode(audio), mimi.encode(audio))


def test_each_weight_of_the_stored_model_is_in_the_loaded_one(tiny_base):
    stored = load_file(tiny_base.moshi_weights)
    live = load_moshi(tiny_base, "cpu", torch.bfloat16).state_dict()
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in live.values())
    assert torch.equal(live["text_emb.weight"], stored["text_emb.weight"])
    joined = stored["depformer.layers.0.self_attn.in_proj_weight"]
    parts = [live[f"depformer.layers.0.self_attn.in_projs.{i}.weight"] for i in range(8)]
    assert torch.equal(torch.cat(parts), joined)


@pytest.mark.parametrize("name", [MOSHI_NAME, MIMI_NAME, TEXT_TOKENIZER_NAME, "mimi_config.json"])
def test_a_folder_that_lacks_a_file_is_an_error_that_names_it(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"lacks the file {name}"):
        find_base(ModelConfig(str(folder)))


def test_a_folder_without_any_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} lacks the file {MOSHI_NAME}"):
        find_base(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("source", ["no/such/folder", "/nowhere", "moshi", "a b/c"])
def test_a_source_that_is_nothing_is_an_error_that_says_what_is_expected(source):
    with pytest.raises(ValueError, match="no folder here and no hub repository id; expected"):
        find_base(ModelConfig(source))


def test_a_revision_of_a_folder_is_an_error(folder):
    with pytest.raises(ValueError, match="model.revision='main' has no meaning for the folder"):
        find_base(ModelConfig(str(folder), "main"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_pickled_weights_are_not_loaded(folder):
    torch.save({}, folder / "weights.pt")
    change_config(folder, moshi_name="weights.pt", mimi_name="weights.pt")
    base = find_base(ModelConfig(str(folder)))
    with pytest.raises(ValueError, match="weights.pt is not safetensors; pickled weights are not loaded"):
        load_moshi(base, "cpu", torch.float32)
    with pytest.raises(ValueError, match="weights.pt is not safetensors; pickled weights are not loaded"):
        load_mimi(base, "cpu")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "{parent}/secret.safetensors"])
def test_a_config_cannot_name_files_outside_its_folder(folder, outside):
    shutil.copy(folder / MOSHI_NAME, folder.parent / "secret.safetensors")
    change_config(folder, moshi_name=outside.format(parent=folder.parent))
    with pytest.raises(ValueError, match="outside the model's folder"):
        find_base(ModelConfig(str(folder)))


def test_a_model_without_audio_output_is_refused(tiny_base):
    model = load_moshi(tiny_base, "cpu", torch.float32)
    model.depformer = None
    with pytest.raises(ValueError, match="not a Moshi dialogue model"):
        refuse_other_models(model)


def test_the_tokenizer_has_moshis_special_tokens_and_spells_any_text(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    model = load_moshi(tiny_base, "cpu", torch.float32)
    assert tokenizer.vocab_size() == model.text_card
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert tokenizer.pad_id() == model.text_padding_token_id == 3
    for text in ("good morning, how are you?", "Zwölf Boxkämpfer 42"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@torch.no_grad()
def test_mimis_codes_of_real_speech_are_varied(tiny_base):
    audio, rate = soundfile.read(DIALOGUE, dtype="float32", always_2d=True)
    mimi = load_mimi(tiny_base, "cpu")
    assert rate == mimi.sample_rate == 24000
    for channel in range(2):
        voiced = torch.from_numpy(np.ascontiguousarray(audio[:, channel]))
        codes = mimi.encode(voiced[None, None])[0]
        assert codes.shape[0] == 8
        assert 0 <= codes.min() <= codes.max() < 256
        assert [len(codebook.unique()) >= 15 for codebook in codes] == [True] * 8
        assert mimi.decode(codes[None]).isfinite().all()


def test_mimi_is_frozen(tiny_base):
    mimi = load_mimi(tiny_base, "cpu")
    assert not mimi.training
    assert not any(parameter.requires_grad for parameter in mimi.parameters())


def test_the_tiny_model_is_the_same_files_whatever_was_drawn_before(tiny_base, tmp_path):
    expected = digests(tiny_base.moshi_weights.parent)
    assert len(expected) == 5
    torch.manual_seed(1234)
    random.seed(1234)
    before = torch.random.get_rng_state()
    write_tiny_model(tmp_path)
    assert digests(tmp_path) == expected
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_tiny_model_is_the_same_files_whatever_the_number_of_threads(tiny_base, tmp_path):
    # A checkpoint is refused on a host where the base model's files differ.
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads)
    try:
        write_tiny_model(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert digests(tmp_path) == digests(tiny_base.moshi_weights.parent)


def test_a_remembered_digest_is_read_again_when_the_file_changes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert cached_sha256(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"three")
    assert cached_sha256(file) == hashlib.sha256(b"three").hexdigest()
