"""Which model is scored: a checkpoint or a baseline, and what tells it from others."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from evaluation.model_identity import baseline_identity, checkpoint_identity, run_of
from evaluation.paper_metrics.settings import PaperMetricsConfig
from moshi_ttt.checkpoint import find_checkpoint, load_checkpoint, read_training_config, verify_files
from moshi_ttt.loading import (
    DTYPES,
    ModelConfig,
    base_fingerprint,
    find_base,
    load_mimi,
    load_moshi,
)


@dataclass(frozen=True)
class FoundModel:
    """A model before it is loaded.

    Args:
        name: for folders and tables.
        about: where it is from, for people.
        identity: SHA-256 of all files that decide what it is.
        codec_sha256: of Mimi's weights: models with another codec see other codes.
        dtype: of its parameters when it is scored.
        source: the checkpoint's folder, or the baseline's config.
        verify: cached or full.
    """

    name: str
    about: dict[str, Any]
    identity: dict[str, Any]
    codec_sha256: str
    dtype: str
    source: Path | ModelConfig
    verify: str

    def load(self, device: torch.device) -> tuple[LMModel, MimiModel]:
        """The model in evaluation mode, and its codec."""
        if isinstance(self.source, Path):
            loaded = load_checkpoint(self.source, device, self.verify)
            model, base = loaded.model.to(DTYPES[self.dtype]), loaded.base
        else:
            base = find_base(self.source)
            model = load_moshi(base, device, DTYPES[self.dtype]).eval()
        return model, load_mimi(base, device)


def find_model(config: PaperMetricsConfig) -> FoundModel:
    """Locate and identify the model, without loading it.

    Raises:
        ValueError: there is none, or it is not as it was saved.
    """
    if config.checkpoint is not None:
        return _find_checkpoint(config, find_checkpoint(config.checkpoint))
    assert config.baseline is not None
    source = ModelConfig(config.baseline, config.revision)
    fingerprint = base_fingerprint(find_base(source), config.verify == "full")
    plain = Path(config.baseline).name if Path(config.baseline).is_dir() else config.baseline
    return FoundModel(
        name=re.sub(r"[^\w.-]+", "--", plain),
        about={"baseline": config.baseline, "revision": config.revision},
        identity=baseline_identity(fingerprint),
        codec_sha256=fingerprint["mimi"],
        dtype=config.dtype,
        source=source,
        verify=config.verify,
    )


def _find_checkpoint(config: PaperMetricsConfig, folder: Path) -> FoundModel:
    manifest = verify_files(folder)
    base = manifest["base"]
    named = run_of(folder) or folder.resolve()
    return FoundModel(
        name=f"{named.name}-{manifest['step']:06d}",
        about={
            "checkpoint": str(folder),
            "step": manifest["step"],
            "base": base["source"],
            "param_dtype": read_training_config(folder)["param_dtype"],
        },
        identity=checkpoint_identity(manifest),
        codec_sha256=base["sha256"]["mimi"],
        dtype=config.dtype,
        source=folder,
        verify=config.verify,
    )
