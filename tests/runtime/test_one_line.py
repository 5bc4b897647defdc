"""Messages of one line, whatever the path of a bundle holds."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from sharing import TINY

from par_runtime import BundleError, Pipeline, RequestError
from par_runtime.backends.base import closed_error, ends_at_tokens
from par_runtime.errors import CudaError, EngineError, OutOfMemory, OutputsError, TensorRTMissingError


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
@pytest.mark.parametrize("name", [b"a\nb\x1b[31m", b"b\xff\xfe"])
def test_a_path_of_two_lines_is_written_in_one(
    name: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    folder = tmp_path / os.fsdecode(name)
    shutil.copytree(TINY, folder)
    said: list[str] = []
    for device in ("cpu", "cpu-ort"):
        pipeline = Pipeline.load(folder, device, threads=1)
        tokens = pipeline.generate(0, seed=1).tokens
        said += [
            repr(pipeline),
            pipeline.note,
            str(closed_error(pipeline.bundle)),
            str(ends_at_tokens(pipeline.bundle)),
        ]
        pipeline.close()
        for work in (lambda p=pipeline: p.generate(0), lambda p=pipeline, t=tokens: p.backend.decode(t)):
            with pytest.raises(RequestError) as caught:
                work()
            said.append(str(caught.value))
    os.truncate(folder / "weights.data", 100)
    with pytest.raises(BundleError) as damaged:
        Pipeline.load(folder)
    said += [str(damaged.value), *(record.getMessage() for record in caplog.records)]
    (folder / "weights.data").unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(BundleError) as missing:
        Pipeline.load(folder)
    said.append(str(missing.value))
    for text in said:
        assert text.isprintable(), text
    assert capsys.readouterr().out == ""


def test_every_error_of_ours_is_one_line() -> None:
    for kind in (BundleError, EngineError, RequestError, OutputsError, CudaError, TensorRTMissingError):
        assert str(kind("a\nb\x1b[31m ż \udcff")) == "a\\nb\\x1b[31m ż \\udcff"
    assert str(OutOfMemory("a\nb", 1, 2, 3)) == "a\\nb"
    assert isinstance(RequestError("a"), ValueError)
