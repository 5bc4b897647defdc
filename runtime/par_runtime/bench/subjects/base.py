"""What ``parvis bench`` measures: a way of making images, and what one batch of it took.

A :class:`Subject` is a bundle on a backend (``bundle.py``), or a baseline of it. Subjects are measured in turns by
``bench.measure``; each normally lives in a process of its own (``worker.py``), so that its peak memory is its own
and no thread pool waits on another's. Everything here is plain values, because it crosses that border as JSON.

Letters: B images, N tokens, n tokens per group, q positions of one call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from par_runtime.bundle import MANIFEST, Bundle, Phase
from par_runtime.cost.decoder import decoder_work

#: The parts of a whole image, in order. ``copy`` is what the host does between calls: ids, noise, tokens back; on a GPU
#: the copies to and from it.
PHASES = ("prefill", "sequential", "transition", "group", "decoder", "copy")


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its bytes and operations follow from. ``head_dim`` as it is padded.

    ``decoder_operations`` are of one image; both decoder numbers are 0 where there is no decoder.
    """

    dim: int
    n_layers: int
    n_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    phases: tuple[Phase, ...]
    decoder_parameters: int = 0
    decoder_operations: int = 0

    @property
    def calls(self) -> int:
        """Model calls per image."""
        return sum(phase.repeat for phase in self.phases)

    @property
    def n_tokens(self) -> int:
        return sum(phase.repeat * phase.query for phase in self.phases)

    @staticmethod
    def of(bundle: Bundle) -> Shape:
        shape = Shape.of_model(bundle.model, bundle.phases)
        if bundle.image_size is None:
            return shape
        # The tokenizer's layers matter to no other user of the manifest, so ``Bundle`` does not hold them.
        tokenizer = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))["tokenizer"]
        parameters, operations = decoder_work(tokenizer["config"], bundle.grid)
        return replace(shape, decoder_parameters=parameters, decoder_operations=operations)

    @staticmethod
    def of_model(m: Mapping[str, int], phases: Sequence[Phase]) -> Shape:
        """From the manifest's ``model``; without a decoder."""
        sizes = (m["dim"], m["n_layers"], m["n_heads"], m["head_dim_padded"], m["ffn_dim"], m["vocab_size"])
        return Shape(*sizes, tuple(phases))


@dataclass(frozen=True)
class Facts:
    """What does not change between two batches of a subject.

    ``weight_bytes``: of one parameter as a call reads it (4 on a CPU, whatever the bundle stores); ``cache_bytes``: of
    one number of the key-value cache. ``clock``: what the calls are timed with.
    """

    label: str  #: "parvis", "eager", "compiled", "n1": who it is in tables and plots, unique among those compared
    bundle: str
    hash: str
    model: str  #: "PAR-L", or width and layers where it is no named size
    parameters: int
    n: int
    grid: tuple[int, int, int]
    precision: str  #: the bundle's
    computes: str  #: what it calculates in
    weight_bytes: float
    cache_bytes: float
    backend: str
    version: str
    device: str
    threads: int | None
    shape: Shape
    image_size: tuple[int, int] | None = None  #: pixels (H, W); None where the bundle ends at tokens
    clock: str = "perf_counter"
    excluded: tuple[str, ...] = ()  #: what the times do not hold
    sampling: str = ""  #: how tokens are drawn, as text


@dataclass(frozen=True)
class Sample:
    """One batch, made once.

    ``calls_ms``: milliseconds of each call, by phase, of :data:`PHASES` those that it has; ``image_ms``: the whole batch
    by a clock of its own, from labels to pixels. ``peak_bytes``: the most memory that the subject's process has held so
    far, where it has a process of its own. ``chosen``: only some of the model's calls were made, ``image_ms`` is theirs.
    """

    calls_ms: Mapping[str, Sequence[float]]
    image_ms: float
    peak_bytes: int | None = None
    chosen: bool = False


class Subject(Protocol):
    """One way of making images, measured in turns with others."""

    @property
    def facts(self) -> Facts: ...

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        """Make one batch, or ``most_calls`` of its calls (:func:`spread_calls`). Raises MemoryError where it does not fit."""
        ...

    def close(self) -> None:
        """Give everything back; it cannot be used afterwards."""
        ...


def spread_calls(phases: Sequence[Phase], most: int | None) -> frozenset[int] | None:
    """Which calls of an image, counted from 0, stand for all where only ``most`` are made; None where all are.

    At least two of every phase that has as many, the rest by how many calls a phase has, and evenly over it: later calls
    see more keys and take longer, so the mean of those chosen is the mean of all.
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


def facts_from(plain: Mapping[str, Any]) -> Facts:
    """Facts as ``dataclasses.asdict`` and JSON gave them."""
    shape = dict(plain["shape"])
    shape["phases"] = tuple(Phase(**(p | {"inputs": tuple(p["inputs"])})) for p in shape["phases"])
    rest = dict(plain) | {"shape": Shape(**shape), "grid": tuple(plain["grid"]), "excluded": tuple(plain["excluded"])}
    size = plain["image_size"]
    return Facts(**(rest | {"image_size": None if size is None else tuple(size)}))
