"""A small Moshi, Mimi and tokenizer with random weights, on disk in the hub's layout and key names.

Everything that loads the real models loads these by the same code. Weights come from a fixed seed and are
made on one thread, so the same torch release on the same kind of processor makes the same files.
"""

import json
import math
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import MIMI_NAME, MOSHI_NAME, TEXT_TOKENIZER_NAME, get_mimi, get_moshi_lm
from safetensors.torch import save_file

from moshi_ttt.digest import cache_folder

TINY_VERSION = 1
_SEED = 20240917
_MIMI_CONFIG_NAME = "mimi_config.json"

LM_CONFIG: dict[str, Any] = {
    "dim": 128,
    "text_card": 352,
    "existing_text_padding_id": 3,
    "n_q": 16,
    "dep_q": 8,
    "card": 256,
    "num_heads": 4,
    "num_layers": 4,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 250,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 64,
    "depformer_dim_feedforward": 264,
    "depformer_num_heads": 4,
    "depformer_num_layers": 2,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}

_MIMI_WIDTH = 64

MIMI_CONFIG: dict[str, Any] = {
    "sample_rate": 24000,
    "channels": 1,
    "frame_rate": 12.5,
    "seanet": {
        "channels": 1,
        "dimension": _MIMI_WIDTH,
        "causal": True,
        "n_filters": 4,
        "n_residual_layers": 1,
        "activation": "ELU",
        "compress": 2,
        "dilation_base": 2,
        "disable_norm_outer_blocks": 0,
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 3,
        "norm": "none",
        "pad_mode": "constant",
        "ratios": [8, 6, 5, 4],
        "true_skip": True,
    },
    "quantizer": {
        "dimension": 32,
        "n_q": 8,
        "bins": LM_CONFIG["card"],
        "input_dimension": _MIMI_WIDTH,
        "output_dimension": _MIMI_WIDTH,
    },
    "transformer": {
        "d_model": _MIMI_WIDTH,
        "num_heads": 4,
        "num_layers": 2,
        "causal": True,
        "layer_scale": 0.01,
        "context": 250,
        "conv_layout": True,
        "max_period": 10000,
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "dim_feedforward": 128,
        "input_dimension": _MIMI_WIDTH,
        "output_dimensions": [_MIMI_WIDTH],
    },
}

# Enough English to train a small vocabulary on; every other character falls back to bytes.
_TOKENIZER_TEXT = """
good morning how are you today i am very well thank you and you
what would you like to talk about we could speak of the weather or of books that you have read
i think that it is going to rain this afternoon but tomorrow should be a fine day
he said that she had been there before and that they would come back again next year
do you remember where we were last summer yes it was a small house near the sea
there is nothing better than a long walk in the woods with an old friend
please tell me more about your work and your family if you have the time
no i do not know his name but i have seen him many times in this street
the children were playing in the garden while their mother was reading a letter
could you say that again a little more slowly i did not hear the last word
of course it may take some time but we will find an answer to your question
when the train arrived the people who had been waiting for hours began to laugh
"""


