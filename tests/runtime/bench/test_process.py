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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import pytest

from par_runtime.bench.subjects import process, worker
from par_runtime.bench.subjects.base import OutOfTimeError
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


def apart(tiny: Path, started: Callable[[SubjectProcess], None] | None = None, end: float = math.inf) -> SubjectProcess:
    """A subject whose process can be paused."""
    spec = {"kind": "bundle", "path": str(tiny), "label": "b", "device": "cpu", "threads": 1, "selftest": False}
    spec |= {"rounding": {"arithmetic": "auto", "cache": "auto", "decoder_precision": "auto"}, "apart": True}
    return SubjectProcess(spec, end, started)


def state(pid: int) -> str:
    """One letter: "T" of a process that is stopped, "Z" of one that has ended, or "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def wait_for_state(pid: int, *wanted: str) -> None:
    for _ in range(3000):
        if state(pid) in wanted:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is {state(pid)!r}, not one of {wanted}")


@pytest.fixture
def helper(tiny: Path) -> Iterator[tuple[SubjectProcess, subprocess.Popen[bytes]]]:
    """A subject apart, and a process of its group: one that compiles for it."""
    subject = apart(tiny)
    group = subject.pid
    beside = subprocess.Popen(["sleep", "600"], preexec_fn=lambda: os.setpgid(0, group))
    yield subject, beside
    beside.kill()
    beside.wait()
    subject.close()


on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads states of processes in /proc")
Helper = tuple[SubjectProcess, "subprocess.Popen[bytes]"]


@on_linux
def test_a_process_is_paused_with_what_it_started_and_answers_afterwards(helper: Helper) -> None:
    subject, beside = helper
    subject.pause()
    for pid in (subject.pid, beside.pid):
        wait_for_state(pid, "T")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(subject.image, 1, True)
        with pytest.raises(FutureTimeoutError):
            asked.result(0.1)
        subject.go_on()
        assert asked.result().image_ms > 0
    wait_for_state(beside.pid, "S", "R")


@on_linux
@pytest.mark.parametrize("how", ["close", "kill"])
def test_a_paused_process_is_ended_with_what_it_started(helper: Helper, how: str) -> None:
    subject, beside = helper
    subject.pause()
    getattr(subject, how)()
    assert beside.wait() == -signal.SIGKILL
    subject.close()
    assert state(subject.pid) == ""


@on_linux
def test_a_process_that_still_starts_can_be_paused(tiny: Path) -> None:
    """It has no group of its own yet."""
    seen: list[str] = []

    def started(subject: SubjectProcess) -> None:
        subject.pause()
        wait_for_state(subject.pid, "T")
        seen.append(state(subject.pid))
        subject.go_on()

    subject = apart(tiny, started)
    subject.close()
    assert seen == ["T"]


@on_linux
def test_a_paused_process_ends_in_time(tiny: Path) -> None:
    with pytest.raises(OutOfTimeError):
        apart(tiny, SubjectProcess.pause, end=time.monotonic() + 0.2)


@on_linux
def test_a_paused_process_whose_bench_was_killed_ends(tiny: Path) -> None:
    """Nobody is left who could let it go on; the system does."""
    script = f"""
import os, signal
from pathlib import Path
from test_process import apart, wait_for_state
subject = apart(Path({str(tiny)!r}))
subject.pause()
wait_for_state(subject.pid, "T")
print(subject.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # The paused process holds its standard error open as long as it lives.
    files = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    bench = subprocess.run([sys.executable, "-c", script], text=True, env=environment, timeout=60, **files)
    assert bench.returncode == -signal.SIGKILL
    wait_for_state(int(bench.stdout), "", "Z")


@on_linux
def test_the_priority_of_a_process_is_lower_until_it_may_be_raised(
    helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, beside = helper
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    subject.lower_priority()
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in (subject.pid, beside.pid)} == {usual + process.LOWER}

    def refused(*_: int) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as changed:
        changed.setattr(os, "setpriority", refused)
        subject.usual_priority()  # many containers do not let a process have it back
    subject.usual_priority()
    assert os.getpriority(os.PRIO_PROCESS, subject.pid) in (usual, usual + process.LOWER)
