"""The folder and the session of a command that trains nothing, and that the same command may go on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from prism_megatron.disk import writing
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.parallel.collectives import on_main
from prism_megatron.run.alone import alone_in, remove_unused
from prism_megatron.run.folder import folder_of_new_run
from prism_megatron.run.session import Session


@contextmanager
def result_folder(world: World, output: Path | None, *, kind: str, check: Callable[[], None]) -> Iterator[Path]:
    """The command's own folder: ``output``, or a new one below ``runs/``, which is named after ``kind``.

    All ranks call it together. Nobody else writes to the folder meanwhile; ``check`` is called once that is so. One
    that was not there before is removed again where the command is refused and has left nothing in it.
    Raises ConfigError where another command is at work there, DiskError where it cannot be made, and as ``check``.
    """
    with ExitStack() as held:
        folder, is_new = on_main(partial(_claim, held, output, kind))
        try:
            on_main(check)
            yield folder
        except PrismError:
            if world.is_main and is_new:
                remove_unused(folder)
            raise


@contextmanager
def session_in(world: World, folder: Path) -> Iterator[Session]:
    """A session that has begun, and inside of which a signal is a wish. All ranks call it together."""
    session = Session(world, folder)
    session.begin()
    with session.stopping, closing(session):
        yield session


def _claim(held: ExitStack, output: Path | None, kind: str) -> tuple[Path, bool]:
    """The folder, of which ``held`` lets go, and whether it was not there before."""
    with writing(output or Path("runs")):
        folder = folder_of_new_run(kind) if output is None else output
        is_new = output is None or not output.exists()
    held.enter_context(alone_in(folder, command=f"prism-{kind}"))
    return folder, is_new
