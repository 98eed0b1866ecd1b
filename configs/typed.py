"""From a command line to a typed config."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

Config = TypeVar("Config")


def typed_config(config: DictConfig, kind: type[Config], unused: Sequence[str] = ()) -> Config:
    """What Hydra composed, as the dataclass that is its schema.

    Args:
        unused: keys that need no value, since nobody will read them.
    Raises:
        ValueError: a value that the user must give is missing, or a key is unknown.
    """
    for key in OmegaConf.missing_keys(config) & set(unused):
        OmegaConf.update(config, key, "")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}; give them as {missing[0]}=VALUE")
    unknown = unknown_keys(config)
    if unknown:
        raise ValueError(f"unknown config keys {', '.join(unknown)}; see --help for those there are")
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, kind)
    return typed


def unknown_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Keys that `+key=value` put beside the fields of a typed config: they would change nothing."""
    kind = OmegaConf.get_type(config)
    if not is_dataclass(kind):  # a dict, whose keys are the user's
        return []
    known = {f.name for f in fields(kind)}
    unknown = [f"{prefix}{key}" for key in config if key not in known]
    for key in known & set(config):
        value = config[key]
        if isinstance(value, DictConfig):
            unknown += unknown_keys(value, f"{prefix}{key}.")
    return sorted(unknown)
