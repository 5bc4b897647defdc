"""The weights of an engine of kernels: from the bundle's file to their place on the device, each byte once.

They come through two blocks of pinned memory: while the GPU copies one, the other is filled. A tensor that kernels want
in another order is copied to a place of its own and packed from there, by a kernel of the engine; the stream keeps the
order. Nothing but the packed weights stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

from par_runtime.arguments import check_returned
from par_runtime.backends import cuda
from par_runtime.backends.engines import Engine
from par_runtime.backends.kernels.modules import Module, Prepared
from par_runtime.backends.program import ALIGN, CONSTANTS, Kernels
from par_runtime.checked import read_regular
from par_runtime.errors import CudaError, EngineError, OutOfMemory
from par_runtime.loaded import LoadedFiles
from par_runtime.reading import advised
from par_runtime.system import available_cores

BLOCK_BYTES = 32 * 2**20  #: of each of the two blocks of pinned memory
READERS = 4  #: threads that fill a block; one alone is slower than the bus
PIECE_BYTES = 4 * 2**20  #: what a reader takes at a time

OnBytes = Callable[[int, int], None]


class Weights(cuda.Owned):
    """All weights of an engine, in one allocation. ``addresses`` by name."""

    def __init__(
        self,
        engine: Engine,
        kernels: Kernels,
        files: LoadedFiles,
        device: cuda.Device,
        stream: cuda.Stream,
        modules: Mapping[str, Module],
        on_load: OnBytes | None = None,
    ) -> None:
        self._buffer: cuda.Buffer | None = None
        places, size = {}, 0
        for name, weight in kernels.weights.items():
            places[name] = size
            size += -(-weight.bytes // ALIGN) * ALIGN
        raw = max((weight.source[1] for weight in kernels.weights.values() if weight.pack), default=0)
        with ExitStack() as held:
            try:
                self._buffer = device.allocate(max(size, 1), f"the {len(places)} weights")
                staging = held.enter_context(device.allocate(raw, "the tensor that is packed")) if raw else None
            except OutOfMemory as error:
                self.free()
                raise OutOfMemory(
                    f"{engine.path}: its weights need {size / 1e6:.0f} MB of GPU memory and {raw / 1e6:.0f} MB more "
                    f"while they are loaded, of {error.total_bytes / 1e6:.0f} MB on {device.name} "
                    f"{error.free_bytes / 1e6:.0f} MB are free: not even one image fits; free GPU memory, or use "
                    "another device",
                    size + raw,
                    error.free_bytes,
                    error.total_bytes,
                ) from error
            self.addresses = {name: self._buffer.pointer + offset for name, offset in places.items()}
            try:
                self._fill(engine, kernels, files, device, stream, modules, staging, on_load)
            except BaseException:
                # The error that matters is the first one.
                with suppress(CudaError):
                    stream.synchronize()  # what is in flight still writes there
                with suppress(CudaError):
                    self.free()
                raise

    def _fill(
        self,
        engine: Engine,
        kernels: Kernels,
        files: LoadedFiles,
        device: cuda.Device,
        stream: cuda.Stream,
        modules: Mapping[str, Module],
        staging: cuda.Buffer | None,
        on_load: OnBytes | None,
    ) -> None:
        constants = memoryview(read_own(engine, CONSTANTS, kernels.constants_bytes, kernels.constants_sha256))
        lengths = [weight.source[1] for weight in kernels.weights.values()]
        total = sum(lengths)
        done = 0
        # In the order of the file, which a disk reads fastest.
        order = sorted(kernels.weights.items(), key=lambda item: (item[1].stored is not None, item[1].source))
        with _Ring(device, stream, min(BLOCK_BYTES, max(lengths, default=1))) as ring:
            for name, weight in order:
                into = self.addresses[name] if weight.pack is None or staging is None else staging.pointer
                start, length = weight.source
                for at in range(0, length, ring.size):
                    size = min(ring.size, length - at)
                    block = ring.next(size)
                    if weight.stored is None:
                        block[:size] = constants[start + at : start + at + size]
                    else:
                        ring.read(files, block, size, start + at)
                    ring.send(into + at, size)
                    done += size
                    if on_load is not None:
                        check_returned("on_load", on_load, on_load(done, total))
                if weight.pack is not None:
                    ends = {"raw": into, "packed": self.addresses[name]}
                    Prepared(modules, [(weight.pack, 0)], ends, stream).enqueue()
            stream.synchronize()
        files.check()

    def free(self) -> None:
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            buffer.free()


class _Ring(cuda.Owned):
    """Two blocks of pinned memory that take turns, and threads that fill them."""

    def __init__(self, device: cuda.Device, stream: cuda.Stream, size: int) -> None:
        self.size, self._stream, self._turn = size, stream, 0
        self._held = ExitStack()
        try:
            self._blocks = [self._held.enter_context(device.pinned(size)) for _ in range(2)]
            self._sent = [self._held.enter_context(device.event()) for _ in range(2)]
            self._used = [False, False]
            workers = max(1, min(READERS, available_cores()))
            self._readers = self._held.enter_context(ThreadPoolExecutor(workers, "parvis weights"))
        except BaseException:
            self._held.close()
            raise

    def next(self, size: int) -> memoryview:
        """The other block, which the GPU has copied by now."""
        self._turn ^= 1
        if self._used[self._turn]:
            self._sent[self._turn].synchronize()
        return memoryview(self._blocks[self._turn].array)[:size]

    def read(self, files: LoadedFiles, block: memoryview, size: int, offset: int) -> None:
        """Fill ``size`` bytes of ``block`` from the weights file at ``offset``. Raises BundleError."""
        pieces = range(0, size, PIECE_BYTES)
        if len(pieces) == 1:
            files.read(block[:size], offset)
            return
        ends = [min(at + PIECE_BYTES, size) for at in pieces]
        list(self._readers.map(lambda at, end: files.read(block[at:end], offset + at), pieces, ends))

    def send(self, address: int, size: int) -> None:
        """Have the GPU copy ``size`` bytes of the block to ``address``."""
        self._stream.upload(address, self._blocks[self._turn], size)
        self._stream.record(self._sent[self._turn])
        self._used[self._turn] = True

    def free(self) -> None:
        self._held.close()


def read_own(engine: Engine, name: str, size: int, digest: str) -> bytes:
    """A file of ``engine``, checked however little of it was when it was opened. Raises EngineError."""
    path, again = engine.path / name, f"rebuild with: {engine.rebuild}"
    content = read_regular(path, size, lambda message: EngineError(advised(message, again)))
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise EngineError(f"{path}: its content was changed; {again}")
    return content
