"""The threads of a compiled library (pool.h), held so that none are lost."""

from __future__ import annotations

import ctypes


class Pool:
    """Up to ``threads`` threads of a library, until :meth:`close` or the end of this object. ``handle`` is what the
    library's functions take; ``prefix``: of the names ``pool_open`` and ``pool_close``.

    The handler of a signal is called between a call and the storing of its result. Where it raises, threads whose
    address was that result would stay for the life of the process. So C writes it into memory that is held before.
    Raises MemoryError.
    """

    def __init__(self, lib: ctypes.CDLL, prefix: str, threads: int) -> None:
        self.handle = ctypes.c_void_p()
        self._at, self._closes = ctypes.byref(self.handle), getattr(lib, f"{prefix}pool_close")
        getattr(lib, f"{prefix}pool_open")(threads, self._at)
        if not self.handle:
            raise MemoryError(f"{threads} threads: no memory for their pool")

    def close(self) -> None:
        """End the threads; a second call does nothing."""
        self._closes(self._at)

    def __del__(self) -> None:
        if hasattr(self, "_closes"):
            self.close()
