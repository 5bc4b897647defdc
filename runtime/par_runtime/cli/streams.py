"""Standard output and standard error as they are: closed, full, without a reader, or with few characters.

What a verb writes to files matters more than what it prints: text that cannot be printed never stops the work and is
never a traceback. Text that was lost is reported at the end.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TextIO, cast

#: Writes a character that a stream does not have as \\xfc, \\u0142 or \\udcfc (a byte of a path that is no UTF-8).
ESCAPED = "backslashreplace"


@contextmanager
def steady() -> Iterator[Callable[[], str]]:
    """Make printing safe while a verb runs.

    A character that a stream cannot write is written as a backslash escape. A stream that is closed, full or without a
    reader takes text and drops it. Gives a function that states why text for standard output was lost; "" where it was
    not, or where its reader only stopped reading.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    (sys.stdout, output, undo_output), (sys.stderr, _, undo_error) = _steady(before[0], 1), _steady(before[1], 2)

    def lost() -> str:
        sys.stdout.flush()
        error = None if output is None else output.error
        return "" if error is None or error.errno == errno.EPIPE else error.strerror or str(error)

    try:
        yield lost
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        sys.stdout, sys.stderr = before
        undo_output()
        undo_error()


class _Lenient(io.RawIOBase):
    """A file descriptor that takes everything. The first failed write is kept in ``error``; what follows is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while self.error is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # a terminal or a pipe that another program set so; its reader is slow
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.error = error
        return len(data)


def _steady(stream: TextIO | None, number: int) -> tuple[TextIO, _Lenient | None, Callable[[], None]]:
    """A stream in place of ``stream``, its descriptor, and what undoes the change.

    A stream that is not a file of the system (in a test, in a notebook) only gets the escapes.
    """
    if stream is None:  # closed when Python started
        lenient = _Lenient(number)
        return (
            io.TextIOWrapper(cast(BinaryIO, io.BufferedWriter(cast(io.RawIOBase, lenient))), "utf-8", ESCAPED),
            lenient,
            lambda: None,
        )
    if type(stream) is not io.TextIOWrapper:
        errors = getattr(stream, "errors", None)
        if not isinstance(stream, io.TextIOWrapper) or errors is None:
            return stream, None, lambda: None
        stream.reconfigure(errors=ESCAPED)
        return stream, None, lambda: stream.reconfigure(errors=errors)
    with suppress(OSError):
        stream.flush()
    lenient = _Lenient(stream.fileno())
    text = io.TextIOWrapper(
        cast(BinaryIO, io.BufferedWriter(cast(io.RawIOBase, lenient))),
        stream.encoding,
        ESCAPED,
        line_buffering=stream.line_buffering or number == 2,
    )
    return text, lenient, lambda: None


def _open_closed_descriptors() -> None:
    """Open the null device where standard input, output or error are closed.

    Otherwise the next file that is opened gets their number, and what a library in C prints is written into that file.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
