"""Flags over YAML over defaults, and complaints that name the key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from prism_megatron.commands.align import parse
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.merge import merge, save, to_plain, to_yaml
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.errors import ConfigError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_mini_recipe_stands_in_only_without_a_model(tmp_path: Path) -> None:
    """Claim: --model, by flag or by YAML, switches the defaults from the mini's recipe to the paper's."""
    yaml = write(tmp_path / "run.yaml", f"model: {{model: {tmp_path}}}")
    assert parse([]) == MINI_ALIGN
    assert parse(["--model", str(tmp_path)]).steps == AlignConfig().steps
    assert parse([f"--model={tmp_path}"]).policy == AlignConfig().policy
    assert parse(["--config", yaml]).rollout == AlignConfig().rollout
    assert parse(["--config", yaml, "--model", "None"]).steps == MINI_ALIGN.steps


def test_flags_win_over_yaml_over_defaults(tmp_path: Path) -> None:
    yaml = write(tmp_path / "run.yaml", "steps: 7\nseed: 3\npolicy: {lr: 1e-6}\nparallel: {sp: on}\n")
    config = parse(["--config", yaml, "--steps", "9", "--discriminator.lr", "2e-4"])
    assert (config.steps, config.seed, config.policy.lr, config.parallel.sp) == (9, 3, 1e-6, "on")
    assert config.discriminator_optimizer.lr == 2e-4
    assert config.rollout == MINI_ALIGN.rollout


@pytest.mark.parametrize("argv", [["--sp"], ["--sp", "--tp", "2"], ["--sp", "on"], ["--sp=on"]])
def test_bare_sp_means_on(argv: list[str]) -> None:
    assert parse(argv).parallel.sp == "on"


def test_switches_have_a_negative_form() -> None:
    assert not parse(["--no-distributed-optimizer"]).parallel.distributed_optimizer


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stepz: 3", "unknown key 'stepz'; did you mean steps"),
        ("policy: {learning_rate: 1}", r"unknown key 'policy\.learning_rate'; did you mean policy\."),
        ("steps: many", "steps must be int, not 'many'"),
        ("steps: true", "steps must be int, not True"),
        ("steps: 2.5", r"steps must be int, not 2\.5"),
        ("policy: {lr: fast}", r"policy\.lr must be a number"),
        ("policy: {lr: true}", r"policy\.lr must be float, not True"),
        ("policy: {lr: null}", r"policy\.lr must be float, not None"),
        ("policy: 3", "policy must hold keys with values, not 3"),
        ("parallel: {sp: maybe}", r"parallel\.sp must be one of auto, on, off, not 'maybe'"),
        ("data: {data: 3}", r"data\.data must be Path, not 3"),
        ("- a\n- b", "must hold keys with values, not a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_yaml_is_one_line_that_names_the_key(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse(["--config", write(tmp_path / "run.yaml", text)])
    assert "\n" not in str(caught.value)


def test_missing_yaml_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(["--config", str(tmp_path / "none.yaml")])


def test_unknown_flag_ends_with_status_2_and_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--tpp", "2"])
    assert caught.value.code == 2
    assert "--tp" in capsys.readouterr().err


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    """Claim: the file saved beside a run, given to --config, is that run's config again; no half file is left."""
    flags = ["--tp", "4", "--sp", "off", "--data", str(tmp_path), "--policy.lr", "3e-7", "--system-prompt", "Be brief."]
    config = parse([*flags, "--recompute-modules", "mlp", "core_attn"])
    path = tmp_path / "run" / "config.yaml"
    save(config, path)
    assert parse(["--config", str(path)]) == config
    assert merge(AlignConfig(), read_yaml(path)) == config
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    assert path.read_text(encoding="utf-8") == to_yaml(config)


def test_plain_form_has_every_field() -> None:
    """Claim: nothing is left out of the printed config, so a run can be repeated from it."""
    plain = to_plain(AlignConfig())
    assert set(plain) == {item.name for item in fields(AlignConfig())}
    assert set(plain["game"]) == {item.name for item in fields(AlignConfig().game)}


def test_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for group in ("parallel", "model", "data", "rollout", "discriminator", "game", "checkpoint", "policy"):
        assert f"{group} options" in text
    for flag in ("--tp ", "--no-distributed-optimizer", "--policy.lr ", "--discriminator.lr ", "--config "):
        assert flag in text


def test_what_is_no_field_is_no_key() -> None:
    """Claim: what a section's class says about its fields is neither set nor offered."""
    with pytest.raises(ConfigError) as caught:
        merge(AlignConfig(), {"run": {"ON_RESUME": "FREE"}})
    assert str(caught.value).startswith("unknown key 'run.ON_RESUME'; did you mean ")
    assert "ON_RESUME" not in str(caught.value).partition("did you mean")[2]
