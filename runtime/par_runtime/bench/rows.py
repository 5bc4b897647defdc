"""One row of a benchmark: one phase of one subject at one batch size, and everything needed to understand it alone.

``samples_ms`` are raw: one number per repetition, the time of all calls of the phase in one batch, so that the rows of
a subject add up to its "image" row, and the parts of a start to its "start" row. The spread is the interquartile range:
it covers the middle half of the repetitions, so one repetition that another process disturbed does not change it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from par_runtime.bench.machine import Machine
from par_runtime.checked import UNPRINTABLE, Mismatch, Value, load_json, read_regular, shown
from par_runtime.errors import RequestError
from par_runtime.reading import advised

SCHEMA = 1
#: Of an interval of a ratio: how often samples are drawn again, its part of the results, the samples that it needs.
RESAMPLES, MIDDLE, FEWEST = 2000, 0.95, 3
#: Of a file of rows: bytes, samples of a row, characters of a text, and the largest number.
LARGEST_FILE, MOST_SAMPLES, LONGEST_TEXT, LARGEST = 2**27, 10**6, 4000, 1e18
ENOUGH = 5  #: repetitions; a row with fewer is marked
ABOVE_BOUND, LIMITS_IN_DOUBT = "above bound", "limits in doubt"  #: marks of a bound that cannot be trusted
INCOMPLETE = "incomplete"  #: the mark of a row that has fewer repetitions than were asked for
ONCE = "load"  #: the phase that is timed once in every run, while its subject starts; in the start suite each time


@dataclass(frozen=True)
class Row:
    """One measured row. Times in milliseconds, sizes in bytes; None where a column does not apply.

    ``phase``: prefill, sequential, transition, group, decoder, copy, or "image" (the whole batch), "load",
    "first_preview", "throughput" (the whole batch, in the batch suite), "serve" and "http" (``samples_ms`` are the
    latencies of requests, ``images`` the most of a call); of a start python, selftest, first_image and "start" (all of
    these and "load"). ``bytes`` and ``operations`` are the least that the phase must read and calculate
    (``cost/work.py``).
    """

    suite: str
    phase: str
    label: str
    bundle: str
    hash: str
    model: str
    parameters: int
    n: int
    grid: tuple[int, int, int]
    precision: str
    computes: str  #: the precision that the backend calculates in
    images: int
    guided: bool
    backend: str
    version: str
    device: str
    clock: str
    threads: int | None
    sampling: str
    query: int | None  #: positions of one call
    calls: int | None  #: in one batch
    samples_ms: tuple[float, ...]
    median_ms: float
    spread_ms: float  #: interquartile range
    p95_ms: float
    call_ms: float | None  #: median of a single call, over all calls of all repetitions
    images_per_s: float | None
    offered_per_s: float | None  #: load of the serve suite, or an open one of the http suite
    peak_bytes: int | None  #: of the subject's own process since it started
    bytes: int | None
    operations: int | None
    bound_ms: float | None
    bound_by: str | None  #: "bandwidth" or "compute", where the bound spends most of its time
    gb_s: float | None
    tflop_s: float | None
    percent_of_bound: float | None
    read_gb_s: float | None  #: the bandwidth of the bound
    matrix_tflop_s: float | None  #: the matrix peak of the bound
    limits_from: str  #: where these two come from
    excluded: tuple[str, ...]
    flags: tuple[str, ...]  #: reasons to doubt the row; the part before the colon is the kind
    machine: Machine
    commit: str
    parvis: str
    python: str
    date: str  #: when it was measured, UTC
    schema: int = SCHEMA
    pytorch: bool = False  #: PyTorch made it, not a backend of this package
    weights: str = ""  #: "int8" or "int4", of quantised matrices; empty where they are in ``precision``
    decoder_computes: str = "fp32"  #: the precision of what makes the pixels, where it is not ``backend``
    decoder_bf16: str = ""  #: how the C decoder could compute in bf16 ("amx", "dots"), where it computes in fp32
    clients: int | None = None  #: of a closed load of the http suite

    @property
    def stored(self) -> str:
        """What the matrices are stored in: "fp32", "fp16", "bf16", "int8", "int4"."""
        return self.weights or self.precision

    @property
    def marks(self) -> tuple[str, ...]:
        """The kinds of its flags.

        "busy", "throttled", "debug", "few repetitions", "estimated", "incomplete", "limits in doubt", "above bound",
        "no graphs", "math attention", "eager decoder".
        """
        return tuple(flag.split(":")[0] for flag in self.flags)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the middle two. NaN of nothing."""
    return quantile(values, 0.5)


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation between the two neighbours, as numpy does by default. NaN of nothing."""
    return float(np.quantile(np.asarray(values, np.float64), q)) if len(values) else math.nan


def spread(values: Sequence[float]) -> float:
    """The interquartile range."""
    return quantile(values, 0.75) - quantile(values, 0.25)


def ratio_interval(old: Sequence[float], new: Sequence[float], random: np.random.Generator) -> tuple[float, float]:
    """Between which values the ratio of medians, new over old, lies: the middle 95 % of what resampling gives.

    0 and infinity where one of them has fewer than :data:`FEWEST` samples.
    """
    if min(len(old), len(new)) < FEWEST:
        return 0.0, math.inf
    middles = []
    for values in (old, new):
        samples = np.asarray(values)
        middles.append(np.median(samples[random.integers(0, len(samples), (RESAMPLES, len(samples)))], axis=1))
    low, high = np.quantile(middles[1] / middles[0], [(1 - MIDDLE) / 2, (1 + MIDDLE) / 2])
    return float(low), float(high)


def percent_in(text: str) -> float:
    """The first percentage in a flag; 0 where it has none."""
    before = text.partition(" %")[0].split()
    try:
        return float(before[-1])
    except (IndexError, ValueError):
        return 0.0


def few_repetitions(samples: Sequence[float], phase: str, suite: str) -> tuple[str, ...]:
    """The flag of a row with fewer than :data:`ENOUGH` repetitions; a bundle is loaded once, whatever was asked for,
    except in the suite ``start``.
    """
    if (phase == ONCE and suite != "start") or len(samples) >= ENOUGH:
        return ()
    return (f"few repetitions: {len(samples)} instead of {ENOUGH} or more, so the spread says little",)


# -- JSON lines -------------------------------------------------------------------------------------------------------


def to_json(row: Row) -> str:
    """One line."""
    return json.dumps({"kind": "measured"} | asdict(row), allow_nan=False)


def from_plain(plain: Any) -> Row:
    """The row of a line's JSON value. Raises Mismatch, which names the column.

    Columns of a newer version are dropped; those that an older version did not have get their defaults.
    """
    given = Value(plain)
    schema = given.get("schema")
    if schema is not None and schema.integer() > SCHEMA:
        raise Mismatch(f"schema {shown(schema.value)} is newer than {SCHEMA}; install a newer parvis (docs/install.md)")
    hints = get_type_hints(Row)
    known: dict[str, Any] = {}
    for field in fields(Row):
        if field.name == "machine":
            known["machine"] = to_machine(given["machine"])
        elif field.default is MISSING or field.name in given.object():
            known[field.name] = _column(given[field.name], hints[field.name])
    if "pytorch" not in known:  # written before the column was: the backend is named "torch eager" or "torch compiled"
        known["pytorch"] = "torch" in known["backend"]
    row = Row(**known)
    if len(row.grid) != 3:
        given["grid"].refuse("three numbers")
    if not row.samples_ms or not min(row.median_ms, *row.samples_ms) > 0:
        given["samples_ms" if row.median_ms > 0 else "median_ms"].refuse("milliseconds above 0")
    return row


def to_machine(given: Value) -> Machine:
    """The machine of a line; what an older version did not have stays empty. Raises Mismatch."""
    given.object()
    columns: dict[str, Any] = {}
    for name, hint in get_type_hints(Machine).items():
        value = given.get(name)
        columns[name] = _column(value, hint) if value is not None else "" if hint is str else None
    if columns["cores"] is None:
        given["cores"].integer(1)
    return Machine(**columns)


def _column(given: Value, hint: Any) -> Any:
    """``given``, checked against the type of its column. Raises Mismatch."""
    kinds = get_args(hint) or (hint,)
    if given.value is None and type(None) in kinds:
        return None
    if get_origin(hint) is tuple:
        return tuple(_column(entry, kinds[0]) for entry in given.entries(0, MOST_SAMPLES))
    if bool in kinds:
        return given.boolean()
    if float in kinds:
        return given.number(0.0, LARGEST)
    if int in kinds:
        return given.integer(0, int(LARGEST))
    text = given.value
    if not isinstance(text, str) or len(text) > LONGEST_TEXT or UNPRINTABLE.search(text):
        given.refuse(f"a text of at most {LONGEST_TEXT} printable characters")
    return text


def read(path: Path) -> list[Row]:
    """The measured rows of a JSON lines file. Raises RequestError, with the line's number where it is one line's fault.

    Lines of another kind (predictions, the paper's rows) are passed over.
    """
    expected = "expected JSON lines, as 'parvis bench --json FILE' writes them"

    def wrong(message: str) -> RequestError:
        return RequestError(advised(message, expected))

    rows = []
    lines, broken = plain_lines(path, wrong)
    if broken:
        raise wrong(f"{broken}: the file ends in the middle of this line; remove it, or measure again")
    for place, plain in lines:
        try:
            if not isinstance(plain, dict):
                raise Mismatch(f"{shown(plain)} is no object")
            kind = Value(plain).get("kind")
            if kind is None or kind.text() == "measured":
                rows.append(from_plain(plain))
        except Mismatch as error:
            raise wrong(f"{place}: not a row of 'parvis bench' ({error})") from error
    if not rows:
        raise wrong(f"{path}: holds no measured rows")
    return rows


def plain_lines(path: Path, wrong: Callable[[str], RequestError]) -> tuple[list[tuple[str, Any]], str]:
    """The JSON values of the lines of a file, each with its place for messages; and the place of a last line in the
    middle of which the file ends, or "". Raises what ``wrong`` makes of a message.
    """
    content = read_regular(path, LARGEST_FILE, wrong)
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise wrong(f"{path}: not text") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            found.append((place, load_json(line, place, wrong)))
        except RequestError:
            if number == len(lines):  # every line that is written whole ends with a line feed
                return found, place
            raise
    return found, ""


def columns(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as flat dictionaries for a table: the machine's columns as ``machine_cpu`` and so on, lists as text."""
    out = []
    for row in rows:
        plain = asdict(row)
        machine = plain.pop("machine")
        flat = plain | {f"machine_{name}": value for name, value in machine.items()}
        flat |= {
            "samples_ms": " ".join(f"{v:.6g}" for v in row.samples_ms),
            "grid": "x".join(map(str, row.grid)),
            "excluded": "; ".join(row.excluded),
            "flags": "; ".join(row.flags),
        }
        out.append(flat)
    return out
