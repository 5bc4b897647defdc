"""Ctrl-C and the signals that end a command, as exceptions, but never in the middle of an import or a foreign call.

An extension module that meets an exception while it is initialised may lose it: onnxruntime's then goes on as if
nothing had come, or raises an ImportError of its own. TensorRT calls Python to log; an exception there is lost, or
ends the process. So a signal that comes meanwhile waits for the end.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]

#: Signals whose default is that nothing happens: on one of these, Python's own handler can be looked at.
_HARMLESS = ("SIGURG", "SIGWINCH", "SIGCHLD")
_address: int | None = None  #: of the function that Python lets the system call, once it is known


def _in_the_system(number: int) -> int:
    """What the system calls when the signal comes: an address, 0 for its default, 1 for nothing."""
    ask = ctypes.pythonapi.PyOS_getsig
    ask.argtypes, ask.restype = [ctypes.c_int], ctypes.c_void_p
    return ask(number) or 0


def _pythons_address() -> int | None:
    """The function that Python lets the system call for all signals with handlers; None where it cannot be found."""
    global _address
    for name in _HARMLESS if _address is None else ():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL and not _in_the_system(number):
            signal.signal(number, lambda *_: None)
            _address = _in_the_system(number)
            signal.signal(number, signal.SIG_DFL)
            break
    return _address


def _is_pythons(number: int) -> bool:
    """Whether the handler of a signal is the one that Python knows.

    Libraries in C set theirs in its place (crash reporters, Qt, ROS, faulthandler.register), and Python is not told:
    setting "the handler that there was" would remove theirs for good.
    """
    known, address = signal.getsignal(number), _pythons_address()
    if known is None or address is None:
        return known is not None
    return _in_the_system(number) == (address if callable(known) else int(known))


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, and SIGTERM and SIGHUP (a terminal that closes) SystemExit, so that
    unfinished files are removed.

    Does nothing outside of the main thread, which alone may set handlers, and for signals that are ignored, as nohup
    sets it, or handled by the program that calls this one, in Python or in C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    mine = [each for each in _NUMBERS if signal.getsignal(each) in defaults and _is_pythons(each)]
    previous = {each: signal.signal(each, _stop) for each in mine}
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
    would have done. Handlers in C stay as they are: they raise no exceptions. In other threads than the main one, where
    no handler runs, it does nothing.
    """
    waiting = Waiting()
    if threading.current_thread() is not threading.main_thread():
        yield waiting
        return

    def wait(number: int, _: FrameType | None) -> None:
        waiting.came = waiting.came or number

    waits = [each for each in _NUMBERS if signal.getsignal(each) is not signal.SIG_IGN and _is_pythons(each)]
    previous = {each: signal.signal(each, wait) for each in waits}
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
