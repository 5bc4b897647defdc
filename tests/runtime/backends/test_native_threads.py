"""The threads of the C kernels in a program: none is lost, and none takes a signal of the program's."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from par_runtime.backends.native import decoding, library
from par_runtime.backends.native.pool import Pool

TASKS = Path("/proc/self/task")
pytestmark = [
    pytest.mark.skipif(library.library() is None, reason="no compiler at installation, or an older CPU"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at threads in /proc"),
]
each_library = pytest.mark.parametrize("prefix", ["parvis_", "parvis_decoder_"])


def of_library(prefix: str) -> ctypes.CDLL:
    if prefix == "parvis_":
        return library.open_library(library.library_file())
    return decoding.open_decoder_library(decoding.decoder_file())


def threads() -> set[str]:
    return set(os.listdir(TASKS))


@each_library
def test_a_pool_ends_once_and_with_its_object(prefix: str) -> None:
    before = threads()
    pool = Pool(of_library(prefix), prefix, 3)
    assert len(threads() - before) == 2
    pool.close()
    pool.close()
    assert not pool.handle
    assert threads() <= before
    pool = Pool(of_library(prefix), prefix, 3)
    del pool
    assert threads() <= before


@each_library
def test_no_thread_is_lost_where_a_signal_interrupts_the_start(prefix: str) -> None:
    """Python calls a signal's handler when the call in C has returned, before its result is anywhere."""
    lib, before = of_library(prefix), threads()
    started = []

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            real = getattr(lib, name)

            def opens(*given: Any) -> None:
                real(*given)
                started.append(len(threads() - before))
                raise KeyboardInterrupt

            return opens if name.endswith("pool_open") else real

    with pytest.raises(KeyboardInterrupt):
        Pool(Interrupted(), prefix, 3)  # type: ignore[arg-type]
    gc.collect()
    assert started == [2]
    assert threads() <= before


def blocked(thread: str) -> set[int]:
    """The signals that a thread does not take."""
    line = next(line for line in (TASKS / thread / "status").read_text().splitlines() if line.startswith("SigBlk:"))
    return {number for number in range(1, 65) if int(line.split()[1], 16) >> (number - 1) & 1}


@each_library
def test_its_threads_take_no_signal_but_that_of_their_own_fault(prefix: str) -> None:
    before = threads()
    own = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    pool = Pool(of_library(prefix), prefix, 3)
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT}
    for thread in threads() - before:
        for _ in range(1000):
            if not faults & blocked(thread):
                break
            time.sleep(0.01)  # the C library blocks all signals of a thread until it is set up
        assert not faults & blocked(thread)
        assert set(map(int, signal.valid_signals() - faults - {signal.SIGKILL, signal.SIGSTOP})) <= blocked(thread)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == own
    pool.close()


WAITS = """
import os, signal, sys
from kinds import KINDS
path, load = KINDS["C step, threads"]
pipeline = load(path)
pipeline.generate([0], seed=1)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
print(signal.sigwait({signal.SIGTERM}).name)
"""


@pytest.mark.two_cores
def test_a_program_waits_for_a_signal_that_it_blocks() -> None:
    """As servers do, with ``sigwait``: a thread that takes the signal would end the process."""
    here = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", WAITS], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGTERM\n", "")
