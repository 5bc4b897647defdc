"""Everything that one command of ``parvis bench`` measured, written to files and to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from par_runtime.bench.report import compare, page, paper, text
from par_runtime.bench.report.compare import Comparison
from par_runtime.bench.rows import Row, to_json
from par_runtime.bench.suites.paper import PaperRow, as_dict
from par_runtime.cost.data_sheets import Prediction
from par_runtime.system import write_beside

STANDARD_OUTPUT = Path("-")


@dataclass
class Outcome:
    """The result of one command. ``measured`` is False where the rows were read from a file."""

    rows: list[Row]
    predictions: list[Prediction]
    paper: list[PaperRow]
    compared: Comparison | None = None
    measured: bool = True


def write(outcome: Outcome, *, json: Path | None, csv: Path | None, html: Path | None, quiet: bool) -> None:
    """Write the files that have a path, and the tables to standard output.

    "-" is standard output; no table is printed then, nor with ``quiet``. Raises OSError.
    """
    outputs: list[tuple[Path | None, Callable[[], str]]] = [
        (json, lambda: json_lines(outcome)),
        (csv, lambda: text.csv_text(outcome.rows)),
        (html, lambda: page.page(outcome.rows, outcome.predictions, outcome.paper, outcome.compared)),
    ]
    for path, make in outputs:
        if path == STANDARD_OUTPUT:
            sys.stdout.write(make())
            quiet = True
        elif path is not None:
            write_beside(path, partial(_write_text, make()))
    if quiet:
        return
    print(tables(outcome))
    for path, _ in outputs:
        if path is not None:
            print(f"\nwritten: {path}")


def _write_text(content: str, path: Path) -> None:
    path.write_text(content, encoding="utf-8")


def tables(outcome: Outcome) -> str:
    """The outcome as text for a terminal."""
    parts = []
    if outcome.paper:
        parts += ["\n".join(paper.notes(outcome.paper)), paper.paper_table(outcome.paper)]
        parts += ["\n".join(text.about(outcome.rows))] if outcome.rows else []
        parts += [paper.predicted_table(outcome.predictions)]
    elif outcome.measured:
        parts += [text.table(outcome.rows)]
        parts += [text.predicted_table(outcome.predictions)] if outcome.predictions else []
    if outcome.compared is not None:
        parts += [compare.text(outcome.compared)]
    return "\n\n".join(parts)


def json_lines(outcome: Outcome) -> str:
    """The outcome as JSON lines: measured rows, then rows of the paper and predictions for other GPUs, if any."""
    lines = [to_json(row) for row in outcome.rows]
    lines += [json.dumps(as_dict(row)) for row in outcome.paper]
    if outcome.paper:
        lines += [json.dumps({"kind": "predicted"} | vars(one)) for one in outcome.predictions]
    return "".join(line + "\n" for line in lines)
