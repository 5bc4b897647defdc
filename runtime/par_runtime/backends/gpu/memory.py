"""The device memory of one engine: bound once per batch size, caches and scratch shared by all sizes.

Letters: B images and R = 2B rows of a profile, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from par_runtime.backends import cuda
from par_runtime.backends.base import Batch, image_shape
from par_runtime.backends.cache_rows import CacheRows
from par_runtime.backends.engines import Engine
from par_runtime.backends.gpu.loaded import Context, LoadedProgram
from par_runtime.backends.gpu.tables import Launch, Tables
from par_runtime.bundle import Bundle
from par_runtime.errors import EngineError, OutOfMemory


@dataclass
class Buffers:
    """The memory that is bound for one batch size. It is freed as a whole when a larger one needs the memory."""

    index: int
    images: int
    tables: Tables
    block: cuda.Buffer  #: the tables on the device
    staging: cuda.Pinned  #: the same on the host
    tokens: cuda.Buffer  #: a row of tokens [R,q] per launch
    sequence: cuda.Buffer  #: tokens [B,N] in sequence order
    logits: cuda.Buffer
    pixels: cuda.Buffer | None
    out: cuda.Pinned  #: tokens [B,N], then pixels
    contexts: dict[str, Context] = field(default_factory=dict)
    warm: bool = False


class Memory:
    """Allocations for the programs of one engine. ``moved`` is called before memory that is bound is freed."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        device: cuda.Device,
        programs: dict[str, LoadedProgram],
        launches: list[Launch],
        stream: cuda.Stream,
        keys: CacheRows,
        moved: Callable[[], None],
    ) -> None:
        self.bundle, self.engine, self.device, self._moved = bundle, engine, device, moved
        self._programs, self._launches, self._stream, self._keys = programs, launches, stream, keys
        self.caches: dict[str, cuda.Buffer] = {}
        self._buffers: dict[int, Buffers] = {}
        self._cache_rows = 0
        self._scratch: cuda.Buffer | None = None
        self._image_bytes = math.prod(image_shape(bundle)) if engine.decodes else 0

    def buffers(self, batch: Batch) -> Buffers:
        """The smallest profile that holds the images and the cache rows of ``batch``, with everything bound."""
        images = max(batch.images, -(-batch.cache_rows // 2))
        return self.profile(images)

    def profile(self, images: int) -> Buffers:
        """The smallest profile that holds ``images``. Raises EngineError, MemoryError."""
        index = next((i for i, size in enumerate(self.engine.images) if size >= images), None)
        if index is None:
            raise EngineError(
                f"{images} images at once; {self.engine.path} was built for at most {self.engine.images[-1]}: give a "
                f"smaller max_batch (--batch), or rebuild with --max-images {images}"
            )
        if index not in self._buffers:
            try:
                self._buffers[index] = self._make(index)
            except OutOfMemory as error:
                raise self._explained(error, self.engine.images[index]) from error
        return self._buffers[index]

    def _make(self, index: int) -> Buffers:
        images, n = self.engine.images[index], self.bundle.n_tokens
        tables = Tables(self._launches, images)
        self._reserve(index, tables.rows)
        pixels = images * self._image_bytes
        allocate = self.device.allocate
        made = Buffers(
            index,
            images,
            tables,
            block=allocate(tables.size, "tables"),
            staging=self.device.pinned(tables.size),
            tokens=allocate(tables.token_pitch * (len(self._launches) + 1), "tokens"),
            sequence=allocate(images * n * 8, "tokens in sequence order"),
            logits=allocate(self._logits_bytes(tables), "logits"),
            pixels=allocate(pixels, "images") if pixels else None,
            out=self.device.pinned(images * n * 8 + pixels),
        )
        made.staging.array[:] = 0
        for i, launch in enumerate(self._launches):
            tables.fill_launch(made.staging.array, i, launch)
        assert self._scratch is not None
        for name, program in self._programs.items():
            context = program.context(index, self._scratch.pointer, self._scratch.size, self._stream)
            made.contexts[name] = context
            if name == "decoder":
                assert made.pixels is not None
                context.bind("tokens", made.sequence.pointer)
                context.bind("images", made.pixels.pointer)
                continue
            for past, present in zip(self.bundle.cache.inputs, self.bundle.cache.outputs, strict=True):
                pointer = self.caches[past].pointer
                context.bind(past, pointer)
                context.bind(present, pointer)  # one buffer is input and output
            for field_name in tables.whole:
                context.bind(field_name, made.block.pointer + tables.at(field_name, 0))
            context.bind("logits", made.logits.pointer)
        self._stream.synchronize()  # profiles are switched on the stream
        return made

    def _reserve(self, index: int, rows: int) -> None:
        """Caches for ``rows`` and scratch memory for the profile; all profiles share them, and they only grow."""
        # Also enough for all smaller profiles: one that needed more would move the caches in the middle of an image.
        scratch = max(1, *(program.scratch_bytes(i) for program in self._programs.values() for i in range(index + 1)))
        if rows <= self._cache_rows and self._scratch is not None and scratch <= self._scratch.size:
            return
        self._release_buffers()  # they are bound to the old addresses
        rows, scratch = max(rows, self._cache_rows), max(scratch, self._scratch.size if self._scratch else 0)
        row_bytes, held = self._row_bytes(), self._keys.count
        if self._scratch is not None:
            self._scratch.free()
            self._scratch = None
        if rows > self._cache_rows:
            if not held:  # freed before anything is allocated, so that memory never holds both
                self._free_caches()
            for name in self.bundle.cache.inputs:
                new = self.device.allocate(row_bytes * rows, f"cache {name}")
                # Masked values are multiplied by zero, so they must be finite. Zeros once: later images overwrite them.
                new.zero(self._stream)
                old = self.caches.pop(name, None)
                if old is not None:  # keys that are still needed are copied, one tensor at a time
                    self._stream.copy(new.pointer, old.pointer, row_bytes * held)
                    self._stream.synchronize()
                    old.free()
                self.caches[name] = new
            self._cache_rows = rows
        self._scratch = self.device.allocate(scratch, "scratch memory")

    def _row_bytes(self) -> int:
        """Bytes of one row of one cache tensor."""
        cache = self.bundle.cache
        step = next(program for name, program in self._programs.items() if name != "decoder")
        return cache.heads * self.bundle.n_tokens * cache.head_dim * step.element_bytes(cache.inputs[0])

    def _explained(self, error: OutOfMemory, images: int) -> MemoryError:
        """``error`` with the number of images that would fit. All memory is freed first."""
        self.free()
        free = self.device.free_bytes()
        fits = [size for i, size in enumerate(self.engine.images) if self._needs(i) < free]
        fit = (
            f"{fits[-1]} would fit: give max_batch={fits[-1]} (--batch {fits[-1]})"
            if fits
            else "not even one fits: free GPU memory, or use another device"
        )
        return MemoryError(
            f"{images} images do not fit on {self.device.name} ({free / 1e6:.0f} MB free); {fit}. {error}"
        )

    def _needs(self, index: int) -> int:
        """All bytes that a batch of this profile takes."""
        images, cache = self.engine.images[index], self.bundle.cache
        tables = Tables(self._launches, images)
        own = tables.size + tables.token_pitch * (len(self._launches) + 1) + self._logits_bytes(tables)
        pixels = images * (self.bundle.n_tokens * 8 + self._image_bytes)
        scratch = max(program.scratch_bytes(index) for program in self._programs.values())
        return own + pixels + scratch + tables.rows * self._row_bytes() * len(cache.inputs)

    def _logits_bytes(self, tables: Tables) -> int:
        return tables.images * tables.query * self.bundle.vocab_size * 4

    def _release_buffers(self) -> None:
        self._moved()
        for held in self._buffers.values():
            for buffer in (held.block, held.staging, held.tokens, held.sequence, held.logits, held.pixels, held.out):
                if buffer is not None:
                    buffer.free()
        self._buffers.clear()

    def _free_caches(self) -> None:
        for buffer in self.caches.values():
            buffer.free()
        self.caches, self._cache_rows = {}, 0

    def free(self) -> None:
        """Free everything."""
        self._release_buffers()
        self._keys.release()
        self._free_caches()
        if self._scratch is not None:
            self._scratch.free()
            self._scratch = None
