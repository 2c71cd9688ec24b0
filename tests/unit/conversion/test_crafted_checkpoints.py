"""Crafted files, through every door that reads a checkpoint or a model: nothing of theirs runs, and one line says so.

``test_hostile_checkpoint.py`` and ``test_hostile_folders.py`` have the plain kinds, word by word; here are those that
two readers may take for two things. A door is held to all files that it reads. Blind spots: files that are exchanged
while they are read, and files that only take time (a dictionary whose keys are tuples in tuples).
"""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import dataclasses
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from prism_megatron.config.check import CheckConfig, InspectConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.merge import merge
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.conversion.checkpoints import pickles
from prism_megatron.conversion.checkpoints.folder import files_folder, read_checkpoint
from prism_megatron.conversion.checkpoints.pickles import check_objects
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.hf.quantised import DequantisedFolder
from prism_megatron.data.render import Renderer
from prism_megatron.errors import CheckpointError, PrismError
from prism_megatron.jobs.check_weights import check_weights
from prism_megatron.jobs.convert import to_hf, to_megatron
from prism_megatron.jobs.inspect_folder import inspect_folder
from tests.unit.conversion import crafted
from tests.unit.conversion.crafted import CANARY

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

POLICY = MINI_FOLDER / "policy"
KEY = "policy.decoder.final_layernorm.weight"
STARTS = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"}
"""What Python's audit calls a new process."""

started: list[str] = []
watched = False


def note(event: str, _: object) -> None:
    if watched and event in STARTS:
        started.append(event)


sys.addaudithook(note)

Door = Callable[[Path], object]

CHECKPOINT_DOORS: dict[str, Door] = {
    "load": read_checkpoint,
    "inspect": lambda folder: inspect_folder(InspectConfig(str(folder))),
    "check": lambda folder: check_weights(CheckConfig(str(folder), str(POLICY))),
    "check the other": lambda folder: check_weights(CheckConfig(str(POLICY), str(folder))),
    "to-hf": lambda folder: to_hf(ToHFConfig(load=str(folder), save="written"), say=lambda _: None),
}
DATA_DOORS = {name: CHECKPOINT_DOORS[name] for name in ("check", "check the other", "to-hf")}
MODEL_DOORS: dict[str, Door] = {
    "inspect": CHECKPOINT_DOORS["inspect"],
    "check": CHECKPOINT_DOORS["check"],
    "to-megatron": lambda folder: to_megatron(ToMegatronConfig(hf=str(folder), save="written"), say=lambda _: None),
    "quantised": lambda folder: DequantisedFolder(folder, dtype=torch.float32),
}


