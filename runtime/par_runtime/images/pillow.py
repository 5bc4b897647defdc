"""What Pillow does to the whole process: it warns, and imports its readers and writers at the first picture."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from par_runtime.forks import tell_of_forks
from par_runtime.late import importing_others

_ready = False  #: Pillow has imported all


class _Quiet:
    """The threads whose warnings are left out, and the filter of ``warnings`` that leaves them out.

    Not warnings.catch_warnings(), which puts back what it found: of two threads at once, one finds the filter of the
    other, and puts that back for ever. Here the filter is there from the first thread until the last, stands for
    these threads alone, and nothing but it is taken away: what others add to the filters meanwhile stays.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a handler of a signal may read a picture, too
        self._threads: dict[int, int] = {}  #: how many times each is inside
        self._lists: list[list[Any]] = []  #: where the filter was added: catch_warnings() of others makes new lists
        # Action, message, category, module, line; of the module, `warnings` calls the method match.
        self._filter = ("ignore", None, Warning, self, 0)
        tell_of_forks(self)

    def match(self, _module: str) -> bool:
        """Whether a warning is left out: whether the thread that warns is inside."""
        return threading.get_ident() in self._threads

    def enter(self) -> None:
        with self._lock:
            thread = threading.get_ident()
            self._threads[thread] = self._threads.get(thread, 0) + 1
            filters: list[Any] = warnings.filters  # type: ignore[assignment]
            if not filters or filters[0] != self._filter:  # others may have put theirs in front
                # Without a word to `warnings`, which would forget what it has said once.
                filters.insert(0, self._filter)
                self._lists.append(filters)

    def leave(self) -> None:
        with self._lock:
            thread = threading.get_ident()
            left = self._threads.pop(thread, 1) - 1  # 1: Ctrl-C came before it had entered
            if left:
                self._threads[thread] = left
            self._remove()

    def _remove(self) -> None:
        """Take the filter away, unless a thread is inside."""
        if self._threads:
            return
        copied: list[Any] = warnings.filters  # type: ignore[assignment]
        for filters in (*self._lists, copied):
            while self._filter in filters:
                filters.remove(self._filter)
        self._lists.clear()

    def after_fork(self) -> None:
        """Other threads are not in this process, and never leave."""
        self._lock = threading.RLock()
        me = threading.get_ident()
        self._threads = {thread: count for thread, count in self._threads.items() if thread == me}
        self._remove()


_quiet = _Quiet()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of this thread: Pillow's, of odd metadata, and of large pictures, whose size is checked
    here. Those of other threads are said, and the filters are afterwards what they were.
    """
    try:
        _quiet.enter()
        yield
    finally:
        _quiet.leave()


def ready() -> None:
    """Let Pillow import its readers and writers, unless it has: to be called before anything that may need one.

    Pillow would import them in the middle of what it does, where a fork would not wait for it. They take a while, so
    what handles no picture does not wait for them.
    """
    global _ready
    if not _ready:
        with importing_others():
            Image.init()
        _ready = True
