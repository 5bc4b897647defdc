"""The inputs of all calls of an image, at fixed places of one block of device memory.

A CUDA graph replays launches with the addresses that they were captured with. So each call reads its own row of tables,
which are uploaded in one copy, and the next call reads its ids where this call writes its tokens. Nothing in the loop
waits for the host.

Letters: B images and R = 2B rows of the engine's profile (a batch may fill less), q positions, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.base import IMAGE_INPUTS, Batch
from par_runtime.backends.engines import Engine
from par_runtime.bundle import Bundle, Call, image_calls
from par_runtime.dtypes import Float, Int

ALIGN = 256  #: of the address of every tensor: TensorRT wants that


@dataclass(frozen=True)
class Field:
    """One array of the block: its offset in bytes, dtype and shape."""

    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, block: NDArray[np.uint8]) -> NDArray[np.generic]:
        """The array in ``block``."""
        return np.ndarray(self.shape, self.dtype, block.data, self.offset)


@dataclass(frozen=True)
class Launch:
    """One launch of a program for one call: ``query`` positions, first those of the call, then padding.

    ``fed`` slots from ``first_fed`` on take the last tokens that were sampled. If these are all inputs of the call,
    the launch reads the previous launch's tokens in place (``chained``); else they are copied into its row of the ids
    table.
    """

    call: Call
    program: str
    query: int
    fed: int
    first_fed: int
    chained: bool


def image_launches(bundle: Bundle, engine: Engine) -> list[Launch]:
    """Every launch of an image, in order."""
    launches: list[Launch] = []
    for call in image_calls(bundle.phases):
        name, query = engine.serving(call.phase.name)
        fed, previous = call.phase.token_slots, launches[-1] if launches else None
        chained = previous is not None and previous.query == query and len(fed) == call.query == previous.call.query
        launches.append(Launch(call, name, query, len(fed), fed[0] if fed else 0, chained))
    return launches


class Tables:
    """The layout of the block for ``images`` B: first a row for each launch, then what is the same in all launches."""

    def __init__(self, launches: list[Launch], images: int) -> None:
        self.launches, self.images, self.rows = launches, images, 2 * images
        self.query = max(launch.query for launch in launches)
        b, r, q = images, self.rows, self.query
        row: dict[str, Field] = {}
        offset = 0
        for name, dtype, shape in (
            ("ids", np.int64, (r, q)),
            ("positions", np.int64, (r, q)),
            ("write", np.int64, (r,)),
            ("length", np.int32, (r,)),
            ("uniform", np.float32, (b, q)),
        ):
            row[name] = Field(offset, np.dtype(dtype), shape)
            offset = aligned(offset + row[name].size)
        self.row, self.pitch = row, offset
        offset = self.pitch * (len(launches) + 1)  # one row more, for single calls (self-test, previews, logits)
        self.whole: dict[str, Field] = {}
        for name in ("image", *IMAGE_INPUTS):
            size = r if name == "image" else b
            self.whole[name] = Field(offset, np.dtype(IMAGE_INPUTS.get(name, np.int64)), (size,))
            offset = aligned(offset + self.whole[name].size)
        self.size = offset
        self.token_pitch = aligned(r * q * 8)  # bytes of one launch's tokens [R,q] int64

    def at(self, name: str, launch: int) -> int:
        """Offset of ``name`` for the launch of that index; ``len(launches)`` is the row of single calls."""
        return self.whole[name].offset if name in self.whole else self.row[name].offset + launch * self.pitch

    def fill_batch(self, block: NDArray[np.uint8], batch: Batch) -> None:
        """Write what is the same in all launches. Unused images take the first one's settings and free cache rows."""
        unused = np.arange(batch.images, self.images)
        free = np.setdiff1d(np.arange(self.rows), batch.cache_row)[: len(unused)]
        image = np.zeros(self.rows, np.int64)
        image[batch.cache_row] = batch.per_row(np.arange(batch.images))
        image[free] = unused
        values = batch.per_image()
        for name, field in self.whole.items():
            if name == "image":
                field.of(block)[...] = image
            else:
                padding = free if name.endswith("_row") else np.repeat(values[name][:1], len(unused))
                field.of(block)[...] = np.concatenate([values[name], padding])

    def fill_launch(self, block: NDArray[np.uint8], index: int, launch: Launch) -> None:
        """Write into row ``index`` what is the same for all images: positions, visible length, learnable tokens."""
        call, row = launch.call, self._row(block, index, launch.query)
        row["ids"][...] = 0
        for slot, entry in enumerate(call.phase.inputs):
            if isinstance(entry, int):
                row["ids"][:, slot] = entry
        row["uniform"][...] = 0
        self._place(row, np.full(self.rows, call.write), call.query)

    def fill_single(
        self, block: NDArray[np.uint8], index: int, query: int, batch: Batch, ids: Int, write: Int, uniform: Float
    ) -> None:
        """Write a single call into row ``index``, for a program of ``query`` positions.

        ``ids`` [R,q'] and ``write`` [R] of all rows of the profile, ``uniform`` [B',q'] of the batch's images.
        """
        real, row = ids.shape[1], self._row(block, index, query)
        row["ids"][...] = 0
        row["ids"][:, :real] = ids
        row["uniform"][...] = 0
        row["uniform"][: batch.images, :real] = uniform
        self._place(row, write, real)

    def _place(self, row: dict[str, NDArray[Any]], write: Int, real: int) -> None:
        """Write where each row stands: ``write`` [R], ``real`` positions. Padding follows them and is masked."""
        row["write"][...] = write
        row["length"][...] = write + real
        row["positions"][...] = write[:, None] + np.arange(row["positions"].shape[1])

    def _row(self, block: NDArray[np.uint8], index: int, query: int) -> dict[str, NDArray[Any]]:
        return {name: self.view(block, name, index, query) for name in self.row}

    def fill_image(self, block: NDArray[np.uint8], batch: Batch, class_ids: Int, noise: Float) -> None:
        """Write what differs between images: ``class_ids`` [R'] and ``noise`` [B',N].

        It copies a whole phase at a time, because it runs for every batch.
        """
        index = 0
        while index < len(self.launches):
            launch = self.launches[index]
            call, repeat = launch.call, launch.call.phase.repeat
            for slot, entry in enumerate(call.phase.inputs):
                if entry == "class":
                    into = self.view(block, "ids", index, launch.query)
                    into[:, slot] = class_ids[0]
                    into[batch.cache_row, slot] = class_ids
            draws = noise[:, call.write : call.write + call.query * repeat].reshape(batch.images, repeat, call.query)
            self._uniforms(block, index, launch)[:, : batch.images, : call.query] = draws.transpose(1, 0, 2)
            index += repeat

    def _uniforms(self, block: NDArray[np.uint8], index: int, launch: Launch) -> NDArray[np.generic]:
        """The draws of all calls of a phase, the first in row ``index``: [repeat, B, q]."""
        field = self.row["uniform"]
        shape = (launch.call.phase.repeat, self.images, launch.query)
        strides = (self.pitch, launch.query * 4, 4)
        return np.ndarray(shape, field.dtype, block.data, field.offset + index * self.pitch, strides)

    def view(self, block: NDArray[np.uint8], name: str, index: int, query: int) -> NDArray[np.generic]:
        """The array ``name`` of row ``index`` in ``block``, packed for a program of ``query`` positions."""
        field = self.row[name]
        shape = (field.shape[0], query) if len(field.shape) == 2 else field.shape
        return np.ndarray(shape, field.dtype, block.data, field.offset + index * self.pitch)


def aligned(offset: int) -> int:
    """The next multiple of :data:`ALIGN`, in bytes."""
    return -(-offset // ALIGN) * ALIGN
