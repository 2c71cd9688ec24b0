"""A model's name stands for one folder, or is refused in one line that says what was tried and what to give.

Blind spot: a hub that answers; the errors it would answer with are raised by a stand-in.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.conversion.checkpoints.folder import CHECKPOINTS, step_folder, write_state
from prism_megatron.conversion.checkpoints.model_names import (
    Role,
    discriminator_folder,
    folder_of,
    policy_folder,
    short_name,
)
from prism_megatron.errors import ConfigError
from tests import hub_cache

POLICY, DISCRIMINATOR = MINI_FOLDER / "policy", MINI_FOLDER / "discriminator"


def checkpoint(folder: Path, *roles: str) -> Path:
    """As far as names look: the account of what it holds."""
    folder.mkdir(parents=True)
    write_state(
        folder,
        engines={role: {"steps_taken": 0, "adam_step": 0} for role in roles},
        models={role: {"expert_layout": None, "aliases": []} for role in roles},
        state={},
    )
    return folder


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 3\n")
    return folder


def refusal(name: str, role: Role | None = None, *, fetch: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        folder_of(name, role, flag="--flag", fetch=fetch)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--flag {name}")
    return str(caught.value)


def test_model_folders_and_checkpoints_stand_for_themselves(tmp_path: Path) -> None:
    both = checkpoint(tmp_path / "both", "policy", "discriminator")
    assert folder_of(str(POLICY), "policy", flag="--flag") == POLICY
    assert folder_of(str(DISCRIMINATOR), "discriminator", flag="--flag") == DISCRIMINATOR
    for role in ("policy", "discriminator", None):
        assert folder_of(str(both), role, flag="--flag") == both


def test_a_checkpoint_is_one_whatever_lies_beside_its_state(tmp_path: Path) -> None:
    both = checkpoint(tmp_path / "both", "policy")
    (both / "config.json").write_text("{}")
    (both / "config.yaml").write_text("{}")
    assert folder_of(str(both), "policy", flag="--flag") == both
    assert "holds policy, and no discriminator" in refusal(str(both), "discriminator")


def test_a_run_stands_for_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    """Claim: not for one whose save was cut off, and for its export only where no checkpoint is complete."""
    run = run_folder(tmp_path / "run")
    (run / "hf").symlink_to(POLICY)
    (run / CHECKPOINTS / ".step_000009.saving").mkdir(parents=True)
    step_folder(run / CHECKPOINTS, 8).mkdir()  # without its state
    assert folder_of(str(run), "policy", flag="--flag") == run / "hf"
    for step in (5, 7):
        checkpoint(step_folder(run / CHECKPOINTS, step), "policy", "discriminator")
    newest = step_folder(run / CHECKPOINTS, 7)
    assert folder_of(str(run), "policy", flag="--flag") == newest
    assert folder_of(f"{run}/", "discriminator", flag="--flag") == newest
    assert folder_of(str(run / "hf"), flag="--flag") == run / "hf"


def test_a_run_that_saved_nothing_says_so(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert "no complete checkpoints/step_* and no hf/" in refusal(str(run))


def test_a_role_that_is_not_held_is_told_with_what_was_read(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "warm")
    step = checkpoint(step_folder(run / CHECKPOINTS, 4), "discriminator")
    assert f"(read as {step}) holds discriminator, and no policy" in refusal(str(run), "policy")
    assert "is a discriminator" in refusal(str(DISCRIMINATOR), "policy")
    assert "is a policy" in refusal(str(POLICY), "discriminator")
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(str(tmp_path), "policy")


def test_a_folder_of_none_of_the_forms_says_what_was_looked_for(tmp_path: Path) -> None:
    said = refusal(str(tmp_path))
    for form in ("config.json", "state.json", "config.yaml", "hub id"):
        assert form in said


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "no/such/folder", "", "a/b/c@d"])
def test_a_path_is_never_taken_for_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert "is not a folder; give a run folder" in refusal(name, fetch=True)


@pytest.mark.parametrize(
    "name",
    ["nowhere", "org/name@../../escape", "org/..", "org/na me", "org/näme", "org/name@", "org/name@a..b", "org/-name",
     "org/a--b", "org/name\n", "org/" + "n" * 200, "org/name@main@x", "org\\name", "C:/name", "org/name@.hidden"],
)  # fmt: skip
def test_what_no_hub_id_can_be_is_refused_without_asking(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a revision becomes part of a path in the cache, so dots that climb are none."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ConfigError, match="is not a folder, and no hub id either"):
        folder_of(name, flag="--flag", fetch=True)


@pytest.mark.parametrize("fetch", [False, True])
def test_a_hub_id_is_read_from_the_cache_of_an_offline_host(
    fetch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_cache.put(tmp_path, "org/mini-1.5", POLICY)
    other = hub_cache.put(tmp_path, "org/mini-1.5", POLICY, revision="refs/pr/3", commit="f" * 40)
    hub_cache.put(tmp_path, "org/judge", DISCRIMINATOR)
    hub_cache.use(tmp_path, monkeypatch)
    assert folder_of("org/mini-1.5", "policy", flag="--flag", fetch=fetch) == snapshot
    assert folder_of("org/mini-1.5@refs/pr/3", "policy", flag="--flag", fetch=fetch) == other
    assert folder_of(f"org/mini-1.5@{'f' * 40}", flag="--flag", fetch=fetch) == other
    assert "is a discriminator" in refusal("org/judge", "policy", fetch=fetch)
    said = refusal("org/absent", fetch=fetch)
    assert "not whole, in this host's cache" in said
    assert "name the folder" in said
    assert ("HF_HUB_OFFLINE" in said) == fetch
    assert "not whole, in this host's cache" in refusal("org/mini-1.5@v2", fetch=fetch)


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache.put(tmp_path / "cache", "org/name", POLICY)
    hub_cache.use(tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/name").symlink_to(DISCRIMINATOR)
    assert folder_of("org/name", flag="--flag") == Path("org/name")


def test_a_repository_that_is_no_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README.md").touch()
    hub_cache.put(tmp_path / "cache", "org/data", tmp_path / "files")
    hub_cache.use(tmp_path / "cache", monkeypatch)
    assert "is no model" in refusal("org/data")


def answer(status: int) -> Any:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/org/name"))


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (GatedRepoError("gated", response=answer(403)), "it is gated"),
        (RepositoryNotFoundError("unknown", response=answer(401)), "it is unknown to the hub"),
        (RevisionNotFoundError("unknown", response=answer(404)), "it has no such revision"),
        (httpx2.ConnectError("no route\nto host"), "it cannot be downloaded (ConnectError: no route)"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_hub_answers_is_one_line(error: Exception, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object, **_flags: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    said = refusal("org/name", fetch=True)
    assert complaint in said
    assert "name the folder" in said


def test_only_files_that_are_read_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: no pickled weights, nothing below the top, and no network once ranks run."""
    asked: list[dict[str, Any]] = []

    def remembers(repository: str, **flags: Any) -> str:
        asked.append({"repository": repository, **flags})
        return str(POLICY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", remembers)
    folder_of("org/name@v1.0", flag="--flag", fetch=True)
    folder_of("org/name", flag="--flag")
    assert [(one["repository"], one["revision"], one["local_files_only"]) for one in asked] == [
        ("org/name", "v1.0", False),
        ("org/name", None, True),
    ]
    assert asked[0]["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja", "*.txt"]
    assert asked[0]["ignore_patterns"] == ["*/*"]


def test_without_a_name_the_mini_plays_and_no_discriminator_is_named() -> None:
    assert policy_folder(None) == POLICY
    assert discriminator_folder(None) is None
    with pytest.raises(ConfigError, match="--model no/such/folder is not a folder"):
        policy_folder("no/such/folder")
    with pytest.raises(ConfigError, match="--discriminator no/such/folder is not a folder"):
        discriminator_folder("no/such/folder")


def test_a_name_that_is_too_long_for_a_file_is_refused() -> None:
    assert "is not a folder" in refusal("/" + "x" * 5000)


def test_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_name(f"{tmp_path}/runs/first/") == "first"
    assert short_name(".") == tmp_path.name
    assert short_name("org/name") == short_name("org/name@v2") == "name"
    Path("org/name@v2").mkdir(parents=True)
    assert short_name("org/name@v2") == "name@v2"
