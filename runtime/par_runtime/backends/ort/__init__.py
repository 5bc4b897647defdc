"""ONNX Runtime, on a CPU and on a GPU. This file does not import it: that takes a while, and it may not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from par_runtime.errors import RequestError, how_to_install

#: What Linux and macOS say where no addresses are left for a library.
NO_ROOM = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")


@contextmanager
def needing(what: str, package: str = "onnxruntime", extra: str = "cpu") -> Iterator[None]:
    """Around what imports onnxruntime, itself within ``late.importing``.

    Raises MemoryError where there is no room for it. Where it is missing, raises RequestError: ``what`` needs
    ``package``, of ``extra``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise RequestError(f"{what} needs {package}, which is not installed; {how_to_install(extra)}") from error
    except ImportError as error:
        if not any(words in str(error) for words in NO_ROOM):
            raise
        raise MemoryError(f"{package} cannot be loaded; see ulimit -v") from error
