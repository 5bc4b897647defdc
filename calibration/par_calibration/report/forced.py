"""Both models on the same tokens: logits at every position, the original's streamed to a temporary file.

One network at a time is in memory. An image takes two rows, one with its class and one without; guided logits are
computed from both here, with the formula of the graphs: ``uncond + guidance * (cond - uncond)``.

Letters: M images, N tokens, B images of a batch, q positions of a call, V codes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_calibration.heldout import HeldOut
from par_runtime.bundle import Bundle, Call, image_calls
from par_runtime.dtypes import Float
from par_runtime.pipeline import Pipeline
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule, rows_of

Double = NDArray[np.float64]
CLASS, LEARNABLE, CODE = "class", "learnable", "code"  #: what an input position holds
INPUTS = (CLASS, LEARNABLE, CODE)
#: Images whose logits are computed in one batch: two rows each.
AT_ONCE = 8
SAY_SECONDS = 20.0  #: between two lines of progress
Say = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class Forced:
    """What two models give the same tokens: arrays [M,N], float64 or bool, by kind of logits."""

    kl: Double  #: of the first model's distribution from the second's, in nats; unguided
    kl_guided: Double
    same: NDArray[np.bool_]  #: both give the same code the largest logit; unguided
    same_guided: NDArray[np.bool_]
    likelihood: Double  #: natural log-probability of the token under the first model; unguided
    likelihood_other: Double  #: under the second


class Stream:
    """A temporary file of logits [M,calls][2,B,q,V] fp32, written once in order and read in the same order.

    It has no name, so that a killed process leaves none of its gigabytes behind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def write(self, logits: Float) -> None:
        """Append ``logits``. Raises CalibrationError where the disk is full."""
        try:
            self._file.write(np.ascontiguousarray(logits).data)
            self._file.flush()
        except OSError as error:
            raise CalibrationError(
                f"{self.folder}: the temporary file of logits cannot be written ({error.strerror}); compare fewer "
                "held-out images, or set TMPDIR to a folder on another disk"
            ) from error

    def rewind(self) -> None:
        """Read from the beginning."""
        self._file.seek(0)

    def read(self, shape: tuple[int, ...]) -> Float:
        """The next logits of ``shape``."""
        count = int(np.prod(shape))
        numbers: Float = np.fromfile(self._file, np.float32, count).reshape(shape)
        return numbers

    def close(self) -> None:
        """Remove the file."""
        with suppress(OSError):  # what could not be written is not needed any more
            self._file.close()


