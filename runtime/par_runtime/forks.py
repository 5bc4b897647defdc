"""What a process made by fork() must know: which objects were made by the process that it was copied from.

fork() copies memory, but only one thread. A pool of threads is empty in the new process, a lock that another thread
held stays locked there, and a GPU cannot be used at all. So objects that hold such things are told. Web servers fork
after loading (gunicorn with ``preload_app``), and so does ``multiprocessing`` with the start method "fork".
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from contextlib import suppress
from typing import Protocol


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


def _tell() -> None:
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
    os.register_at_fork(after_in_child=_tell)
