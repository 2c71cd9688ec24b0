"""What stands around every command: how it meets the terminal, and how Ctrl-C ends it.

Standard output and error take any character, and lose their reader without a word. Ctrl-C is one line and status 130.
Imports the standard library alone: all else is imported inside, where Ctrl-C is heard already.
"""

from __future__ import annotations

import _thread
import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

INTERRUPTED = 128 + signal.SIGINT
"""The status of a command that Ctrl-C ended before it had anything to keep."""

INTERRUPTED_TEXT = "interrupted"

_GONE = {errno.EPIPE, errno.EIO}
"""A reader that has gone: of a pipe, of a terminal."""
_AGAIN_SECONDS = 0.05


class Terminal(io.TextIOWrapper):
    """A standard stream. What cannot be encoded becomes a replacement; what nobody reads goes nowhere."""

    lost: OSError | None = None
    """why nothing is written any more"""
    _before: io.TextIOWrapper | None = None
    """what would close the file if it went; loggers may hold it too"""

    @classmethod
    def over(cls, stream: object) -> Terminal | None:
        """The same stream, tolerant; None for one that is closed, or that is no file."""
        if isinstance(stream, cls):
            return stream
        if not isinstance(stream, io.TextIOWrapper) or stream.closed:
            return None
        own = cls(
            stream.buffer,
            encoding=stream.encoding,
            errors="replace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        own._before = stream
        return own

    @property
    def is_read(self) -> bool:
        """False once its reader has gone away, as ``head`` does."""
        return self.lost is None

    def write(self, text: str) -> int:
        """All of ``text``, or nothing where nobody reads it."""
        with self._losing():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """As of any stream."""
        with self._losing():
            super().flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = error
            # What is left in the buffer would be an error again, at the end of the process at the latest.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)


def tolerate() -> None:
    """Make this process's standard streams :class:`Terminal` s; one that was closed leads nowhere."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # Else the next file that is opened would be standard output.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # for as long as the process
        own = Terminal.over(stream)
        if own is not None:
            setattr(sys, name, own)


def guarded(main: Callable[[], int | None]) -> int:
    """The exit status of ``main()``: 130, after one line, where Ctrl-C ended it; 1 where its output was not written."""
    tolerate()
    sys.unraisablehook = partial(_unraisable, before=sys.unraisablehook)
    try:
        status = main() or 0
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(INTERRUPTED_TEXT, file=sys.stderr, flush=True)
        status = INTERRUPTED
    finally:
        # Nothing is left to tidy: another Ctrl-C, while libraries shut down, ends the process without a trace of them.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost is not None and lost.errno not in _GONE:
        print(f"error: standard output cannot be written: {lost.strerror}", file=sys.stderr, flush=True)
        return status or 1
    return status


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: libraries may answer an interrupt with an error of their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _unraisable(caught: sys.UnraisableHookArgs, *, before: Callable[[sys.UnraisableHookArgs], object]) -> None:
    """Ctrl-C that fell into a place that cannot raise, such as a finaliser, is heard again a little later."""
    if caught.exc_type is KeyboardInterrupt:
        again = threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        before(caught)


def run(name: str) -> int:
    """The exit status of ``prism_megatron.commands.NAME``, which is imported here."""
    return guarded(lambda: importlib.import_module(f"prism_megatron.commands.{name}").main())


(
    align,
    warm_start,
    convert,
    serve,
    verify,
    make_random,
    report,
    data,
    sft,
    rlvr,
    select_prompts,
    verify_answers,
    evaluate,
    drift,
    visual_reliance,
    pipeline,
    curate,
    make_pairs,
    plan,
) = (
    partial(run, name)
    for name in (
        "align",
        "warm_start",
        "convert",
        "serve",
        "verify",
        "make_random",
        "report",
        "data",
        "sft",
        "rlvr",
        "select_prompts",
        "verify_answers",
        "evaluate",
        "drift",
        "visual_reliance",
        "pipeline",
        "curate",
        "make_pairs",
        "plan",
    )
)
"""The console scripts."""
