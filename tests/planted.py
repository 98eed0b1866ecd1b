"""A Moshi whose likelihood is known in closed form, on disk in the hub's layout.

Nothing but the embedding of Moshi's own semantic codebook reaches its logits, layers pass it on as it is. So
the distribution of codebook k depends on one semantic code alone, by a table: on the last frame's for the
semantic codebook, on the same frame's for the acoustic ones, which are a frame late.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import MOSHI_NAME
from safetensors.torch import save_file

from moshi_ttt.loading import ModelConfig, find_base, load_moshi
from moshi_ttt.tiny_model import hub_key_names, tiny_model_folder

# Of outputs that are added to the residual stream.
SILENT = ("out_projs", "linear_out", "text_emb.", "depformer_emb.", "depformer_text_emb.")


def load(folder: Path) -> LMModel:
    return load_moshi(find_base(ModelConfig(str(folder))), "cpu", torch.float32).eval()


@torch.no_grad()
def write_planted(folder: Path) -> Path:
    """Write the model; returns the folder."""
    shutil.copytree(tiny_model_folder(), folder)
    model = load(folder)
    for name, parameter in model.named_parameters():
        if any(part in name for part in SILENT):
            parameter.zero_()
    for number, embedding in enumerate(model.emb):
        embedding.weight.normal_() if number == 0 else embedding.weight.zero_()
    for linear in model.linears:
        linear.weight.mul_(3)  # sharper distributions: scores are far apart
    save_file(hub_key_names(model.state_dict()), folder / MOSHI_NAME)
    return folder


def tables(model: LMModel) -> np.ndarray:
    """Log-probabilities `[codebook, semantic code read, code]`; the last code read is the initial one."""
    embedding = _array(model.emb[0].weight)
    scale = np.sqrt((embedding**2).mean(1, keepdims=True) + model.out_norm.eps)
    normed = embedding / scale * _array(model.out_norm.alpha).reshape(-1)
    found = []
    for k in range(model.dep_q):
        logits = normed @ _array(model.depformer_in[k].weight).T @ _array(model.linears[k].weight).T
        found.append(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    return np.stack(found)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def known_nll(model: LMModel, codes: torch.Tensor) -> np.ndarray:
    """The NLL of a clip `[17, T]`: `[T, dep_q]`, NaN for acoustic codes of the last frame."""
    own = codes[1 : 1 + model.dep_q].numpy()
    read = np.concatenate(([model.initial_token_id], own[0]))
    table = tables(model)
    nll = np.full(own.T.shape, np.nan)
    nll[:, 0] = -table[0, read[:-1], own[0]]
    for k in range(1, model.dep_q):
        nll[:-1, k] = -table[k, own[0][:-1], own[k][:-1]]
    return nll


def known_score(nll: np.ndarray) -> float:
    """Minus the mean, the semantic codebook 100 times."""
    weights = np.where(np.isnan(nll), 0, 1) * np.array([100] + [1] * (nll.shape[1] - 1))
    return -float((np.nan_to_num(nll) * weights).sum() / weights.sum())
