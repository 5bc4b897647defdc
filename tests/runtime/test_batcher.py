"""Requests of many threads in common calls: each gets its own image, and nothing that one does disturbs another."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double.fixtures import Make
from sharing import busy, params, until

from par_runtime import Batcher, BusyError, Pipeline, RequestError, Result, Settings
from par_runtime.errors import OutOfMemory

Get = Callable[[str], Pipeline]
PLAIN = "ONNX Runtime"


class Spy:
    """What a pipeline was asked for."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.labels: list[list[int]] = []
        real = pipeline.generate

        def generate(labels: Any, *given: Any, **more: Any) -> Result:
            self.labels.append(labels)
            return real(labels, *given, **more)

        monkeypatch.setattr(pipeline, "generate", generate)


def image_of(pipeline: Pipeline, label: int, **how: Any) -> Result:
    return pipeline.generate([label], **how)


REQUESTS: list[dict[str, Any]] = [
    {"label": 0, "seed": 1},
    {"label": 1, "seed": 2, "guidance": 3.0},
    {"label": 3, "seed": 3, "guidance": 1.0},
    {"label": 2, "seed": 4, "greedy": True},
    {"label": 2, "seed": 5, "guidance": 2.0, "guidance_interval": 3},
]


def check_threads(pipeline: Pipeline) -> None:
    alone = [image_of(pipeline, **request) for request in REQUESTS]
    with Batcher(pipeline, max_batch=min(4, pipeline.backend.max_images)) as batcher, ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: batcher.generate(**REQUESTS[i % 5]), range(20)))
    assert made == [alone[i % 5] for i in range(20)]
    assert batcher.images == 20
    assert 5 <= batcher.calls <= 20


@pytest.mark.parametrize("kind", params("C step", PLAIN, "ONNX Runtime, GPU"))
def test_each_thread_gets_its_own_image(kind: str, shared_pipelines: Get) -> None:
    check_threads(shared_pipelines(kind))


@pytest.mark.parametrize("capture", ["image", "none"])
def test_each_thread_gets_its_own_image_of_a_gpu(capture: str, load: Make) -> None:
    check_threads(load(capture=capture))


