"""The pool of threads of the C kernels, compiled into a program of its own; and that a source package is complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from par_runtime import Pipeline
from par_runtime.backends import native

SOURCES = Path(native.__file__).parent
ROOT = Path(__file__).parents[3]

PROGRAM = r"""
#include "pool.h"
#include <stdio.h>

#define ITEMS 1000
typedef struct { long *out; long value; } Work;
static atomic_int entered, go_on, taken_late;

/* Two phases: out[i] += value, then out[i] *= 2. Thread 1 stays away from call 1 until it is over. */
static void task(Worker *worker, const void *argument) {
    const Work *work = argument;
    int late = worker->thread == 1 && work->value == 1;
    if (late) {
        atomic_store(&entered, 1);
        while (!atomic_load(&go_on)) sched_yield();
    }
    if (worker->thread == 0 && work->value == 1)
        while (!atomic_load(&entered)) sched_yield(); /* the call is not over before thread 1 is inside */
    for (int phase = 0; phase < 2; phase++) {
        begin_phase(worker, ITEMS, items_at_once(worker->pool, ITEMS));
        for (long i; (i = next_item(worker)) >= 0;) {
            if (late) atomic_fetch_add(&taken_late, 1);
            work->out[i] = phase ? work->out[i] * 2 : work->out[i] + work->value;
        }
        end_phase(worker);
    }
}

/* Another task of the same pool, of one phase: out[i] = 2 * value. */
static void other_task(Worker *worker, const void *argument) {
    const Work *work = argument;
    begin_phase(worker, ITEMS, items_at_once(worker->pool, ITEMS));
    for (long i; (i = next_item(worker)) >= 0;) work->out[i] = 2 * work->value;
    end_phase(worker);
}

int main(void) {
    static long out[ITEMS];
    Pool *pool = pool_open(3, NULL);
    for (long value = 1; value <= 200; value++) {
        Work work = {out, value};
        int other = value % 3 == 2; /* each call has its own, whatever that of the one before was */
        if (pool_run(pool, other ? other_task : task, &work, sizeof work, other ? 1 : 2)) return 2;
        if (value == 100) { /* it was inside of call 1 all the time */
            if (!pool->inside) return 3;
            atomic_store(&go_on, 1);
            pool_settle(pool);
            if (pool->inside) return 4;
        }
        for (long i = 0; i < ITEMS; i++) {
            if (out[i] != 2 * value) return 5;
            out[i] = 0;
        }
    }
    pool_close(pool);
    return atomic_load(&taken_late) ? 6 : 0;
}
"""


def ends(folder: Path, *options: str, program: str = PROGRAM) -> int:
    """The exit code of ``program``, which includes the pool.h of ``folder`` or, without one, ours."""
    (folder / "main.c").write_text(program)
    command = ["cc", "-std=gnu11", *options, "-pthread", "-Wall", "-Werror", f"-I{SOURCES}", "main.c", "-o", "main"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return subprocess.run([folder / "main"], timeout=60, capture_output=True).returncode


@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
def test_a_call_ends_without_a_thread_that_is_late_and_it_takes_no_piece_of_another(tmp_path: Path) -> None:
    """99 calls are made while one thread stays inside of the first one; a pool that waits for it would never end."""
    assert ends(tmp_path, "-O2") == 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
def test_memory_is_ordered_on_any_cpu(tmp_path: Path) -> None:
    """x86 keeps more order than the pool asks for, ARM does not; the thread sanitizer counts what is asked for."""
    sanitized = ("-O1", "-g", "-fsanitize=thread")
    try:
        works = ends(tmp_path, *sanitized, program="int main(void) { return 0; }") == 0
    except AssertionError:
        works = False
    if not works:
        pytest.skip("no thread sanitizer here")
    assert ends(tmp_path, *sanitized) == 0
    relaxed = re.sub("memory_order_(acquire|release)", "memory_order_relaxed", (SOURCES / "pool.h").read_text())
    (tmp_path / "pool.h").write_text(relaxed)
    assert ends(tmp_path, *sanitized) == 66  # what it ends with after a report


@pytest.mark.parametrize("source", ["step.c", "dots.c", "decoder.c"])
@pytest.mark.parametrize("compiler", ["gcc", "clang", "aarch64-linux-gnu-gcc"])
def test_each_compiler_takes_the_sources(compiler: str, source: str) -> None:
    """Where one refuses them, installation goes on without the C kernels, and says nothing."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    command = [compiler, "-fsyntax-only", "-std=gnu11", "-pthread", "-Wall", "-Werror", SOURCES / source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sources", [{"step.c", "dots.c"}, {"decoder.c"}])
def test_a_source_package_takes_every_header_along(sources: set[str]) -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11

    def included(name: str) -> set[str]:
        headers = set(re.findall(r'#include "([^"]+)"', (SOURCES / name).read_text()))
        return headers.union(*(included(header) for header in headers))

    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    (module,) = (each for each in modules if {Path(path).name for path in each["sources"]} == sources)
    assert {Path(path).name for path in module["depends"]} == set().union(*map(included, sources))


@pytest.mark.two_cores
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone has these calls")
def test_a_thread_that_wakes_up_is_kept_off_the_cpu_of_the_caller() -> None:
    """And a set of CPUs that somebody gives it counts from then on."""
    allowed = os.sched_getaffinity(0)
    with Pipeline.load(ROOT / "models" / "demo", "cpu", threads=2, selftest=False) as pipeline:
        before = set(os.listdir("/proc/self/task"))
        tokens = np.zeros((1, pipeline.bundle.n_tokens), np.int64)
        pipeline.backend.decode(tokens)
        [thread] = map(int, set(os.listdir("/proc/self/task")) - before)

        def after_a_pause() -> set[int]:
            state = Path(f"/proc/self/task/{thread}/stat")
            while state.read_text().rpartition(")")[2].split()[0] != "S":
                time.sleep(0.001)
            pipeline.backend.decode(tokens)
            return os.sched_getaffinity(thread)

        for _ in range(3):
            assert len(allowed - after_a_pause()) == 1
        only = allowed - os.sched_getaffinity(thread)  # not the set that it has, which looks as if nobody gave any
        os.sched_setaffinity(thread, only)
        for _ in range(3):
            assert after_a_pause() == only
        os.sched_setaffinity(thread, allowed)
        assert len(allowed - after_a_pause()) == 1
