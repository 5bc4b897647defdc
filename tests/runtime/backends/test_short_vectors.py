"""The kernels of 64-bit ARM, in an emulator, give the bits of the same kernels in SSE, which all other tests run.

``short_vectors.c`` runs the step with all weights, arithmetics and caches, and writes its logits and tokens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from instruction_sets import X86

from par_runtime.backends import native

SOURCES = Path(native.__file__).parent
PROGRAM = Path(__file__).parent / "short_vectors.c"
#: As pyproject.toml has them, and warnings are errors.
OPTIONS = ("-std=gnu11", "-O3", "-pthread", "-ffp-contract=off", "-Wall", "-Werror", f"-I{SOURCES}")
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"

#: of each run: runs of 10 rows of 100 logits in fp32 and 10 tokens in int64
LOGITS, TOKENS, RUNS = 10 * 100, 10, 5 * 3 * 2 * 6


def made_by(compiler: list[str], run: list[str], folder: Path, instructions: str) -> bytes:
    """What the program writes, built by ``compiler`` and started by ``run``."""
    program = folder / f"program-{instructions}"
    command = [*compiler, *OPTIONS, PROGRAM, SOURCES / "dots.c", "-o", program, "-lm"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [*run, program], env=os.environ | {"PARVIS_NATIVE": instructions}, capture_output=True, check=True
    )
    assert done.stderr.decode() == instructions
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="needs x86-64 with AVX2")
@pytest.mark.skipif(
    not all(map(shutil.which, ("cc", CROSS, EMULATOR))),
    reason="needs an emulator of ARM: apt install gcc-aarch64-linux-gnu qemu-user-static",
)
def test_arm_computes_the_same_bits(tmp_path: Path) -> None:
    sse = made_by(["cc"], [], tmp_path, "sse")
    assert made_by([CROSS, "-static"], [EMULATOR], tmp_path, "neon") == sse
    rows = np.frombuffer(sse, np.uint8).reshape(RUNS, 4 * LOGITS + 8 * TOKENS)
    logits = rows[:, : 4 * LOGITS].copy().view(np.float32)
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.1).all()
    tokens = rows[:, 4 * LOGITS :].copy().view(np.int64)
    assert ((tokens >= 0) & (tokens < 100)).all()
    assert len(np.unique(tokens)) > 50
