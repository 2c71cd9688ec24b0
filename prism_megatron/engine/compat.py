"""Where megatron-core 0.16.1 and 0.19.2 differ for the engine. Models' differences live beside the models."""

from __future__ import annotations

from importlib.metadata import version

MEGATRON_CORE_VERSION = version("megatron-core")
