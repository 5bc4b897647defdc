"""How many threads are asked for: more than cores, none, by commands; and a tokenizer that is closed meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sharing import SMALL, TINY

from par_runtime import Bundle, Pipeline, RequestError
from par_runtime.arguments import cpu_threads
from par_runtime.backends.ort import needing
from par_runtime.cli.dispatch import main
from par_runtime.system import available_cores
from par_runtime.tokenizer import Tokenizer


def test_more_threads_than_cores_are_reduced_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = available_cores()
    words = f"threads 100000: reduced to {cores}, the cores that this process may use"
    before = threading.active_count()
    for load in (
        lambda: Pipeline.load(TINY, "cpu", threads=100000),
        lambda: Pipeline.load(SMALL, "cpu", threads=np.int64(100000), selftest=False),
    ):
        with pytest.warns(UserWarning, match=words) as caught, load() as pipeline:
            assert pipeline.threads == cores
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=words):
        tokenizer = Tokenizer(Bundle.open(TINY), 100000)
    assert tokenizer._threads == cores
    with pytest.warns(UserWarning, match="an integer of about 401 digits: reduced"):
        assert cpu_threads(10**400) == cores
    assert threading.active_count() == before
    assert cpu_threads(cores) == cores  # no warning


def test_a_tokenizer_that_is_closed_meanwhile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its parts would say something of its own."""
    bundle = Bundle.open(TINY)
    tokens = np.zeros((1, bundle.n_tokens), np.int64)
    tokenizer = Tokenizer(bundle, 1)
    tokenizer.decode(tokens)
    assert tokenizer._decoder is not None
    real = tokenizer._decoder.run

    def closes(given: Any) -> Any:
        tokenizer.close()
        return real(given)

    monkeypatch.setattr(tokenizer._decoder, "run", closes)
    with pytest.raises(RequestError, match=r"the tokenizer was closed; load it again$"):
        tokenizer.decode(tokens)


def test_there_is_no_room_for_a_library() -> None:
    with pytest.raises(MemoryError, match=r"^onnxruntime cannot be loaded; see ulimit -v$"), needing("decoding"):
        raise ImportError("libonnxruntime.so.1: failed to map segment from shared object")
    with pytest.raises(ImportError, match="spoilt"), needing("decoding"):
        raise ImportError("spoilt")


def test_nothing_to_decode_or_to_encode_is_nothing() -> None:
    """As Pipeline has it; a batch of a service may be empty."""
    bundle = Bundle.open(TINY)
    height, width = bundle.image_size or (0, 0)
    empty = np.zeros((0, bundle.n_tokens), np.int64)
    tokenizer = Tokenizer(bundle, 1)
    with Pipeline.load(TINY, "cpu", threads=1, selftest=False) as pipeline:
        for decode in (tokenizer.decode, pipeline.decode):
            made = decode(empty)
            assert (made.shape, made.dtype) == ((0, height, width, 3), np.uint8)
    tokenizer.close()
    with pytest.raises(RequestError, match="was closed"):
        tokenizer.decode(empty)


def test_the_commands_reduce_threads_with_one_line(tmp_path: Path) -> None:
    photo = tmp_path / "out.png"
    command = [sys.executable, "-m", "par_runtime"]
    line = f"parvis: warning: threads 64: reduced to {available_cores()}, the cores that this process may use"
    if available_cores() >= 64:
        pytest.skip("64 threads are no more than the cores here")
    for verb in (
        ["generate", str(TINY), "--label", "0", "--out", str(photo)],
        ["reconstruct", str(photo), "--bundle", str(TINY), "--out", str(tmp_path / "again.png")],
        ["verify", str(TINY), "--images", "1"],
    ):
        done = subprocess.run([*command, *verb, "--threads", "64"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines().count(line) == 1, done.stderr
        assert "UserWarning" not in done.stderr


@pytest.mark.parametrize("threads", ["0", "-1", "abc", "1.5", "1e9"])
def test_bad_threads_of_a_command_are_one_line(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(TINY), "--label", "0", "--threads", threads]) == 2
    error = capsys.readouterr().err
    assert error.startswith("parvis: error: ")
    assert threads in error
    assert error.count("\n") == 1
