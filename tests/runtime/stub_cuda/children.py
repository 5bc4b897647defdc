"""Functions of a test file run in a child process on the stub of libcuda, which is read when a process starts."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from par_runtime.backends import cuda

#: Every test on the stub has this mark: cuda-python is an extra.
needs_cuda_python = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None, reason="needs cuda-python: pip install cuda-python"
)
STUB = Path(__file__).parent / "stub_cuda.c"
KINDS = ("device", "pinned", "stream", "graph", "exec", "event", "module")  # the order of the stub's enum kind
PRELUDE = """
from __future__ import annotations
import ctypes, os, sys, threading
from collections.abc import Iterator
from contextlib import contextmanager
import numpy as np
from par_runtime.backends import cuda
from par_runtime.backends.cuda import CudaError, Device, OutOfMemory
"""

# -- what the children use too ----------------------------------------------------------------------------------------


def live() -> dict[str, int]:
    """How many of each kind the driver holds, without those of which there are none."""
    stub = ctypes.CDLL("libcuda.so.1")
    return {kind: count for i, kind in enumerate(KINDS) if (count := stub.stub_live(i))}


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[list[Exception]]:
    """The body raises exactly ``kind``, with all ``words`` in its message; the list holds the error afterwards."""
    caught: list[Exception] = []
    try:
        yield caught
    except Exception as error:
        caught.append(error)
    assert caught, f"nothing was raised, expected {kind.__name__} with {words}"
    assert type(caught[0]) is kind, repr(caught[0])
    assert all(word in str(caught[0]) for word in words), (words, str(caught[0]))


@contextmanager
def failing(rule: str) -> Iterator[None]:
    """The stub's calls fail as ``rule`` says, "name:code" or several of them."""
    os.environ["STUB_CUDA_FAIL"] = rule
    try:
        yield
    finally:
        os.environ["STUB_CUDA_FAIL"] = ""


# -- running them -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the compiled stub."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler (cc) for the stub driver")
    folder = tmp_path_factory.mktemp("stub_cuda")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(folder / "libcuda.so.1"), str(STUB)], check=True)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Run a function of this file in a child, with the stub of that folder (or none) and environment settings."""

    def child(check: Callable[[], None], library: Path | None, **settings: str) -> None:
        shared = [inspect.getsource(f) for f in (live, refused, failing)]
        script = tmp_path / f"{check.__name__}.py"
        parts = [PRELUDE, f"KINDS = {KINDS}\n", *shared, inspect.getsource(check), f"{check.__name__}()\n"]
        script.write_text("\n".join([*parts, "print('reached the end')\n"]))
        env = {k: v for k, v in os.environ.items() if not k.startswith("STUB_CUDA_") and k != "LD_LIBRARY_PATH"}
        env |= {"PYTHONPATH": str(Path(cuda.__file__).parents[2])} | settings
        if library is not None:
            env["LD_LIBRARY_PATH"] = str(library)
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script)], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.stdout == "reached the end\n"
        assert done.stderr == ""

    return child
