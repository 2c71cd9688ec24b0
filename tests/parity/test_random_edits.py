"""Whatever is done to the files of a model: the same model as transformers' or a refusal, never another model."""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest

from prism_megatron.commands import verify as command
from prism_megatron.config.convert import ToMegatronConfig
from prism_megatron.config.verify import VerifyConfig
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.jobs.convert import to_megatron
from prism_megatron.parity.verify import verify
from prism_megatron.testing import GlooWorld
from tests.config_edits import bases, edited, write_base, write_edited
from tests.conftest import SEED

NUM_EDITS = 44
Verdict = Literal["same", "refused", "another model"]


def judge(world: World, folder: Path) -> tuple[Verdict, str]:
    """What ``prism-verify`` says of a folder. Whatever else is raised fails the test with its traceback."""
    try:
        report = verify(world, command.checked(VerifyConfig(hf=str(folder))))
    except PrismError as error:
        return "refused", str(error)
    assert report is not None
    return ("same" if report.ok else "another model"), report.text()


def converts(folder: Path, save: Path) -> tuple[Verdict, str]:
    """What ``prism-convert to-megatron`` says of a folder."""
    try:
        to_megatron(ToMegatronConfig(hf=str(folder), save=str(save)), say=lambda _line: None)
    except PrismError as error:
        return "refused", str(error)
    return "same", ""


@pytest.mark.long
def test_random_edits_give_the_same_model_or_a_refusal(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Claim: of edits of the six published configs and of tiny ones, in both spellings, every folder that converts is
    the same model (logits and gradients), or transformers itself does not read it; whatever convert refuses, verify
    refuses in the same words. Some of each are met.

    Without the shared configs, those of the presets stand for the published ones.
    """
    shared: Path | None = None
    with suppress(pytest.skip.Exception):
        shared = request.getfixturevalue("shared_dir")
    configs = bases(shared)
    for number, config in enumerate(configs.values()):
        write_base(tmp_path / f"base-{number}", config)
    chance, met = random.Random(SEED), set()
    with GlooWorld(1) as gloo:
        for edit in range(NUM_EDITS):
            number = edit % len(configs)
            name, config = list(configs.items())[number]
            changed, said = edited(config, chance)
            folder, save = tmp_path / "edited", tmp_path / "checkpoint"
            write_edited(tmp_path / f"base-{number}", folder, changed)
            converted, why = converts(folder, save)
            ((verdict, told),) = gloo.run(judge, folder)
            what = f"{name}: {said}"
            assert verdict in ("same", "refused"), f"{what}: {told}"
            assert "\n" not in (told if verdict == "refused" else ""), what
            if converted == "same":
                assert verdict == "same" or told.startswith("transformers cannot read"), f"{what}: {told}"
            else:
                assert (converted, why) == ("refused", told), f"{what}: {why}, but {told}"
            met.add(verdict)
            shutil.rmtree(folder)
            shutil.rmtree(save, ignore_errors=True)
    assert met == {"same", "refused"}
