"""Load, then fork: the copy works on a CPU, says so on a GPU, and always ends.

Each test forks in a process of its own, with a time limit, so that a child that hangs fails the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharing import KINDS, ON_A_CPU, TINY, params

pytestmark = [pytest.mark.two_cores, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")]

PRELUDE = """
import gc, os, sys, threading, warnings
import numpy as np
warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
from kinds import KINDS
kind = sys.argv[1]
path, load = KINDS[kind]

def made(pipeline, **how):
    r = pipeline.generate([0, 1] if kind == "ONNX Runtime" else [0], seed=1, guidance=1, **how)
    return r.tokens.tolist(), pipeline.encode(r.images).tolist()

def same(pipeline):
    assert made(pipeline) == wanted

def in_child(work, leave=sys.exit):
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0, status
        return
    try:
        work()
    except Exception:
        import traceback
        traceback.print_exc()
        os._exit(1)
    leave(0)

pipeline = load(path)
"""


def run(kind: str, code: str) -> None:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])}
    command = [sys.executable, "-c", PRELUDE + code, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("kind", [*params("C step, threads"), pytest.param("ONNX Runtime", marks=pytest.mark.slow)])
def test_a_forked_process_makes_the_same_images_and_ends(kind: str) -> None:
    run(
        kind,
        """
wanted = made(pipeline)
in_child(lambda: None)  # only ends

def closes():
    same(pipeline)
    pipeline.close()
    gc.collect()
in_child(closes)
in_child(pipeline.close)  # unused
in_child(lambda: in_child(lambda: same(pipeline)))
same(pipeline)
""",
    )


@pytest.mark.parametrize("kind", [*params("C step, threads"), pytest.param("ONNX Runtime", marks=pytest.mark.slow)])
def test_a_fork_while_other_threads_generate(kind: str) -> None:
    run(
        kind,
        """
wanted, stop, began = made(pipeline), threading.Event(), threading.Event()
def work():
    while not stop.is_set():
        pipeline.generate([0, 1], seed=5, guidance=1, on_step=lambda *_: began.set())
threads = [threading.Thread(target=work) for _ in range(2)]
for each in threads: each.start()
began.wait()
for _ in range(2 if kind == "ONNX Runtime" else 1):
    in_child(lambda: same(pipeline), os._exit)
stop.set()
for each in threads: each.join()
assert made(pipeline) == wanted
""",
    )


@pytest.mark.parametrize("kind", params(*ON_A_CPU))
def test_a_fork_inside_a_callback_goes_on_in_both_processes(kind: str) -> None:
    run(
        kind,
        """
wanted, child = made(pipeline), []
def fork(done, total):
    if done == 9:
        child.append(os.fork())
same = made(pipeline, on_step=fork) == wanted
if child[0] == 0:
    os._exit(0 if same else 1)
assert same
assert os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1]) == 0
""",
    )


def test_workers_of_multiprocessing() -> None:
    run(
        "ONNX Runtime",
        """
import multiprocessing
wanted = made(pipeline)
def work(_):
    return made(pipeline)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(work, range(2)) == [wanted] * 2
""",
    )


def test_a_session_with_one_thread_is_shared_with_the_forked_process() -> None:
    run(
        "ONNX Runtime",
        """
from par_runtime import Pipeline
pipeline = Pipeline.load(path, "cpu-ort", threads=1)
wanted, session = made(pipeline), pipeline.backend._step
def child():
    same(pipeline)
    assert pipeline.backend._step is session
in_child(child)
""",
    )


def test_a_session_with_one_thread_in_which_another_thread_was_is_opened_again() -> None:
    """It may hold locks of the session, which stay locked in the forked process."""
    run(
        "ONNX Runtime",
        """
from par_runtime import Pipeline
pipeline = Pipeline.load(path, "cpu-ort", threads=1)
wanted = made(pipeline)
inside, go_on = threading.Event(), threading.Event()
class Waits:
    def __init__(self, session): self.session = session
    def __getattr__(self, name): return getattr(self.session, name)
    def run_with_iobinding(self, binding):
        inside.set()
        go_on.wait()
        self.session.run_with_iobinding(binding)
    def run(self, *arguments):
        inside.set()
        go_on.wait()
        return self.session.run(*arguments)
backend = pipeline.backend
for holder, name, call in ((backend, "_step", lambda: pipeline.generate([0, 1], seed=1)),
                           (backend._decoder._session, "_session", lambda: pipeline.decode(np.zeros((1, 64), int)))):
    session = getattr(holder, name)
    setattr(holder, name, Waits(session))
    thread = threading.Thread(target=call)
    thread.start()
    inside.wait()
    def child():
        same(pipeline)
        assert type(getattr(holder, name)) is type(session)
    in_child(child)
    go_on.set()
    thread.join()
    setattr(holder, name, session)
    in_child(lambda: same(pipeline))
    inside.clear()
    go_on.clear()
