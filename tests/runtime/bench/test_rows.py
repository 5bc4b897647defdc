"""Rows as files: what is written is what is read, and what is no row is refused by its line."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench.subjects import Scripted, one_row, rows_from, subject_info

from par_runtime.bench.report.text import csv_text
from par_runtime.bench.rows import columns, from_plain, median, quantile, read, spread, to_json
from par_runtime.errors import RequestError


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    rows = rows_from(Scripted(subject_info(), drift=(1.0, 1.25, 3.0)))
    (tmp_path / "rows.jsonl").write_text("".join(to_json(row) + "\n" for row in rows) + "\n")
    assert read(tmp_path / "rows.jsonl") == rows


def test_lines_of_another_kind_are_passed_over(tmp_path: Path) -> None:
    row = one_row([1.0, 2.0])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"kind": "predicted", "gpu": "H100"}) + "\n" + to_json(row) + "\n")
    assert read(tmp_path / "rows.jsonl") == [row]


def spoilt(**changes: object) -> str:
    return json.dumps({k: v for k, v in (json.loads(to_json(one_row([1.0]))) | changes).items() if v != "gone"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"line 1: not a row of 'parvis bench' \(.*\); expected JSON lines, as --json FILE writes"),
        ("[1]", r"line 1: .*a list, not an object"),
        (spoilt(median_ms="gone"), "line 1: .*no column 'median_ms'"),
        (spoilt(schema=99), "schema 99 is newer than 1; upgrade parvis"),
        (spoilt(samples_ms=[]), "samples_ms is not a list of numbers"),
        (spoilt(samples_ms=["a"]), "samples_ms is not a list of numbers"),
        (spoilt(machine=3), "line 1: not a row"),
        ("\n\n", "holds no measured rows"),
        (json.dumps({"kind": "predicted"}), "holds no measured rows"),
    ],
)
def test_what_is_no_row_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(RequestError, match=message):
        read(tmp_path / "rows.jsonl")


def test_bytes_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="not text; expected JSON lines"):
        read(tmp_path / "rows.jsonl")


def test_columns_of_a_newer_version_are_dropped() -> None:
    row = one_row([1.0, 2.0, 3.0, 4.0, 5.0])
    assert from_plain(json.loads(to_json(row)) | {"invented_later": 1}) == row


@pytest.mark.parametrize(("backend", "pytorch"), [("torch eager", True), ("native-cpu", False)])
def test_rows_from_before_the_column_pytorch_are_read(backend: str, pytorch: bool) -> None:
    row = one_row([1.0, 2.0, 3.0, 4.0, 5.0], backend=backend, pytorch=pytorch)
    plain = json.loads(to_json(row))
    del plain["pytorch"]
    assert from_plain(plain) == row


def test_a_spreadsheet_gets_every_column() -> None:
    row = replace(one_row([1.5, 2.5]), flags=("busy: a, b", "debug: c"))
    (line,) = csv.DictReader(io.StringIO(csv_text([row])))
    assert line["samples_ms"] == "1.5 2.5"
    assert line["grid"] == "1x24x24"
    assert line["flags"] == "busy: a, b; debug: c"
    assert line["machine_cpu"] == "a CPU"
    assert list(line) == list(columns([row])[0])


def test_quantiles() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert quantile([0.0, 10.0], 0.95) == pytest.approx(9.5)