def forced_logits(pipeline: Pipeline, held: HeldOut, say: Say = lambda _: None) -> Iterator[tuple[slice, Call, Float]]:
    """The logits of every call with the tokens of ``held`` given: (images, call, logits [2,B,q,V]).

    Of the two, the first are with class and the second without. ``say`` hears from time to time how far it is.
    """
    said = time.monotonic()
    bundle = pipeline.bundle
    size = max(1, min(AT_ONCE, pipeline.default_batch, pipeline.backend.max_images // 2))
    for first in range(0, len(held), size):
        part = slice(first, min(first + size, len(held)))
        tokens, labels = held.tokens[part], list(held.labels[part])
        count = len(labels)
        # Rows with class and rows without are two sets of unguided images here, so that both logits come out.
        each = image_settings(bundle, 2 * count, guidance=1.0)
        schedule = Schedule.of(bundle, labels * 2, each)
        ids = schedule.class_ids.copy()
        ids[count:] = bundle.no_class
        schedule = replace(schedule, class_ids=ids)
        with rows_of(pipeline.backend, schedule):
            for call, batch, inputs, write in schedule.walk(np.concatenate([tokens, tokens])):
                logits = pipeline.backend.logits(batch, inputs, write)
                yield part, call, logits.reshape(2, count, call.query, -1)
                if time.monotonic() > said + SAY_SECONDS:
                    said = time.monotonic()
                    say(f"images {part.start + 1} to {part.stop} of {len(held)}, {call.positions.stop} tokens of each")


def stream_bytes(bundle: Bundle, images: int) -> int:
    """How large the file of a :class:`Stream` becomes."""
    return 2 * 4 * images * bundle.n_tokens * bundle.vocab_size


def record(pipeline: Pipeline, held: HeldOut, stream: Stream, say: Say) -> None:
    """Write the logits of ``held`` to ``stream``."""
    for _, _, logits in forced_logits(pipeline, held, say):
        stream.write(logits)


def against(
    pipeline: Pipeline,
    held: HeldOut,
    streams: list[Stream],
    guidance: float,
    say: Say,
    keep: Stream | None = None,
) -> list[Forced]:
    """The logits of ``pipeline`` against those in each of ``streams``; ``keep`` gets them too."""
    shape = held.tokens.shape
    out = [
        Forced(*(np.zeros(shape, bool if f.name.startswith("same") else np.float64) for f in fields(Forced)))
        for _ in streams
    ]
    for stream in streams:
        stream.rewind()
    for part, call, logits in forced_logits(pipeline, held, say):
        if keep is not None:
            keep.write(logits)
        given = held.tokens[part, call.positions][..., None]
        for stream, to in zip(streams, out, strict=True):
            compare_logits(stream.read(logits.shape), logits, guidance, given, to, (part, call.positions))
    return out


def compare_logits(
    first: Float, second: Float, guidance: float, given: NDArray[np.int64], to: Forced, at: tuple[slice, slice]
) -> None:
    """Fill the places ``at`` of ``to`` from logits [2,B,q,V] of both models; what is no number stays none."""
    with np.errstate(invalid="ignore", over="ignore"):
        _fill(first, second, guidance, given, to, at)


def _fill(
    first: Float, second: Float, guidance: float, given: NDArray[np.int64], to: Forced, at: tuple[slice, slice]
) -> None:
    to.same[at] = first[0].argmax(-1) == second[0].argmax(-1)
    to.kl[at], normal, other_normal = divergence(first[0], second[0])
    to.likelihood[at] = np.take_along_axis(first[0], given, -1)[..., 0] - normal
    to.likelihood_other[at] = np.take_along_axis(second[0], given, -1)[..., 0] - other_normal
    one, other = (x[1] + np.float32(guidance) * (x[0] - x[1]) for x in (first, second))
    to.kl_guided[at] = divergence(one, other)[0]
    to.same_guided[at] = one.argmax(-1) == other.argmax(-1)


def divergence(first: Float, second: Float) -> tuple[Double, Double, Double]:
    """The Kullback-Leibler divergence [...] in nats of the softmax of ``second`` [...,V] from that of ``first``.

    Also the logarithms of the sums of both exponentials: a logit less this is a log-probability. Exponentials are of
    fp32, their sums of fp64, and the logits are subtracted from each other before anything else, so what is left of
    rounding is about 1e-7 nats.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        most, most_other = first.max(-1), second.max(-1)
        mass = np.exp(first - most[..., None])
        total = mass.sum(-1, dtype=np.float64)
        normal = most + np.log(total)
        normal_other = most_other + np.log(np.exp(second - most_other[..., None]).sum(-1, dtype=np.float64))
        kl: Double = (mass * (first - second)).sum(-1, dtype=np.float64) / total - (normal - normal_other)
    return np.where(kl < 0, 0.0, kl), normal, normal_other  # NaN stays


def positions_of(bundle: Bundle) -> dict[str, NDArray[np.int64]]:
    """The positions of each phase and of each kind of input, by name: "group", "class", "learnable", "code"."""
    where: dict[str, list[int]] = {name: [] for name in (*(phase.name for phase in bundle.phases), *INPUTS)}
    for call in image_calls(bundle.phases):
        for slot, entry in enumerate(call.phase.inputs):
            position = call.write + slot
            where[call.phase.name].append(position)
            where[CLASS if entry == "class" else CODE if entry == "token" else LEARNABLE].append(position)
    return {name: np.array(places, np.int64) for name, places in where.items() if places}
