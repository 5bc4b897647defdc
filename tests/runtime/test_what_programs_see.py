"""What a program sees of a pipeline: its log, short words for large objects, and what dir and help show."""

from __future__ import annotations

import logging
import pydoc
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from odd_values import Broken, Huge
from sharing import TINY

import par_runtime
from par_runtime import Pipeline, Schedule, Settings
from par_runtime.arguments import given
from par_runtime.backends.native import library

Get = Callable[[str], Pipeline]


@pytest.fixture
def pipeline(shared_pipelines: Get) -> Pipeline:
    return shared_pipelines("ONNX Runtime")


def test_logging_says_what_happens_and_nothing_is_printed(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, "par_runtime"), Pipeline.load(TINY, "auto") as pipeline:
        assert pipeline.note
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    where = "par_runtime.pipeline"
    assert any(s[:2] == (where, "INFO") and "loaded on onnxruntime-cpu" in s[2] for s in said)
    assert any(s[:2] == (where, "INFO") and "running on the CPU" in s[2] for s in said)
    assert any(s[:2] == (where, "DEBUG") and "self-test passed" in s[2] for s in said)
    if library.library() is not None:
        assert any(s[:2] == ("par_runtime.backends.choose", "DEBUG") and "no C step: a width" in s[2] for s in said)
    code = "import sys; from par_runtime import Pipeline; Pipeline.load(sys.argv[1]).generate(0, seed=1)"
    done = subprocess.run([sys.executable, "-c", code, str(TINY)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_short_words_for_large_objects(pipeline: Pipeline) -> None:
    assert repr(pipeline) == f"Pipeline({TINY}, {pipeline.backend.info.name})"
    schedule = Schedule.of(pipeline.bundle, [0, 1], [Settings(guidance=2), Settings()])
    assert repr(schedule.batch) == "Batch(2 images, 3 rows)"
    assert repr(schedule) == "Schedule(19 calls, Batch(2 images, 3 rows))"
    assert schedule == schedule
    assert schedule != Schedule.of(pipeline.bundle, [0, 1], [Settings(guidance=2), Settings()])
    assert schedule.batch != Schedule.of(pipeline.bundle, [0], [Settings()]).batch
    with Pipeline.load(TINY, "cpu", selftest=False) as other:
        assert pipeline != other
        assert pipeline == pipeline
    assert repr(other).endswith(", closed)")
    assert len({pipeline, other}) == 2


def test_dir_and_help_show_what_there_is() -> None:
    assert dir(par_runtime) == sorted(par_runtime.__all__)
    text = pydoc.render_doc(Pipeline.generate, renderer=pydoc.plaintext)
    assert "images_per_label: 'int' = 1" in text
    assert "Generate one image per label" in text
    for name in ("score", "encode", "decode", "preview", "selftest", "close", "load"):
        assert pydoc.getdoc(getattr(Pipeline, name)), name


def test_given_is_bounded() -> None:
    assert given("a\nb") == r"'a\nb'"
    assert given(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"
    assert given(Broken()) == "a Broken"
    assert given(type("Colour", (), {"__repr__": lambda _: "\x1b[2J\u202e"})()) == r"\x1b[2J\u202e"
    assert len(given(b"x" * 10**7)) <= 80
    assert len(given(set(range(10**5)))) <= 80
    assert len(given(Huge())) <= 80
    assert len(given(np.zeros((100, 100)))) <= 80
