"""A subject's process: what Ctrl-C, limits of the system and a bench that has ended make of it."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from par_runtime.bench.subjects import process, worker
from par_runtime.bench.subjects.process import SubjectProcess, open_bundle
from par_runtime.errors import RequestError


@pytest.fixture
def opened(tiny: Path) -> Iterator[SubjectProcess]:
    subject = open_bundle(tiny, threads=1, selftest=False)
    yield subject
    subject.close()


class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
    """A process that gets Ctrl-C as soon as it is there, before its first line is run."""

    def __init__(self, *given: Any, **how: Any) -> None:
        super().__init__(*given, **how)
        self.send_signal(signal.SIGINT)


def test_ctrl_c_does_not_reach_a_process_that_still_starts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    subject = open_bundle(tiny, threads=1, selftest=False)
    try:
        assert subject.image(1, True).image_ms > 0
        os.kill(subject.pid, signal.SIGINT)
        assert subject.image(1, True).image_ms > 0
    finally:
        subject.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize("thread", ["this", "another"])
def test_ctrl_c_while_a_process_is_started_ends_it(thread: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes between the start and the first line that could end the process. Where another thread takes the signal,
    which has it not blocked, Python calls the handler in this one at once.
    """
    started: list[subprocess.Popen[str]] = []

    class Started(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **how: Any) -> None:
            super().__init__(*given, **how)
            started.append(self)
            handler = signal.getsignal(signal.SIGINT)
            assert callable(handler)
            if thread == "this":
                signal.raise_signal(signal.SIGINT)
            else:
                handler(signal.SIGINT, None)

    monkeypatch.setattr(subprocess, "Popen", Started)
    with pytest.raises(KeyboardInterrupt):
        open_bundle(tiny, threads=1, selftest=False)
    assert started[0].returncode is not None


def test_a_process_whose_bench_has_ended_says_nothing(tiny: Path) -> None:
    """Python's own warnings are errors in it: nothing is left open."""
    spec = {"kind": "bundle", "path": str(tiny), "label": "b", "device": "cpu", "threads": 1, "selftest": False}
    spec |= {"rounding": {"arithmetic": "auto", "cache": "auto", "decoder_precision": "auto"}}
    command = [sys.executable, "-W", "error", "-m", "par_runtime.bench.subjects.worker", json.dumps(spec)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for ends_early in (False, True):
        with subprocess.Popen(command, text=True, **pipes) as bench:
            assert bench.stdin is not None
            assert bench.stdout is not None
            assert bench.stderr is not None
            assert json.loads(bench.stdout.readline())["info"]["label"] == "b"
            if ends_early:
                bench.stdout.close()
            bench.stdin.write(json.dumps({"do": "image", "images": 1, "guided": True}) + "\n")
            bench.stdin.close()
            assert ends_early or json.loads(bench.stdout.readline())["ok"]["image_ms"] > 0
            assert bench.stderr.read() == ""
        assert bench.returncode == 0


def test_a_thread_is_started_only_to_end_it_in_time(
    opened: SubjectProcess, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert opened._end == math.inf
    assert opened.image(1, True).image_ms > 0
    with pytest.raises(RequestError, match=r"^the system starts no more threads; raise its limit \(ulimit -u\)"):
        open_bundle(tiny, threads=1, end=time.monotonic() + 60)


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.EAGAIN, RequestError, f"the system starts no more processes; {process.MORE}"),
        (errno.ENOMEM, MemoryError, "none for another process"),
    ],
)
def test_a_system_without_room_for_a_process_is_said_so(
    code: int, kind: type[Exception], text: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(kind) as error:
        open_bundle(tiny)
    assert str(error.value) == text


def test_an_error_of_the_system_in_it_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The name of the file and the remedy, as where it happens in this process."""

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/is/no/room")

    monkeypatch.setattr(worker, "open_subject", full)
    with (tmp_path / "answers").open("w+") as answers, (tmp_path / "none").open("w+") as requests:
        worker.serve({}, requests, answers)
        answers.seek(0)
        answer = json.load(answers)
    assert worker.ERRORS[answer["error"]] is RequestError
    assert answer["text"].startswith("no space left on the disk of /there/is/no/room; free some")
