"""Imports inside functions: of what takes long, or may be missing. No fork and no signal may come in their middle."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from par_runtime.forks import no_fork
from par_runtime.stopping import later


@contextmanager
def importing(*modules: str) -> Iterator[None]:
    """Around each import inside a function: of ``modules``, by their whole names.

    The lock of a module that one thread imports would stay locked in a process that another one forks, and that
    process would wait for it for ever. Where all of them are imported already, nothing is locked: then neither a fork
    waits, nor a handler of a signal is touched.
    """
    if all(map(_imported, modules)):
        yield
        return
    with importing_others():
        yield


@contextmanager
def importing_others() -> Iterator[None]:
    """As :func:`importing`, around what imports modules of other packages that we do not know by name."""
    with later(), no_fork():
        yield


def _imported(name: str) -> bool:
    """Whether the module is there, to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)
