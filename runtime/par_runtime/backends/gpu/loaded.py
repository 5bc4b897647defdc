"""What a loaded program must do, whichever engine it is of: ``GpuBackend`` and ``Memory`` use only this.

A program makes all calls of some phases, or decodes. It has one context per profile (batch size). All contexts of an
engine share one block of scratch memory, because they run one after the other.
"""

from __future__ import annotations

from typing import Protocol

from par_runtime.backends import cuda


class Context(Protocol):
    """A program at one batch size, on memory that the caller owns."""

    def bind(self, name: str, address: int) -> None:
        """Later launches find the tensor ``name`` at ``address``. Raises EngineError where that cannot be."""
        ...

    def enqueue(self, stream: cuda.Stream, what: str) -> None:
        """Launch it, with the addresses of now. Raises CudaError, or EngineError that names ``what``."""
        ...


class LoadedProgram(Protocol):
    """A program in device memory, ready for contexts."""

    def scratch_bytes(self, profile: int) -> int:
        """Scratch memory that a context of this profile needs."""
        ...

    def element_bytes(self, tensor: str) -> int:
        """Bytes of one number of ``tensor``."""
        ...

    def context(self, profile: int, scratch: int, scratch_bytes: int, stream: cuda.Stream) -> Context:
        """The context of ``profile``, on scratch memory at ``scratch``; nothing else is bound. Raises EngineError."""
        ...

    def launched(self) -> None:
        """Called when every context was launched once: what that made may be kept for the next load."""
        ...

    def close(self) -> None:
        """Free it and its contexts; a second call does nothing."""
        ...