def tiny_model_folder() -> Path:
    """Folder of the tiny model in the cache, made on first use."""
    folder = cache_folder() / f"tiny-{TINY_VERSION}-torch-{torch.__version__}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp.tiny."))
        _write_alone(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster; its files are the same
            shutil.rmtree(temporary)
            if not folder.is_dir():
                raise
    return folder


def _write_alone(folder: Path) -> None:
    """Write the model, in a process of its own where this one is in a process group.

    Moshi's k-means gathers from all processes of a group: the files would depend on their number, and those
    who make them would wait for those who find them made.
    """
    if not torch.distributed.is_initialized():
        write_tiny_model(folder)
        return
    process = multiprocessing.get_context("spawn").Process(target=write_tiny_model, args=(folder,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the tiny model could not be written: exit code {process.exitcode}, see above")


def write_tiny_model(folder: Path) -> None:
    """Write config.json, Moshi, Mimi and the tokenizer to an existing folder."""
    with torch.random.fork_rng(devices=[]), _one_thread():  # sums depend on how they are split over threads
        torch.manual_seed(_SEED)
        moshi = get_moshi_lm(None, lm_kwargs=LM_CONFIG, device="cpu", dtype=torch.float32)
        mimi = get_mimi(None, MIMI_CONFIG, num_codebooks=MIMI_CONFIG["quantizer"]["n_q"])
        _fill_codebooks(mimi)
    _save(moshi, folder / MOSHI_NAME, torch.bfloat16)
    _save(mimi, folder / MIMI_NAME, torch.float32)
    _train_tokenizer(folder / TEXT_TOKENIZER_NAME)
    (folder / _MIMI_CONFIG_NAME).write_text(json.dumps(MIMI_CONFIG, indent=2))
    names = {
        "model_type": "moshi",
        "moshi_name": MOSHI_NAME,
        "mimi_name": MIMI_NAME,
        "mimi_config_name": _MIMI_CONFIG_NAME,
        "tokenizer_name": TEXT_TOKENIZER_NAME,
    }
    (folder / "config.json").write_text(json.dumps(LM_CONFIG | names, indent=2))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def hub_key_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename attention weights to the names that Kyutai's published checkpoints have.

    `in_projs.{i}.weight` of all steps are joined to `in_proj_weight`, `out_projs.{i}.weight` to
    `out_proj.weight`.
    """
    joined: dict[str, list[torch.Tensor]] = {}
    renamed = {}
    for name, tensor in state.items():
        for new, old in ((".in_projs.", ".in_proj_weight"), (".out_projs.", ".out_proj.weight")):
            if new in name:
                joined.setdefault(name.split(new)[0] + old, []).append(tensor)
                break
        else:
            renamed[name] = tensor
    return renamed | {name: torch.cat(parts) for name, parts in joined.items()}


def _save(model: LMModel | MimiModel, path: Path, dtype: torch.dtype) -> None:
    state = {
        name: tensor.to(dtype).contiguous() for name, tensor in hub_key_names(model.state_dict()).items()
    }
    save_file(state, path)


@torch.no_grad()
def _fill_codebooks(mimi: MimiModel) -> None:
    """Give the quantizer codebooks that fit its random encoder, by Moshi's own k-means.

    Without this every code is 0.
    """
    latent = mimi._encode_to_unquantized_latent(_speech_like_audio(120.0, mimi.sample_rate))
    mimi.quantizer.train()
    for _ in range(mimi.total_codebooks):  # each pass initialises the next level on the residuals
        mimi.quantizer(latent, mimi.frame_rate)
    mimi.quantizer.eval()


def _speech_like_audio(duration_sec: float, sample_rate: int) -> torch.Tensor:
    """Voiced syllables of gliding pitch, hisses and pauses, `[1, 1, samples]`."""
    pieces = []
    remaining = int(duration_sec * sample_rate)
    while remaining > 0:
        length = min(remaining, int(sample_rate * (0.08 + 0.3 * torch.rand(()).item())))
        time = torch.arange(length) / sample_rate
        envelope = torch.sin(math.pi * torch.arange(length) / length)
        kind = torch.rand(()).item()
        if kind < 0.65:
            glide = 80 + 220 * torch.rand(()) + 120 * (torch.rand(()) - 0.5) * time / time[-1]
            phase = 2 * math.pi * torch.cumsum(glide / sample_rate, 0)
            formant = 300 + 2500 * torch.rand(2)
            piece = torch.zeros(length)
            for harmonic in range(1, 20):
                distance = (harmonic * glide - formant[:, None]) / 250
                piece += torch.exp(-distance.square()).sum(0) * torch.sin(harmonic * phase)
            piece *= 0.25
        elif kind < 0.85:
            piece = 0.1 * torch.randn(length)
        else:
            piece = 0.001 * torch.randn(length)
        pieces.append(piece * envelope * (0.2 + 0.8 * torch.rand(()).item()))
        remaining -= length
    return torch.cat(pieces)[None, None]


def _train_tokenizer(path: Path) -> None:
    """A SentencePiece model with Moshi's special tokens: 0 unknown, 1 start, 2 end, 3 padding."""
    sentences = [line for line in _TOKENIZER_TEXT.splitlines() if line]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=LM_CONFIG["text_card"],
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            user_defined_symbols=["\n"],
            num_threads=1,
            minloglevel=2,
        )
