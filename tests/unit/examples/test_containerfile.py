"""The image has the versions that the project is checked against elsewhere, and compiles nothing of another name.

Blind spot: the build, which nobody has run; versions of what NVIDIA's image brings.
"""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.unit.examples.recipes import EXAMPLES

ROOT = EXAMPLES.parent
TEXT = (EXAMPLES / "container" / "Containerfile").read_text(encoding="utf-8")
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(\S+)$", TEXT, re.MULTILINE))
INSTALLS = [step for step in re.findall(r"^RUN .*?(?<!\\)$", TEXT, re.MULTILINE | re.DOTALL) if "pip install" in step]


def pinned(constraints: str, package: str) -> str:
    """The version that a file of constraints names."""
    text = (ROOT / "constraints" / constraints).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^{re.escape(package)}==(\S+)$", text, re.MULTILINE)
    return str(found)


def test_transformer_engine_is_the_one_that_is_compiled_for_the_checks() -> None:
    """Claim: make te-check binds our calls to the version of the image, which the extra ``gpu`` allows."""
    own = ARGUMENTS["TRANSFORMER_ENGINE"]
    assert own == pinned("te.txt", "transformer-engine")
    (extra,) = re.findall(r'"gpu": \["([^"]+)", "flash-attn"\]', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert Version(own) in Requirement(extra).specifier
    assert "transformer-engine[core_cu13,pytorch]==${TRANSFORMER_ENGINE}" in TEXT


def test_sglang_is_the_one_that_is_run_on_the_cpu() -> None:
    """Claim: its version is that of make sglang and of the Makefile's line for CUDA, in an environment of its own."""
    own = ARGUMENTS["SGLANG"]
    assert own == pinned("sglang-cpu.txt", "sglang")
    assert f"'sglang[all]=={own}'" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert '/opt/sglang/bin/python -m pip install "sglang[all]==${SGLANG}"' in TEXT
    trainjob = (EXAMPLES / "kubernetes" / "align.yaml").read_text(encoding="utf-8")
    assert "rollout_python: /opt/sglang/bin/python" in trainjob


def test_every_version_is_named() -> None:
    """Claim: the image is of a month, apex of a commit, all else of a version; nothing takes whatever is newest."""
    assert re.search(r"^FROM nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", TEXT, re.MULTILINE)
    assert re.fullmatch(r"[0-9a-f]{40}", ARGUMENTS["APEX"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", ARGUMENTS["FLASH_ATTN"])
    for step in INSTALLS:
        assert "==$" in step or "checkout --quiet ${APEX}" in step or "--editable ." in step, step
    assert "pip install apex" not in TEXT


@pytest.mark.parametrize("what", ["transformer-engine[", "flash-attn==", "/opt/apex", "--editable ."])
def test_what_is_compiled_is_compiled_against_the_torch_of_the_image(what: str) -> None:
    """Claim: no build brings a torch of its own, and none replaces the image's."""
    (step,) = (one for one in INSTALLS if what in one)
    assert "--no-build-isolation" in step and "--constraint /opt/torch.txt" in step
