"""A file that stays open, in a program that may close its descriptor.

What becomes a daemon closes every descriptor (``os.closerange``), also of files that it did not open. Then the number
is free, and the next file or socket of the program has it. Reading there would read that file, and closing it would
close that file. So who uses the descriptor looks first whether it is still of the file that was opened.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path

from par_runtime.checked import open_descriptor


class HeldFile:
    """The regular file ``path``, open to be read until :meth:`close`, or the end of this object. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._open = _Open()
        # Before there is anything to close, so that whatever interrupts this leaves no descriptor open.
        weakref.finalize(self, self._open.close).atexit = False  # a daemon thread may still be in a call
        self._open.file(path)

    def status(self) -> os.stat_result | None:
        """What the system says of the file now; None where it is closed, or the program closed its descriptor."""
        return self._open.status()

    @property
    def descriptor(self) -> int:
        """Its number, for reading right after :meth:`status` found the file."""
        return self._open.descriptors[0]

    def close(self) -> None:
        """Close it; a second call does nothing, and so does one after the program closed the descriptor."""
        self._open.close()


class _Open:
    """What of a :class:`HeldFile` is needed to close it, once that is gone."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []  # one
        self._identity: tuple[int, int] | None = None

    def file(self, path: Path) -> None:
        open_descriptor(path, self.descriptors)
        found = os.fstat(self.descriptors[0])
        _latest[self.descriptors[0]] = self
        self._identity = (found.st_dev, found.st_ino)

    def status(self) -> os.stat_result | None:
        for descriptor in self.descriptors:
            with suppress(OSError):
                found = os.fstat(descriptor)
                if _latest.get(descriptor) is self and (found.st_dev, found.st_ino) == self._identity:
                    return found
        return None

    def close(self) -> None:
        ours = self._identity is None or self.status() is not None
        for descriptor in self.descriptors:
            if ours:
                os.close(descriptor)
        # Afterwards: if this is interrupted in between, a second call finds that the descriptor is no longer ours.
        self.descriptors.clear()


#: descriptor -> who got it last. A bundle that is loaded again after the program closed everything may get the same
#: number for the same file. Nothing is taken out, as there are never more entries than descriptors.
_latest: dict[int, _Open] = {}
