"""Planted bugs of what all engines on a GPU share, for the tests of each kind."""

from __future__ import annotations

from typing import Any

import pytest

from par_runtime.backends import cuda
from par_runtime.backends.gpu.backend import GpuBackend


def no_wait_before_the_copy_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = GpuBackend.make_images

    def make_images(self: GpuBackend, *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if any(held.warm for held in self._memory._buffers.values()):
                inner.setattr(cuda.Stream, "synchronize", lambda self: None)
            return real(self, *arguments)

    monkeypatch.setattr(GpuBackend, "make_images", make_images)
