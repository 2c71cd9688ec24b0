"""Files of settings that are no plain YAML in UTF-8: one line with the file, the line, and what to do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.commands.align import parse
from prism_megatron.config.merge import merge, to_yaml
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.errors import ConfigError
from tests.fuzz_yaml import BOMB, DOORS, try_files

FUZZED = 150


def complaint(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        parse(["--config", str(path)])
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_wide_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    assert "save it as UTF-8" in complaint(tmp_path / "a.yaml", "steps: 3\n".encode(encoding))


def test_bytes_of_another_encoding_are_refused_with_their_line(tmp_path: Path) -> None:
    message = complaint(tmp_path / "a.yaml", "steps: 3\nrun:\n  run_name: café\n".encode("latin-1"))
    assert "line 3: " in message
    assert "byte 0xe9; save it as UTF-8" in message


def test_a_mark_of_utf8_at_the_start_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfsteps: 3\r\nseed: 7\r\n")
    assert dict(read_yaml(path)) == {"steps": 3, "seed": 7}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("steps: 3\nseed: 1\nsteps: 4\n", "line 3: the key 'steps' stands in line 1 already; remove one"),
        ("seed: 1\npolicy:\n  lr: 1.0\n  lr: 2.0\n", "line 4: the key 'lr' stands in line 3"),
        ("policy: {lr: 1.0, lr: 1.0}\n", "line 1: the key 'lr' stands in line 1"),
        ("a: &a [*a]\n", "line 1: what an anchor (&) names here holds itself"),
        ("policy: &p\n  <<: *p\n", ": what an anchor (&) names here holds itself"),
        (BOMB, "this comes to more than 10000 values"),
        ("steps: 3\nseed: \x01\n", "line 2: this is not YAML: the character U+0001"),
        ("steps:\n\tseed: 1\n", "line 2: this is not YAML: while scanning for the next token"),
        ("steps:\n\tseed: 1\n", "indent with spaces, not with tabs"),
        ('run:\n  run_name: "a\\0b"\n', "line 2: 'a\\x00b' holds a character that is no text"),
        ('run:\n  run_name: "\\ud800"\n', "line 2: '\\ud800' holds a character that is no text"),
        ('run: {run_name: "\\U00110000"}\n', "is not YAML: chr() arg not in range"),
        ("[1, 2]: 3\n", "line 1: a key must be a word"),
        ("steps: 3\nseed: !!int abc\n", "line 2: 'abc' is no int"),
        ("seed: !!bool maybe\n", "line 1: 'maybe' is no bool"),
        ("seed: !!set {a}\n", "not 'tag:yaml.org,2002:set'; leave the tag out"),
        (f"seed: 0x{'f' * 6000}\n", "line 1: '0xfff"),
        ("steps: " + "[" * 3000, "is nested too deeply"),
        ("3", "must hold keys with values, not a number; write `steps: 3`"),
        ("steps: 3\n---\nseed: 1\n", "line 2: this is not YAML: expected a single document"),
        ("x" * 300_000, "is larger than 256 KiB"),
        # What stands under a key that is known is said with its line too.
        ("seed: 1\nsteps: many\n", "line 2: steps must be int, not 'many'; write a whole number in digits"),
        ("policy:\n  lr: 1\n  learning: 2\n", "line 3: unknown key 'policy.learning'; did you mean"),
        ("seed: 1\npolicy:\n  lr: .nan\n", "line 3: policy.lr must be a finite number, not nan"),
        ("seed: 1\npolicy:\n  lr: .inf\n", "line 3: policy.lr must be a finite number, not inf"),
        ("policy:\n  lr: nan\n", "line 2: policy.lr must be a finite number, not 'nan'"),
        # YAML 1.1 has numbers of base 60 (90), octals (8) and dates here.
        ("steps: 1:30\n", "line 1: steps must be int, not '1:30'"),
        ("seed: 010\n", "line 1: seed must be int, not '010'"),
        ("run:\n  max_minutes: 1:30\n", "line 2: run.max_minutes must be a number, not '1:30'"),
        ("seed: 2001-12-14\n", "line 1: seed must be int, not '2001-12-14'"),
        ("run:\n  run_name: 2024\n", "line 2: run.run_name must be str, not 2024; put it in quotes"),
        ("run:\n  run_name: yes\n", "line 2: run.run_name must be str, not True; put it in quotes"),
        ("model: {model: [1]}\n", "line 1: model.model must be str, not [1]"),
    ],
)  # fmt: skip
def test_what_is_no_plain_setting_is_one_line(tmp_path: Path, text: str, wanted: str) -> None:
    assert wanted in complaint(tmp_path / "a.yaml", text.encode("utf-8", "surrogatepass"))


def test_text_that_looks_like_a_date_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: {run_name: 2001-12-14}\npolicy: {lr: 1e-6}\n", encoding="utf-8")
    config = merge(AlignConfig(), read_yaml(path))
    assert (config.run.run_name, config.policy.lr) == ("2001-12-14", 1e-6)


@pytest.mark.parametrize("name", ["1.5e3", "-.5", "+.5", "1.e5", "1:30", "010", "2001-12-14", "off", "=", "<<", "~"])
def test_text_that_looks_like_a_number_is_saved_as_text(tmp_path: Path, name: str) -> None:
    """Claim: the config.yaml of any run is read again, whatever its text looks like to either reader of YAML."""
    path, config = tmp_path / "a.yaml", AlignConfig()
    config = replace(config, run=replace(config.run, run_name=name))
    path.write_text(to_yaml(config), encoding="utf-8")
    assert merge(AlignConfig(), read_yaml(path)) == config


def test_a_section_may_be_named_and_used_again(tmp_path: Path) -> None:
    """Claim: anchors and merge keys are read, and a key of one's own beside a merged one is no repetition."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "policy: &both {lr: 1.0e-4, beta1: 0.5}\ndiscriminator_optimizer:\n  <<: *both\n  lr: 2.0e-4\n",
        encoding="utf-8",
    )
    config = merge(AlignConfig(), read_yaml(path))
    assert (config.discriminator_optimizer.lr, config.discriminator_optimizer.beta1) == (2e-4, 0.5)
    assert config.policy.lr == 1e-4


def test_what_can_be_read_once_only_is_refused(tmp_path: Path) -> None:
    """Claim: settings are read more than once, so a pipe would be empty the second time, and its values lost."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"is no regular file; .* write them to a file"):
        read_yaml(tmp_path / "pipe")


def test_an_infinite_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--policy\.lr inf must be"):
        parse(["--policy.lr", "inf"])


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """Claim: of 150 damaged files, over all commands, each is read or refused by name. Blind spot: the other files."""
    outcome = try_files(FUZZED, seed=7, folder=tmp_path)
    assert not outcome.failures, "\n\n".join(outcome.failures)
    assert outcome.kinds.total() == FUZZED
    assert FUZZED // len(DOORS) > 1
    assert min(outcome.kinds["read"], outcome.kinds["ConfigError"]) > 5
