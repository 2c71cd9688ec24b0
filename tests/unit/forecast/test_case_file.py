"""Claim: cases that are written as JSON are read as the same cases, and anything else is refused with its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prism_megatron.errors import ConfigError
from prism_megatron.forecast.case_file import read_cases, write_cases
from tests.integration.test_device_pass import QUICK


def test_cases_come_back_as_they_were(tmp_path: Path) -> None:
    """Claim: see the module; dataclasses, tuples, dtypes and what may be None are told apart by their declarations."""
    cases = [*QUICK.values(), replace(next(iter(QUICK.values())), dtype=torch.float32)]
    write_cases(tmp_path / "cases.json", cases)
    assert read_cases(tmp_path / "cases.json") == cases


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\x80\x05K", "is no JSON"),
        ('[{"play": "align"}]', "case 0: .*give every field"),
        ('[{"play": "align", "dtype": "int8"}]', "case 0: dtype is 'int8'"),
        ('[{"plays": "align"}]', "case 0 is .*expected an object with the fields"),
    ],
)
def test_other_files_are_refused(text: str, complaint: str, tmp_path: Path) -> None:
    """Claim: a pickle, a missing field, a strange dtype and an unknown field are errors that say where."""
    (tmp_path / "cases.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=complaint):
        read_cases(tmp_path / "cases.json")
