"""The page of a GPU's report made again from its files of rows, or one page of several reports. Needs no GPU.

Also what an ended run left: ``FILE.part``, and a file that was cut off in its last line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from par_export.card.figure import figure
from par_export.card.findings import Findings, Known, by_card
from par_export.card.table import markdown
from par_export.kernels.product_trials import KINDS as PRODUCT_KINDS
from par_runtime.bench.machine import Machine
from par_runtime.bench.report.output import Outcome
from par_runtime.bench.rows import LARGEST, Row, from_plain, median, plain_lines, to_machine
from par_runtime.checked import Mismatch, Value, shown
from par_runtime.errors import RequestError

EXPECTED = "expected lines of 'parvis bench --suite gpu --json FILE'; give such a file, or remove this one"
LONGEST = 20000  #: characters of a text of a line
LARGEST_COUNT = 10**9


def again(paths: Sequence[Path]) -> Outcome:
    """The outcome of the reports whose rows are in ``paths``, as one page. Raises RequestError."""
    runs = read_runs(paths)
    counted = [row for own in by_card(runs).values() for row in Known(own).rows]
    return Outcome(counted, [], [], measured=False, page=markdown(runs), figure=lambda: figure(runs))


def read_runs(paths: Sequence[Path]) -> list[Findings]:
    """What the report in each file found, the earliest first. Raises RequestError, which names the file."""
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise RequestError(f"{path}: given twice; give each file once")
        seen[path.resolve()] = path
    runs = [replace(_read(path), file=name) for path, name in zip(paths, _names(paths), strict=True)]
    return sorted(runs, key=lambda run: (run.date, run.file))


def _names(paths: Sequence[Path]) -> list[str]:
    """The name of each file, with as many of its folders as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({own[-length:] for own in parts}) < len(parts):
        length += 1
    return ["/".join(own[-length:]) for own in parts]


def _read(path: Path) -> Findings:
    """The run whose lines are in ``path``. Raises RequestError."""

    def wrong(message: str) -> RequestError:
        return RequestError(f"{message}; {EXPECTED}")

    lines, broken = plain_lines(path, wrong)
    rows, others, stopped = list[Row](), list[Value](), ""
    for place, plain in lines:
        try:
            line = Value(plain)
            kind = line.get("kind")
            name = "measured" if kind is None else kind.text()
            if name == "measured":
                rows.append(_row(plain))
            elif name == "stopped":
                stopped = line["why"].text(LONGEST)
            elif name in KINDS:
                KINDS[name](line)
                _text(line, "gpu", "driver", "commit", "date")
                others.append(line)
        except Mismatch as error:
            raise wrong(f"{place}: not a line of a GPU's report ({error})") from error
    if not rows and not others:
        raise wrong(f"{path}: holds no line of a GPU's report")
    found = _findings(path, rows, [line.value for line in others], wrong)
    if broken:
        found.said.append(f"{path.name} breaks off in its last line, which is left out.")
    if stopped:
        found.said.append(f"{path.name} holds a part of a report: {' '.join(stopped.split())}.")
    elif path.suffix == ".part":
        found.said.append(f"{path.name} is what was left when its run ended.")
    return found


def _row(plain: Any) -> Row:
    row = from_plain(plain)
    if row.suite != "gpu":
        raise Mismatch(f"suite is {shown(row.suite)}; expected 'gpu'")
    if not math.isclose(row.median_ms, median(row.samples_ms), rel_tol=1e-9):
        raise Mismatch(f"median_ms is {row.median_ms}; expected that of samples_ms, {median(row.samples_ms)}")
    return row


