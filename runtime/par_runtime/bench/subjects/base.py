"""What ``parvis bench`` measures: a subject is one way of making images, a sample is one batch that it made.

A :class:`Subject` is a bundle on a backend (``pipeline.py``), or the same model in PyTorch (``baselines.py``).
``bench.measure`` measures several of them in turns. Each normally lives in a process of its own (``process.py``,
``worker.py``), so that its peak memory is its own and thread pools do not disturb each other. Everything here is plain
values, because it goes from process to process as JSON.

Letters: B images, N tokens, n tokens per group, q positions of one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from par_runtime.bundle import Phase
from par_runtime.cost.architecture import Architecture
from par_runtime.errors import RequestError

#: The phases of the step network, in order.
MODEL_PHASES = ("prefill", "sequential", "transition", "group")
#: The parts of a whole image, in order. ``copy`` is what the host does between calls: ids, noise, tokens back; on a GPU
#: the copies to and from it.
PHASES = (*MODEL_PHASES, "decoder", "copy")
#: The parts of a start, from a command to its first image, in order (``suites/start.py``).
STARTING = ("python", "load", "selftest", "first_image")


class OutOfTimeError(Exception):
    """A subject was still at work when the time of the whole run had passed, and was ended."""


class TooManyImagesError(RequestError):
    """A batch is larger than the subject's backend takes at once."""


@dataclass(frozen=True)
class SubjectInfo:
    """What does not change between two batches of a subject.

    ``weight_bytes``: of one parameter as a call reads it (4 on a CPU, whatever the bundle stores); ``cache_bytes``: of
    one number of the key-value cache. ``clock``: what the calls are timed with.
    """

    label: str  #: "parvis", "eager", "compiled", "n1": its name in tables and plots, unique among those compared
    bundle: str
    hash: str
    model: str  #: "PAR-L", or width and layers if it is not a named size
    parameters: int
    n: int
    grid: tuple[int, int, int]
    precision: str  #: the bundle's
    computes: str  #: the precision that it calculates in
    weight_bytes: float
    cache_bytes: float
    backend: str
    version: str
    device: str
    threads: int | None
    architecture: Architecture
    image_size: tuple[int, int] | None = None  #: pixels (H, W); None where the bundle ends at tokens
    decoder: str = ""  #: runtime and version of what makes the pixels, where it is another than ``backend``
    decoder_computes: str = "fp32"  #: the precision that this one calculates in; "fp32" where ``decoder`` is empty
    decoder_bf16: str = ""  #: how the C decoder could compute in bf16 ("amx", "dots"), where it computes in fp32
    clock: str = "perf_counter"
    excluded: tuple[str, ...] = ()  #: what the times do not contain
    sampling: str = ""  #: how tokens are drawn, as text
    pytorch: bool = False  #: a baseline that PyTorch runs, not a backend of this package
    weights: str = ""  #: "int8" or "int4", of the bundle's quantised matrices; empty where they are in ``precision``


@dataclass(frozen=True)
class Sample:
    """One batch, made once.

    ``calls_ms``: milliseconds of each call, by phase, for those of :data:`PHASES` that the subject has; of a start, by
    part, for those of :data:`STARTING`. ``image_ms``: the whole batch by a clock of its own, from labels to pixels.
    ``peak_bytes``: the most memory that the subject's process has held so far, where it has a process of its own.
    ``chosen``: only some of the model's calls were made, and ``image_ms`` is the time of these. ``flags``: why the
    subject itself doubts the times, as in a row.
    """

    calls_ms: Mapping[str, Sequence[float]]
    image_ms: float
    peak_bytes: int | None = None
    chosen: bool = False
    flags: Sequence[str] = ()


class Subject(Protocol):
    """One way of making images, measured in turns with others."""

    @property
    def info(self) -> SubjectInfo:
        """What does not change between two batches."""
        ...

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        """Make one batch, or ``most_calls`` of its calls (:func:`spread_calls`).

        Raises MemoryError if it does not fit, TooManyImagesError.
        """
        ...

    def close(self) -> None:
        """Free everything; the subject cannot be used afterwards."""
        ...


def spread_calls(phases: Sequence[Phase], most: int | None) -> frozenset[int] | None:
    """Which calls of an image, counted from 0, stand for all where only ``most`` are made; None where all are made.

    Every phase gets at least two calls, if it has two. The others are shared out by the number of calls of each phase.
    They are spread evenly over the phase: later calls see more keys and take longer, so the mean of the chosen calls is
    the mean of all.
    """
    if most is None or most >= sum(phase.repeat for phase in phases):
        return None
    share = max(0, most - sum(min(2, phase.repeat) for phase in phases)) / sum(phase.repeat for phase in phases)
    chosen: list[int] = []
    first = 0
    for phase in phases:
        count = min(phase.repeat, 2 + int(share * phase.repeat))
        chosen += [first + int((i + 0.5) * phase.repeat / count) for i in range(count)]
        first += phase.repeat
    return frozenset(chosen)


def info_from_json(plain: Mapping[str, Any]) -> SubjectInfo:
    """The info that ``dataclasses.asdict`` and JSON turned into ``plain``."""
    sizes = dict(plain["architecture"])
    sizes["phases"] = tuple(Phase(**(p | {"inputs": tuple(p["inputs"])})) for p in sizes["phases"])
    size = plain["image_size"]
    changed = {
        "architecture": Architecture(**sizes),
        "grid": tuple(plain["grid"]),
        "excluded": tuple(plain["excluded"]),
        "image_size": None if size is None else tuple(size),
    }
    return SubjectInfo(**(dict(plain) | changed))
