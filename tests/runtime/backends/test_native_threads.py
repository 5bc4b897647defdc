"""The threads of the C kernels in a program: none is lost."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from par_runtime.backends.native import decoding, library
from par_runtime.backends.native.pool import Pool

TASKS = Path("/proc/self/task")
pytestmark = [
    pytest.mark.skipif(library.library() is None, reason="no compiler at installation, or an older CPU"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at threads in /proc"),
]
each_library = pytest.mark.parametrize("prefix", ["parvis_", "parvis_decoder_"])


def of_library(prefix: str) -> ctypes.CDLL:
    if prefix == "parvis_":
        return library.open_library(library.library_file())
    return decoding.open_decoder_library(decoding.decoder_file())


def threads() -> set[str]:
    return set(os.listdir(TASKS))


@each_library
def test_a_pool_ends_once_and_with_its_object(prefix: str) -> None:
    before = threads()
    pool = Pool(of_library(prefix), prefix, 3)
    assert len(threads() - before) == 2
    pool.close()
    pool.close()
    assert not pool.handle
    assert threads() <= before
    pool = Pool(of_library(prefix), prefix, 3)
    del pool
    assert threads() <= before


@each_library
def test_no_thread_is_lost_where_a_signal_interrupts_the_start(prefix: str) -> None:
    """Python calls a signal's handler when the call in C has returned, before its result is anywhere."""
    lib, before = of_library(prefix), threads()
    started = []

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            real = getattr(lib, name)

            def opens(*given: Any) -> None:
                real(*given)
                started.append(len(threads() - before))
                raise KeyboardInterrupt

            return opens if name.endswith("pool_open") else real

    with pytest.raises(KeyboardInterrupt):
        Pool(Interrupted(), prefix, 3)  # type: ignore[arg-type]
    gc.collect()
    assert started == [2]
    assert threads() <= before
