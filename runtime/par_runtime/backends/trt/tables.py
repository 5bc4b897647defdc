"""What a whole image needs on the device, laid out once: every call's inputs at fixed places of one block.

A CUDA graph replays launches with the addresses they were captured with. So each call reads its own row of tables
that are uploaded in one copy, and the tokens of a call lie where the next call reads its ids: nothing in the loop
waits for the host, and nothing in it depends on data.

Letters: B images and R = 2B rows of the engine's profile (a batch may fill less), q positions, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.base import Batch
from par_runtime.backends.engines import Engine
from par_runtime.bundle import Bundle, Phase
from par_runtime.dtypes import Float, Int

ALIGN = 256  #: TensorRT wants tensor addresses that are multiples of this


@dataclass(frozen=True)
class Field:
    """One array of the block: where it lies and what it is."""

    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, block: NDArray[np.uint8]) -> NDArray[np.generic]:
        """The array in ``block``."""
        return np.ndarray(self.shape, self.dtype, block.data, self.offset)


@dataclass(frozen=True)
class Call:
    """One launch of a plan: ``query`` positions of which ``phase.query`` are real, the first at ``write``.

    ``fed`` slots from ``first_fed`` on take the last tokens sampled. Where these are all that matters, the call reads
    the previous call's tokens in place (``chained``); else they are copied into its row of the ids table.
    """

    phase: Phase
    plan: str
    query: int
    write: int
    fed: int
    first_fed: int
    chained: bool


def calls_of(bundle: Bundle, engine: Engine) -> list[Call]:
    """Every launch of an image, in order."""
    calls: list[Call] = []
    for phase in bundle.phases:
        name, plan = engine.plan_for(phase.name)
        fed = [j for j, entry in enumerate(phase.inputs) if entry == "token"]
        for i in range(phase.repeat):
            previous = calls[-1] if calls else None
            chained = (
                previous is not None
                and previous.query == plan.query
                and len(fed) == phase.query == previous.phase.query
            )
            calls.append(
                Call(phase, name, plan.query, phase.start + i * phase.query, len(fed), fed[0] if fed else 0, chained)
            )
    return calls


class Tables:
    """The layout of the block for ``images`` B: per-call rows first, then what holds for the whole image."""

    def __init__(self, bundle: Bundle, calls: list[Call], images: int) -> None:
        self.bundle, self.calls, self.images, self.rows = bundle, calls, images, 2 * images
        self.query = max(call.query for call in calls)
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
        offset = self.pitch * (len(calls) + 1)  # one row more: a call on its own (selftest, previews, logits)
        self.whole: dict[str, Field] = {}
        for name, dtype in (
            ("image", np.int64),
            ("cond_row", np.int64),
            ("uncond_row", np.int64),
            ("guidance", np.float32),
            ("temperature", np.float32),
            ("top_k", np.int64),
            ("top_p", np.float32),
        ):
            self.whole[name] = Field(offset, np.dtype(dtype), (r if name == "image" else b,))
            offset = aligned(offset + self.whole[name].size)
        self.size = offset
        self.token_pitch = aligned(r * q * 8)  # bytes of one call's tokens [R,q] int64

    def at(self, name: str, call: int) -> int:
        """Offset of ``name`` for the call of that index (``len(calls)``: the single call)."""
        return self.whole[name].offset if name in self.whole else self.row[name].offset + call * self.pitch

    def device_rows(self, batch: Batch) -> Int:
        """The device row of each row of ``batch`` [R']: classes first, rows without class from B on."""
        extra = np.arange(batch.rows - batch.images)
        return np.concatenate([np.arange(batch.images), self.images + extra])

    def fill_batch(self, block: NDArray[np.uint8], batch: Batch) -> None:
        """Write what holds for the whole image. Unused images repeat the first one's settings, on rows of their own."""
        b, rows = self.images, self.device_rows(batch)
        cond = np.arange(b)
        uncond = cond.copy()
        uncond[: batch.images] = rows[batch.uncond_row]
        image = np.concatenate([cond, cond])
        image[rows[batch.uncond_row]] = np.arange(batch.images)
        values = {"image": image, "cond_row": cond, "uncond_row": uncond}
        for name in ("guidance", "temperature", "top_k", "top_p"):
            given = getattr(batch, name)
            values[name] = np.concatenate([given, np.repeat(given[:1], b - batch.images)])
        for name, field in self.whole.items():
            field.of(block)[...] = values[name]

    def fill_call(self, block: NDArray[np.uint8], index: int, call: Call) -> None:
        """Write what never changes of a call into row ``index``: its place, what it sees, its learnable tokens."""
        q, real = call.query, call.phase.query
        row = {name: self.view(block, name, index, q) for name in self.row}
        row["ids"][...] = 0
        for j, entry in enumerate(call.phase.inputs):
            if isinstance(entry, int):
                row["ids"][:, j] = entry
        row["positions"][...] = np.arange(call.write, call.write + q)
        row["write"][...] = call.write
        row["length"][...] = call.write + real  # padded positions are written, and never seen
        row["uniform"][...] = 0

    def fill_single(
        self, block: NDArray[np.uint8], index: int, call: Call, batch: Batch, ids: Int, uniform: Float
    ) -> None:
        """Write a call on its own into row ``index``: ``ids`` [R',q'], ``uniform`` [B',q']. Unused rows repeat row 0."""
        real, rows = call.phase.query, self.device_rows(batch)
        self.fill_call(block, index, call)
        into = self.view(block, "ids", index, call.query)
        into[:, :real] = ids[0]
        into[rows, :real] = ids
        self.view(block, "uniform", index, call.query)[: batch.images, :real] = uniform

    def fill_image(self, block: NDArray[np.uint8], batch: Batch, class_ids: Int, noise: Float) -> None:
        """Write what an image differs in: ``class_ids`` [R'] and ``noise`` [B',N]. A phase at a time: this is on the
        path of every image."""
        rows = self.device_rows(batch)
        index = 0
        while index < len(self.calls):
            call = self.calls[index]
            real, repeat = call.phase.query, call.phase.repeat
            for j, entry in enumerate(call.phase.inputs):
                if entry == "class":
                    into = self.view(block, "ids", index, call.query)
                    into[:, j] = class_ids[0]
                    into[rows, j] = class_ids
            draws = noise[:, call.write : call.write + real * repeat].reshape(batch.images, repeat, real)
            self._uniforms(block, index, call)[:, : batch.images, :real] = draws.transpose(1, 0, 2)
            index += repeat

    def _uniforms(self, block: NDArray[np.uint8], index: int, call: Call) -> NDArray[np.generic]:
        """The draws of all calls of a phase, the first in row ``index``: [repeat, B, q]."""
        field = self.row["uniform"]
        shape = (call.phase.repeat, self.images, call.query)
        strides = (self.pitch, call.query * 4, 4)
        return np.ndarray(shape, field.dtype, block.data, field.offset + index * self.pitch, strides)

    def view(self, block: NDArray[np.uint8], name: str, index: int, query: int) -> NDArray[np.generic]:
        """The array ``name`` of row ``index`` in ``block``, packed for a plan of ``query`` positions."""
        field = self.row[name]
        shape = (field.shape[0], query) if len(field.shape) == 2 else field.shape
        return np.ndarray(shape, field.dtype, block.data, field.offset + index * self.pitch)


def aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN
