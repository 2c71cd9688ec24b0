"""Whole seeds travel in files: what comes out is what went in, and nothing else comes out."""

from __future__ import annotations

import io
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.config.experiments.effect import EffectConfig, Regime, Registration
from prism_megatron.errors import DataError, PrismError
from prism_megatron.experiments.effect.answers import ANSWERS, RESPONSES
from prism_megatron.experiments.effect.archive import archive_of, is_whole, pack, unpack
from prism_megatron.experiments.effect.run import run_seeds
from prism_megatron.experiments.effect.seed import DONE, FAITHFUL, TAUGHT, arms_of, folder_of, texts_of

REGISTERED = Registration(
    title="Two seeds",
    seeds=(7, 8),
    variants=("segment",),
    controls=("lr0",),
    algorithms=("grpo",),
    guessable=Regime(seeds=1, comparisons=0.9),
)


def make_seed(output: Path, seed: int) -> None:
    """All that is kept of a seed, and a policy, which is not."""
    for place, arm in enumerate(arms_of(REGISTERED, REGISTERED.seeds.index(seed))):
        folder = folder_of(output, seed, arm)
        (folder / "policy").mkdir(parents=True)
        (folder / "policy" / "model.safetensors").write_bytes(b"weights")
        for name in (ANSWERS, RESPONSES, DONE):
            (folder / name).write_text(f"{seed} {arm} {place} {name}\n")
    for name in (FAITHFUL, TAUGHT):
        texts_of(output, seed, name).write_text(f"{seed} {name}\n")


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_comes_out_is_what_went_in_less_the_policies(tmp_path: Path) -> None:
    """Claim: byte for byte, in place of a seed that was begun; the file is the same each time it is written."""
    for name in ("one", "two"):
        make_seed(tmp_path / name, 7)
        pack(tmp_path / name, REGISTERED, 7, archive_of(tmp_path / name, 7))
    kept = archive_of(tmp_path / "one", 7)
    assert kept.read_bytes() == archive_of(tmp_path / "two", 7).read_bytes()
    begun = folder_of(tmp_path / "other", 7, "sft")
    begun.mkdir(parents=True)
    (begun / DONE).write_text("of another run")
    unpack(kept, tmp_path / "other", REGISTERED, 7)
    expected = {name: text for name, text in texts(tmp_path / "one" / "seed-7").items() if "policy" not in name}
    assert texts(tmp_path / "other" / "seed-7") == expected
    assert is_whole(tmp_path / "other", REGISTERED, 7) and not is_whole(tmp_path / "other", REGISTERED, 8)


def test_another_registrations_seed_is_refused(tmp_path: Path) -> None:
    make_seed(tmp_path, 7)
    kept = archive_of(tmp_path, 7)
    pack(tmp_path, REGISTERED, 7, kept)
    with pytest.raises(DataError, match=r"seed-7\.tar\.xz is of another registration"):
        unpack(kept, tmp_path / "out", replace(REGISTERED, align_steps=39), 7)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["cut", "no archive", "lacks a file"])
def test_a_damaged_file_is_refused_and_leaves_nothing(how: str, tmp_path: Path) -> None:
    make_seed(tmp_path, 7)
    kept = archive_of(tmp_path, 7)
    pack(tmp_path, REGISTERED, 7, kept)
    if how == "cut":
        kept.write_bytes(kept.read_bytes()[:-200])
    elif how == "no archive":
        kept.write_bytes(b"text")
    else:
        with tarfile.open(kept, "r:xz") as old, tarfile.open(tmp_path / "new", "w:xz") as new:
            for member in old.getmembers()[:-1]:
                new.addfile(member, old.extractfile(member))
        (tmp_path / "new").replace(kept)
    with pytest.raises(DataError, match=r"seed-7\.tar\.xz is no whole seed of this registration"):
        unpack(kept, tmp_path / "out", REGISTERED, 7)
    assert not (tmp_path / "out").exists()


def test_names_that_no_seed_has_are_not_read(tmp_path: Path) -> None:
    """Claim: a file that would lead out of the folder is passed over, as is any other."""
    make_seed(tmp_path, 7)
    kept = archive_of(tmp_path, 7)
    pack(tmp_path, REGISTERED, 7, kept)
    with tarfile.open(kept, "r:xz") as old, tarfile.open(tmp_path / "new", "w:xz") as new:
        for member in old.getmembers():
            new.addfile(member, old.extractfile(member))
        for name in ("../outside", "seed-7/more"):
            member = tarfile.TarInfo(name)
            member.size = 4
            new.addfile(member, io.BytesIO(b"text"))
    unpack(tmp_path / "new", tmp_path / "out", REGISTERED, 7)
    assert not (tmp_path / "outside").exists() and not (tmp_path / "out" / "seed-7" / "more").exists()


def test_archived_seeds_are_not_run_again_and_others_are_archived(tmp_path: Path) -> None:
    """Claim: the command is run for seed 8 alone, which then has a file."""
    make_seed(tmp_path / "elsewhere", 7)
    archive, output = tmp_path / "archive", tmp_path / "out"
    pack(tmp_path / "elsewhere", REGISTERED, 7, archive_of(archive, 7))
    make_seed(tmp_path / "made", 8)
    config = EffectConfig(output=output, archive=archive)
    copies = f"import shutil, sys; shutil.copytree({str(tmp_path / 'made' / 'seed-8')!r}, {str(output / 'seed-8')!r})"
    only = f"import sys; assert sys.argv[-1] == '8'; {copies}"
    run_seeds(config, REGISTERED, [sys.executable, "-c", only])
    assert all(is_whole(output, REGISTERED, seed) for seed in REGISTERED.seeds)
    assert archive_of(archive, 8).is_file()
    run_seeds(config, REGISTERED, [sys.executable, "-c", "raise SystemExit(1)"])


def test_a_seed_that_failed_is_not_archived(tmp_path: Path) -> None:
    config = EffectConfig(output=tmp_path / "out", archive=tmp_path / "archive")
    with pytest.raises(PrismError, match="of 2 seeds 7, 8 did not end"):
        run_seeds(config, REGISTERED, [sys.executable, "-c", "raise SystemExit(1)"])
    assert not (tmp_path / "archive").exists()
