"""Which demonstrations a run learns from, and how they become rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, OnResume, Range
from prism_megatron.config.stages.data import STRUCTURED_SYSTEM_PROMPT, OnBad


@dataclass(frozen=True)
class DemonstrationsConfig:
    """Sets of conversations (docs/data.md)."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    data: tuple[Path, ...] = ()
    """files or folders of demonstrations, in any format of docs/data.md; without one the mini world's scenes"""
    repeats: tuple[str, ...] = ()
    """how often an epoch shows each sample of a source, where that is not once: SOURCE=TIMES, such as public=0.5"""
    weights: tuple[str, ...] = ()
    """share of each source in an epoch: SOURCE=WEIGHT, such as mine=3 public=1; sources that are not named are not
    seen, and an epoch has as many samples as there are. Instead of --repeats"""
    on_bad: OnBad = "fail"
    """what is done about bad records: fail before the first step, or skip them, counted"""
    system_prompt: str | None = STRUCTURED_SYSTEM_PROMPT
    """system message before conversations that have none of their own; None for none"""
    min_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """smaller images are enlarged to this area; by default the model's own limit"""
    max_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """larger images are shrunk to this area; by default the model's own limit"""
    labels: Literal["last", "all"] = "last"
    """which of the assistant's turns are learned"""
    max_tokens: Annotated[int, AT_LEAST_ONE] = 8192
    """longer conversations, image tokens included, are left out; packed rows hold about as many (paper: 8192)"""
    packing: bool = True
    """several conversations to a row, none of which sees another; off: one to a row, padded"""
    rows_per_step: Annotated[int, AT_LEAST_ONE] = 16
    """rows that one optimizer step learns from, over all data-parallel ranks"""
    rows_per_microbatch: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 1
    """rows in one forward and backward pass with --no-packing; a packed row runs alone"""
    epochs: Annotated[int, AT_LEAST_ONE, OnResume.LONGER] = 1
    """how often everything is seen (paper: once)"""
    validation_share: Annotated[float, Range(at_least=0, below=1)] = 0.02
    """share of the records that is held out, chosen by their ids"""
    index: Annotated[Path | None, OnResume.FREE] = None
    """folder that keeps where records lie and how long they are, for this run and others; by default one in the user's
    cache (XDG_CACHE_HOME)"""
    readers: Annotated[int, NOT_NEGATIVE, OnResume.FREE] = 1
    """processes of each rank that read and decode ahead; 0 reads in the rank itself"""
