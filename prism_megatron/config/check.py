"""The configurations of ``prism-convert check`` and ``inspect``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class CheckConfig:
    """Are two folders equal, tensor by tensor and bit by bit? Exit status 1 where they are not."""

    a: tyro.conf.Positional[str] = ""
    """run folder, checkpoint, model folder or hub id"""
    b: tyro.conf.Positional[str] = ""
    """run folder, checkpoint, model folder or hub id"""
    role: Literal["policy", "discriminator"] | None = None
    """whose weights of a checkpoint are held against a model folder; by default the only role's, or the policy's"""
    json: bool = False
    """print every tensor's hash, as JSON"""


@dataclass(frozen=True)
class InspectConfig:
    """What a model folder or a checkpoint holds; no tensor is read."""

    folder: tyro.conf.Positional[str] = ""
    """run folder, checkpoint, model folder or hub id"""
    tensors: bool = False
    """list every tensor"""
    json: bool = False
    """print it as JSON"""
