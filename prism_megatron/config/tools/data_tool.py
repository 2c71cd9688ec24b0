"""The configurations of ``prism-data``, one for each of its commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from prism_megatron.config.fields import AT_LEAST_ONE, SHARE
from prism_megatron.config.formats import FormatConfig

OnBad = Literal["fail", "skip"]
Target = Literal["ours", "webdataset", "energon"]


@dataclass(frozen=True)
class CheckSetConfig:
    """Is every record of a set one that can be learned? Names each bad one; exit status 2 where there are any."""

    path: tyro.conf.Positional[str] = ""
    """file or folder of records"""
    reading: tyro.conf.OmitArgPrefixes[FormatConfig] = field(default_factory=FormatConfig)
    on_bad: OnBad = "fail"
    """fail: exit status 2 where there are bad records; skip: they are named and counted, and the status is 0"""
    decode: bool = False
    """read every pixel too, not only the headers of images"""
    require_tags: bool = False
    """a response without the three tags is a bad record"""
    validation_share: Annotated[float, SHARE] = 0.1
    """share of the records that is held out, for the counts of both parts"""


@dataclass(frozen=True)
class SetStatsConfig:
    """How many tokens the records of a set have, how large its images are, and where its records come from."""

    path: tyro.conf.Positional[str] = ""
    """file or folder of records"""
    reading: tyro.conf.OmitArgPrefixes[FormatConfig] = field(default_factory=FormatConfig)
    model: str | None = None
    """model folder, run folder, checkpoint or hub id, whose tokenizer and image settings count"""
    system_prompt: str | None = None
    """system message of records that have none of their own"""
    min_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """smaller images are enlarged to this area; by default the model's own limit"""
    max_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """larger images are shrunk to this area; by default the model's own limit"""
    on_bad: OnBad = "fail"
    """fail: exit status 2 where there are bad records; skip: they are counted, and the status is 0"""


@dataclass(frozen=True)
class ConvertSetConfig:
    """Write a set in another form."""

    source: tyro.conf.Positional[str] = ""
    """file or folder of records"""
    target: tyro.conf.Positional[str] = ""
    """folder to write, which must not be there yet"""
    reading: tyro.conf.OmitArgPrefixes[FormatConfig] = field(default_factory=FormatConfig)
    to: Target = "webdataset"
    """ours: data.jsonl, one question and one image a record; webdataset: tars; energon: tars with .nv-meta"""
    records_per_shard: Annotated[int, AT_LEAST_ONE] = 1000
    """of tars"""
    on_bad: OnBad = "fail"
    """fail: the first bad record ends it and nothing is written; skip: bad records are named, counted and left out"""
    drop_system: bool = False
    """leave system messages out, which ours has no field for; a run's --system-prompt stands in their place"""


@dataclass(frozen=True)
class ShardSetConfig:
    """Write a set as WebDataset shards with Energon's metadata, for reading in any order."""

    source: tyro.conf.Positional[str] = ""
    """file or folder of records"""
    target: tyro.conf.Positional[str] = ""
    """folder to write, which must not be there yet"""
    reading: tyro.conf.OmitArgPrefixes[FormatConfig] = field(default_factory=FormatConfig)
    records_per_shard: Annotated[int, AT_LEAST_ONE] = 1000
    """records in one tar"""
    validation_share: Annotated[float, SHARE] = 0.0
    """this share, by the rule by which runs hold records out, becomes the part val of split.yaml; 0: no such part"""
    on_bad: OnBad = "fail"
    """fail: the first bad record ends it and nothing is written; skip: bad records are named, counted and left out"""


@dataclass(frozen=True)
class EnergonStateConfig:
    """Will Energon go on from a saved state of its loader without losing samples? Refused at other ranks or workers."""

    path: tyro.conf.Positional[Path] = Path()
    """folder with a .pt file for every rank, or one file of all ranks"""
    ranks: Annotated[int, AT_LEAST_ONE] = 1
    """data-parallel ranks of the run that is to go on"""
    workers: Annotated[int, AT_LEAST_ONE] = 1
    """worker processes of each rank; 1 for none"""
