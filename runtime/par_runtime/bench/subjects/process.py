"""Subjects in processes of their own, so that peak memory is exact and thread pools do not disturb each other.

``open_bundle`` and ``open_eager`` start ``worker.py`` and exchange JSON lines with it; they return a ``Subject``.
"""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from par_runtime.bench.subjects.base import OutOfTimeError, Sample, SubjectInfo, info_from_json
from par_runtime.bench.subjects.worker import ERRORS
from par_runtime.dtypes import AUTO, Rounding
from par_runtime.errors import RequestError
from par_runtime.stopping import later

MORE = "raise its limit (ulimit -u), or end others"
CLOSE_SECONDS = 5.0  #: how long a process may take to end by itself before it is killed
LOWER = 10  #: by so much the priority of a process is lower that leaves the processors to others


def open_bundle(
    path: str | Path,
    label: str = "parvis",
    *,
    device: str = "cpu",
    threads: int | None = None,
    selftest: bool = True,
    rounding: Rounding = AUTO,
    end: float = math.inf,
) -> SubjectProcess:
    """The bundle at ``path`` on ``device``, as ``Pipeline.load`` takes it. Raises what ``Pipeline.load`` raises.

    ``end``: as in :class:`SubjectProcess`.
    """
    return SubjectProcess(
        {
            "kind": "bundle",
            "path": str(path),
            "label": label,
            "device": device,
            "threads": threads,
            "selftest": selftest,
            "rounding": rounding._asdict(),
        },
        end,
    )


def open_eager(
    path: str | Path,
    label: str = "eager",
    *,
    threads: int | None = None,
    compiled: bool = False,
    device: str = "cpu",
    end: float = math.inf,
    compile_threads: int | None = None,
    started: Callable[[SubjectProcess], None] | None = None,
) -> SubjectProcess:
    """A model of the bundle's architecture in PyTorch, with random weights, on "cpu" or "cuda".

    ``compile_threads``: processes that compile kernels beside it; None: as many as PyTorch takes, a machine's worth.
    ``started``: as in :class:`SubjectProcess`; with it, the process can be paused.
    Raises RequestError where the 'export' extra is missing, BundleError.
    """
    kind = "compiled" if compiled else "eager"
    spec = {"kind": kind, "path": str(path), "label": label, "threads": threads, "device": device}
    return SubjectProcess(spec | {"compile_threads": compile_threads, "apart": started is not None}, end, started)


def open_random(
    path: str | Path, label: str, *, device: str = "cuda", end: float = math.inf, filled: bool = True
) -> SubjectProcess:
    """The bundle at ``path`` on its engine of kernels on ``device``, with random weights that are made there.

    ``filled``: at once; else when ``logits`` is asked for.
    Raises RequestError where the 'export' extra is missing, what ``Pipeline.load`` raises, EngineError, CudaError.
    """
    spec = {"kind": "random", "path": str(path), "label": label, "threads": None, "device": device}
    return SubjectProcess(spec | {"filled": filled}, end)


