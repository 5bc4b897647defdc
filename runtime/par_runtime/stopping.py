"""Ctrl-C and the signals that end a command, as exceptions, but never in the middle of an import.

An extension module that meets an exception while it is initialised may lose it: onnxruntime's then goes on as if
nothing had come, or raises an ImportError of its own. So a signal that comes during an import waits for its end.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_importing = 0  # imports of the main thread that are under way, one in another
_waiting: int | None = None  # the signal that came meanwhile


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, and SIGTERM and SIGHUP (a terminal that closes) SystemExit, so that
    unfinished files are removed.

    Does nothing outside of the main thread, which alone may set handlers, and for signals that are ignored, as nohup
    sets it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    numbers = [each for each in numbers if signal.getsignal(each) not in (signal.SIG_IGN, None)]
    previous = [signal.signal(each, _stop) for each in numbers]
    try:
        yield
    finally:
        for each, handler in zip(numbers, previous, strict=True):
            signal.signal(each, handler)


@contextmanager
def later() -> Iterator[None]:
    """Around an import: signals of :func:`exit_on_signals` wait for the end of the block, which then raises."""
    global _importing, _waiting
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread
        yield
        return
    _importing += 1
    try:
        yield
    finally:
        _importing -= 1
        if not _importing and _waiting is not None:
            number, _waiting = _waiting, None
            _end(number)


def _stop(number: int, _: FrameType | None) -> None:
    global _waiting
    if _importing:
        _waiting = number
    else:
        _end(number)


def _end(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
