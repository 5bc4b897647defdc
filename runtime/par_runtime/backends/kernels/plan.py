"""A program of an engine of kernels, ready to run: see ``gpu.loaded.LoadedProgram``.

Its launches are prepared once per batch size. Between two calls only addresses change, and of those only the ones that
lie in another place for each call: ids, tokens, and the call's row of the tables.
"""

from __future__ import annotations

from par_runtime.backends import cuda
from par_runtime.backends.base import tensors
from par_runtime.backends.cuda import REPORT_IT
from par_runtime.backends.engines import Engine
from par_runtime.backends.kernels.modules import Prepared
from par_runtime.backends.kernels.shared import Shared
from par_runtime.backends.program import Program
from par_runtime.bundle import Bundle
from par_runtime.dtypes import BYTES
from par_runtime.errors import EngineError


class KernelProgram:
    """The step, or the decoder. ``program``: its launches; ``shared``: what all programs of the engine share."""

    def __init__(self, bundle: Bundle, engine: Engine, name: str, program: Program, shared: Shared) -> None:
        self.name, self._engine, self.program, self.shared = name, engine, program, shared
        self._tensors = frozenset(tensors(bundle, program.query))
        self._contexts: dict[int, KernelContext] = {}

    def scratch_bytes(self, profile: int) -> int:
        """Scratch memory that a context of this profile needs."""
        return self.program.profiles[self._engine.images[profile]].scratch_bytes

    def element_bytes(self, tensor: str) -> int:
        """Bytes of one number of a cache."""
        return int(BYTES[self._engine.precision])

    def context(self, profile: int, scratch: int, scratch_bytes: int, stream: cuda.Stream) -> KernelContext:
        """The context of ``profile``, on scratch memory at ``scratch``; nothing else is bound."""
        images = self._engine.images[profile]
        context = self._contexts.get(profile)
        if context is None:
            fixed = self.shared.addresses | {
                name: self.shared.states[self.name] + offset for name, (offset, _) in self.program.state.items()
            }
            launches = Prepared(self.shared.modules, self.program.launches(images), fixed, stream)
            context = self._contexts[profile] = KernelContext(self._engine, self._tensors, launches)
        for name, (offset, _) in self.program.profiles[images].scratch.items():
            context.launches.set(name, scratch + offset)
        return context

    def launched(self) -> None:
        """Nothing to keep: all was compiled when the engine was built."""

    def close(self) -> None:
        """Free what all programs of the engine share: they are closed together."""
        self._contexts.clear()
        self.shared.free()


class KernelContext:
    """Launches for one batch size; see ``gpu.loaded.Context``."""

    def __init__(self, engine: Engine, names: frozenset[str], launches: Prepared) -> None:
        self._engine, self._names, self.launches = engine, names, launches

    def bind(self, name: str, address: int) -> None:
        """Later launches find the tensor ``name`` at ``address``. Raises EngineError."""
        try:
            if name not in self._names:
                raise ValueError(f"no tensor {name!r}")
            self.launches.set(name, address)
        except ValueError as error:
            raise EngineError(f"{self._engine.path}: {error}; {REPORT_IT}") from error

    def enqueue(self, stream: cuda.Stream, what: str) -> None:
        """Launch them, on the stream that they were prepared for. Raises CudaError, EngineError that names ``what``."""
        try:
            self.launches.enqueue()
        except ValueError as error:
            raise EngineError(f"{self._engine.path}: {what}: {error}; {REPORT_IT}") from error
