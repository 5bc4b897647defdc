"""The least time that hardware allows a model: what a call must read over the bandwidth, what it must calculate over the peak.

A call reads every weight but those of the embedding table once, and of each row in flight the keys and values that it may
see. It multiplies each weight with each position of each row, and each position with those keys and values. Nothing else
is counted (activations stay in caches; norms, sampling and the noise are small), so the bound is a true lower one.
Source: the paper's model of a memory-bound step, extended by arithmetic.

Letters: B images, R rows (two for a guided image), N tokens, n tokens per group, q positions of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from par_runtime.bench.subjects.base import Shape
from par_runtime.bundle import Phase


@dataclass(frozen=True)
class DataSheet:
    """A GPU as its maker describes it: memory bandwidth, and dense fp16 matrices summed in fp32. Not measured."""

    gb_s: float
    tflop_s: float


DATA_SHEETS = {
    "A100-40": DataSheet(1555, 312),
    "A100-80": DataSheet(2039, 312),
    "H100": DataSheet(3350, 989),
    "H200": DataSheet(4800, 989),
    "L4": DataSheet(300, 121),
    "RTX 4090": DataSheet(1008, 165),
}

#: name -> width, layers, heads, FFN width of the published models (V = 16384, 1000 classes).
NAMED = {
    "PAR-B": (768, 12, 12, 2048),
    "PAR-L": (1024, 24, 16, 2816),
    "PAR-XL": (1280, 36, 20, 3584),
    "PAR-XXL": (1536, 48, 24, 4096),
    "PAR-3B": (3200, 24, 32, 8704),
}


@dataclass(frozen=True)
class Call:
    """What one call must do at least."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Bound:
    """The least time of some calls. ``by``: "bandwidth" or "compute", on which most of it goes."""

    ms: float
    by: str
    bytes: float
    operations: float


def step_parameters(shape: Shape) -> int:
    """Parameters that a call reads: all but the embedding table, of which it reads a few rows. Heads as padded."""
    inner = shape.n_heads * shape.head_dim
    layer = shape.dim * 3 * inner + inner * shape.dim + 3 * shape.dim * shape.ffn_dim + 2 * shape.dim
    return shape.n_layers * layer + shape.dim + shape.dim * shape.vocab_size


def phase_calls(
    shape: Shape, name: str, images: int, guided: bool, weight_bytes: float, cache_bytes: float
) -> list[Call]:
    """The calls of phase ``name`` for a batch; none for a phase that the model does not have.

    ``weight_bytes`` of a parameter as it is read, ``cache_bytes`` of a number of the cache.
    """
    if name == "decoder":
        return decoder_calls(shape, images, weight_bytes) if shape.decoder_parameters else []
    rows = images * (2 if guided else 1)
    return [
        _call(shape, phase, phase.start + (i + 1) * phase.query, rows, weight_bytes, cache_bytes)
        for phase in shape.phases
        if phase.name == name
        for i in range(phase.repeat)
    ]


def all_calls(shape: Shape, images: int, guided: bool, weight_bytes: float, cache_bytes: float) -> list[Call]:
    """The model's calls of a batch, in order; the decoder is not among them."""
    return [
        call
        for phase in shape.phases
        for call in phase_calls(shape, phase.name, images, guided, weight_bytes, cache_bytes)
    ]


def _call(shape: Shape, phase: Phase, visible: int, rows: int, weight_bytes: float, cache_bytes: float) -> Call:
    parameters = step_parameters(shape)
    numbers = 2 * shape.n_layers * shape.n_heads * shape.head_dim * visible  # keys and values of one row
    positions = rows * phase.query
    return Call(
        bytes=parameters * weight_bytes + rows * numbers * cache_bytes,
        operations=2 * parameters * positions + 2 * numbers * positions,
    )


def decoder_calls(shape: Shape, images: int, weight_bytes: float, calls: int = 1) -> list[Call]:
    """Decoding ``images`` in ``calls`` equal parts: weights once in each, one byte per pixel and colour not counted."""
    each = images * shape.decoder_operations / calls
    return [Call(shape.decoder_parameters * weight_bytes, each)] * calls


def bound(calls: Sequence[Call], gb_s: float, tflop_s: float | None) -> Bound:
    """The least time of ``calls`` one after the other; without a matrix peak, by bandwidth alone."""
    read = [call.bytes / gb_s / 1e6 for call in calls]
    calculate = [call.operations / tflop_s / 1e9 if tflop_s else 0.0 for call in calls]
    by = "bandwidth" if sum(read) >= sum(calculate) else "compute"
    return Bound(
        ms=sum(map(max, read, calculate)),
        by=by,
        bytes=sum(call.bytes for call in calls),
        operations=sum(call.operations for call in calls),
    )


def working_bytes(shape: Shape, images: int, guided: bool, weight_bytes: float, cache_bytes: float) -> int:
    """What the largest call reads: the size of array that a fair bandwidth is measured with."""
    calls = all_calls(shape, images, guided, weight_bytes, cache_bytes)
    return int(max(call.bytes for call in calls))


def phases_of(n: int, n_tokens: int) -> tuple[Phase, ...]:
    """The calls of an image for models that no bundle describes: n + N/n - 1 of them. ``inputs`` are left empty."""
    each = [("prefill", 1, 1), ("sequential", 1, n - 1), ("transition", n, 1), ("group", n, n_tokens // n - 2)]
    phases, position = [], 0
    for name, query, repeat in each:
        phases.append(Phase(name, query, repeat, position, ()))
        position += query * repeat
    return tuple(phases)


def named_shape(name: str, n: int, n_tokens: int = 576, vocab_size: int = 16384, pad_heads_to: int = 8) -> Shape:
    """A published model ("PAR-XL") at another n, its heads padded as bundles pad them."""
    dim, layers, heads, ffn = NAMED[name]
    head_dim = -(-(dim // heads) // pad_heads_to) * pad_heads_to
    return Shape(dim, layers, heads, head_dim, ffn, vocab_size, phases_of(n, n_tokens))


def model_name(shape: Shape) -> str:
    """ "PAR-L" for its width and depth, or these two where they are no published model's."""
    for name, (dim, layers, heads, _) in NAMED.items():
        if (shape.dim, shape.n_layers, shape.n_heads) == (dim, layers, heads):
            return name
    return f"width {shape.dim}, {shape.n_layers} layers"


# -- GPUs that are not here ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The least time of a batch on a GPU by data sheet: no measurement, and no promise that anything gets there.

    In fp16; the model's calls, without decoding.
    """

    bundle: str
    model: str
    n: int
    images: int
    guided: bool
    gpu: str
    gb_s: float
    tflop_s: float
    bound_ms: float
    by: str


def predictions(
    shape: Shape, bundle: str, n: int, images: int, guided: bool, weight_bytes: float = 2
) -> list[Prediction]:
    """One for each GPU of :data:`DATA_SHEETS`."""
    calls = all_calls(shape, images, guided, weight_bytes, 2)
    out = []
    for gpu, sheet in DATA_SHEETS.items():
        found = bound(calls, sheet.gb_s, sheet.tflop_s)
        name = model_name(shape)
        out.append(Prediction(bundle, name, n, images, guided, gpu, sheet.gb_s, sheet.tflop_s, found.ms, found.by))
    return out
