"""Several threads and one pipeline: results are those of one caller, and what cannot work is one error."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double.fixtures import Make
from sharing import KINDS, TINY, params

from par_runtime import Pipeline, RequestError

pytestmark = pytest.mark.two_cores

DEMO = Path(__file__).parents[2] / "models" / "demo"
Get = Callable[[str], Pipeline]
#: Requests with other batch sizes, settings and phases, which would disturb each other in any buffer that they share.
REQUESTS: list[dict[str, Any]] = [
    {"labels": [0], "seed": 1},
    {"labels": [1, 2], "seed": 2, "guidance": 3.0},
    {"labels": [3, 0], "seed": 3, "guidance": 1.0, "decode": False},
    {"labels": [2], "seed": 4, "greedy": True},
]


def made(pipeline: Pipeline, request: dict[str, Any]) -> list[Any]:
    r = pipeline.generate(**request)
    return [r.tokens.tolist(), None if r.images is None else r.images.tolist()]


def check_shared(pipeline: Pipeline) -> None:
    """All methods from eight threads give what one thread gets."""
    alone = [made(pipeline, request) for request in REQUESTS]
    tokens = np.array(alone[1][0])
    images, scores = pipeline.decode(tokens), pipeline.score(tokens, [1, 2])
    encoded = pipeline.encode(images)
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        assert made(pipeline, REQUESTS[index % 4]) == alone[index % 4]
        if index == 0:
            assert (pipeline.encode(images) == encoded).all()
            pipeline.selftest(seconds=0)
        elif index == 1:
            assert (pipeline.score(tokens, [1, 2]) == scores).all()
        elif index == 2:
            assert (pipeline.decode(tokens) == images).all()
            assert (pipeline.preview(tokens, pipeline.bundle.n_tokens) == images).all()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, i) for i in range(8)]:
            future.result(timeout=60)


@pytest.mark.parametrize("kind", params("C step", "ONNX Runtime", "ONNX Runtime, GPU"))
def test_threads_that_share_a_pipeline_get_what_one_gets(kind: str, shared_pipelines: Get) -> None:
    check_shared(shared_pipelines(kind))


@pytest.mark.parametrize("capture", ["image", "none"])
def test_threads_that_share_a_gpu_get_what_one_gets(capture: str, load: Make) -> None:
    check_shared(load(capture=capture))


def test_two_pipelines_run_in_two_threads(shared_pipelines: Get) -> None:
    one, two = shared_pipelines("ONNX Runtime"), KINDS["ONNX Runtime"][1](TINY)
    alone = [made(one, request) for request in REQUESTS]
    with ThreadPoolExecutor(2) as pool, two:
        both = pool.map(lambda pipeline: [made(pipeline, request) for request in REQUESTS], [one, two])
        assert list(both) == [alone, alone]


def test_to_thread_of_asyncio(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines("ONNX Runtime")
    alone = [made(pipeline, request) for request in REQUESTS]

    async def main() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(made, pipeline, request) for request in REQUESTS))

    assert asyncio.run(main()) == alone


@pytest.mark.parametrize("kind", params("C step", "ONNX Runtime", "ONNX Runtime, GPU"))
def test_a_callback_may_look_but_not_start_another_call(kind: str, shared_pipelines: Get) -> None:
    check_callbacks(shared_pipelines(kind))


def test_a_callback_on_a_gpu_may_look_but_not_start_another_call(load: Make) -> None:
    check_callbacks(load())


def check_callbacks(pipeline: Pipeline) -> None:
    finished = pipeline.generate([1], seed=1)
    wanted = made(pipeline, REQUESTS[1])
    refused: list[str] = []

    def inside(*at: object) -> None:
        if at[-2] not in (1, 14, at[-1]):
            return
        for name, call in {
            "generate": lambda: pipeline.generate(0),
            "score": lambda: pipeline.score(finished.tokens, [1]),
            "selftest": pipeline.selftest,
            "close": pipeline.close,
        }.items():
            with pytest.raises(RequestError, match=rf"^{name}\(\) was called inside a callback of generate\(\)"):
                call()
            refused.append(name)
        assert (pipeline.decode(finished.tokens) == finished.images).all()
        assert pipeline.preview(finished.tokens, 5).shape == finished.images.shape  # type: ignore[union-attr]
        assert pipeline.encode(finished.images).shape == finished.tokens.shape

    assert made(pipeline, REQUESTS[1] | {"on_step": inside}) == wanted
    assert made(pipeline, REQUESTS[1] | {"on_preview": inside, "preview_every": 14}) == wanted
    assert set(refused) == {"generate", "score", "selftest", "close"}
    assert len(refused) >= 8  # in on_step and in on_preview


@pytest.mark.parametrize("kind", params("C step", "ONNX Runtime"))
def test_an_error_in_one_thread_spoils_nothing(kind: str, shared_pipelines: Get) -> None:
    pipeline = shared_pipelines(kind)
    wanted = [made(pipeline, request) for request in REQUESTS]
    kept: list[BaseException] = []  # with their tracebacks, as a future keeps them

    for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):

        def fail(done: int, _: int, error: type[BaseException] = error) -> None:
            if done == 9:
                raise error

        with pytest.raises(error) as caught:
            pipeline.generate([0, 1, 2], seed=5, on_step=fail)
        kept.append(caught.value)
        assert made(pipeline, REQUESTS[0]) == wanted[0]

    def drop(done: int, _: int) -> None:
        if done == 12 and kept:  # frees the frames of the failed calls in the middle of another image
            for each in kept:
                each.__traceback__ = None
            kept.clear()
            gc.collect()

    assert made(pipeline, REQUESTS[1] | {"on_step": drop}) == wanted[1]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(made, pipeline, REQUESTS[2]).result(timeout=30) == wanted[2]


@pytest.mark.parametrize("kind", params("C step", "ONNX Runtime"))
def test_close_waits_for_the_call_of_another_thread(kind: str) -> None:
    path, load = KINDS[kind]
    pipeline = load(path)
    wanted = made(pipeline, REQUESTS[1])
    closing: list[threading.Thread] = []

    def on_step(done: int, _: int) -> None:
        if done == 3:
            closing.append(threading.Thread(target=pipeline.close))
            closing[0].start()
            closing[0].join(0.05)
            assert closing[0].is_alive()

    assert made(pipeline, REQUESTS[1] | {"on_step": on_step}) == wanted
    closing[0].join(30)
    with pytest.raises(RequestError, match="was closed; load it again"):
        pipeline.generate(0)


def test_a_pipeline_is_neither_copied_nor_pickled(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines("ONNX Runtime")
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(RequestError, match=r"cannot be copied or sent to another process; call Pipeline\.load"):
            copied(pipeline)


def test_a_pipeline_that_nobody_holds_is_freed_while_another_runs(shared_pipelines: Get) -> None:
    pipeline = shared_pipelines("ONNX Runtime")
    wanted = made(pipeline, REQUESTS[1])
    others = [KINDS["ONNX Runtime"][1](TINY) for _ in range(2)]
    others[0].generate(0, seed=1)

    def drop(done: int, _: int) -> None:
        if done == 5:
            others.clear()
            gc.collect()

    assert made(pipeline, REQUESTS[1] | {"on_step": drop}) == wanted


DAEMONS = {
    "generates": "p = Pipeline.load(sys.argv[1], 'cpu-ort', threads=1)\n"
    "def work():\n    while True: p.generate([0, 1], seed=1, on_step=lambda *_: began.set())",
    "encodes": "t, images = Tokenizer(Bundle.open(sys.argv[1]), 1), np.zeros((1000, 16, 16, 3), np.uint8)\n"
    "def work():\n    while True: t.encode(images); began.set()",
    "loads": "def work():\n"
    "    with no_fork():\n        began.set(); time.sleep(0.3); print('left')\n"
    "    Pipeline.load(sys.argv[1], 'cpu-ort'); print('not reached')",
}


@pytest.mark.parametrize("what", DAEMONS)
def test_a_daemon_thread_does_not_disturb_the_end_of_python(what: str) -> None:
    code = (
        "import sys, threading, time; import numpy as np; from par_runtime import Bundle, Pipeline\n"
        "from par_runtime.forks import no_fork; from par_runtime.tokenizer import Tokenizer\n"
        f"began = threading.Event()\n{DAEMONS[what]}\n"
        "threading.Thread(target=work, daemon=True).start(); began.wait()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TINY)], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"left\n" if what == "loads" else b"")


def test_a_handler_at_the_end_of_python_may_still_generate_and_close() -> None:
    code = (
        "import atexit, sys\n"
        "def last():\n    print(p.generate(0, seed=1).tokens.shape); p.close()\n"
        "atexit.register(last)\n"
        "from par_runtime import Pipeline; p = Pipeline.load(sys.argv[1], 'cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TINY)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 64)\n", "")


def test_threads_of_a_decoder_leave_the_cores_when_its_call_is_over() -> None:
    """ONNX Runtime's would wait for work in a loop for 30 ms, on a core that somebody else needs by then."""
    with Pipeline.load(DEMO, "cpu-ort", threads=2, selftest=False) as pipeline:
        tokens = np.zeros((1, pipeline.bundle.n_tokens), np.int64)
        used = []
        for _ in range(5):
            pipeline.backend.decode(tokens)
            before = time.process_time()
            time.sleep(0.06)
            used.append(time.process_time() - before)
    assert min(used) < 0.01
