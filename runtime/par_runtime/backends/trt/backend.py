"""TensorRT: a whole image is one CUDA graph launch.

All memory is bound once per batch size: caches that are input and output, the tables of ``trt_tables.py``, one
block of scratch memory that every execution context shares. An image is then: one upload, the list of launches
(each reading its own row of the tables and the previous launch's tokens), the decoder, one copy back. That list is
captured once per batch size and replayed; where capture of the whole is refused each launch is captured alone, and
``capture="none"`` enqueues everything as it is.

Letters: B images and R = 2B rows of a profile, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends import cuda
from par_runtime.backends.base import Batch
from par_runtime.backends.engines import Engine
from par_runtime.backends.trt.memory import Memory, Shape, bind
from par_runtime.backends.trt.module import TensorRT
from par_runtime.backends.trt.plan import LoadedPlan, make_log
from par_runtime.backends.trt.tables import Call, calls_of
from par_runtime.bundle import Bundle
from par_runtime.dtypes import LOGIT_ROUNDING, Float, Int
from par_runtime.errors import CudaError, EngineError

Capture = Literal["image", "call", "none"]
GRAPHS_KEPT = 4  #: captured shapes; a graph of a large model holds tens of megabytes


class TrtBackend:
    """One engine of a bundle on one GPU. See ``backend.Backend``; ``whole`` makes whole batches without the host."""

    def __init__(
        self, bundle: Bundle, engine: Engine, device: cuda.Device, trt: TensorRT, capture: Capture = "image"
    ) -> None:
        self.bundle, self.engine, self.device, self.trt, self.capture = bundle, engine, device, trt, capture
        self.name = f"{trt.name} {trt.version} {engine.precision} on {device.name}"
        self.tie = LOGIT_ROUNDING[engine.precision]
        self.max_images = engine.images[-1]
        self.capturing: Capture = capture  #: what is in use: the next best where the driver refuses
        device.activate()
        self._log = make_log(trt)
        self._runtime = trt.module.Runtime(self._log)
        plans = dict(engine.plans) | ({"decoder": engine.decoder} if engine.decoder else {})
        self._plans = {
            name: LoadedPlan(bundle, engine, name, plan, trt, self._runtime, self._log) for name, plan in plans.items()
        }
        self._calls = calls_of(bundle, engine)
        self._single = len(self._calls)  # the tables' row of a call on its own
        self._stream = device.stream()
        self._graphs: OrderedDict[tuple[int, bool], list[cuda.Graph]] = OrderedDict()
        self._batch: Batch | None = None
        self._memory = Memory(bundle, engine, device, self._plans, self._calls, self._stream, self._drop_graphs)

    # -- the Backend protocol -------------------------------------------------------------------------------------

    def start(self, batch: Batch) -> None:
        self.device.activate()
        shape = self._memory.shape(batch.images)
        self._batch = batch
        shape.tables.fill_batch(shape.staging.array, batch)

    def step(self, ids: Int, write: int, uniform: Float) -> Int:
        shape, call = self._enqueue_single(ids, write, uniform)
        got = self._fetch(
            shape.tokens.pointer + self._single * shape.tables.token_pitch, shape.tables.rows * call.query * 8
        )
        tokens: Int = got.view(np.int64).reshape(-1, call.query)
        assert self._batch is not None
        return tokens[shape.tables.device_rows(self._batch), : ids.shape[1]]

    def logits(self, ids: Int, write: int) -> Float:
        assert self._batch is not None
        uniform = np.zeros((self._batch.images, ids.shape[1]), np.float32)
        shape, call = self._enqueue_single(ids, write, uniform)
        size = shape.images * call.query * self.bundle.vocab_size * 4
        got: Float = self._fetch(shape.logits.pointer, size).view(np.float32)
        return got.reshape(shape.images, call.query, -1)[: self._batch.images, : ids.shape[1]]

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        if self.engine.decoder is None:
            raise EngineError(f"{self.engine.path}: was built without a decoder; rebuild with: {self.engine.rebuild}")
        self.device.activate()
        shape = self._memory.shape(len(tokens))
        with self.device.pinned(shape.sequence.size) as staging:
            sequence = staging.array.view(np.int64).reshape(shape.images, -1)
            sequence[: len(tokens)] = tokens
            sequence[len(tokens) :] = tokens[:1]
            self._stream.upload(shape.sequence.pointer, staging, staging.size)
            self._stream.synchronize()  # before the staging memory goes
        self._enqueue_decoder(shape)
        assert shape.pixels is not None
        pixels = self._fetch(shape.pixels.pointer, shape.pixels.size).reshape(shape.images, *self._image, 3)
        return pixels[: len(tokens)]

    # -- whole images ---------------------------------------------------------------------------------------------

    def whole(self, batch: Batch, class_ids: Int, noise: Float, decode: bool) -> tuple[Int, NDArray[np.uint8] | None]:
        """Tokens [B,N] and images [B,H,W,3] (None without ``decode``) of ``batch`` in one launch.

        ``class_ids`` [R'] are the first call's ids of each row, ``noise`` [B,N] the draws. One synchronisation, at
        the end. Raises CudaError, OutOfMemory, EngineError.
        """
        self.device.activate()
        shape = self._memory.shape(batch.images)
        self._batch = batch
        tables = shape.tables
        tables.fill_batch(shape.staging.array, batch)
        tables.fill_image(shape.staging.array, batch, class_ids, noise)
        decode = decode and self.engine.decoder is not None
        self._warm(shape)
        for graph in self._captured(shape, decode):
            graph.launch(self._stream)
        if self.capturing == "none":
            self._enqueue_image(shape, decode)
        self._stream.synchronize()
        n_bytes = shape.images * self.bundle.n_tokens * 8
        tokens: Int = shape.out.array[:n_bytes].view(np.int64).reshape(shape.images, -1)[: batch.images].copy()
        if not decode:
            return tokens, None
        assert shape.pixels is not None
        pixels = shape.out.array[n_bytes : n_bytes + shape.pixels.size].reshape(shape.images, *self._image, 3)
        return tokens, pixels[: batch.images].copy()

    def _captured(self, shape: Shape, decode: bool) -> list[cuda.Graph]:
        """The graphs that make an image, captured at the first use of a shape; none where capture is off."""
        if self.capturing == "none":
            return []
        key = (shape.index, decode)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        graphs: list[cuda.Graph] = []
        try:
            if self.capturing == "image":
                with self._stream.capture() as captured:
                    self._enqueue_image(shape, decode)
                graphs = [captured.graph]
            else:
                for part in self._parts(shape, decode):
                    with self._stream.capture() as captured:
                        part()
                    graphs.append(captured.graph)
        except (CudaError, EngineError):
            for graph in graphs:
                graph.free()
            self.capturing = "call" if self.capturing == "image" else "none"
            return self._captured(shape, decode)
        self._graphs[key] = graphs
        while len(self._graphs) > GRAPHS_KEPT:
            for graph in self._graphs.popitem(last=False)[1]:
                graph.free()
        return graphs

    def _enqueue_image(self, shape: Shape, decode: bool) -> None:
        for part in self._parts(shape, decode):
            part()

    def _parts(self, shape: Shape, decode: bool) -> list[Any]:
        """What an image is made of, in order, as functions that enqueue."""
        parts: list[Any] = [lambda: self._upload(shape)]
        parts += [lambda i=i: self._enqueue(shape, i) for i in range(len(self._calls))]
        parts.append(lambda: self._collect(shape))
        if decode:
            parts.append(lambda: self._enqueue_decoder(shape))
        parts.append(lambda: self._download(shape, decode))
        return parts

    def _upload(self, shape: Shape) -> None:
        self._stream.upload(shape.block.pointer, shape.staging, shape.tables.size)

    def _enqueue(self, shape: Shape, index: int) -> None:
        """Launch call ``index`` of the image: its ids are the previous call's tokens, or its row of the table."""
        call, tables = self._calls[index], shape.tables
        ids = shape.block.pointer + tables.at("ids", index)
        before = shape.tokens.pointer + (index - 1) * tables.token_pitch
        if call.chained:
            ids = before
        elif call.fed:
            previous = self._calls[index - 1]
            self._stream.copy_2d(
                ids + call.first_fed * 8,
                call.query * 8,
                before + (previous.phase.query - call.fed) * 8,
                previous.query * 8,
                call.fed * 8,
                shape.tables.rows,
            )
        self._run(shape, call, index, ids)

    def _run(self, shape: Shape, call: Call, index: int, ids: int) -> None:
        context, tables, block = shape.contexts[call.plan], shape.tables, shape.block.pointer
        addresses = {"ids": ids, "tokens": shape.tokens.pointer + index * tables.token_pitch}
        for name in ("positions", "write", "length", "uniform"):
            addresses[name] = block + tables.at(name, index)
        for name, address in addresses.items():
            bind(self.engine, context, name, address)
        if not context.execute_async_v3(self._stream.handle):
            raise EngineError(
                f"{self.engine.path}: {call.plan} call at position {call.write} failed: {self._log.said()}"
            )

    def _collect(self, shape: Shape) -> None:
        """Put the tokens of all calls into sequence order [B,N]."""
        n, pitch = self.bundle.n_tokens, shape.tables.token_pitch
        index = 0
        while index < len(self._calls):
            call = self._calls[index]
            real, repeat = call.phase.query, call.phase.repeat
            for b in range(shape.images):
                self._stream.copy_2d(
                    shape.sequence.pointer + (b * n + call.write) * 8,
                    real * 8,
                    shape.tokens.pointer + index * pitch + b * call.query * 8,
                    pitch,
                    real * 8,
                    repeat,
                )
            index += repeat

    def _enqueue_decoder(self, shape: Shape) -> None:
        if not shape.contexts["decoder"].execute_async_v3(self._stream.handle):
            raise EngineError(f"{self.engine.path}: the decoder failed: {self._log.said()}")

    def _download(self, shape: Shape, decode: bool) -> None:
        self._stream.download(shape.out, shape.sequence.pointer, shape.sequence.size)
        if decode and shape.pixels is not None:
            self._stream.download(shape.out, shape.pixels.pointer, shape.pixels.size, shape.sequence.size)

    # -- single calls ---------------------------------------------------------------------------------------------

    def _enqueue_single(self, ids: Int, write: int, uniform: Float) -> tuple[Shape, Call]:
        """One call on its own, through the tables' last row; the host gives its ids."""
        assert self._batch is not None, "start() comes before step()"
        self.device.activate()
        shape = self._memory.shape(self._batch.images)
        call = next(c for c in self._calls if c.write == write and c.phase.query == ids.shape[1])
        shape.tables.fill_single(shape.staging.array, self._single, call, self._batch, ids, uniform)
        self._upload(shape)
        self._run(shape, call, self._single, shape.block.pointer + shape.tables.at("ids", self._single))
        return shape, call

    def _fetch(self, pointer: int, size: int) -> NDArray[np.uint8]:
        """A copy of ``size`` bytes of the device, waited for."""
        with self.device.pinned(size) as pinned:
            self._stream.download(pinned, pointer, size)
            self._stream.synchronize()
            got: NDArray[np.uint8] = pinned.array.copy()
            return got

    def _warm(self, shape: Shape) -> None:
        """One launch of every context outside capture: TensorRT finishes its own set-up in the first."""
        if shape.warm:
            return
        self._upload(shape)
        seen = set()
        for index, call in enumerate(self._calls):
            if call.plan not in seen:
                self._run(shape, call, index, shape.block.pointer + shape.tables.at("ids", index))
                seen.add(call.plan)
        if "decoder" in shape.contexts:
            self._stream.fill(shape.sequence.pointer, 0, shape.sequence.size)
            self._enqueue_decoder(shape)
        self._stream.synchronize()
        for plan in self._plans.values():
            plan.save_runtime_cache()
        shape.warm = True

    def _drop_graphs(self) -> None:
        """Captured graphs hold addresses: they go before what they point to."""
        for graphs in self._graphs.values():
            for graph in graphs:
                graph.free()
        self._graphs.clear()

    @property
    def _image(self) -> tuple[int, int]:
        return self.bundle.image_size or (0, 0)

    def close(self) -> None:
        """Free everything on the device."""
        self.device.activate()
        self._memory.free()
        for plan in self._plans.values():
            plan.close()
        self._stream.free()
        self.device.close()
