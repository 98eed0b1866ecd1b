"""The README.md of a hub repository, filled from the training config."""

from typing import Any

import yaml

LICENSE = "cc-by-4.0"  # of Kyutai's weights, which these are made of


def model_card(training: dict[str, Any], manifest: dict[str, Any], repo: str | None, has_ttt: bool) -> str:
    """Markdown with the hub's metadata.

    Args:
        training: the config to publish.
        manifest: of the checkpoint.
        repo: where it goes, if known.
        has_ttt: whether the model has TTT layers.
    """
    base = training["model"]["source"]
    tags = ["moshi", "speech-to-speech", "full-duplex", *(["test-time-training"] if has_ttt else [])]
    front: dict[str, Any] = {"license": LICENSE, "tags": tags, "pipeline_tag": "audio-to-audio"}
    if "/" in base:
        front["base_model"] = base
    name = repo or "FOLDER"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name.split('/')[-1]}",
        _what(base, has_ttt, manifest["step"]),
        "## Use\n\n" + _use(name, repo is not None, has_ttt),
        "## Training\n\n" + _table(training),
        "## Files of the base model, by SHA-256\n\n"
        + "\n".join(f"- {file}: `{digest}`" for file, digest in manifest["base"]["sha256"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _what(base: str, has_ttt: bool, step: int) -> str:
    layers = (
        "Some of its transformer layers are hybrid: a short attention window is followed by a "
        "Test-Time-Training layer, a small network that goes on learning while the model listens and speaks. "
        if has_ttt
        else ""
    )
    return (
        f"Moshi, fine-tuned from {base} with moshi-ttt ({step} steps). {layers}Any LoRA is merged into the "
        "weights. No result is claimed here; evaluate it with `python -m evaluation.paper_metrics`."
    )


def _use(name: str, on_hub: bool, has_ttt: bool) -> str:
    if not has_ttt:
        if on_hub:
            return f"```\npython -m moshi.server --hf-repo {name}\n```"
        return (
            f"```\npython -m moshi.server --config-path {name}/config.json "
            f"--moshi-weight {name}/model.safetensors ...\n```"
        )
    fetch = f"python -m inference.export fetch={name} output=model\n" if on_hub else ""
    folder = "model" if on_hub else name
    return (
        f"```\n{fetch}python -m inference.generate checkpoint={folder} input=question.wav output=answer.wav\n"
        "```\n\nThe moshi package cannot run it: it has no TTT layers."
    )


def _table(training: dict[str, Any]) -> str:
    sections = (
        "mode",
        "ttt",
        "trained_lora",
        "optim",
        "duration_sec",
        "batch_size",
        "max_steps",
        "param_dtype",
    )
    rows = []
    for section in sections:
        value = training.get(section)
        if isinstance(value, dict):
            rows += [(f"{section}.{key}", item) for key, item in value.items()]
        elif value is not None:
            rows.append((section, value))
    lines = "\n".join(f"| {key} | {item} |" for key, item in rows)
    return f"| setting | value |\n|---|---|\n{lines}"
