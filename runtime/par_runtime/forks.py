"""What a process made by fork() must know: which objects were made by the process that it was copied from. And what
the end of Python must wait for, since it ends daemon threads as fork() does: wherever they are.

fork() copies memory, but only one thread. A pool of threads is empty in the new process, a lock that another thread
held stays locked there, and a GPU cannot be used at all. So objects that hold such things are told. Web servers fork
after loading (gunicorn with ``preload_app``), and so does ``multiprocessing`` with the start method "fork".
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

#: How long a fork waits for other threads in :func:`no_fork`.
FORK_SECONDS = 60.0
#: How long Python waits at its end for daemon threads in :func:`no_fork` or in :class:`Calls`.
END_SECONDS = 30.0


class Forkable(Protocol):
    """An object that must know when its process is a copy."""

    def after_fork(self) -> None:
        """Called in the new process, before any other code there. It must be quick, and wait for nothing."""
        ...


#: By id, since such objects need not be hashable.
_told: weakref.WeakValueDictionary[int, Forkable] = weakref.WeakValueDictionary()


def tell_of_forks(instance: Forkable) -> None:
    """Call ``instance.after_fork()`` in every process that is forked from this one, as long as the instance lives."""
    _told[id(instance)] = instance


@contextmanager
def no_fork() -> Iterator[None]:
    """While a thread is in here, ``os.fork()`` of another thread waits, and so does the end of Python.

    For what holds locks that cannot be made anew in the forked process, where they would stay locked: importing a
    module, opening a session of ONNX Runtime. Several threads may be in here at a time.
    """
    me = threading.get_ident()
    with _gate:
        _inside[me] = _inside.get(me, 0) + 1
    try:
        stop_at_the_end()
        yield
    finally:
        with _gate:
            _inside[me] -= 1
            if not _inside[me]:
                del _inside[me]
            _gate.notify_all()


_gate = threading.Condition()  #: of _inside; held during a fork
_inside: dict[int, int] = {}  #: thread -> how many times it is in no_fork


def _wait() -> None:
    _gate.acquire()
    me = threading.get_ident()  # a handler of a signal may fork in the middle of anything
    _gate.wait_for(lambda: not _inside.keys() - {me}, FORK_SECONDS)


def _go_on() -> None:
    with suppress(RuntimeError):  # Ctrl-C came before it was held
        _gate.release()


class Calls:
    """Threads that are in a call of a library, whose locks they hold. ``with calls:`` around each such call.

    Python waits at its end for those of daemon threads: it ends such threads wherever they are, and where that is in
    the C++ of ONNX Runtime, the process is aborted.
    """

    def __init__(self) -> None:
        self._threads: set[int] = set()
        _all_calls.add(self)

    def __enter__(self) -> None:
        self._threads.add(threading.get_ident())
        try:
            stop_at_the_end()
        except SystemExit:
            self._threads.discard(threading.get_ident())
            raise

    def __exit__(self, *_: object) -> None:
        self._threads.discard(threading.get_ident())

    def of_others(self) -> bool:
        """Whether another thread is in a call."""
        return bool(self._threads - {threading.get_ident()})

    def lost_in_fork(self) -> bool:
        """In a forked process: whether another thread was in a call, which will never end here."""
        lost = self.of_others()
        self._threads &= {threading.get_ident()}
        return lost


_all_calls: weakref.WeakSet[Calls] = weakref.WeakSet()
_ending = False  #: Python is


def stop_at_the_end() -> None:
    """Raise SystemExit where Python is ending, except in the main thread: before a thread goes into a library again.

    Long methods call it between two steps.
    """
    if _ending and threading.current_thread() is not threading.main_thread():
        raise SystemExit("Python is ending")


@atexit.register
def _end() -> None:
    global _ending
    _ending, until, me = True, time.monotonic() + END_SECONDS, threading.get_ident()
    while time.monotonic() < until and (_inside.keys() - {me} or any(calls.of_others() for calls in list(_all_calls))):
        time.sleep(0.005)


def _tell() -> None:
    global _gate
    _gate = threading.Condition()
    for thread in _inside.keys() - {threading.get_ident()}:
        del _inside[thread]
    _end_at_once()
    for instance in list(_told.values()):
        instance.after_fork()


def _end_at_once() -> None:
    """Let this process end without the destructors of what was loaded before the fork, as multiprocessing's do.

    ONNX Runtime (1.32) starts a thread when it is imported, and its destructor waits for it. Python has ended in order
    before: this is about the exit handlers of C, of which the last registered is called first.
    """
    if "onnxruntime" not in sys.modules:
        return
    with suppress(OSError, AttributeError):  # on_exit is glibc's: other libraries do not wait there
        c = ctypes.CDLL(None)
        c.on_exit(c._exit, None)  # called with the exit code
        c.__cxa_atexit(c.fflush, None, None)  # before that: all streams of C


def keep_forever(*objects: object) -> None:
    """Never free ``objects``, not even when Python exits: their destructors would wait for threads that do not exist in
    this process, or call a driver that cannot be used here."""
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait, after_in_parent=_go_on, after_in_child=_tell)
