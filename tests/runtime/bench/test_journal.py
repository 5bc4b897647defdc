"""Rows that survive: Ctrl-C, signals, a subject or a disk that fails. A reader never sees half a line."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.subjects import one_row

from conftest import child
from par_runtime.bench import bounds, journal
from par_runtime.bench.journal import Journal
from par_runtime.bench.limits import Round
from par_runtime.bench.report import output
from par_runtime.bench.report.output import Outcome
from par_runtime.bench.rows import Row, read
from par_runtime.bench.subjects.process import SubjectProcess
from par_runtime.cli.dispatch import main
from par_runtime.errors import OutputsError, RequestError


def rows_of(text: str) -> list[str]:
    return [json.loads(line).get("phase", json.loads(line)["kind"]) for line in text.splitlines()]


# -- the journal ------------------------------------------------------------------------------------------------------


def test_rows_are_written_while_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    kept = Journal(tmp_path / "rows.jsonl", pytest.fail)
    kept.finish = lambda rows: Outcome([replace(row, bundle="finished") for row in rows], [], [])
    kept.keep("a", list)
    assert list(tmp_path.iterdir()) == []  # there is nothing to keep yet
    rows: list[Row] = []
    kept.keep("b", lambda: rows)
    for i in range(3):
        rows.append(one_row([1.0 + i]))
        kept.keep("b", lambda: rows)
        assert len(read(tmp_path / "rows.jsonl.part")) == i + 1
    kept.keep("a", lambda: [one_row([9.0])])  # in place of the empty one
    assert [row.median_ms for row in read(tmp_path / "rows.jsonl.part")] == [9.0, 1.0, 2.0, 3.0]
    assert {row.bundle for row in read(tmp_path / "rows.jsonl.part")} == {"finished"}
    assert rows_of((tmp_path / "rows.jsonl.part").read_text())[-1] == "stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl.part"]
    kept.remove()
    assert list(tmp_path.iterdir()) == []


def test_rows_that_another_run_keeps_stay(tmp_path: Path) -> None:
    """Two runs of one --json: each has a file of its own, and the one that ends first removes nothing of the other."""
    first, second = (Journal(tmp_path / "rows.jsonl", pytest.fail) for _ in range(2))
    for _ in range(2):
        for kept, value in ((first, 1.0), (second, 2.0)):
            kept.keep("a", lambda value=value: [one_row([value])])  # type: ignore[misc]
            kept.keep_now()
    assert [row.median_ms for row in read(tmp_path / "rows.jsonl.part")] == [1.0]
    first.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl.part2"]
    assert [row.median_ms for row in read(tmp_path / "rows.jsonl.part2")] == [2.0]
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_kept_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    warned: list[str] = []
    (tmp_path / "file").touch()
    kept = Journal(tmp_path / "file" / "rows.jsonl", warned.append)
    for _ in range(2):
        kept.keep("a", lambda: [one_row([1.0])])
    assert len(warned) == 1
    assert "rows cannot be kept while they are measured" in warned[0]
    assert kept.outcome("why").stopped == "why"


def test_files_are_not_written_at_every_turn(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "rows.jsonl", pytest.fail)
    kept.keep("a", lambda: pytest.fail("not due yet"))
    assert list(tmp_path.iterdir()) == []


# -- files that cannot be written at the end --------------------------------------------------------------------------


def test_every_file_that_can_be_written_is_and_the_table_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = output.write_beside

    def full(path: Path, write_to: Any) -> None:
        if path.suffix == ".jsonl":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, write_to)

    monkeypatch.setattr(output, "write_beside", full)
    json_file, csv_file = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    outcome = Outcome([one_row([1.0])], [], [])
    with pytest.raises(OutputsError, match=rf"no space left on the disk of {json_file}.*; written: {csv_file}"):
        output.write(outcome, json=json_file, csv=csv_file, html=None, quiet=False)
    assert csv_file.read_text().count("\n") == 2
    assert "parvis  image" in capsys.readouterr().out
    with pytest.raises(OSError, match="No space left"):
        output.write(outcome, json=json_file, csv=None, html=None, quiet=True)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "measure_cpu", lambda *_: Round({2**30: {"by hand": 20.0}}, {"by hand": 0.1}))


@pytest.fixture
def ends_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: let the i-th run of a subject whose label ends with ``label`` raise this error."""
    real = SubjectProcess.run

    def end(i: int, error: BaseException, label: str = "") -> None:
        count = iter(range(1, 1000))

        def run(self: SubjectProcess, *arguments: Any) -> Any:
            if self.info.label.endswith(label) and next(count) == i:
                raise error
            return real(self, *arguments)

        monkeypatch.setattr(SubjectProcess, "run", run)

    return end


