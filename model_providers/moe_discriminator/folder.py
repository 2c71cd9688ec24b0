"""The ``config.json`` of a discriminator folder: that of its dense Qwen3-VL with a section of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.stages.discriminator import SECTION, DiscriminatorConfig, Modality, Routing
from prism_megatron.errors import ConfigError

ARCHITECTURE = "PrismDiscriminator"


def is_discriminator(folder: str | Path) -> bool:
    """Whether a model folder's config has the section of a discriminator. ConfigError where it cannot be read."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    return isinstance(config, dict) and SECTION in config


def read_variant(folder: str | Path) -> Variant:
    """The kind of a saved discriminator. Raises ConfigError when the folder holds none, or a malformed one."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}; give a discriminator folder") from error
    section = config.get(SECTION) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{path} has no section {SECTION!r}: it is not a discriminator (--discriminator takes one)")
    counts = {name: value for name, value in section.items() if name not in {"routing", "modality"}}
    well_formed = (
        section.get("routing") in get_args(Routing)
        and section.get("modality") in get_args(Modality)
        and set(counts) == (set() if section["routing"] == "dense" else {"experts_per_tower", "top_k"})
        and all(type(value) is int for value in counts.values())
    )
    if not well_formed:
        raise ConfigError(
            f"{path}: section {SECTION!r} is {section}, expected a routing of {get_args(Routing)}, a modality of "
            f"{get_args(Modality)} and, unless dense, whole numbers for experts_per_tower and top_k"
        )
    return Variant.of(DiscriminatorConfig(**section))


def write_config(folder: str | Path, *, dense_folder: str | Path, variant: Variant) -> None:
    """Write ``config.json`` into ``folder``: the dense model's, named as a discriminator, with the kind's section."""
    text = config_text((Path(dense_folder) / "config.json").read_text(encoding="utf-8"), variant)
    (Path(folder) / "config.json").write_text(text, encoding="utf-8")


def config_text(dense_config: str | bytes, variant: Variant) -> str:
    """The ``config.json`` of a discriminator upcycled from the model of ``dense_config``."""
    config = json.loads(dense_config)
    config["architectures"] = [ARCHITECTURE]
    config[SECTION] = {"routing": variant.routing, "modality": variant.modality}
    if variant.towers is not None:
        config[SECTION] |= {"experts_per_tower": variant.towers.experts_per_tower, "top_k": variant.towers.top_k}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def check_kind_of(folder: str | Path, wanted: Variant, *, where: str | Path, flag: str = "--discriminator") -> None:
    """Raise ConfigError, with the flags to use, unless ``folder`` has a discriminator of the kind that flags ask for.

    ``where`` is what the user named, by ``flag``.
    """
    held = read_variant(folder)
    if held != wanted:
        raise ConfigError(
            f"{wanted.as_flags()}: the discriminator in {where} is another kind; use {held.as_flags()}, or another "
            f"{flag}"
        )