def test_what_waits_is_made_in_one_call(shared_pipelines: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = shared_pipelines(PLAIN)
    with Batcher(pipeline, max_batch=4) as batcher, busy(pipeline):
        spy = Spy(pipeline, monkeypatch)
        futures = [batcher.submit(5, seed=0)]
        until(lambda: batcher.waiting == 0)  # it waits for the pipeline
        futures += [batcher.submit(i % 6, seed=i) for i in range(1, 10)]
        assert batcher.waiting == 9
    assert spy.labels == [[5], [1, 2, 3, 4], [5, 0, 1, 2], [3]]
    assert (batcher.images, batcher.calls, batcher.waiting) == (10, 4, 0)
    for i, future in enumerate(futures):
        assert future.result().seeds == [i]
        assert future.result() == image_of(pipeline, 5 if i == 0 else i % 6, seed=i)


def test_results_share_no_memory(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines(PLAIN)
    with Batcher(pipeline) as batcher, busy(pipeline):
        first = batcher.submit(0, seed=1)
        until(lambda: batcher.waiting == 0)
        futures = [batcher.submit(0, seed=1) for _ in range(3)]
    images = [future.result().images for future in (first, *futures)]
    assert all(image is not None and image.base is None for image in images)
    images[1][:] = 0  # type: ignore[index]
    assert np.array_equal(images[2], images[0])  # type: ignore[arg-type]


def test_a_guidance_interval_has_calls_of_its_own(shared_pipelines: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = shared_pipelines(PLAIN)
    with Batcher(pipeline) as batcher, busy(pipeline):
        spy = Spy(pipeline, monkeypatch)
        batcher.submit(5)
        until(lambda: batcher.waiting == 0)
        for label, interval in ((0, -1), (1, 2), (2, -1), (3, 2), (4, 7)):
            batcher.submit(label, guidance_interval=interval)
    assert spy.labels == [[5], [0, 2], [1, 3], [4]]


def test_the_oldest_request_waits_for_others(shared_pipelines: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = shared_pipelines(PLAIN)
    spy = Spy(pipeline, monkeypatch)
    batcher = Batcher(pipeline, max_batch=3, max_wait_ms=60_000)
    began = time.monotonic()
    futures = [batcher.submit(i) for i in range(3)]  # a full batch does not wait
    assert [future.result(30).labels for future in futures] == [[0], [1], [2]]
    last = batcher.submit(3)
    time.sleep(0.05)
    assert not last.running()
    batcher.close()  # nor does a closed one
    assert last.result(0).labels == [3]
    assert time.monotonic() - began < 50
    with Batcher(pipeline, max_wait_ms=20) as soon:  # its time is over, and nobody else came
        assert soon.generate(4).labels == [4]
    assert spy.labels == [[0, 1, 2], [3], [4]]


def test_a_request_too_many_is_said_at_once(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines(PLAIN)
    with Batcher(pipeline, max_waiting=2) as batcher, busy(pipeline):
        batcher.submit(0)
        until(lambda: batcher.waiting == 0)
        waiting = [batcher.submit(0), batcher.submit(0)]
        with pytest.raises(
            BusyError, match=r"^2 requests wait already; try again later, or give a larger max_waiting$"
        ):
            batcher.submit(0)
        assert waiting[0].cancel()
        waiting.append(batcher.submit(0))  # there is room again
    assert waiting[2].result(0).labels == [0]
    assert not issubclass(BusyError, ValueError)  # it is no bad request


def test_a_cancelled_request_costs_nothing(shared_pipelines: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = shared_pipelines(PLAIN)
    with Batcher(pipeline) as batcher, busy(pipeline):
        spy = Spy(pipeline, monkeypatch)
        batcher.submit(5)
        until(lambda: batcher.waiting == 0)
        futures = [batcher.submit(i) for i in range(3)]
        assert futures[0].cancel()
        assert futures[2].cancel()
    assert spy.labels == [[5], [1]]
    with pytest.raises(CancelledError):
        futures[0].result()
    with Batcher(pipeline) as batcher, busy(pipeline):
        batcher.submit(5)
        until(lambda: batcher.waiting == 0)
        assert batcher.submit(4).cancel()  # the only one
    assert batcher.images == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"label": "nobody"}, "unknown label 'nobody'"),
        ({"label": 99}, "label 99: this model has classes 0..5"),
        ({"label": [1, 2]}, r"label \[1, 2\]: expected a class index or name, not a list"),
        ({"label": 1, "top_p": 2}, "top_p 2: expected 0 to 1"),
        ({"label": 1, "guidance": [1.0, 2.0]}, "guidance: 2 values for 1 images"),
        ({"label": 1, "seed": -1}, "seed -1: expected a whole number"),
        ({"label": 1, "settings": Settings(), "top_k": 3}, "both settings and top_k were given"),
    ],
)
def test_a_bad_request_is_said_where_it_was_made(shared_pipelines: Get, given: dict[str, Any], text: str) -> None:
    with Batcher(shared_pipelines(PLAIN)) as batcher:
        with pytest.raises(RequestError, match=text):
            batcher.submit(**given)
        assert batcher.waiting == 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"max_batch": 0}, "max_batch 0: expected 1 to"),
        ({"max_batch": 10**6}, "max_batch 1000000: expected 1 to .* on onnxruntime"),
        ({"max_wait_ms": -1}, "max_wait_ms -1: expected 0 to 1000000 milliseconds"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms nan: expected 0 to"),
        ({"max_waiting": 0}, "max_waiting 0: expected 1 or more"),
    ],
)
def test_bad_limits(shared_pipelines: Get, given: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        Batcher(shared_pipelines(PLAIN), **given)
    with pytest.raises(RequestError, match=r"pipeline: expected one of Pipeline\.load, not a str"):
        Batcher("models/demo")  # type: ignore[arg-type]


def test_a_fault_reaches_those_of_its_call_alone(shared_pipelines: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = shared_pipelines(PLAIN)
    with Batcher(pipeline) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "generate", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                batcher.generate(0)
        assert batcher.generate(1, seed=2) == image_of(pipeline, 1, seed=2)
    assert batcher.images == 1


def test_close_makes_what_waits_or_cancels_it(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines(PLAIN)
    for cancel in (False, True):
        batcher = Batcher(pipeline, max_wait_ms=60_000)
        futures = [batcher.submit(i) for i in range(3)]
        batcher.close(cancel=cancel)
        batcher.close()
        assert [future.cancelled() for future in futures] == [cancel] * 3
        assert batcher.images == (0 if cancel else 3)
        with pytest.raises(RequestError, match=r"submit\(\): this Batcher was closed; make another one"):
            batcher.submit(0)
    unused = Batcher(pipeline)
    unused.close()
    assert pipeline.generate(0).labels == [0]  # it stays open


def test_callbacks_may_submit_and_close_but_not_wait(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines(PLAIN)
    batcher = Batcher(pipeline)
    later: list[Future[Result]] = []
    said: list[str] = []

    def done(_: Future[Result]) -> None:
        later.append(batcher.submit(3))
        try:
            batcher.generate(2)
        except RequestError as error:
            said.append(str(error))
        batcher.close()

    batcher.submit(1).add_done_callback(done)
    until(lambda: bool(later) and later[0].done())
    assert later[0].result().labels == [3]

    assert len(said) == 1
    with pytest.raises(RequestError, match=r"submit\(\): this Batcher was closed"):
        batcher.submit(0)

    other = Batcher(pipeline)
    other.submit(0).result()  # its thread has begun

    def on_step(*_: int) -> None:
        if not waiting:
            waiting.append(other.submit(2))
            for work in (lambda: other.generate(0), other.close, lambda: other.close(cancel=True)):
                with pytest.raises(RequestError) as error:
                    work()
                said.append(str(error.value))

    waiting: list[Future[Result]] = []
    pipeline.generate(0, on_step=on_step)
    why = "was called inside a callback, and would wait for images that wait for its end"
    assert said == [
        f"generate() {why}; submit() may be called there",
        f"generate() {why}; submit() may be called there",
        f"close() {why}; call it afterwards",
        f"close() {why}; call it afterwards",
    ]
    other.close()
    assert waiting[0].result(0).labels == [2]


def test_it_can_be_awaited(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines(PLAIN)

    async def several() -> list[Result]:
        with Batcher(pipeline) as batcher:
            return await asyncio.gather(*(asyncio.wrap_future(batcher.submit(i, seed=i)) for i in range(4)))

    assert asyncio.run(several()) == [image_of(pipeline, i, seed=i) for i in range(4)]


def test_a_closed_pipeline_is_said(tiny: Path) -> None:
    pipeline = Pipeline.load(tiny, "cpu", threads=1, selftest=False)
    with Batcher(pipeline, max_wait_ms=60_000) as batcher:
        waiting = batcher.submit(0)
        pipeline.close()
        with pytest.raises(RequestError, match=r"^submit\(\): the pipeline of .* was closed; load it again"):
            batcher.submit(0)
    with pytest.raises(RequestError, match=r"^generate\(\): the pipeline of .* was closed; load it again"):
        waiting.result()
    with pytest.raises(RequestError, match=r"^Batcher\(\): the pipeline of .* was closed; load it again"):
        Batcher(pipeline)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), ValueError("mine")])
def test_what_a_callback_raises_ends_nothing(shared_pipelines: Get, error: BaseException) -> None:
    pipeline = shared_pipelines(PLAIN)

    def fails(_: Future[Result]) -> None:
        raise error

    with Batcher(pipeline) as batcher, busy(pipeline):
        first = batcher.submit(0)
        until(lambda: batcher.waiting == 0)
        futures = [batcher.submit(i) for i in range(1, 5)]
        for future in (first, futures[0], futures[2]):
            future.add_done_callback(fails)
        futures[1].set_running_or_notify_cancel()  # somebody else ends a future of ours
        futures[1].set_exception(KeyError("theirs"))
    assert [future.result(0).labels for future in (first, futures[0], *futures[2:])] == [[0], [1], [3], [4]]
    assert batcher.images == 4


def test_cancelled_requests_reach_whoever_waits_for_several(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines(PLAIN)
    batcher = Batcher(pipeline, max_wait_ms=60_000)
    futures = [batcher.submit(i) for i in range(3)]
    assert futures[0].cancel()
    batcher.submit(3)  # the thread looks at what waits
    assert wait(futures, 30, FIRST_COMPLETED).done == {futures[0]}
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(lambda: set(as_completed(futures, 30)))
        batcher.close(cancel=True)
        assert ended.result() == set(futures)


def test_cancelled_requests_fill_no_batch(shared_pipelines: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = shared_pipelines(PLAIN)
    spy = Spy(pipeline, monkeypatch)
    with Batcher(pipeline, max_batch=3, max_wait_ms=60_000) as batcher:
        futures = [batcher.submit(i) for i in range(2)]
        futures[0].cancel()
        assert batcher.waiting == 1
        futures += [batcher.submit(2)]
        time.sleep(0.05)
        assert not futures[1].running()
        futures += [batcher.submit(3)]
        assert futures[1].result(30).labels == [1]
    assert spy.labels == [[1, 2, 3]]


def test_an_interrupted_close_is_made_again(shared_pipelines: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = shared_pipelines(PLAIN)
    with busy(pipeline):
        batcher = Batcher(pipeline)
        futures = [batcher.submit(i) for i in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(batcher._worker.ended, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                batcher.close()
    batcher.close()
    assert all(future.done() for future in futures)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_submit_leaves_no_lock_locked(tiny: Path) -> None:
    code = """
import random, signal
from par_runtime import BusyError
batcher = Batcher(pipeline, max_batch=64, max_wait_ms=60_000, max_waiting=60)
signal.signal(signal.SIGALRM, signal.default_int_handler)
stopped = 0
for i in range(400):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
        while True:
            try:
                batcher.submit(1, seed=i)
            except BusyError:
                pass
    except KeyboardInterrupt:
        stopped += 1
assert stopped == 400
batcher.close()
assert 1 <= batcher.images <= 60, batcher.images
"""
    done = child(tiny, code)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_that_is_forgotten_is_freed(tiny: Path) -> None:
    pipeline = Pipeline.load(tiny, "cpu", threads=1, selftest=False)
    batcher = Batcher(pipeline)
    made = batcher.submit(1, seed=2)
    thread, of = batcher._worker.thread, weakref.ref(pipeline)
    assert thread is not None
    del batcher, pipeline
    gc.collect()
    assert made.result(30).labels == [1]  # what was asked for is made
    thread.join(30)
    assert not thread.is_alive()
    del made
    gc.collect()
    assert of() is None


def test_it_is_not_copied(shared_pipelines: Get) -> None:
    batcher = Batcher(shared_pipelines(PLAIN))
    for work in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(RequestError, match="a Batcher cannot be copied or sent to another process; make another"):
            work(batcher)


def test_each_future_has_a_result_or_an_error_of_its_own(
    shared_pipelines: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = shared_pipelines(PLAIN)
    with Batcher(pipeline, max_batch=2, max_wait_ms=60_000) as batcher:
        one, two = [batcher.submit(0, seed=1) for _ in range(2)]
        one.result(30).timings.clear()
        assert two.result(30).timings["total"] > 0
        monkeypatch.setattr(pipeline, "generate", out_of_memory)
        one, two = [batcher.submit(0, seed=1) for _ in range(2)]
        errors = [future.exception(30) for future in (one, two)]
    assert errors[0] is not errors[1]
    for error in errors:
        assert isinstance(error, OutOfMemory)
        assert (str(error), error.free_bytes) == ("too large", 2)


def out_of_memory(*_: object, **__: object) -> None:
    raise OutOfMemory("too large", 1, 2, 3)


def test_a_wrong_keyword_names_the_method_that_was_called(shared_pipelines: Get) -> None:
    batcher = Batcher(shared_pipelines(PLAIN))
    for wrong in ("guidence", "decode", "images"):
        with pytest.raises(TypeError, match=rf"submit\(\) got an unexpected keyword argument '{wrong}'"):
            batcher.submit(0, **{wrong: 3})  # type: ignore[arg-type]


PRELUDE = """
import os, sys, warnings
from pathlib import Path
from par_runtime import Batcher, Pipeline
pipeline = Pipeline.load(sys.argv[1], "cpu", threads=1, selftest=False)
batcher = Batcher(pipeline)
"""


def child(tiny: Path, code: str) -> subprocess.CompletedProcess[str]:
    places = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + code, str(tiny)]
    return subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_a_thread_of_its_own(tiny: Path) -> None:
    code = """
wanted = batcher.generate(1, seed=2)
batcher.submit(1)
pid = os.fork()
if pid == 0:
    assert (batcher.images, batcher.waiting) == (0, 0)
    assert batcher.generate(1, seed=2) == wanted
    batcher.close()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert batcher.generate(1, seed=2) == wanted
"""
    done = child(tiny, code)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_ends_although_requests_wait(tiny: Path) -> None:
    done = child(tiny, "for i in range(50): batcher.submit(i % 6)")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_close_that_does_not_wait_returns_at_once_and_what_waits_is_made(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines(PLAIN)
    batcher = Batcher(pipeline, max_wait_ms=600_000)  # nor is company waited for
    with busy(pipeline):
        future = batcher.submit(0, seed=7)
        batcher.close(wait=False)
        assert not future.done()
        with pytest.raises(RequestError, match="this Batcher was closed"):
            batcher.submit(0)
    assert future.result(60) == pipeline.generate(0, seed=7)
    batcher.close()
