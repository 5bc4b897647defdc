"""Everything that one command of ``parvis bench`` measured, written to files and to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from par_runtime.bench.report import compare, page, paper, text
from par_runtime.bench.report.compare import Comparison
from par_runtime.bench.rows import Row, to_json
from par_runtime.bench.suites.paper import PaperRow, as_dict
from par_runtime.cost.data_sheets import Prediction
from par_runtime.errors import OutputsError
from par_runtime.system import explain, write_beside

STANDARD_OUTPUT = Path("-")


@dataclass
class Outcome:
    """The result of one command. ``measured`` is False where the rows were read from a file.

    ``stopped``: why these are not all rows that were asked for, or "". Of a GPU's report: ``others``, its lines of
    other kinds; ``page``, what is printed in place of a table; ``wrong``: which checks failed, or ""; ``figure`` makes
    the SVG of --svg.
    """

    rows: list[Row]
    predictions: list[Prediction]
    paper: list[PaperRow]
    compared: Comparison | None = None
    measured: bool = True
    stopped: str = ""
    others: list[dict[str, Any]] = field(default_factory=list)
    page: str = ""
    wrong: str = ""
    figure: Callable[[], str] = lambda: ""


def write(
    outcome: Outcome, *, json: Path | None, csv: Path | None, html: Path | None, svg: Path | None = None, quiet: bool
) -> None:
    """Write the files that have a path, and the tables to standard output.

    "-" is standard output; no table is printed then, nor with ``quiet``. What is printed and every file that can be
    written is there even where another file cannot be. Raises OSError if that is the only one, else OutputsError.
    """
    outputs: list[tuple[Path | None, Callable[[], str]]] = [
        (json, lambda: json_lines(outcome)),
        (csv, lambda: text.csv_text(outcome.rows)),
        (html, lambda: page.page(outcome.rows, outcome.predictions, outcome.paper, outcome.compared, outcome.stopped)),
        (svg, outcome.figure),
    ]
    written: list[Path] = []
    failed: list[OSError] = []
    for path, make in outputs:
        if path == STANDARD_OUTPUT:
            sys.stdout.write(make())
            quiet = True
        elif path is not None:
            try:
                write_beside(path, partial(write_text, make()))
                written.append(path)
            except OSError as error:
                failed.append(error)
    if not quiet:
        print(tables(outcome))
        for path in written:
            print(f"\nwritten: {path}")
    if failed and not written:
        raise failed[0]
    if failed:
        raise OutputsError(f"{explain(failed[0])}; written: {', '.join(map(str, written))}")


def write_text(content: str, path: Path) -> None:
    """Write ``content`` to ``path``. Raises OSError."""
    path.write_text(content, encoding="utf-8")


def tables(outcome: Outcome) -> str:
    """The outcome as text for a terminal."""
    parts = [f"not complete: {outcome.stopped}"] if outcome.stopped else []
    if outcome.paper:
        parts += ["\n".join(paper.notes(outcome.paper)), paper.paper_table(outcome.paper)]
        parts += ["\n".join(text.about(outcome.rows))] if outcome.rows else []
        parts += ["\n".join(f"marked    {note}" for note in text.doubts(outcome.rows))] if outcome.rows else []
        parts += [paper.predicted_table(outcome.predictions)]
    elif outcome.page:
        parts += [outcome.page]
    elif outcome.measured:
        parts += [text.table(outcome.rows)]
        parts += [text.predicted_table(outcome.predictions)] if outcome.predictions else []
    if outcome.compared is not None:
        parts += [compare.text(outcome.compared)]
    return "\n\n".join(parts)


def json_lines(outcome: Outcome) -> str:
    """The outcome as JSON lines: measured rows, then lines of other kinds: a report's, the paper's, predictions.

    The last line of an outcome that is not complete has the kind "stopped".
    """
    lines = [to_json(row) for row in outcome.rows]
    lines += [json.dumps(line) for line in outcome.others]
    lines += [json.dumps(as_dict(row)) for row in outcome.paper]
    if outcome.paper:
        lines += [json.dumps({"kind": "predicted"} | vars(one)) for one in outcome.predictions]
    if outcome.stopped:
        lines.append(json.dumps({"kind": "stopped", "why": outcome.stopped}))
    return "".join(line + "\n" for line in lines)
