"""What a run may go on with: nothing that would train something else, unless it is asked for by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.fields import OnResume, fields_of
from prism_megatron.config.resume import changeable, check_resume, differences
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.warm_start import WarmStartConfig
from prism_megatron.errors import ConfigError

CONFIGS = [AlignConfig(), WarmStartConfig()]


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """``config`` with another value at ``path``."""
    if len(path) == 1:
        return replace(config, **{path[0]: value})
    return replace(config, **{path[0]: changed(getattr(config, path[0]), path[1:], value)})


def another(value: Any) -> Any:
    """A value that is not ``value``; types do not matter to the comparison."""
    return (*value, "more") if isinstance(value, tuple) else f"not {value}"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_free_refused_or_nobodys_business(config: Any) -> None:
    """Claim: each field does what its class says, also one that a later stage adds: fields are taken from the class."""
    for field in fields_of(config):
        now = changed(config, field.path, another(field.value))
        if field.on_resume is OnResume.FIXED:
            with pytest.raises(ConfigError) as caught:
                check_resume(config, now, change=(), where="runs/a")
            assert str(caught.value).startswith(f"runs/a would go on as another run: {field.flag} was ")
            assert f"--change {changeable(field.flag)}" in str(caught.value)
            lines = check_resume(config, now, change=(changeable(field.flag),), where="runs/a")
        else:
            lines = check_resume(config, now, change=(), where="runs/a")
        assert bool(lines) is (field.on_resume is not OnResume.COMMAND), field.flag
        assert not lines or lines[0].startswith(f"{field.flag} was ")


def test_all_that_is_refused_is_named_at_once() -> None:
    before = AlignConfig()
    now = changed(changed(changed(before, ("seed",), 7), ("rollout", "top_p"), 0.5), ("parallel", "tp"), 2)
    with pytest.raises(ConfigError) as caught:
        check_resume(before, now, change=(), where="runs/a")
    assert str(caught.value) == (
        "runs/a would go on as another run: --top-p was 1 and is 0.5; --seed was 42 and is 7. Leave --top-p and --seed "
        "out, or ask for it by --change top-p seed"
    )
    with pytest.raises(ConfigError, match=r"another run: --seed was 42 and is 7\. Leave --seed out"):
        check_resume(before, now, change=("top_p",), where="runs/a")
    assert check_resume(before, now, change=("--top-p", "seed"), where="runs/a") == [
        "--tp was 1 and is 2",
        "--top-p was 1 and is 0.5",
        "--seed was 42 and is 7",
    ]


def test_a_change_of_nothing_is_allowed_so_that_a_command_can_be_repeated() -> None:
    assert check_resume(AlignConfig(), AlignConfig(), change=("policy.lr",), where="runs/a") == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("policy.l", r"--change policy\.l: there is no such flag; did you mean policy\.lr"),
        ("tp", "--change tp is not needed: a run may go on with another --tp; leave it out"),
        ("steps", "--change steps is not needed"),
        ("load", "--change load is not needed"),
    ],
)
def test_a_change_that_cannot_be_meant_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_resume(AlignConfig(), AlignConfig(), change=(name,), where="runs/a")


def test_more_steps_say_what_they_do_to_the_schedule() -> None:
    """Claim: a schedule that is stretched says so, for the roles whose rates depend on the number of steps."""
    before = changed(AlignConfig(steps=10), ("policy", "schedule"), "cosine")
    lines = check_resume(before, replace(before, steps=20), change=(), where="runs/a")
    grown, stretched = lines
    assert grown == "--steps was 10 and is 20"
    assert stretched.startswith("the cosine schedule of policy now spans 20 steps: its learning rates from here on are")
    constant = AlignConfig(steps=10)
    assert check_resume(constant, replace(constant, steps=20), change=(), where="runs/a") == [grown]
    warm = changed(constant, ("discriminator_optimizer", "warmup_ratio"), 0.1)
    assert "schedule of discriminator" in check_resume(warm, replace(warm, steps=20), change=(), where="runs/a")[1]
    fixed = changed(warm, ("discriminator_optimizer", "warmup_steps"), 3)
    assert len(check_resume(fixed, replace(fixed, steps=20), change=(), where="runs/a")) == 1


def test_paths_of_one_command_are_no_difference() -> None:
    before = AlignConfig()
    now = changed(changed(before, ("checkpoint", "load"), Path("a")), ("checkpoint", "output"), Path("b"))
    assert differences(before, now) == []


def test_long_values_are_cut_in_the_line() -> None:
    before = AlignConfig()
    now = changed(before, ("data", "system_prompt"), "x" * 500)
    (line,) = check_resume(before, now, change=("system-prompt",), where="runs/a")
    assert len(line) < 200


def test_a_folder_that_is_spelled_otherwise_is_the_same(tmp_path: Path) -> None:
    before = changed(AlignConfig(), ("data", "data"), tmp_path / "set")
    assert differences(before, changed(before, ("data", "data"), tmp_path / "x" / ".." / "set")) == []
    assert differences(before, changed(before, ("data", "data"), tmp_path / "other"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert differences(before, changed(before, ("data", "data"), tmp_path / "loop")), (
        "a link that leads nowhere is one too"
    )


def test_values_are_told_apart_on_one_line() -> None:
    before = AlignConfig()
    now = changed(before, ("policy", "lr"), 1.0000001e-6)
    assert check_resume(before, now, change=("policy.lr",), where="a") == ["--policy.lr was 1e-06 and is 1.0000001e-06"]
    hostile = changed(before, ("data", "system_prompt"), "a\n\x1b[31mb")
    (line,) = check_resume(before, hostile, change=("system-prompt",), where="a")
    assert "\n" not in line and "\x1b" not in line
