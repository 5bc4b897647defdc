"""Ctrl-C and the signals that end a command, as exceptions, but never in the middle of an import or a foreign call.

An extension module that meets an exception while it is initialised may lose it: onnxruntime's then goes on as if
nothing had come, or raises an ImportError of its own. TensorRT calls Python to log; an exception there is lost, or
ends the process. So a signal that comes meanwhile waits for the end.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, and SIGTERM and SIGHUP (a terminal that closes) SystemExit, so that
    unfinished files are removed.

    Does nothing outside of the main thread, which alone may set handlers, and for signals that are ignored, as nohup
    sets it, or handled by the program that calls this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    previous = {each: signal.signal(each, _stop) for each in _NUMBERS if signal.getsignal(each) in defaults}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


class Waiting:
    """What :func:`later` yields."""

    came: int | None = None  #: the first signal that waits for the end of the block


@contextmanager
def later() -> Iterator[Waiting]:
    """Signals that would end the process, or that have handlers, wait for the end of the block, and do then what they
    would have done. In other threads than the main one, where no handler runs, it does nothing.
    """
    waiting = Waiting()
    if threading.current_thread() is not threading.main_thread():
        yield waiting
        return

    def wait(number: int, _: FrameType | None) -> None:
        waiting.came = waiting.came or number

    free = (signal.SIG_IGN, None)  # None: set by another language, and not to be set again by this one
    previous = {each: signal.signal(each, wait) for each in _NUMBERS if signal.getsignal(each) not in free}
    try:
        yield waiting
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
        if waiting.came is not None:
            handler = previous[signal.Signals(waiting.came)]
            if callable(handler):
                handler(waiting.came, None)
            else:
                signal.raise_signal(waiting.came)


def _stop(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
