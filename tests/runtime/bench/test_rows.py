"""Rows as files: what is written is what is read, and what is no row is refused by its line."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from bench.subjects import Scripted, one_row, rows_from, subject_info

from par_runtime.bench import rows
from par_runtime.bench.report.text import csv_text
from par_runtime.bench.rows import columns, from_plain, median, quantile, read, spread, to_json
from par_runtime.errors import RequestError


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    made = rows_from(Scripted(subject_info(), drift=(1.0, 1.25, 3.0)))
    (tmp_path / "rows.jsonl").write_text("".join(to_json(row) + "\n" for row in made) + "\n")
    assert read(tmp_path / "rows.jsonl") == made


def test_lines_of_another_kind_are_passed_over(tmp_path: Path) -> None:
    row = one_row([1.0, 2.0])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"kind": "predicted", "gpu": "H100"}) + "\n" + to_json(row) + "\n")
    assert read(tmp_path / "rows.jsonl") == [row]


def test_a_run_without_rows_is_an_empty_table() -> None:
    assert csv_text([]).strip() == ""


def spoilt(**changes: object) -> str:
    return json.dumps({k: v for k, v in (json.loads(to_json(one_row([1.0]))) | changes).items() if v != "gone"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", r"line 1: not valid JSON \(.*\); expected JSON lines, as 'parvis bench --json FILE' writes them"),
        ("[1]\n", r"line 1: not a row of 'parvis bench' \(\[1\] is no object\)"),
        (spoilt(median_ms="gone"), "line 1: not a row of 'parvis bench' \\(no entry 'median_ms'\\)"),
        (spoilt(schema=99), "schema 99 is newer than 1; install a newer parvis"),
        (spoilt(schema="new"), "schema is 'new'; expected a whole number"),
        (spoilt(samples_ms=[]), "samples_ms is \\[\\]; expected milliseconds above 0"),
        (spoilt(samples_ms=["a"]), r"samples_ms\[0\] is 'a'; expected a number"),
        (spoilt(samples_ms=[1, -1]), r"samples_ms\[1\] is -1; expected a number"),
        (spoilt(samples_ms=[0.0]), "expected milliseconds above 0"),
        (spoilt(median_ms=0), "median_ms is 0; expected milliseconds above 0"),
        (spoilt(median_ms="fast"), "median_ms is 'fast'; expected a number"),
        (spoilt(median_ms=True), "median_ms is True; expected a number"),
        (spoilt(median_ms=1.0).replace('"median_ms": 1.0', '"median_ms": NaN') + "\n", "number NaN; expected a finite"),
        (spoilt(label=["a"]), r"label is \['a'\]; expected a text"),
        (spoilt(label="\x1b[2J"), r"label is '.x1b\[2J'; expected a text"),
        (spoilt(label="a" * 10**5), r"label is 'aaa.{60,80}\.\.\.; expected a text of at most 4000"),
        (spoilt(grid=[1, 2]), r"grid is \[1, 2\]; expected three numbers"),
        (spoilt(threads=1.5), "threads is 1.5; expected a whole number"),
        (spoilt(flags="busy"), "flags is 'busy'; expected a list"),
        (spoilt(guided=1), "guided is 1; expected true or false"),
        (spoilt(machine=3), "machine is 3; expected an object"),
        (spoilt(machine={"cpu": "x", "cores": "two"}), "machine.cores is 'two'; expected a whole number"),
        (spoilt(machine={}), "no entry 'cores' in machine"),
        (spoilt(kind=7), "kind is 7; expected a text"),
        ("[" * 100_000 + "\n", r"line 1: not valid JSON \(nested more than"),
        ("1" * 10_000 + "\n", r"line 1: not valid JSON \(an integer of 10000 digits"),
        ("\n\n", "holds no measured rows"),
        (json.dumps({"kind": "predicted"}), "holds no measured rows"),
        ("", "holds no measured rows"),
        (
            spoilt() + "\n" + spoilt()[:200],
            "line 2: the file ends in the middle of this line; remove it, or measure again",
        ),
    ],
)
def test_what_is_no_row_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(RequestError, match=message) as raised:
        read(tmp_path / "rows.jsonl")
    assert len(str(raised.value)) < len(str(tmp_path)) + 400
    assert str(raised.value).isprintable()


def test_bytes_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="not text; expected JSON lines"):
        read(tmp_path / "rows.jsonl")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "large.jsonl").write_text(to_json(one_row([1.0])) + "\n")
    monkeypatch.setattr(rows, "LARGEST_FILE", 100)
    for name, message in (
        ("pipe.jsonl", "is a pipe, not a file; expected JSON lines"),
        ("", "is a folder, not a file"),
        ("none.jsonl", "none.jsonl: missing; expected JSON lines"),
        ("large.jsonl", "bytes; expected at most 100; expected JSON lines"),
    ):
        with pytest.raises(RequestError, match=message):
            read(tmp_path / name)


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
