"""The ``config.json`` of a discriminator folder: that of its dense Qwen3-VL with a section of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.errors import ConfigError

SECTION = "prism_discriminator"
ARCHITECTURE = "PrismDiscriminator"


def is_discriminator(folder: str | Path) -> bool:
    """Whether a model folder's config has the section of a discriminator. ConfigError where it cannot be read."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    return isinstance(config, dict) and SECTION in config


def read_towers(folder: str | Path) -> Towers:
    """The towers of a saved discriminator. Raises ConfigError when the folder holds none, or a malformed one."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}; give a discriminator folder") from error
    section = config.get(SECTION) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{path} has no section {SECTION!r}: it is not a discriminator (--discriminator takes one)")
    wanted = {field.name for field in dataclasses.fields(Towers)}
    if set(section) != wanted or not all(type(value) is int for value in section.values()):
        raise ConfigError(f"{path}: section {SECTION!r} is {section}, expected integers for {sorted(wanted)}")
    return Towers(**section)


def write_config(folder: str | Path, *, dense_folder: str | Path, towers: Towers) -> None:
    """Write ``config.json`` into ``folder``: the dense model's, named as a discriminator, with the towers' section."""
    text = config_text((Path(dense_folder) / "config.json").read_text(encoding="utf-8"), towers)
    (Path(folder) / "config.json").write_text(text, encoding="utf-8")


def config_text(dense_config: str | bytes, towers: Towers) -> str:
    """The ``config.json`` of a discriminator upcycled from the model of ``dense_config``."""
    config = json.loads(dense_config)
    config["architectures"] = [ARCHITECTURE]
    config[SECTION] = dataclasses.asdict(towers)
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
