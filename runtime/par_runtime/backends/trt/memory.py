"""The device memory of one engine: bound once per batch size, caches and scratch shared by all sizes.

Letters: B images and R = 2B rows of a profile, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from par_runtime.backends import cuda
from par_runtime.backends.engines import Engine
from par_runtime.backends.trt.plan import LoadedPlan
from par_runtime.backends.trt.tables import Call, Tables
from par_runtime.bundle import Bundle
from par_runtime.errors import EngineError, OutOfMemory


@dataclass
class Shape:
    """Everything bound for one batch size. Freed as a whole when a larger one needs the memory."""

    index: int
    images: int
    tables: Tables
    block: cuda.Buffer  #: the tables on the device
    staging: cuda.Pinned  #: the same on the host
    tokens: cuda.Buffer  #: a row of tokens [R,q] per call
    sequence: cuda.Buffer  #: tokens [B,N] in sequence order
    logits: cuda.Buffer
    pixels: cuda.Buffer | None
    out: cuda.Pinned  #: tokens [B,N], then pixels
    contexts: dict[str, Any] = field(default_factory=dict)
    warm: bool = False


class Memory:
    """Allocations for the plans of one engine. ``moved`` is called before anything that is bound goes away."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        device: cuda.Device,
        plans: dict[str, LoadedPlan],
        calls: list[Call],
        stream: cuda.Stream,
        moved: Callable[[], None],
    ) -> None:
        self.bundle, self.engine, self.device, self._moved = bundle, engine, device, moved
        self._plans, self._calls, self._stream = plans, calls, stream
        self.caches: dict[str, cuda.Buffer] = {}
        self.shapes: dict[int, Shape] = {}
        self._cache_rows = 0
        self._scratch: cuda.Buffer | None = None
        self._image = bundle.image_size or (0, 0)

    def shape(self, images: int) -> Shape:
        """The smallest profile that holds ``images``, with everything bound."""
        index = next((i for i, size in enumerate(self.engine.images) if size >= images), None)
        if index is None:
            raise EngineError(
                f"{images} images at once; {self.engine.path} was built for at most {self.engine.images[-1]}: give a smaller "
                f"max_batch (--batch), or rebuild with --max-images {images}"
            )
        if index not in self.shapes:
            try:
                self.shapes[index] = self._make(index)
            except OutOfMemory as error:
                raise self._explained(error, self.engine.images[index]) from error
        return self.shapes[index]

    def _make(self, index: int) -> Shape:
        images, n = self.engine.images[index], self.bundle.n_tokens
        tables = Tables(self.bundle, self._calls, images)
        self._reserve(index, tables.rows)
        pixels = images * self._image[0] * self._image[1] * 3 if self.engine.decoder else 0
        allocate = self.device.allocate
        shape = Shape(
            index,
            images,
            tables,
            block=allocate(tables.size, "tables"),
            staging=self.device.pinned(tables.size),
            tokens=allocate(tables.token_pitch * (len(self._calls) + 1), "tokens"),
            sequence=allocate(images * n * 8, "tokens in sequence order"),
            logits=allocate(self._logits_bytes(tables), "logits"),
            pixels=allocate(pixels, "images") if pixels else None,
            out=self.device.pinned(images * n * 8 + pixels),
        )
        shape.staging.array[:] = 0
        for i, call in enumerate(self._calls):
            tables.fill_call(shape.staging.array, i, call)
        assert self._scratch is not None
        for name, plan in self._plans.items():
            context = plan.context(index, self._scratch.pointer, self._scratch.size, self._stream.handle)
            shape.contexts[name] = context
            if name == "decoder":
                assert shape.pixels is not None
                bind(self.engine, context, "tokens", shape.sequence.pointer)
                bind(self.engine, context, "images", shape.pixels.pointer)
                continue
            for past, present in zip(self.bundle.cache.inputs, self.bundle.cache.outputs, strict=True):
                pointer = self.caches[past].pointer
                bind(self.engine, context, past, pointer)
                bind(self.engine, context, present, pointer)  # one buffer is input and output
            for field_name in tables.whole:
                bind(self.engine, context, field_name, shape.block.pointer + tables.at(field_name, 0))
            bind(self.engine, context, "logits", shape.logits.pointer)
        self._stream.synchronize()  # profiles are switched on the stream
        return shape

    def _reserve(self, index: int, rows: int) -> None:
        """Caches for ``rows`` and scratch memory for the profile, shared by all shapes; grown when a larger one comes."""
        # Of all smaller profiles too: one that needed more would move the caches in the middle of an image.
        scratch = max(1, *(plan.scratch_bytes(i) for plan in self._plans.values() for i in range(index + 1)))
        if rows <= self._cache_rows and self._scratch is not None and scratch <= self._scratch.size:
            return
        self._release_shapes()  # they are bound to the old addresses
        size = self._row_bytes() * max(rows, self._cache_rows)
        scratch = max(scratch, self._scratch.size if self._scratch else 0)
        for buffer in [*self.caches.values(), *([self._scratch] if self._scratch else [])]:
            buffer.free()  # before allocating, so that the old and the new are never held together
        self.caches, self._scratch, self._cache_rows = {}, None, 0
        for name in self.bundle.cache.inputs:
            self.caches[name] = self.device.allocate(size, f"cache {name}")
            # What is masked is multiplied by zero, so it must be finite; once, for later images overwrite it.
            self.caches[name].zero(self._stream)
        self._scratch = self.device.allocate(scratch, "scratch memory")
        self._cache_rows = max(rows, self._cache_rows)

    def _row_bytes(self) -> int:
        """Bytes of one row of one cache tensor."""
        cache = self.bundle.cache
        plan = next(iter(self._plans.values()))
        return cache.heads * self.bundle.n_tokens * cache.head_dim * plan.element_bytes(cache.inputs[0])

    def _explained(self, error: OutOfMemory, images: int) -> MemoryError:
        """How many images would fit, from what one row takes and what is free."""
        self.free()
        free = self.device.free_bytes()
        fits = [size for i, size in enumerate(self.engine.images) if self._needs(i) < free]
        fit = f"{fits[-1]} would fit: give max_batch={fits[-1]} (--batch {fits[-1]})" if fits else "not even one fits"
        return MemoryError(
            f"{images} images do not fit on {self.device.name} ({free / 1e6:.0f} MB free); {fit}. {error}"
        )

    def _needs(self, index: int) -> int:
        """Bytes that a batch of this profile takes in all."""
        images, cache = self.engine.images[index], self.bundle.cache
        tables = Tables(self.bundle, self._calls, images)
        own = tables.size + tables.token_pitch * (len(self._calls) + 1) + self._logits_bytes(tables)
        pixels = images * (self.bundle.n_tokens * 8 + self._image[0] * self._image[1] * 3)
        scratch = max(plan.scratch_bytes(index) for plan in self._plans.values())
        return own + pixels + scratch + tables.rows * self._row_bytes() * len(cache.inputs)

    def _logits_bytes(self, tables: Tables) -> int:
        return tables.images * tables.query * self.bundle.vocab_size * 4

    def _release_shapes(self) -> None:
        self._moved()
        for shape in self.shapes.values():
            for buffer in (
                shape.block,
                shape.staging,
                shape.tokens,
                shape.sequence,
                shape.logits,
                shape.pixels,
                shape.out,
            ):
                if buffer is not None:
                    buffer.free()
        self.shapes.clear()

    def free(self) -> None:
        """Free everything."""
        self._release_shapes()
        for buffer in [*self.caches.values(), *([self._scratch] if self._scratch else [])]:
            buffer.free()
        self.caches, self._scratch, self._cache_rows = {}, None, 0


def bind(engine: Engine, context: Any, name: str, address: int) -> None:
    """Give a context the address of a tensor. Raises EngineError."""
    if not context.set_tensor_address(name, address):
        raise EngineError(
            f"{engine.path}: refuses the address {address:#x} of {name!r}; rebuild with: {engine.rebuild}"
        )
