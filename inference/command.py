"""From a command line to a typed config."""

from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

Config = TypeVar("Config")


def typed_config(config: DictConfig, kind: type[Config]) -> Config:
    """What Hydra composed, as the dataclass that is its schema.

    Raises:
        ValueError: values without a default are missing.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"missing {', '.join(missing)}; give them as {missing[0]}=VALUE")
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, kind)
    return typed
