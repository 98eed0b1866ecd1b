"""What a result belongs to: a model is what its files are, wherever they lie and whatever they are called."""

import hashlib
import json
from pathlib import Path
from typing import Any


def checkpoint_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint by the SHA-256 of its files and of its base model's.

    Args:
        manifest: its checkpoint.json.
    """
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return {"kind": "checkpoint", "files_sha256": files, "base_sha256": manifest["base"]["sha256"]}


def baseline_identity(fingerprint: dict[str, str]) -> dict[str, Any]:
    """A Moshi by the SHA-256 of its files (`moshi_ttt.loading.base_fingerprint`)."""
    return {"kind": "baseline", "base_sha256": fingerprint}


def digest_of(identity: dict[str, Any]) -> str:
    """One SHA-256 for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def run_of(checkpoint: str | Path) -> Path | None:
    """The run of a consolidated folder RUN/checkpoints/checkpoint_000500/consolidated; None for a copy."""
    parents = Path(checkpoint).resolve().parents
    in_a_run = len(parents) > 2 and parents[1].name == "checkpoints"
    return parents[2] if in_a_run else None
