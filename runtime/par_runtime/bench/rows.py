"""One row of a benchmark: one phase of one subject at one batch size, and everything needed to understand it alone.

``samples_ms`` are raw: one number per repetition, the time of all calls of the phase in one batch, so that the rows of
a subject add up to its "image" row. The spread is the interquartile range: it covers the middle half of the
repetitions, so one repetition that another process disturbed does not change it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from par_runtime.bench.machine import Machine
from par_runtime.errors import RequestError

SCHEMA = 1
ENOUGH = 5  #: repetitions; a row with fewer is marked
ABOVE_BOUND, LIMITS_IN_DOUBT = "above bound", "limits in doubt"  #: marks of a bound that cannot be trusted
INCOMPLETE = "incomplete"  #: the mark of a row that has fewer repetitions than were asked for
ONCE = "load"  #: the phase that is timed once in every run, while its subject starts


@dataclass(frozen=True)
class Row:
    """One measured row. Times in milliseconds, sizes in bytes; None where a column does not apply.

    ``phase``: prefill, sequential, transition, group, decoder, copy, or "image" (the whole batch), "load",
    "first_preview", "throughput" (the whole batch, in the batch suite), "serve" (``samples_ms`` are the latencies of
    requests). ``bytes`` and ``operations`` are the least that the phase must read and calculate (``cost/work.py``).
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
    offered_per_s: float | None  #: load of the serve suite
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

    @property
    def marks(self) -> tuple[str, ...]:
        """The kinds of its flags.

        "busy", "throttled", "debug", "few repetitions", "estimated", "incomplete", "limits in doubt", "above bound".
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


def few_repetitions(samples: Sequence[float], phase: str) -> tuple[str, ...]:
    """The flag of a row with fewer than :data:`ENOUGH` repetitions; a bundle is loaded once, whatever was asked for."""
    if phase == ONCE or len(samples) >= ENOUGH:
        return ()
    return (f"few repetitions: {len(samples)} instead of {ENOUGH} or more, so the spread says little",)


# -- JSON lines -------------------------------------------------------------------------------------------------------


def to_json(row: Row) -> str:
    """One line."""
    return json.dumps({"kind": "measured"} | asdict(row), allow_nan=False)


def from_plain(plain: Mapping[str, Any]) -> Row:
    """The row of a line's JSON object. Raises KeyError, TypeError, ValueError.

    Columns of a newer version are dropped; those that an older version did not have get their defaults.
    """
    known = {field.name: plain[field.name] for field in fields(Row) if field.name in plain}
    missing = [field.name for field in fields(Row) if field.name not in plain and field.default is MISSING]
    if missing:
        raise KeyError(missing[0])
    if known.get("schema", SCHEMA) > SCHEMA:
        raise ValueError(f"schema {known['schema']} is newer than {SCHEMA}; upgrade parvis")
    for name in ("samples_ms", "grid", "excluded", "flags"):
        known[name] = tuple(known[name])
    if not known["samples_ms"] or not all(isinstance(v, (int, float)) for v in known["samples_ms"]):
        raise ValueError("samples_ms is not a list of numbers")
    if "pytorch" not in known:  # written before the column was: the backend is named "torch eager" or "torch compiled"
        known["pytorch"] = "torch" in known["backend"]
    known["machine"] = Machine(**{f.name: known["machine"].get(f.name) for f in fields(Machine)})
    return Row(**known)


def read(path: Path) -> list[Row]:
    """The measured rows of a JSON lines file. Raises RequestError with the line's number, OSError."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: not text; expected JSON lines, as 'parvis bench --json FILE' writes them"
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            plain = json.loads(line)
            if not isinstance(plain, dict):
                raise ValueError(f"a {type(plain).__name__}, not an object")
            if plain.get("kind", "measured") != "measured":
                continue
            rows.append(from_plain(plain))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
            raise RequestError(
                f"{path}, line {number}: not a row of 'parvis bench' ({reason}); expected JSON lines, as --json FILE "
                "writes them"
            ) from error
    if not rows:
        raise RequestError(
            f"{path}: holds no measured rows; expected JSON lines, as 'parvis bench --json FILE' writes them"
        )
    return rows


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
