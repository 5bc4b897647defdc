"""Loading what was compiled of this folder: ``step.c`` and ``decoder.c`` are libraries of their own."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from par_runtime.reading import REMEDIES

NOT_BUILT = "the C kernels were not built: no compiler was there at installation"
OTHER_CPU = "this CPU has neither AVX2 nor NEON of 64-bit ARM, which the C kernels need"
OTHER_SOURCES = "the C kernels were built from other sources than this Python package; install parvis again"
#: What the system lacked at that moment, as the dynamic linker says it -> what to do.
_PASSING = {os.strerror(number): REMEDIES[number] for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)}


class KernelError(Exception):
    """A compiled library cannot be used; the message is the reason. ``passing``: it may be loaded another time."""

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


def compiled_file(name: str) -> Path | None:
    """The compiled library ``name`` beside this file; None where the installation built none."""
    names = (Path(__file__).parent / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in names if path.is_file()), None)


def open_compiled(
    file: Path | None, declare: Callable[[ctypes.CDLL], None], prefix: str, sizes: Sequence[int]
) -> ctypes.CDLL:
    """Load ``file``, declare its functions, and check that its structures have the ``sizes`` of those in Python.

    ``declare`` raises AttributeError for a function that is not there. ``prefix``: of the names ``struct_sizes`` and
    ``instructions``, which every library has. Raises KernelError.
    """
    if file is None:
        raise KernelError(NOT_BUILT)
    try:
        lib = ctypes.CDLL(str(file))
    except OSError as error:  # the dynamic linker's, which has no number
        why = " ".join(str(error).split()).removeprefix(f"{file}: ")
        remedy = next((remedy for words, remedy in _PASSING.items() if words in why), None)
        message = f"{file} cannot be loaded ({why})" + (f"; {remedy}" if remedy else "")
        raise KernelError(message, passing=remedy is not None) from error
    try:
        declare(lib)
    except AttributeError as error:
        raise KernelError(OTHER_SOURCES) from error
    found = (ctypes.c_int64 * len(sizes))()
    getattr(lib, f"{prefix}struct_sizes")(found)
    if list(found) != list(sizes):
        raise KernelError(OTHER_SOURCES)
    if not getattr(lib, f"{prefix}instructions")():
        raise KernelError(OTHER_CPU)
    return lib


def once(
    opens: Callable[[Path | None], ctypes.CDLL],
) -> Callable[[Path | None], ctypes.CDLL | KernelError]:
    """``opens`` with its error as a result, so that both are kept; but for an error that may pass."""
    kept: dict[Path | None, ctypes.CDLL | KernelError] = {}

    @wraps(opens)
    def opened(file: Path | None) -> ctypes.CDLL | KernelError:
        if file in kept:
            return kept[file]
        try:
            found: ctypes.CDLL | KernelError = opens(file)
        except KernelError as error:
            if error.passing:
                return error
            found = error
        return kept.setdefault(file, found)

    return opened