class SubjectProcess:
    """A subject in a process of its own, ``pid``, of the bundle at ``path``.

    ``load_ms``, ``selftest_ms``: what loading took, and the self-test, None where there was none. ``note``: why it runs
    on the CPU although a GPU was asked for, or "". ``end``: when it is killed whatever it does, by ``time.monotonic``;
    the call that waits for it then raises OutOfTimeError.

    ``started`` is called as soon as the process is there, before it has loaded anything. Where ``spec`` has "apart",
    the process and what it starts are a group of processes, which can be paused.
    """

    info: SubjectInfo
    load_ms: float
    selftest_ms: float | None
    note: str

    def __init__(
        self,
        spec: Mapping[str, Any],
        end: float = math.inf,
        started: Callable[[SubjectProcess], None] | None = None,
    ) -> None:
        self._spec, self.path = spec, spec["path"]
        self._apart, self._paused = bool(spec.get("apart")), False
        self._end, self._late = end, False
        try:
            with later(), ctrl_c_blocked():  # it is ended by this process, also where it still imports
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "par_runtime.bench.subjects.worker", json.dumps(spec)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    env=environment(),
                )
            self.pid = self._process.pid
            if started is not None:
                started(self)
            with self._killed_at_end():
                opened = self._answer()
        except BaseException as error:
            if hasattr(self, "_process"):  # it was started
                self.close()
            if (why := no_room(error)) is not None:
                raise why from error
            raise
        self.info, self.note = info_from_json(opened["info"]), opened["note"]
        self.load_ms, self.selftest_ms = opened["load_ms"], opened["selftest_ms"]

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        """Make one batch, or some of its calls; see ``Subject.run``."""
        return Sample(**self._ask(do="run", images=images, guided=guided, most_calls=most_calls))

    def image(self, images: int, guided: bool) -> Sample:
        """Make one batch, timed as a whole only, where the subject is one of :func:`open_bundle`."""
        return Sample(**self._ask(do="image", images=images, guided=guided))

    def forget(self) -> None:
        """Have a model in PyTorch free the memory of its last batch."""
        self._ask(do="forget")

    def decode(self, images: int) -> Sample:
        """Decode random tokens of ``images`` images, nothing else."""
        return Sample(**self._ask(do="decode", images=images))

    def first_preview_ms(self, images: int, guided: bool) -> float:
        """Milliseconds until the first picture that shows something of every region."""
        return float(self._ask(do="preview", images=images, guided=guided))

    def kernels(self, images: int, guided: bool, image: bool = True) -> list[dict[str, Any]]:
        """What each kernel of a call takes, where the subject is one of :func:`open_random`.

        ``image``: one is made before; without it tokens are random, which takes the same time.
        """
        timed: list[dict[str, Any]] = self._ask(do="kernels", images=images, guided=guided, image=image)
        return timed

    def call_us(self, images: int) -> list[float]:
        """Microseconds of all kernels of a guided call in one go, where the subject is one of :func:`open_random`."""
        took: list[float] = self._ask(do="call", images=images)
        return took

    def logits(self, images: int, into: Path) -> int:
        """Write what a call's logits are on numbers that every engine of this bundle gets, where the subject is one of
        :func:`open_random`. They are float32 of shape (images * n, codes), in a file of numpy.

        Returns how many calls more gave other bits.
        """
        return int(self._ask(do="logits", images=images, into=str(into)))

    def kill(self) -> None:
        """End the process at once, whatever it does; ``close`` must follow."""
        # Its group first: processes that it started would stay paused for good. Of one that has ended and was not
        # paused they end by themselves.
        if self._apart and (self._paused or self._process.returncode is None):
            self._signal_group(signal.SIGKILL)
        self._process.kill()

    # -- a process that is "apart" ------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the process and what it started, until ``go_on``. A request to it is answered after that.

        Where this process is killed before, the system itself lets them go on and end, once they have stopped: it does
        so with every stopped group whose last parent in the same session has ended.
        """
        if self._process.poll() is not None:
            return
        self._paused = True
        if not self._signal_group(signal.SIGSTOP):  # it has only just started, and made no group yet
            self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End ``pause``."""
        self._paused = False
        self._signal_group(signal.SIGCONT)
        self._process.send_signal(signal.SIGCONT)

    def lower_priority(self) -> None:
        """Leave the processors to others, where they want them."""
        self._set_priority(LOWER)

    def usual_priority(self) -> None:
        """End ``lower_priority``, where the system lets this process do so: many containers do not."""
        self._set_priority(0)

    def _set_priority(self, lower: int) -> None:
        priority = os.getpriority(os.PRIO_PROCESS, 0) + lower
        for which in (os.PRIO_PROCESS, os.PRIO_PGRP):
            with suppress(OSError):  # it has ended, has no group yet, or must not have a higher priority again
                os.setpriority(which, self.pid, priority)

    def _signal_group(self, number: int) -> bool:
        """Send a signal to the process and what it started; whether there is such a group."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def close(self) -> None:
        """End the process; kill it where it does not end in time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._paused:  # it would not hear that it is to end
            self.kill()
        with suppress(OSError):
            self._process.stdin.close()  # asks it to end
        try:
            self._process.wait(CLOSE_SECONDS if sys.exc_info()[0] is None else 0.1)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        with self._killed_at_end():
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            except (OSError, ValueError) as error:
                raise self._ended() from error
            return self._answer()["ok"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise ERRORS.get(answer["error"], RuntimeError)(answer["text"])
        return answer

    @contextmanager
    def _killed_at_end(self) -> Iterator[None]:
        """Kill the process where its time passes before the block ends."""
        if self._end == math.inf:
            yield
            return
        timer = threading.Timer(max(0.0, min(self._end - time.monotonic(), threading.TIMEOUT_MAX)), self._kill)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:
            raise RequestError(f"the system starts no more threads; {MORE}") from error
        try:
            yield
        finally:
            timer.cancel()

    def _kill(self) -> None:
        self._late = True
        self.kill()

    def _ended(self) -> Exception:
        """The error that explains why the process ended by itself."""
        code = self._process.wait()
        what = f"{self._spec['path']} ({self._spec['label']})"
        if self._late:
            return OutOfTimeError(f"{self._spec['label']} was still at work when the time had passed")
        if code == -signal.SIGKILL:
            return killed(what)
        return RequestError(f"the process of {what} ended by itself with code {code}; its output is above")


def environment() -> dict[str, str]:
    """The variables of a process that finds the packages of this one."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def no_room(error: BaseException) -> Exception | None:
    """What the bench reports where ``error`` says that the system has no room for another process; else None."""
    if isinstance(error, BlockingIOError):  # EAGAIN of fork
        return RequestError(f"the system starts no more processes; {MORE}")
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return MemoryError("none for another process")
    return None


def killed(what: str) -> MemoryError:
    """The error of a process that SIGKILL ended, which Linux sends to the largest one when memory runs out."""
    return MemoryError(f"the process of {what} was killed; most likely the machine ran out of memory")


@contextmanager
def ctrl_c_blocked() -> Iterator[None]:
    """A process that is started in this block has Ctrl-C blocked, which reaches every process of a terminal.

    By itself Python sets a handler for it before the first line of a program runs, so the program cannot be faster.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
