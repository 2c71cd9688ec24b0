"""How a set of records is stored, and how its records become conversations. docs/data.md shows every format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from prism_megatron.config.fields import ExistingFolder, OnResume

FormatName = Literal["ours", "sharegpt", "columns", "verl", "prism", "webdataset", "energon"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)


@dataclass(frozen=True)
class FormatConfig:
    """How a set is read."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    format: FormatName | None = None
    """how the set is stored; by default what is there says it"""
    plain_answers: bool = False
    """learn the answer alone where a record has no caption or no solution; off: such a record is malformed"""
    columns: tuple[str, ...] = ()
    """where a set's names differ from the usual ones: question=problem image=picture"""
    images: Annotated[Path | None, ExistingFolder()] = None
    """folder that paths of images start from; by default the set's own"""
    split: str = "train"
    """part to read where a set names its parts (Energon's split.yaml, train-00000-of-00002.parquet); all: every one"""