""",
    )


def test_a_fork_waits_until_another_thread_has_opened_its_session() -> None:
    """ONNX Runtime holds a lock of its own meanwhile, for which the forked process would wait for ever."""
    run(
        "ONNX Runtime",
        """
from par_runtime.backends.ort import sessions
from par_runtime.forks import no_fork
wanted, opening, opened = made(pipeline), threading.Event(), []
class Slow(sessions.ort.InferenceSession):
    def __init__(self, *arguments, **how):
        opening.set()
        stop.wait(0.3)
        super().__init__(*arguments, **how)
        opened.append(True)
sessions.ort.InferenceSession, fast, stop = Slow, sessions.ort.InferenceSession, threading.Event()
thread = threading.Thread(target=load, args=(path,))
thread.start()
opening.wait()
def child():
    sessions.ort.InferenceSession = fast
    assert opened
    same(pipeline)
    same(load(path))
in_child(child)
thread.join()
with no_fork():  # a handler of a signal may fork anywhere
    in_child(lambda: same(pipeline))
""",
    )


def test_a_decoder_that_was_not_used_before_the_fork() -> None:
    run(
        "ONNX Runtime",
        """
wanted = made(pipeline)
other = load(path)
other.generate(0, seed=1, decode=False)
in_child(lambda: same(other))
""",
    )


def test_a_forked_process_after_the_bundle_was_replaced(tmp_path: Path) -> None:
    """Sessions are made again, of what was loaded."""
    run(
        "ONNX Runtime",
        f"""
import shutil
from pathlib import Path
copy = Path({str(tmp_path)!r}) / "bundle"
shutil.copytree(path, copy)
pipeline = load(copy)
wanted = made(pipeline)
shutil.rmtree(copy)
in_child(lambda: same(pipeline))
""",
    )


GPU_CHILD = """
from par_runtime import CudaError
wanted = pipeline.generate([0, 1], seed=1)
on_stand_in = kind in ("TensorRT", "kernels")
calls = driver.counts.copy() if on_stand_in else None
def child():
    for use in (lambda: pipeline.generate([0, 1], seed=1), lambda: pipeline.score(wanted.tokens, [0, 1]),
                lambda: pipeline.decode(wanted.tokens), pipeline.selftest):
        try:
            use()
        except CudaError as error:
            assert "forked" in str(error) and "load the pipeline in the process that uses it" in str(error), error
        else:
            raise AssertionError("no error")
    pipeline.close()
    pipeline.close()
    if on_stand_in:
        assert driver.counts == calls, "the driver was called in the child"
in_child(child)
in_child(lambda: None)
assert (pipeline.generate([0, 1], seed=1).tokens == wanted.tokens).all()
pipeline.close()
"""


def test_onnx_runtime_on_a_gpu_says_that_it_cannot_be_forked() -> None:
    run("ONNX Runtime, GPU", GPU_CHILD)


ENGINES = {
    "TensorRT": """
from double import tensorrt
from par_runtime.backends.trt import module as trt_module
trt_module.load = lambda name=None: tensorrt.make(driver)
tensorrt.write_engine(Bundle.open(copy), (1, 2), "shared")
""",
    "kernels": """
from double import bare, kernels
from double.twins import Twins
bundle = Bundle.open(copy)
planned = kernels.planned(bundle, (2,), "SM80", "fp32", "fp32")
bare.register(driver, kernels.write_engine(bundle, planned))
driver.twin = Twins(driver)
""",
}


@pytest.mark.parametrize("kind", ["TensorRT", pytest.param("kernels", marks=pytest.mark.slow)])
def test_an_engine_says_that_it_cannot_be_forked_without_a_call_of_the_driver(tmp_path: Path, kind: str) -> None:
    stand_in = f"""
import shutil
from pathlib import Path
from double.driver import Driver
from par_runtime import Bundle
from par_runtime.backends import cuda
driver = cuda.driver = Driver()
copy = Path({str(tmp_path)!r}) / "bundle"
shutil.copytree({str(TINY)!r}, copy)
{ENGINES[kind]}"""
    head, last = PRELUDE.rsplit("pipeline = load(path)", 1)
    assert last.strip() == ""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])}
    code = head + stand_in + "pipeline = load(copy)\n" + GPU_CHILD
    done = subprocess.run(
        [sys.executable, "-c", code, kind], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_every_kind_is_forked() -> None:
    assert set(KINDS) == {*ON_A_CPU, "C step, threads", "ONNX Runtime, GPU", *ENGINES}
