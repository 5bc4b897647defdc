"""Rows of a call by the C step, which gives what it multiplies. Half-precision weights are held as they are stored."""

from __future__ import annotations

from par_runtime.backends.base import Batch
from par_runtime.backends.native.backend import NativeBackend
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Float, Int


class NativeRows:
    """The step of a bundle in C; :attr:`rows` are what its last call multiplied each matrix with."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Load it. Raises BundleError, MemoryError, OSError."""
        self._backend = NativeBackend(bundle, threads)
        self.name = self._backend.info.name
        self.rows: dict[str, Float] = {}  #: name of a matrix -> [M,K], M = R*q, of the last call

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        """Tokens [B,q] of one call, as ``backends.base.Backend.step``."""
        tokens, self.rows = self._backend.step_with_rows(batch, ids, write, uniform)
        return tokens

    def release(self) -> None:
        """Forget all keys: the next call begins an image."""
        self._backend.release()

    def close(self) -> None:
        """Free the backend."""
        self._backend.close()
        self.rows = {}
