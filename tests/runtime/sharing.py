"""Pipelines on each kind of backend, for the tests of what happens around them: threads, forks, close, moved files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from kinds import KINDS, SMALL, TINY

from par_runtime import Pipeline
from par_runtime.backends.native import library

__all__ = ["KINDS", "ON_A_CPU", "SMALL", "TINY", "busy", "params", "shared_pipelines", "until"]

ON_A_CPU = ["C step", "ONNX Runtime"]
no_kernels = pytest.mark.skipif(library.library() is None, reason="no compiler at installation, or an older CPU")


def params(*names: str) -> list[object]:
    """The kinds of these names, for ``parametrize``; the C step only where it was built."""
    return [pytest.param(name, marks=[no_kernels] if name.startswith("C step") else []) for name in names]


@pytest.fixture(scope="module")
def shared_pipelines() -> Iterator[Callable[[str], Pipeline]]:
    """One open pipeline for each kind, for all tests of a module."""
    opened: dict[str, Pipeline] = {}

    def get(name: str) -> Pipeline:
        if name not in opened:
            path, load = KINDS[name]
            opened[name] = load(path)
        return opened[name]

    yield get
    for pipeline in opened.values():
        pipeline.close()


@contextmanager
def busy(pipeline: Pipeline) -> Iterator[None]:
    """The pipeline makes an image of somebody else, until the end of the block."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        begun.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=pipeline.generate, args=(0,), kwargs={"on_step": wait, "decode": False})
    thread.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.join()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)
