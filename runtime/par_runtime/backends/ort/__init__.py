"""ONNX Runtime, on a CPU and on a GPU. This file does not import it: that takes a while, and it may not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from par_runtime.errors import RequestError, how_to_install
from par_runtime.forks import no_fork
from par_runtime.stopping import later

#: What Linux and macOS say where no addresses are left for a library.
NO_ROOM = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")


@contextmanager
def importing(what: str, package: str = "onnxruntime", extra: str = "cpu") -> Iterator[None]:
    """Around the import of modules that import onnxruntime.

    Raises MemoryError where there is no room for it. Where it is missing, raises RequestError: ``what`` needs
    ``package``, of ``extra``.
    """
    try:
        with later(), no_fork():  # the lock of a module would stay locked in the forked process
            yield
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise RequestError(f"{what} needs {package}, which is not installed; {how_to_install(extra)}") from error
    except ImportError as error:
        if not any(words in str(error) for words in NO_ROOM):
            raise
        raise MemoryError(f"{package} cannot be loaded; see ulimit -v") from error
