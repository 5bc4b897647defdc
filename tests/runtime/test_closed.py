"""After ``close``: one error from every method, on every backend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double.fixtures import Make
from PIL import Image
from sharing import KINDS, TINY, params

from par_runtime import Bundle, BundleError, Pipeline, RequestError
from par_runtime.backends.ort import sessions
from par_runtime.errors import CudaError
from par_runtime.request import Settings
from par_runtime.schedule import Schedule
from par_runtime.tokenizer import Tokenizer
from par_runtime.turns import Turn


def check_closed(pipeline: Pipeline) -> None:
    made = pipeline.generate([1], seed=1)
    pipeline.encode(made.images)
    pipeline.close()
    pipeline.close()  # twice is once
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: pipeline.generate([1], seed=1),
        "score": lambda: pipeline.score(made.tokens, [1]),
        "decode": lambda: pipeline.decode(made.tokens),
        "preview": lambda: pipeline.preview(made.tokens, 5),
        "encode": lambda: pipeline.encode(made.images),
        "selftest": pipeline.selftest,
        "with": pipeline.__enter__,
    }
    for name, call in calls.items():
        with pytest.raises(RequestError, match=rf"^{name}.* was closed; load it again with Pipeline\.load$"):
            call()
    # The backend itself, which benchmarks call: an error, no crash.
    schedule = Schedule.of(pipeline.bundle, [1], [Settings()], [1])
    tokens = made.tokens.copy()
    call, batch, ids, write = next(iter(schedule.walk(tokens)))
    for use in (
        lambda: pipeline.backend.step(batch, ids, write, schedule.noise[:, call.positions]),
        lambda: pipeline.backend.logits(batch, ids, write),
        lambda: pipeline.backend.decode(tokens),
    ):
        with pytest.raises((RequestError, CudaError), match="was closed; load"):
            use()
    pipeline.backend.release()
    pipeline.backend.close()


@pytest.mark.parametrize("kind", params("C step", "ONNX Runtime", "ONNX Runtime, GPU"))
def test_everything_is_one_error_after_close(kind: str) -> None:
    path, load = KINDS[kind]
    check_closed(load(path))


@pytest.mark.parametrize("capture", ["image", "none"])
def test_everything_is_one_error_after_close_of_a_gpu(capture: str, load: Make) -> None:
    check_closed(load(capture=capture))


def test_everything_is_one_error_after_close_of_kernels_on_a_gpu(load_kernels: Make) -> None:
    check_closed(load_kernels(images=(1,)))


def test_with_closes_also_after_an_error_and_cannot_be_entered_again() -> None:
    pipeline = Pipeline.load(TINY, device="cpu")
    with pytest.raises(ZeroDivisionError), pipeline:
        pipeline.generate(0, on_step=lambda *_: 1 // 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(RequestError, match="was closed"), pipeline:
        pass


@pytest.mark.parametrize("kind", params("C step", "ONNX Runtime"))
def test_close_frees_every_part_whatever_interrupts_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, load = KINDS[kind]
    pipeline = load(path)
    pipeline.generate([1], seed=1)
    tokenizer, freed = pipeline._tokenizer, []
    assert tokenizer is not None
    with monkeypatch.context() as patch:
        for part in (tokenizer, pipeline.backend._decoder, pipeline.backend._files):  # type: ignore[attr-defined]

            def interrupted(close: Callable[[], None] = part.close) -> None:
                close()
                freed.append(close)
                raise KeyboardInterrupt

            patch.setattr(part, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.close()
    assert len(freed) == 3
    with pytest.raises(RequestError, match=r"^generate\(\): .* was closed"):
        pipeline.generate([1], seed=1)
    pipeline.close()
    pipeline.close()


def test_a_close_that_did_not_end_is_made_again() -> None:
    turn, calls = Turn("it"), []

    def free() -> None:
        calls.append(turn.closed)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turn.close(free)
    for _ in range(3):
        turn.close(free)
    assert calls == [True, True]


def test_a_tokenizer_that_was_closed() -> None:
    tokenizer = Tokenizer(Bundle.open(TINY))
    tokens = tokenizer.encode(np.zeros((16, 16, 3), np.uint8))
    tokenizer.close()
    tokenizer.close()
    for use in (lambda: tokenizer.decode(tokens), lambda: tokenizer.encode(np.zeros((16, 16, 3), np.uint8))):
        with pytest.raises(RequestError, match="the tokenizer was closed; load it again"):
            use()


def test_too_many_open_files_and_threads_are_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of a system are no fault of the bundle, nor of a picture."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (16, 16)).save(photo)
    code = """
import errno, os, resource, sys
from par_runtime import BundleError, Pipeline
pipeline = Pipeline.load(sys.argv[1], "cpu-ort", threads=1, selftest=False)
wanted = pipeline.generate(0, seed=1)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    os.close(held.pop())
try:
    Pipeline.load(sys.argv[1], "cpu-ort", threads=1, selftest=False)
except BundleError as error:
    print(error)
try:
    pipeline.encode(sys.argv[2])
except OSError as error:
    print(error.errno == errno.EMFILE)
assert pipeline.generate(0, seed=1) == wanted
for each in held[-9:]:
    os.close(each)
Pipeline.load(sys.argv[1], "cpu-ort", threads=1).encode(sys.argv[2])
"""
    if sys.platform == "linux":
        command = [sys.executable, "-c", code, str(TINY), str(photo)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("Too many open files); raise the limit of open files (ulimit -n)\nTrue\n")

    def no_threads(*_: object, **__: object) -> None:
        raise RuntimeError("env.cc:327 PosixThread pthread_create failed, error code: 11")  # as 1.32 says it

    monkeypatch.setattr(sessions.ort, "InferenceSession", no_threads)
    with pytest.raises(
        BundleError, match=r"pthread_create failed.*; no more threads may be started: raise their limit"
    ):
        Pipeline.load(TINY, "cpu-ort")
