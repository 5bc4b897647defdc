"""AMX: what Linux may refuse, and what a process must not notice of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from instruction_sets import X86

from par_runtime.backends.native.decoder import AMX, bf16_form
from par_runtime.backends.native.decoding import open_decoder_library
from par_runtime.backends.native.library import has_tiles, library, open_library

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "models" / "demo"
_LIBRARY = library()
needs_tiles = pytest.mark.skipif(_LIBRARY is None or not has_tiles(_LIBRARY), reason="no AMX here")

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


@needs_tiles
def test_a_stack_for_signals_that_is_too_small_leaves_dot_products() -> None:
    version, *tokens = said(8192)
    without, *wanted = said(0, "dots")
    assert ("amx" in version, version, tokens) == (False, without, wanted)


@needs_tiles
def test_with_a_larger_one_there_are_tiles() -> None:
    assert "amx" in said(2**16)[0]


#: A compiler whose assembler does not know AMX, as far as our files notice.
COMPILER = """#!/bin/sh
case "$* " in
*FEWER_INSTRUCTIONS*) ;;
*"/dots.c "* | *"/decoder.c "*) echo "Error: no such instruction: tileloadd" >&2; exit 1 ;;
esac
exec cc "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(_LIBRARY is None or not X86, reason="no compiler at installation, or another CPU")
def test_an_assembler_without_them_leaves_kernels_without_them(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    compiler = tmp_path / "cc"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "t"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CC": str(compiler)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no such instruction" in done.stderr
    built = open_library(next(tmp_path.rglob("_step*.so")))
    assert (built.parvis_instructions(), has_tiles(built)) == (_LIBRARY.parvis_instructions(), False)
    assert bf16_form(open_decoder_library(next(tmp_path.rglob("_decoder*.so")))) != AMX
