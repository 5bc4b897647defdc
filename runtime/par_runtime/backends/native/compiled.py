"""Loading what was compiled of this folder: ``step.c`` and ``decoder.c`` are libraries of their own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NOT_BUILT = "the C kernels were not built, or this CPU has neither AVX2 nor NEON of 64-bit ARM"
OTHER_SOURCES = "the C kernels were built from other sources than this Python package; install parvis again"


class KernelError(Exception):
    """A compiled library cannot be used; the message is the reason."""


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
    except OSError as error:
        raise KernelError(NOT_BUILT) from error
    try:
        declare(lib)
    except AttributeError as error:
        raise KernelError(OTHER_SOURCES) from error
    found = (ctypes.c_int64 * len(sizes))()
    getattr(lib, f"{prefix}struct_sizes")(found)
    if list(found) != list(sizes):
        raise KernelError(OTHER_SOURCES)
    if not getattr(lib, f"{prefix}instructions")():
        raise KernelError(NOT_BUILT)
    return lib
