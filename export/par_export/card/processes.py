"""Stages of the report as processes: their lines, and an end that is always one, whatever a kernel does."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from par_runtime.bench.limits import SINGLE_THREADED

Line = dict[str, Any]
MOST_SAID = 200  #: lines of a program that a stage runs under
NOT_A_LINE = 500  #: characters of the last words of a process that end up in the report


@dataclass
class Ended:
    """A stage that has ended. ``lines`` without "begin", "done" and "failed"; ``why`` it failed, or "".

    ``during``: what it had begun when it ended before its time, or "". ``said``: the first lines of a program that it
    ran under.
    """

    lines: list[Line] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    why: str = ""
    during: str = ""
    seconds: float = 0.0


def run_stage(
    name: str, spec: Mapping[str, Any], until: float, before: Sequence[str] = (), threads: int | None = None
) -> Ended:
    """Run a stage until it ends, or until ``until`` by ``time.monotonic``, when it is killed.

    ``before``: a program and its options that the stage is run under (``compute-sanitizer``). ``threads``: of PyTorch's
    and numpy's own, for a stage beside others; None: as many as they take, for one that has the machine for itself.
    """
    module = [sys.executable, "-m", "par_export.card.stages", name, json.dumps(spec)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if threads is not None:
        environment |= shared_cores(threads)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as words:
        process = subprocess.Popen(
            [*before, *module],
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            env=environment,
            start_new_session=True,  # so that it can be ended with what it started
        )
        assert process.stdout is not None
        ended, late = _listen(process, process.stdout, until)
        ended.seconds = time.monotonic() - began
        if late:
            ended.why = "it had not ended when its time was over"
        elif not ended.why and (ended.during != _DONE or process.returncode):
            words.seek(0)
            last = [line.strip() for line in words.read()[-20000:].splitlines() if line.strip()] or [""]
            code = process.returncode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            ended.why = f"its process {how}{f': {last[-1]}' if last[-1] else ''}"[:NOT_A_LINE]
    if ended.during == _DONE:
        ended.during = ""
    return ended


def shared_cores(threads: int) -> dict[str, str]:
    """The variables by which a process that shares its cores computes with ``threads`` threads.

    Threads of OpenMP that wait for each other keep their cores busy meanwhile, and so keep those from running that they
    wait for, if other processes want the cores too: of eight that each took a thread for every core, none computed in
    150 s what takes one thread 2.5 s. So they sleep instead.
    """
    return dict.fromkeys(SINGLE_THREADED, str(threads)) | {"OMP_WAIT_POLICY": "passive"}


_DONE = "\0done"


def _listen(process: subprocess.Popen[str], output: IO[str], until: float) -> tuple[Ended, bool]:
    """What the process says until it ends; and whether it was killed because its time was over."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    ended, late = Ended(), False
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                late = True
                break
            if line is None:
                break
            _take(ended, line)
    finally:  # Ctrl-C too
        if late or sys.exc_info()[0] is not None:
            _kill(process)
        process.wait()
        reader.join()
        output.close()
    return ended, late


def _take(ended: Ended, line: str) -> None:
    try:
        said: Line = json.loads(line)
    except ValueError:
        if len(ended.said) < MOST_SAID:
            ended.said.append(line.strip())
        return
    kind = said.get("kind")
    if kind == "begin":
        ended.during = said["name"]
    elif kind == "done":
        ended.during = _DONE
    elif kind == "failed":
        ended.why = said["text"]
    else:
        ended.lines.append(said)
        if kind == "check" and said["name"] == ended.during:
            ended.during = ""


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