def cases(files: Mapping[str, Any], doors: Mapping[str, Door]) -> pytest.MarkDecorator:
    """Every file through every door."""
    pairs = [pytest.param(files[file], doors[door], id=f"{file}, {door}") for file in files for door in doors]
    return pytest.mark.parametrize(("content", "door"), pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini's policy as a checkpoint."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    to_megatron(ToMegatronConfig(hf=str(POLICY), save=str(folder)), say=lambda _: None)
    return folder


@pytest.fixture
def folder(whole: Path, here: Path) -> Path:
    return Path(shutil.copytree(whole, here / "checkpoint", copy_function=os.link))


@pytest.fixture
def model(here: Path) -> Path:
    return Path(shutil.copytree(POLICY, here / "model"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own, in which nothing may have run when the test is over."""
    global watched  # noqa: PLW0603 - an audit hook stays
    monkeypatch.chdir(tmp_path)
    started.clear()
    watched = True
    yield tmp_path
    watched = False
    assert not started
    assert not Path(CANARY).exists()


def put(path: Path, content: bytes) -> None:
    """Exchange a file, of which the folder has a hard link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def assert_refused(door: Door, folder: Path, *, naming: Path) -> None:
    with pytest.raises(PrismError) as caught:
        door(folder)
    message = str(caught.value)
    assert str(naming) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 700
    assert not Path("written").exists()


@pytest.fixture
def unwatched(here: Path) -> None:
    global watched  # noqa: PLW0603
    watched = False


@pytest.mark.parametrize("name", crafted.RUNNING)
def test_plain_pickle_would_run_them(name: str, extension: None, unwatched: None) -> None:
    """Claim: what is refused below would have run, so that "nothing ran" says something."""
    with contextlib.suppress(pickle.UnpicklingError, TypeError, EOFError):  # after the call
        pickle.loads(crafted.RUNNING[name])
    Path(CANARY).rmdir()


@pytest.mark.parametrize("name", crafted.RUN_BY_TORCH)
def test_torch_would_run_payloads(name: str, unwatched: None) -> None:
    """Claim: torch finds the payload there, wherever zipfile looks."""
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):  # the latter after the call
        warnings.simplefilter("ignore")
        torch.load(io.BytesIO(crafted.ARCHIVES[name]), weights_only=False)
    Path(CANARY).rmdir()


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension("posix", "mkdir", crafted.EXTENSION)
    assert pickle.loads(bytes([0x80, 2, 0x82, crafted.EXTENSION]) + b".") is os.mkdir
    yield
    copyreg.remove_extension("posix", "mkdir", crafted.EXTENSION)
    copyreg._extension_cache.clear()  # type: ignore[attr-defined]


@cases(crafted.RUNNING | crafted.CHANGING, CHECKPOINT_DOORS)
def test_a_crafted_index_is_refused(folder: Path, content: bytes, door: Door, extension: None) -> None:
    """Claim: also where only attributes of classes, functions and constants would be set: those are as before."""
    before = _MEM_FORMAT_ENCODING(0).value, torch.serialization._get_layout.cache  # type: ignore[attr-defined]
    put(folder / ".metadata", content)
    assert_refused(door, folder, naming=folder / ".metadata")
    assert (_MEM_FORMAT_ENCODING(0).value, torch.serialization._get_layout.cache) == before  # type: ignore[attr-defined]
    assert pathlib.PosixPath("x").is_symlink() is False
    assert not hasattr(torch.serialization, CANARY)
    assert StorageMeta().load_id is None is StorageMeta.load_id


@pytest.mark.parametrize("name", [name for name in crafted.RUNNING if not name.startswith("EXT")])
def test_the_fast_reader_refuses_by_itself(name: str, here: Path) -> None:
    """Claim: what the rehearsal took for something else would still find nothing to call."""
    guard = pickles._Guard(crafted.RUNNING[name], allowed=pickles._INDEX_GLOBALS, path=here)
    with pytest.raises(CheckpointError, match="would run"):
        guard.load()


@cases(crafted.RUNNING | crafted.CHANGING, {"load": CHECKPOINT_DOORS["load"], "to-hf": CHECKPOINT_DOORS["to-hf"]})
def test_a_crafted_pickle_in_an_archive_is_refused(folder: Path, content: bytes, door: Door, extension: None) -> None:
    put(folder / "common.pt", crafted.torch_archive(content))
    assert_refused(door, folder, naming=folder / "common.pt")


@cases(crafted.ARCHIVES, CHECKPOINT_DOORS)
def test_a_crafted_archive_is_refused(folder: Path, content: bytes, door: Door) -> None:
    put(folder / "common.pt", content)
    assert_refused(door, folder, naming=folder / "common.pt")


def test_empty_archives_pass(folder: Path) -> None:
    """Claim: the archives above are refused for what is in them, not for how these tests write archives."""
    for content in (crafted.torch_archive(crafted.EMPTY), crafted.saved({})):
        put(folder / "common.pt", content)
        check_objects(folder / "common.pt")
        read_checkpoint(folder)


def put_chunk(folder: Path, content: bytes) -> Path:
    """Make ``content`` the chunk of ``KEY``, in a data file of its own, and long enough to be one."""
    content = content.ljust(4096, b"\0")
    index: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    (where,) = (where for where in index.storage_data if where.fqn == KEY)
    index.storage_data[where] = dataclasses.replace(
        index.storage_data[where], relative_path="__9_9.distcp", offset=0, length=len(content)
    )
    put(folder / "__9_9.distcp", content)
    put(folder / ".metadata", pickle.dumps(index))
    return folder / "__9_9.distcp"


CHUNKS = (
    crafted.RUNNING
    | crafted.ARCHIVES
    | {f"{name}, zipped": crafted.torch_archive(crafted.RUNNING[name]) for name in crafted.RUNNING}
)


@cases(CHUNKS, {"read": lambda folder: TorchDistFolder(folder).read(KEY, 0, 1)})
def test_a_crafted_chunk_is_refused(folder: Path, content: bytes, door: Door, extension: None) -> None:
    """Claim: nor does what stands in the place of numbers run, or pass for them."""
    assert_refused(door, folder, naming=put_chunk(folder, content))


@cases({name: crafted.ARCHIVES[name] for name in crafted.RUN_BY_TORCH}, DATA_DOORS)
def test_a_crafted_chunk_is_refused_by_all(folder: Path, content: bytes, door: Door) -> None:
    assert_refused(door, folder, naming=put_chunk(folder, content))


@cases({"numbers twice": 0}, DATA_DOORS)
def test_numbers_that_can_be_read_in_two_ways_are_refused(folder: Path, content: int, door: Door) -> None:
    """Claim: what is converted and compared is what torch, and Megatron with it, would load."""
    size = TorchDistFolder(folder).shape(KEY)[0]
    chunk = crafted.numbers_twice(1.0, 2.0, size, TorchDistFolder(folder).dtype(KEY))
    assert torch.load(io.BytesIO(chunk), weights_only=True)[content] == 2.0
    assert_refused(door, folder, naming=put_chunk(folder, chunk))


@cases(crafted.STATES, CHECKPOINT_DOORS)
def test_a_crafted_state_is_refused(folder: Path, content: bytes, door: Door) -> None:
    put(folder / "state.json", content)
    assert_refused(door, folder, naming=folder)


@cases(crafted.BACKENDS, CHECKPOINT_DOORS)
def test_a_crafted_choice_of_readers_is_refused(folder: Path, content: bytes, door: Door) -> None:
    put(folder / "metadata.json", content)
    assert_refused(door, folder, naming=folder / "metadata.json")


@cases({"a rank's index": "__0.metadata", "an index of another name": "x.metadata"}, CHECKPOINT_DOORS)
def test_a_second_index_is_refused(folder: Path, content: str, door: Door) -> None:
    """Claim: torch would read a rank's own index with plain pickle where it cannot read that of all."""
    put(folder / content, crafted.RUNNING["protocol 2"])
    assert_refused(door, folder, naming=folder)


@cases(crafted.CONFIGS, {name: door for name, door in CHECKPOINT_DOORS.items() if name != "load"})
def test_a_crafted_config_in_a_checkpoint_is_refused(folder: Path, content: bytes, door: Door) -> None:
    put(files_folder(folder, "policy") / "config.json", content)
    assert_refused(door, folder, naming=folder)


@cases(crafted.CONFIGS, {name: door for name, door in MODEL_DOORS.items() if name != "check"})
def test_a_crafted_config_is_refused(model: Path, content: bytes, door: Door) -> None:
    put(model / "config.json", content)
    assert_refused(door, model, naming=model / "config.json")


@cases(crafted.WEIGHTS, MODEL_DOORS)
def test_crafted_weights_are_refused(model: Path, content: bytes, door: Door) -> None:
    put(model / "model.safetensors", content)
    assert_refused(door, model, naming=model)


@cases(crafted.TOKENIZERS, {"render": lambda folder: Renderer.from_folder(folder).prompt("x", "How many?", [])})
def test_a_crafted_tokenizer_is_refused(model: Path, content: tuple[str, bytes], door: Door) -> None:
    put(model / content[0], content[1])
    assert_refused(door, model, naming=model)


def test_code_that_a_model_brings_along_is_not_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: transformers is not left to ask the user whether to run it; the folder's tokenizer needs none."""
    (model / "evil.py").write_text(f"import os\nos.mkdir({CANARY!r})\nclass Evil: pass\n")
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    document = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(document | own))
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "n"

    monkeypatch.setattr(builtins, "input", answer)
    Renderer.from_folder(model)
    assert not asked


@cases(crafted.FLAGS, {"--config": lambda path: merge(AlignConfig(), read_yaml(path))})
def test_a_crafted_file_of_flags_is_refused(here: Path, content: bytes, door: Door) -> None:
    put(here / "flags.yaml", content)
    with pytest.raises(PrismError, match=r"flags\.yaml"):
        door(here / "flags.yaml")


JOURNALS = {
    "a pickle": crafted.RUNNING["protocol 4"],
    "a deep list": b"[" * 100_000 + b"\n",
    "no text": b"\xff\xfe\n",
    "a number of 5000 digits": b'{"fingerprint": ' + b"1" * 5000 + b"}\n",
}


@cases(JOURNALS, {"to-hf": CHECKPOINT_DOORS["to-hf"]})
def test_a_crafted_journal_is_no_work(folder: Path, content: bytes, door: Door) -> None:
    """Claim: what cannot be read of an earlier conversion is done again."""
    put_below(Path(".written.converting"), "journal.jsonl", content)
    door(folder)
    assert (Path("written") / "model.safetensors").is_file()


def put_below(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir()
    put(folder / name, content)


@pytest.mark.parametrize("link", ["", "/journal.jsonl", "/folder"])
def test_work_is_not_written_through_links(folder: Path, here: Path, link: str) -> None:
    """Claim: a work folder that somebody has laid out leads nowhere else: nothing there is emptied or filled."""
    work, mine = here / ".written.converting", here / "mine"
    put_below(mine, "journal.jsonl", b"precious")
    if link:
        work.mkdir()
    Path(f"{work}{link}").symlink_to(mine / "journal.jsonl" if link.endswith("jsonl") else mine)
    with pytest.raises(PrismError, match=r"is a link, .* remove it"):
        CHECKPOINT_DOORS["to-hf"](folder)
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == {"journal.jsonl": b"precious"}
