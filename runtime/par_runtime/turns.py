"""One call at a time: for an object that several threads share, and whose methods use the same buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from par_runtime.errors import RequestError
from par_runtime.forks import Calls, tell_of_forks

P = ParamSpec("P")
T = TypeVar("T")


class Turn:
    """Whose turn it is: the lock of an object, the thread that has it, and whether the object was closed."""

    def __init__(self, what: str) -> None:
        """``what``: names the object in errors, for instance "the pipeline of models/demo"."""
        self._what = what
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._doing = ""
        self.closed = False
        self._freed = False  # by close(), to its end
        self._calls = Calls()  # the end of Python waits for the thread in a method
        tell_of_forks(self)

    def run(self, name: str, work: Callable[[], T], *, inside: bool, closed: bool = False) -> T:
        """Call ``work``, the method ``name``, when no other thread is in a method; returns its result.

        The thread whose turn it is already, so one that is in a callback, goes on at once where the method may run
        ``inside`` another. Raises RequestError where it may not, or where the object was closed and the method may not
        run then (``closed``).
        """
        lock = self._lock
        if self._owner == threading.get_ident() and lock.locked():
            if not inside:
                raise RequestError(
                    f"{name}() was called inside a callback of {self._doing}(), on the same pipeline, whose buffers "
                    f"are in use. Call it after {self._doing}() has returned, or load a second pipeline"
                )
            return work()
        with lock:  # not acquire(): between that and a try, Ctrl-C would leave it locked
            try:
                self._owner, self._doing = threading.get_ident(), name
                if self.closed and not closed:
                    raise RequestError(f"{name}(): {self._what} was closed; load it again with Pipeline.load")
                with self._calls:
                    return work()
            finally:
                self._owner = None

    def close(self, free: Callable[[], None]) -> None:
        """Call ``free`` when no thread is in a method. Later calls do nothing, once it has returned: one that was
        interrupted, or failed, is made again.
        """

        def last() -> None:
            if not self._freed:
                self.closed = True
                free()
                self._freed = True

        if not self._freed:
            self.run("close", last, inside=False, closed=True)

    def check_open(self, name: str) -> None:
        """Raise RequestError where the object was closed."""
        if self.closed:
            raise RequestError(f"{name}: {self._what} was closed; load it again with Pipeline.load")

    @property
    def mine(self) -> bool:
        """Whether this thread is in a method."""
        return self._owner == threading.get_ident()

    def after_fork(self) -> None:
        """A lock that another thread held would stay locked in this process, where that thread does not exist."""
        self._calls.lost_in_fork()
        if not self.mine:
            self._lock, self._owner = threading.Lock(), None


class HasTurn(Protocol):
    """An object whose methods take turns."""

    _turn: Turn


S = TypeVar("S", bound=HasTurn)


def one_at_a_time(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method that waits until no other thread is in a method of the object. Not inside a callback: RequestError."""

    @wraps(method)
    def alone(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._turn.run(method.__name__, lambda: method(self, *args, **kwargs), inside=False)

    return alone


def also_inside(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """As :func:`one_at_a_time`, for a method that may also be called inside a callback of another one."""

    @wraps(method)
    def alone(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._turn.run(method.__name__, lambda: method(self, *args, **kwargs), inside=True)

    return alone