@pytest.mark.usefixtures("known_limits")
def test_ctrl_c_keeps_the_rows_in_every_file(
    tiny: Path, tmp_path: Path, ends_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_at(4, KeyboardInterrupt())  # a warm-up, two repetitions
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv", "html")}
    arguments = ["bench", str(tiny), "--device", "cpu", "--repetitions", "3"]
    assert main([*arguments, *(word for name, path in files.items() for word in (f"--{name}", str(path)))]) == 130
    printed = capsys.readouterr()
    assert "rows were measured before the run ended; they are in" in printed.err
    assert printed.out.startswith("not complete: the run was stopped\n")
    rows = read(files["json"])
    assert {len(row.samples_ms) for row in rows} == {2}
    assert all("incomplete: 2 of 3 repetitions were made before it ended" in row.flags for row in rows)
    assert next(row for row in rows if row.phase == "image").bound_ms  # by the limits that were measured
    assert rows_of(files["json"].read_text())[-1] == "stopped"
    assert "incomplete: 2 of 3" in files["csv"].read_text()
    assert "<strong>Not complete: the run was stopped.</strong>" in files["html"].read_text()
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


@pytest.mark.usefixtures("known_limits")
def test_a_file_of_an_earlier_run_is_not_replaced_by_a_part(
    tiny: Path, tmp_path: Path, ends_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_at(3, RequestError("it ended by itself"))
    file = tmp_path / "rows.jsonl"
    file.write_text("an earlier run\n")
    assert main(["bench", str(tiny), "--device", "cpu", "--repetitions", "2", "--quiet", "--json", str(file)]) == 2
    assert file.read_text() == "an earlier run\n"
    assert {len(row.samples_ms) for row in read(tmp_path / "rows.jsonl.part")} == {1}
    printed = capsys.readouterr()
    assert f"they are in {file}.part" in printed.err
    assert printed.err.endswith("parvis: error: it ended by itself\n")


@pytest.mark.usefixtures("known_limits")
def test_one_subject_that_fails_does_not_end_the_others(
    tiny: Path, tmp_path: Path, ends_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ends_at(3, RequestError("it ended by itself"), "(2)")
    file = tmp_path / "rows.jsonl"
    arguments = ["bench", str(tiny), str(tiny), "--device", "cpu", "--repetitions", "2"]
    assert main([*arguments, "--json", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.err.endswith("parvis: error: tiny (2): it ended by itself\n")
    assert printed.out.startswith("not complete: tiny (2) failed\n")
    images = {row.label: len(row.samples_ms) for row in read(file) if row.phase == "image"}
    assert images == {"tiny (1)": 2, "tiny (2)": 1}
    assert [row.label for row in read(file) if row.phase == "first_preview"] == ["tiny (1)"]


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGTERM,
        signal.SIGKILL,
        *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_a_signal_leaves_whole_rows(sent: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code = (
        "import sys; from par_runtime.bench import journal; journal.EVERY_S = 0.0; "
        "from par_runtime.cli.dispatch import main; sys.exit(main())"
    )
    arguments = ["bench", str(tiny), "--device", "cpu", "--repetitions", "100000", "--no-limits", "--json", str(file)]
    with child([sys.executable, "-c", code, *arguments], stdout=-3, stderr=-3) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "rows.jsonl.part").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, sent)
        code_of_exit = process.wait(30)
    assert code_of_exit == (-9 if sent == signal.SIGKILL else 128 + sent)
    left = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert left == [tmp_path / "rows.jsonl.part" if sent == signal.SIGKILL else file]
    rows = read(left[0])
    assert len(next(row for row in rows if row.phase == "image").samples_ms) >= 1
    assert rows_of(left[0].read_text())[-1] == "stopped"
