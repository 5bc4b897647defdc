"""The checks of a GPU's report: which run, and what its page says of them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_report import SAMPLE, options

from par_export.card import checks
from par_export.card.checks import SANITIZER, Checks
from par_export.card.findings import Findings
from par_export.card.processes import Ended
from par_export.card.report import CardOptions, Report
from par_export.card.table import markdown
from par_runtime.bench import gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.machine import describe


@pytest.mark.parametrize(
    ("words", "code", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "| compute-sanitizer | 1 of 1 |"),
        (
            "========= Invalid __global__ read of size 4 bytes\\n========= ERROR SUMMARY: 1 error",
            9,
            "one image | WRONG | Invalid __global__ read of size 4 bytes; ERROR SUMMARY: 1 error |",
        ),
        (
            "========= Error: Device not supported",
            1,
            "- compute-sanitizer: its process ended with code 1 Error: Device",
        ),
    ],
)
def test_the_checker_of_memory_accesses(
    stand_in: gpu.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int, found: str
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\nprintf '{words}\\n'; echo '{{\"kind\": \"done\"}}'; exit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    journal = Journal(None, lambda _: None)
    made = Checks(Report(CardOptions(), stand_in, lambda _: None, journal).session, time.monotonic() + 60)
    (tmp_path / "weights.data").touch()
    ((name, run),) = made.sanitized({"tiny": tmp_path})
    assert name == SANITIZER
    made.take(name, run())
    assert found in journal.finish([]).page


@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (8, 1), (16, 2), (64, 8)])
def test_checks_at_once_share_the_cores_and_their_seconds_are_said(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    """Eight that each take a thread for every core wait for each other until their time is over."""
    given: dict[str, int | None] = {}

    def run_stage(name: str, *_: object, threads: int | None = None) -> Ended:
        given[name] = threads
        return Ended(seconds={"kernels": 3.4, "images": 40.0}.get(name, 0.6))

    monkeypatch.setattr(checks, "run_stage", run_stage)
    monkeypatch.setattr(checks, "available_cores", lambda: cores)
    monkeypatch.setattr(Checks, "sanitized", lambda *_: [])
    set_up = options(tmp_path, tiny, samples=(SAMPLE,))
    session = Report(set_up, stand_in, lambda _: None, Journal(None, lambda _: None)).session
    made = Checks(replace(session, work=tmp_path), time.monotonic() + 60)
    made.run()
    made.memory()
    assert given == {"kernels": threads, "images": threads, "memory": None}  # the last runs alone
    (note,) = (line["text"] for line in session.lines if line["kind"] == "note")
    assert note == "seconds of the checks, up to 8 at once: tiny: images 40, odd: kernels 3"


@pytest.mark.parametrize(("error", "shown"), [(1e-3, "50 % of the allowed"), (None, "not finite")])
def test_errors_of_checks_are_summed_up(stand_in: gpu.Gpu, error: float | None, shown: str) -> None:
    found = Findings(describe(stand_in), "c", "d")
    text = {"passed": error is not None, "text": "x"}
    found.lines = [
        {"kind": "check", "name": "odd: step.qkv", "error": error, "allowed": 2e-3, **text},
        {"kind": "check", "name": "odd: step's counters", "passed": True, "text": "y"},
    ]
    assert f"| odd | {2 - (error is None)} of 2 | {shown} |" in markdown([found])


def test_of_a_subject_that_fails_in_everything_a_few_checks_are_shown() -> None:
    lines = [{"kind": "check", "name": f"odd: {i}", "passed": False, "text": f"text {i}"} for i in range(300)]
    lines += [{"kind": "check", "name": "demo: loads", "passed": False, "text": "no file"}]
    page = markdown([Findings(describe(None), "c", "d", lines=lines)])
    assert "| odd | 0 of 300 |" in page
    assert "| odd: 4 | WRONG | text 4 |" in page
    assert "odd: 5" not in page
    assert "| odd | 295 more WRONG | in the lines of --json |" in page
    assert "| demo: loads | WRONG | no file |" in page
