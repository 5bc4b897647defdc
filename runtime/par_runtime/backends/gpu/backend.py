"""An engine on a GPU: a whole image is one CUDA graph launch.

All memory is bound once per batch size: caches that are input and output, the tables of ``tables.py``, one
block of scratch memory that every context shares. An image is then: one upload, the list of launches
(each reads its own row of the tables and the previous launch's tokens), the decoder, one copy back. That list is
captured once per batch size and replayed. If the driver refuses to capture it as a whole, each launch is captured
alone; ``capture="none"`` captures nothing.

Letters: B images and R = 2B rows of a profile, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends import cuda
from par_runtime.backends.base import BackendInfo, Batch, Decoder, image_shape
from par_runtime.backends.cache_rows import CacheRows
from par_runtime.backends.engines import Capture, Engine
from par_runtime.backends.gpu.loaded import Context, LoadedProgram
from par_runtime.backends.gpu.memory import Buffers, Memory
from par_runtime.backends.gpu.tables import Launch, image_launches
from par_runtime.backends.tails import least_tail, why_not_drawn
from par_runtime.bundle import Bundle
from par_runtime.dtypes import BYTES, LOGIT_ROUNDING, Float, Int
from par_runtime.errors import CudaError, EngineError, RequestError
from par_runtime.forks import keep_forever, tell_of_forks

GRAPHS_KEPT = 4  #: captured batch sizes, in a way each; a graph of a large model holds tens of megabytes


class GpuBackend:
    """One engine of a bundle on one GPU. See ``base.Backend``; ``make_images`` makes whole batches without the host.

    ``runtime`` and ``version`` say what loaded the engine. The backend owns ``device``, ``stream`` and ``programs``
    (name -> loaded program, "decoder" among them where the engine decodes), and frees them when it is closed.
    ``decoder``: what decodes on the CPU, where the engine has no program for it; the backend closes it too.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        device: cuda.Device,
        stream: cuda.Stream,
        programs: Mapping[str, LoadedProgram],
        *,
        runtime: str,
        version: str,
        capture: Capture = "image",
        decoder: Decoder | None = None,
    ) -> None:
        self.bundle, self.engine, self.device, self.stream, self.capture = bundle, engine, device, stream, capture
        quantised = f" from {bundle.quantised}" if bundle.quantised else ""  # what its matrices are stored in
        self.info = BackendInfo(
            runtime=runtime,
            version=f"{version} {engine.precision}{quantised} on {device.name}",
            device=device.name,
            computes=engine.precision,
            weight_bytes=bundle.bytes_read(BYTES[engine.precision], stored_scales=engine.kernels is not None),
            cache_bytes=BYTES[engine.precision],
            decoder="" if decoder is None else decoder.name,
            decoder_computes="fp32" if decoder is None else decoder.computes,
        )
        self._decoder = decoder
        self.tie = LOGIT_ROUNDING[engine.precision]
        self.max_images = engine.images[-1]
        self.capturing: Capture = capture  #: the mode in use; another than ``capture`` if the driver refused that
        self._closed = False
        self._programs = dict(programs)
        self._launches = image_launches(bundle, engine)
        self._single = len(self._launches)  # the tables' row of a single call
        self._graphs: OrderedDict[tuple[int, bool, str], list[cuda.Graph]] = OrderedDict()
        self._keys = CacheRows(bundle.n_tokens)
        self._memory = Memory(
            bundle, engine, device, self._programs, self._launches, stream, self._keys, self._drop_graphs
        )
        tell_of_forks(self)

    @property
    def programs(self) -> Mapping[str, LoadedProgram]:
        """Its programs by name, for benchmarks."""
        return self._programs

    def after_fork(self) -> None:
        # Their destructors call the driver, which cannot be used in a forked process; our own calls raise CudaError.
        keep_forever(self._programs)

    # -- the Backend protocol -------------------------------------------------------------------------------------

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        self._check_tail(batch)
        buffers, launch = self._enqueue_single(batch, ids, write, uniform)
        tables = buffers.tables
        got = self._fetch(buffers.tokens.pointer + self._single * tables.token_pitch, tables.rows * launch.query * 8)
        tokens: Int = got.view(np.int64).reshape(-1, launch.query)
        return tokens[batch.cache_row[: batch.images], : ids.shape[1]]

    def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
        uniform = np.zeros((batch.images, ids.shape[1]), np.float32)
        buffers, launch = self._enqueue_single(batch, ids, write, uniform)
        size = buffers.images * launch.query * self.bundle.vocab_size * 4
        got: Float = self._fetch(buffers.logits.pointer, size).view(np.float32)
        return got.reshape(buffers.images, launch.query, -1)[: batch.images, : ids.shape[1]]

    def release(self, cache_rows: Int | None = None) -> None:
        self._keys.release(cache_rows)

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        if self._decoder is not None:
            self.device.activate()  # an error in a forked process, as for every call
            return self._decoder.run(tokens)
        if not self.engine.decodes:
            raise EngineError(f"{self.engine.path}: was built without a decoder; rebuild with: {self.engine.rebuild}")
        self.device.activate()
        buffers = self._memory.profile(len(tokens))
        given = tokens.shape[1]
        with self.device.pinned(buffers.sequence.size) as staging:
            sequence = staging.array.view(np.int64).reshape(buffers.images, -1)
            sequence[: len(tokens), :given] = tokens
            sequence[: len(tokens), given:] = 0  # of later latent frames, which earlier ones do not see
            sequence[len(tokens) :] = sequence[:1]
            self.stream.upload(buffers.sequence.pointer, staging, staging.size)
            self.stream.synchronize()  # before the staging memory is freed
        self._enqueue_decoder(buffers)
        assert buffers.pixels is not None
        pixels = self._fetch(buffers.pixels.pointer, buffers.pixels.size).reshape(buffers.images, *self._image)
        if given < self.bundle.n_tokens:
            pixels = pixels[:, : self.bundle.frames_of(given // self.bundle.frame_tokens)]
        return pixels[: len(tokens)]

    def _check_tail(self, batch: Batch) -> None:
        """Raise RequestError where an image asks for a filter that the engine cannot draw with. It would not fail: it
        would draw from other codes."""
        for top_k, top_p in zip(batch.top_k.tolist(), batch.top_p.tolist(), strict=True):
            draws = why_not_drawn(self.engine.sampling, self.bundle.vocab_size, top_k, top_p)
            if draws is not None:
                other = replace(self.engine, sampling=least_tail(self.bundle.vocab_size, top_k, top_p))
                raise RequestError(
                    f"top-k {top_k}, top-p {top_p:g}: the plan {self.engine.path.name} was built with --sampling "
                    f"{self.engine.sampling}, which {draws}; ask for that, or build the plan again with: "
                    f"{other.rebuild}"
                )

    # -- whole images ---------------------------------------------------------------------------------------------

    def make_images(
        self, batch: Batch, class_ids: Int, noise: Float, decode: bool
    ) -> tuple[Int, NDArray[np.uint8] | None]:
        """Tokens [B,N] and images [B,H,W,3] or clips [B,T,H,W,3] (None without ``decode``) of ``batch`` in one launch.

        ``class_ids`` [R'] are the first call's ids of each row, ``noise`` [B,N] the draws. One synchronisation, at
        the end. Raises CudaError, OutOfMemory, EngineError, RequestError.
        """
        self._check_tail(batch)
        buffers, decode = self._prepare(batch, class_ids, noise, decode)
        for graph in self._captured(buffers, decode):
            graph.launch(self.stream)
        if self.capturing == "none":
            for _, enqueue in self._parts(buffers, decode):
                enqueue()
        self.stream.synchronize()
        n_bytes = buffers.images * self.bundle.n_tokens * 8
        tokens: Int = buffers.out.array[:n_bytes].view(np.int64).reshape(buffers.images, -1)[: batch.images].copy()
        if not decode:
            return tokens, None
        assert buffers.pixels is not None
        pixels = buffers.out.array[n_bytes : n_bytes + buffers.pixels.size].reshape(buffers.images, *self._image)
        return tokens, pixels[: batch.images].copy()

    def phases(self, batch: Batch, class_ids: Int, noise: Float) -> list[tuple[str, int, Callable[[], None]]]:
        """What ``make_images`` enqueues for ``batch``, decoder included: (phase, its calls, a function for all).

        For benchmarks, which time the phases on :attr:`stream`. "copy" is the upload of the tables, the collection of
        the tokens, and the way back of tokens and pixels. Each is a graph of its own, which is kept as those of whole
        images are; plain launches where the driver refuses to capture it. The functions are for now: the next use of
        the backend may free what they launch. Raises what ``make_images`` raises.
        """
        self._check_tail(batch)
        buffers, decode = self._prepare(batch, class_ids, noise, True)
        parts = groupby(self._parts(buffers, decode), key=itemgetter(0))
        phases = [(name, [enqueue for _, enqueue in calls]) for name, calls in parts]
        launches: list[Callable[[], None]] = [partial(_each, calls) for _, calls in phases]
        if self.capturing != "none":
            with suppress(CudaError, EngineError):
                key = (buffers.index, decode, "phase")
                new = key not in self._graphs
                launches = [partial(graph.launch, self.stream) for graph in self._kept(key, launches)]
                if new:  # a graph that is launched for the first time is uploaded first, which takes its time
                    _each(launches)
                    self.stream.synchronize()
        return [(name, len(calls), launch) for (name, calls), launch in zip(phases, launches, strict=True)]

    def at_call(self, batch: Batch, class_ids: Int, noise: Float, call: int) -> Mapping[str, Context]:
        """The contexts by program, with the addresses of call ``call`` of the image that ``make_images`` made last.

        For benchmarks, which launch parts of a call again; the arguments are those of ``make_images``.
        """
        buffers, _ = self._prepare(batch, class_ids, noise, True)
        self._upload(buffers)
        launch, tables = self._launches[call], buffers.tables
        before = buffers.tokens.pointer + (call - 1) * tables.token_pitch
        ids = before if launch.chained else buffers.block.pointer + tables.at("ids", call)
        self._bind(buffers, launch, call, ids)
        self.stream.synchronize()
        return buffers.contexts

    def _prepare(self, batch: Batch, class_ids: Int, noise: Float, decode: bool) -> tuple[Buffers, bool]:
        """Bound and warmed-up memory, with the tables of ``batch`` in staging; and whether images are decoded."""
        self.device.activate()
        self._keys.release()  # every launch writes into all rows, so the images may as well lie in the first ones,
        batch = replace(batch, cache_row=np.arange(batch.rows))  # where the tokens are collected
        buffers = self._memory.buffers(batch)
        buffers.tables.fill_batch(buffers.staging.array, batch)
        buffers.tables.fill_image(buffers.staging.array, batch, class_ids, noise)
        self._warm(buffers)
        return buffers, decode and self.engine.decodes

    def _captured(self, buffers: Buffers, decode: bool) -> list[cuda.Graph]:
        """The graphs that make an image, captured at the first use of a batch size; none where capture is off."""
        if self.capturing == "none":
            return []
        parts = [enqueue for _, enqueue in self._parts(buffers, decode)]
        try:
            pieces = [partial(_each, parts)] if self.capturing == "image" else parts
            return self._kept((buffers.index, decode, "image"), pieces)
        except (CudaError, EngineError):
            self.capturing = "call" if self.capturing == "image" else "none"
            return self._captured(buffers, decode)

    def _kept(self, key: tuple[int, bool, str], pieces: Sequence[Callable[[], None]]) -> list[cuda.Graph]:
        """The graphs of ``key``, one of what each of ``pieces`` enqueues, captured at the first use.

        Raises CudaError, EngineError.
        """
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        graphs: list[cuda.Graph] = []
        try:
            for piece in pieces:
                with self.stream.capture() as captured:
                    piece()
                graphs.append(captured.graph)
        except (CudaError, EngineError):
            for graph in graphs:
                graph.free()
            raise
        self._graphs[key] = graphs
        while len(self._graphs) > GRAPHS_KEPT:
            for graph in self._graphs.popitem(last=False)[1]:
                graph.free()
        return graphs

    def _parts(self, buffers: Buffers, decode: bool) -> list[tuple[str, Callable[[], None]]]:
        """What an image is made of, in order: (phase, a function that enqueues the part)."""
        parts: list[tuple[str, Callable[[], None]]] = [("copy", partial(self._upload, buffers))]
        for index, launch in enumerate(self._launches):
            parts.append((launch.call.phase.name, partial(self._enqueue, buffers, index)))
        parts.append(("copy", partial(self._collect, buffers)))
        if decode:
            parts.append(("decoder", partial(self._enqueue_decoder, buffers)))
        parts.append(("copy", partial(self._download, buffers, decode)))
        return parts

    def _upload(self, buffers: Buffers) -> None:
        self.stream.upload(buffers.block.pointer, buffers.staging, buffers.tables.size)

    def _enqueue(self, buffers: Buffers, index: int) -> None:
        """Launch ``index`` of the image: its ids are the previous launch's tokens, or its row of the table."""
        launch, tables = self._launches[index], buffers.tables
        ids = buffers.block.pointer + tables.at("ids", index)
        before = buffers.tokens.pointer + (index - 1) * tables.token_pitch
        if launch.chained:
            ids = before
        elif launch.fed:
            previous = self._launches[index - 1]
            self.stream.copy_2d(
                ids + launch.first_fed * 8,
                launch.query * 8,
                before + (previous.call.query - launch.fed) * 8,
                previous.query * 8,
                launch.fed * 8,
                buffers.tables.rows,
            )
        self._run(buffers, launch, index, ids)

    def _run(self, buffers: Buffers, launch: Launch, index: int, ids: int) -> None:
        context = self._bind(buffers, launch, index, ids)
        context.enqueue(self.stream, f"{launch.program} call at position {launch.call.write}")

    def _bind(self, buffers: Buffers, launch: Launch, index: int, ids: int) -> Context:
        """The context of ``launch``, which finds its ids at ``ids`` and the rest in row ``index`` of the tables."""
        context, tables, block = buffers.contexts[launch.program], buffers.tables, buffers.block.pointer
        addresses = {"ids": ids, "tokens": buffers.tokens.pointer + index * tables.token_pitch}
        for name in ("positions", "write", "length", "uniform"):
            addresses[name] = block + tables.at(name, index)
        for name, address in addresses.items():
            context.bind(name, address)
        return context

    def _collect(self, buffers: Buffers) -> None:
        """Put the tokens of all calls into sequence order [B,N]."""
        n, pitch = self.bundle.n_tokens, buffers.tables.token_pitch
        index = 0
        while index < len(self._launches):
            launch = self._launches[index]
            real, repeat = launch.call.query, launch.call.phase.repeat
            for b in range(buffers.images):
                self.stream.copy_2d(
                    buffers.sequence.pointer + (b * n + launch.call.write) * 8,
                    real * 8,
                    buffers.tokens.pointer + index * pitch + b * launch.query * 8,
                    pitch,
                    real * 8,
                    repeat,
                )
            index += repeat

    def _enqueue_decoder(self, buffers: Buffers) -> None:
        buffers.contexts["decoder"].enqueue(self.stream, "the decoder")

    def _download(self, buffers: Buffers, decode: bool) -> None:
        self.stream.download(buffers.out, buffers.sequence.pointer, buffers.sequence.size)
        if decode and buffers.pixels is not None:
            self.stream.download(buffers.out, buffers.pixels.pointer, buffers.pixels.size, buffers.sequence.size)

    # -- single calls ---------------------------------------------------------------------------------------------

    def _enqueue_single(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> tuple[Buffers, Launch]:
        """Enqueue one single call: it uses the last row of the tables, and a program that serves q positions."""
        self.device.activate()
        buffers = self._memory.buffers(batch)
        here = [launch for launch in self._launches if launch.call.query == ids.shape[1]]
        launch = next((launch for launch in here if launch.call.write == write[0]), here[0])
        lost = self._keys.without_keys(batch, write)
        if lost.size:
            raise ValueError(
                f"cache rows {lost.tolist()} do not hold the keys before positions {write.tolist()}: they were "
                "released, or "
                "lost when memory ran out; begin their images again from the first call"
            )
        buffers.tables.fill_batch(buffers.staging.array, batch)
        ids, write = self._keys.write(batch, ids, write, buffers.tables.rows, launch.query)
        buffers.tables.fill_single(buffers.staging.array, self._single, launch.query, batch, ids, write, uniform)
        self._upload(buffers)
        self._run(buffers, launch, self._single, buffers.block.pointer + buffers.tables.at("ids", self._single))
        return buffers, launch

    def _fetch(self, pointer: int, size: int) -> NDArray[np.uint8]:
        """A copy of ``size`` bytes of the device; it waits for the stream."""
        with self.device.pinned(size) as pinned:
            self.stream.download(pinned, pointer, size)
            self.stream.synchronize()
            got: NDArray[np.uint8] = pinned.array.copy()
            return got

    def _warm(self, buffers: Buffers) -> None:
        """Launch every context once outside of capture: the first launch finishes what is set up (by TensorRT), or
        loaded (by the driver), late."""
        if buffers.warm:
            return
        self._upload(buffers)
        seen = set()
        for index, launch in enumerate(self._launches):
            if launch.program not in seen:
                self._run(buffers, launch, index, buffers.block.pointer + buffers.tables.at("ids", index))
                seen.add(launch.program)
        if "decoder" in buffers.contexts:
            self.stream.fill(buffers.sequence.pointer, 0, buffers.sequence.size)
            self._enqueue_decoder(buffers)
        self.stream.synchronize()
        for program in self._programs.values():
            program.launched()
        buffers.warm = True

    def _drop_graphs(self) -> None:
        """Free the captured graphs. They hold addresses, so this happens before the memory there is freed."""
        for graphs in self._graphs.values():
            for graph in graphs:
                graph.free()
        self._graphs.clear()

    @property
    def _image(self) -> tuple[int, ...]:
        return image_shape(self.bundle)

    def close(self) -> None:
        """Free everything on the device. A second call does nothing, and so does one in a forked process."""
        if self._closed:
            return
        with ExitStack() as parts:  # each is freed, whatever another one raises
            parts.callback(setattr, self, "_closed", True)  # last: the context takes along what could not be freed
            if not cuda.forked():  # the memory is the other process's
                parts.callback(self.device.close)
                parts.callback(self.stream.free)
                for program in self._programs.values():
                    parts.callback(program.close)
                parts.callback(self._memory.free)
                parts.callback(self.device.activate)
            if self._decoder is not None:
                parts.callback(self._decoder.close)


def _each(enqueue: Sequence[Callable[[], None]]) -> None:
    for part in enqueue:
        part()
