"""AMX: what Linux may refuse, and what a process must not notice of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from par_runtime.backends.native.library import has_tiles, library

DEMO = Path(__file__).parents[3] / "models" / "demo"
_LIBRARY = library()
pytestmark = pytest.mark.skipif(_LIBRARY is None or not has_tiles(_LIBRARY), reason="no AMX here")

#: A stack for signals of ``argv[1]`` bytes in the main thread, where it is not 0; then what the kernels are, and what
#: the first tokens of an image are, in two threads.
PROGRAM = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(2**16)
if int(sys.argv[1]):
    stack = Stack(ctypes.addressof(memory), 0, int(sys.argv[1]))
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from par_runtime import Pipeline
with Pipeline.load(sys.argv[2], device="cpu", threads=2) as pipeline:
    tokens = pipeline.generate("micah", seed=1, decode=False).tokens
    print(pipeline.backend.info.version, *tokens[0, :8].tolist(), sep="|")
"""


def said(stack: int, requested: str = "") -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PARVIS_NATIVE": requested}
    command = [sys.executable, "-c", PROGRAM, str(stack), str(DEMO)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().split("|")


def test_a_stack_for_signals_that_is_too_small_leaves_dot_products() -> None:
    version, *tokens = said(8192)
    without, *wanted = said(0, "dots")
    assert ("amx" in version, version, tokens) == (False, without, wanted)


def test_with_a_larger_one_there_are_tiles() -> None:
    assert "amx" in said(2**16)[0]