def _findings(
    path: Path, rows: Sequence[Row], others: Sequence[dict[str, Any]], wrong: Callable[[str], RequestError]
) -> Findings:
    """What the lines of one run say; they must be of one card, driver and commit."""
    origins = [(row.machine.gpu, row.machine.gpu_driver, row.commit) for row in rows]
    origins += [(line["gpu"], line["driver"], line["commit"]) for line in others]
    if (other := next((origin for origin in origins if origin != origins[0]), None)) is not None:
        texts = (f"{g or 'no GPU'}, driver {d or 'unknown'}, commit {c}" for g, d, c in (origins[0], other))
        raise wrong(f"{path}: lines of two runs ({'; '.join(texts)}), where each file holds one")
    runs = [line for line in others if line["kind"] == "run"]
    if len(runs) > 1:
        raise wrong(f"{path}: lines of {len(runs)} runs, where each file holds one")
    gpu, driver, commit = origins[0]
    nothing = Machine("", 1, None, None, "", None, gpu, driver, None, None, None)
    run: dict[str, Any] = runs[0] if runs else {"minutes": 0.0, "parts": []}
    return Findings(
        to_machine(Value(run["machine"])) if runs else rows[0].machine if rows else nothing,
        commit,
        others[0]["date"] if others else rows[0].date,
        run["minutes"],
        rows,
        [line for line in others if line["kind"] not in ("run", "left_out")],
        [line["text"] for line in others if line["kind"] == "left_out"],
        run["parts"],
    )


# -- the lines --------------------------------------------------------------------------------------------------------


def _text(line: Value, *names: str) -> None:
    for name in names:
        if not isinstance(line[name].value, str) or len(line[name].value) > LONGEST:
            line[name].refuse(f"a text of at most {LONGEST} characters")


def _numbers(line: Value, *names: str) -> None:
    for name in names:
        line[name].number(-LARGEST, LARGEST)


def _samples(line: Value, name: str) -> None:
    for entry in line[name].entries(1):
        entry.number(0.0, LARGEST)


def _run(line: Value) -> None:
    _numbers(line, "minutes")
    for part in line["parts"].entries():
        part.text()
    machine = to_machine(line["machine"])
    if (machine.gpu, machine.gpu_driver) != (line["gpu"].value, line["driver"].value):
        line["machine"].refuse(f"the card and the driver of the line, {shown(line['gpu'].value)}")


def _check(line: Value) -> None:
    _text(line, "name", "text")
    line["passed"].boolean()
    if line.get("allowed") is not None:
        line["allowed"].number(0.0, LARGEST)
        if line["allowed"].value == 0:
            return
        if line["error"].value is not None:  # null is what is no number
            _numbers(line, "error")


def _limit(line: Value) -> None:
    _text(line, "name", "unit", "how")
    _numbers(line, "value", "spread")


def _timed(line: Value) -> None:
    """What a kernel took, and how often it is launched."""
    for name in ("images", "count"):
        line[name].integer(1, LARGEST_COUNT)
    _numbers(line, "bytes")
    _microseconds(line)


def _microseconds(line: Value) -> None:
    _samples(line, "samples_us")
    if min(line["samples_us"].value) <= 0:
        line["samples_us"].refuse("microseconds above 0")


def _kernel(line: Value) -> None:
    _text(line, "label", "program", "source", "of")
    _timed(line)


def _shape(line: Value) -> None:
    _text(line, "label", "kernel", "compiler", "words")
    line["set"].integer(0, LARGEST_COUNT)
    for _, value in line["tile"].items():
        value.integer(0, LARGEST_COUNT)
    _timed(line)


def _product(line: Value) -> None:
    _text(line, "name", "model", "compiler")
    line["kernel"].one_of(PRODUCT_KINDS)
    for name in ("rows", "BN", "BK", "split", "warps", "stages", "parts"):
        line[name].integer(1, LARGEST_COUNT)
    for name in ("ahead", "held", "columns", "block_rows", "depth"):
        line[name].integer(0, LARGEST_COUNT)
    for name in ("chosen", "at_once"):
        line[name].boolean()
    for name in ("model_us", "error"):
        line[name].number(0.0, LARGEST)
    _microseconds(line)


def _words(line: Value) -> None:
    _text(line, "text")


#: kind of a line -> its check, which raises Mismatch.
KINDS: dict[str, Callable[[Value], None]] = {
    "run": _run,
    "check": _check,
    "limit": _limit,
    "kernel": _kernel,
    "shape": _shape,
    "product": _product,
    "note": _words,
    "left_out": _words,
}
