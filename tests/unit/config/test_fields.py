"""What annotations say of a field is what is checked, under the flag that a user types."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from prism_megatron.config.experiments.effect import EffectConfig
from prism_megatron.config.experiments.variants import VariantsConfig
from prism_megatron.config.fields import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    ZERO_IS_OFF,
    ExistingFolder,
    OnResume,
    Range,
    check_fields,
    fields_of,
)
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.warm_start import WarmStartConfig
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.config.tools.verify import VerifyConfig
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    top_width: Annotated[int, AT_LEAST_ONE] = 1
    renamed: Annotated[float | None, tyro.conf.arg(name="other"), SHARE] = None


@dataclass(frozen=True)
class Outer:
    flat: tyro.conf.OmitArgPrefixes[Inner] = field(default_factory=Inner)
    nested: Inner = field(default_factory=Inner)
    spelled: Annotated[Inner, tyro.conf.arg(name="short")] = field(default_factory=Inner)
    where: Annotated[Path | None, ExistingFolder()] = None
    free: int = -1


def test_flags_are_those_that_tyro_takes() -> None:
    """Claim: a complaint names what can be typed. Compared with tyro by typing each flag."""
    flags = {field.flag: field.path for field in fields_of(Outer())}
    assert flags == {
        "--top-width": ("flat", "top_width"),
        "--other": ("flat", "renamed"),
        "--nested.top-width": ("nested", "top_width"),
        "--nested.other": ("nested", "renamed"),
        "--short.top-width": ("spelled", "top_width"),
        "--short.other": ("spelled", "renamed"),
        "--where": ("where",),
        "--free": ("free",),
    }
    for flag, path in flags.items():
        typed: Any = tyro.cli(Outer, args=[flag, "1"])
        for name in path:
            typed = getattr(typed, name)
        assert str(typed) in {"1", "1.0"}


@pytest.mark.parametrize(
    "config",
    [
        AlignConfig(),
        WarmStartConfig(),
        EffectConfig(Path("out")),
        VariantsConfig(Path("out")),
        VerifyConfig(),
        ServeConfig(),
    ],
)
def test_no_two_fields_share_a_flag_and_defaults_are_in_range(config: object) -> None:
    flags = [field.flag for field in fields_of(config)]
    assert len(flags) == len(set(flags))
    check_fields(config)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (Outer(nested=Inner(top_width=0)), "--nested.top-width 0 must be at least 1"),
        (Outer(spelled=Inner(renamed=1.5)), "--short.other 1.5 must be at least 0 and at most 1"),
        (Outer(spelled=Inner(renamed=float("nan"))), "--short.other nan must be at least 0 and at most 1"),
        (
            Outer(where=Path("nowhere")),
            "--where nowhere is not a folder; give one that exists, or leave --where out",
        ),
        (
            Outer(where=Path(__file__)),
            f"--where {__file__} is not a folder; give one that exists, or leave --where out",
        ),
    ],
)
def test_the_first_value_out_of_range_is_named(config: Outer, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fields(config)
    assert str(caught.value) == complaint


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (AT_LEAST_ONE, [1, 2, 10**9], [0, -1]),
        (NOT_NEGATIVE, [0, 0.0, 1e-9], [-1, -1e-9, float("nan")]),
        (POSITIVE, [1e-9, 1], [0, -1.0, float("nan")]),
        (SHARE, [0, 0.5, 1.0], [-1e-9, 1.1, float("nan")]),
        (ZERO_IS_OFF, [0, 1], [-1]),
        (Range(above=0, below=1), [0.5], [0.0, 1.0, float("nan")]),
        (Range(at_least=0, below=1), [0.0], [1.0]),
        (Range(above=0, at_most=1), [1.0], [0.0]),
    ],
)
def test_bounds(bounds: Range, inside: list[float], outside: list[float]) -> None:
    for value in inside:
        bounds.check("--flag", value)
    for value in outside:
        with pytest.raises(ConfigError, match=r"--flag .* must be"):
            bounds.check("--flag", value)


def test_a_remark_says_why_and_large_counts_are_shown_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        ZERO_IS_OFF.check("--replay", -12345678)
    assert str(caught.value) == "--replay -12345678 must be at least 0, which turns it off"


def test_nothing_is_in_every_range() -> None:
    config = AlignConfig()
    check_fields(replace(config, parallel=replace(config.parallel, etp=None)))
    with pytest.raises(ConfigError, match="--etp 0 must be at least 1"):
        check_fields(replace(config, parallel=replace(config.parallel, etp=0)))


@pytest.mark.parametrize("config", [AlignConfig(), WarmStartConfig()])
def test_every_field_of_a_stage_says_what_a_run_that_goes_on_may_do_to_it(config: object) -> None:
    """Claim: a field that is added later is covered: its section, or itself, has to say which class it is of."""
    assert not [field.flag for field in fields_of(config) if field.on_resume is None]


def test_a_field_speaks_for_itself_before_its_section_does() -> None:
    classes = {field.flag: field.on_resume for field in fields_of(AlignConfig())}
    assert classes["--rollout-servers"] is OnResume.FREE
    assert classes["--temperature"] is OnResume.FIXED
    assert classes["--policy.lr"] is classes["--discriminator.lr"] is classes["--seed"] is OnResume.FIXED
    assert classes["--policy.offload"] is classes["--tp"] is classes["--save-every"] is OnResume.FREE
    assert classes["--steps"] is OnResume.LONGER
    assert classes["--load"] is OnResume.COMMAND
    assert {field.on_resume for field in fields_of(Outer())} == {None}
