"""A whole seed in one file: what its figures are made of, without its policies.

Seeds of one registration may be run on several machines, and put together by a folder of such files. A file is the same
whoever writes it; nothing is read from it but the names that a seed has.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_megatron.config.experiments.effect import Registration
from prism_megatron.config.merge import to_plain
from prism_megatron.disk import folder_beside, writing
from prism_megatron.errors import DataError
from prism_megatron.experiments.effect.answers import ANSWERS, RESPONSES
from prism_megatron.experiments.effect.seed import DONE, FAITHFUL, TAUGHT, arms_of, folder_of, is_done, texts_of

_REGISTERED = "registered.json"
_MAX_BYTES = 2**24


def archive_of(folder: Path, seed: int) -> Path:
    """The file of a seed."""
    return folder / f"seed-{seed}.tar.xz"


def is_whole(output: Path, registered: Registration, seed: int) -> bool:
    """Whether every arm of the seed is done in ``output``."""
    place = registered.seeds.index(seed)
    return all(is_done(folder_of(output, seed, arm)) for arm in arms_of(registered, place))


def pack(output: Path, registered: Registration, seed: int, target: Path) -> None:
    """Write a whole seed's file, in one rename. Raises DiskError."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.part")
        with tarfile.open(aside, "w:xz", format=tarfile.PAX_FORMAT, preset=9) as file:
            _add(file, _REGISTERED, _text_of(registered))
            for name in _names(registered, seed):
                _add(file, name, (output / name).read_bytes())
        aside.replace(target)


def unpack(archive: Path, output: Path, registered: Registration, seed: int) -> None:
    """Put a seed's file into ``output``, whole or not at all, in place of what is there of that seed.

    Raises DataError for a file of another registration, or one that lacks something or cannot be read; DiskError.
    """
    with _reading(archive), tarfile.open(archive, "r:xz") as file:
        if _member(file, _REGISTERED) != _text_of(registered):
            raise DataError(f"{archive} is of another registration; name another --archive")
        found = {name: _member(file, name) for name in _names(registered, seed)}
    target = output / f"seed-{seed}"
    with writing(target):
        output.mkdir(parents=True, exist_ok=True)
        aside = folder_beside(target)
        for name, content in found.items():
            path = aside / Path(name).relative_to(target.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if target.exists():
            target.rename(folder_beside(target) / target.name)
        aside.rename(target)


def _names(registered: Registration, seed: int) -> Iterator[str]:
    """Files of a whole seed below the experiment's folder; what says that an arm is done comes last of it."""
    here = Path()
    for name in (FAITHFUL, TAUGHT):
        yield str(texts_of(here, seed, name))
    for arm in arms_of(registered, registered.seeds.index(seed)):
        for name in (ANSWERS, RESPONSES, DONE):
            yield str(folder_of(here, seed, arm) / name)


def _text_of(registered: Registration) -> bytes:
    return json.dumps(to_plain(registered), indent=1, sort_keys=True).encode()


def _add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def _member(file: tarfile.TarFile, name: str) -> bytes:
    found = file.extractfile(name)
    content = None if found is None else found.read(_MAX_BYTES + 1)
    if content is None or len(content) > _MAX_BYTES:
        raise DataError(f"{name} in an archive is no file of at most {_MAX_BYTES} bytes")
    return content


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, KeyError, tarfile.TarError, lzma.LZMAError) as error:
        raise DataError(
            f"{archive} is no whole seed of this registration: {error}; remove it to run the seed"
        ) from error
