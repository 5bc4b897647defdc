"""ONNX Runtime, on a CPU and on a GPU. This file does not import it: that takes a while, and it may not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from par_runtime.errors import RequestError, how_to_install
from par_runtime.forks import no_fork
from par_runtime.stopping import later


@contextmanager
def importing(what: str, package: str = "onnxruntime", extra: str = "cpu") -> Iterator[None]:
    """Around the import of modules that import onnxruntime.

    Where that is missing, raises RequestError: ``what`` needs ``package``, of ``extra``.
    """
    try:
        with later(), no_fork():  # the lock of a module would stay locked in the forked process
            yield
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise RequestError(f"{what} needs {package}, which is not installed; {how_to_install(extra)}") from error
