"""The kernels of 64-bit ARM, in an emulator, give the bits of the same kernels in SSE, which all other tests run.

``short_vectors.c`` runs the step with all weights, arithmetics and caches, and writes its logits and tokens; then
products in int8, in which ARM has instructions of its own.
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
#: of products: int8 and int4, groups, scales; rows of 1 to 33 activations, 32 columns
PRODUCTS, NUMBERS = 2 * 3 * 3, 33 * 34 // 2 * 32
PRODUCT_BYTES = 4 * PRODUCTS * NUMBERS
SDOT, SMMLA = 2, 8  #: of parvis_extra_instructions()

needs_an_emulator = pytest.mark.skipif(
    not X86 or not all(map(shutil.which, ("cc", CROSS, EMULATOR))),
    reason="needs x86-64 with AVX2 and an emulator of ARM: apt install gcc-aarch64-linux-gnu qemu-user-static",
)


def built(compiler: list[str], folder: Path, *sources: Path) -> Path:
    """The program made of ``sources``, some of which may be compiled already."""
    program = folder / "program"
    done = subprocess.run([*compiler, *OPTIONS, *sources, "-o", program, "-lm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def made_by(run: list[str], program: Path, instructions: str, says: str, *given: str) -> bytes:
    """What the program writes. It says which instructions it has taken."""
    environment = os.environ | {"PARVIS_NATIVE": instructions}
    done = subprocess.run([*run, program, *given], env=environment, capture_output=True, check=True)
    assert done.stderr.decode() == says
    return done.stdout


@pytest.fixture(scope="module")
def on_x86(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as all other tests run the kernels of ARM, in SSE."""
    return built(["cc"], tmp_path_factory.mktemp("sse"), PROGRAM, SOURCES / "dots.c")


@pytest.mark.slow
@needs_an_emulator
def test_arm_computes_the_same_bits(tmp_path: Path, on_x86: Path) -> None:
    sse = made_by([], on_x86, "sse", "sse 0")
    program = built([CROSS, "-static"], tmp_path, PROGRAM, SOURCES / "dots.c")
    assert made_by([EMULATOR], program, "neon", "neon 0") == sse
    assert made_by([EMULATOR], program, "dots", f"neon {SDOT}") == sse
    assert made_by([EMULATOR], program, "", f"neon {SDOT + SMMLA}") == sse
    # What a CPU lacks is not taken.
    assert made_by([EMULATOR, "-cpu", "neoverse-n1"], program, "", f"neon {SDOT}", "products") == sse[-PRODUCT_BYTES:]
    assert made_by([EMULATOR, "-cpu", "cortex-a57"], program, "", "neon 0", "products") == sse[-PRODUCT_BYTES:]
    rows = np.frombuffer(sse[:-PRODUCT_BYTES], np.uint8).reshape(RUNS, 4 * LOGITS + 8 * TOKENS)
    logits = rows[:, : 4 * LOGITS].copy().view(np.float32)
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.1).all()
    tokens = rows[:, 4 * LOGITS :].copy().view(np.int64)
    assert ((tokens >= 0) & (tokens < 100)).all()
    assert len(np.unique(tokens)) > 50
    products = np.frombuffer(sse[-PRODUCT_BYTES:], np.float32).reshape(PRODUCTS, NUMBERS)
    assert np.isfinite(products).all()
    assert (products.std(axis=1) > 0.1).all()


@pytest.mark.slow
@needs_an_emulator
@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ("-mcpu=cortex-a72", 0),
        ("-march=armv8.1-a", 0),
        ("-march=armv8.2-a", 0),
        ("-march=armv8.2-a+fp16", 0),
        ("-mcpu=cortex-a76", SDOT),
        ("-mcpu=neoverse-n1", SDOT),
        ("-march=armv8.2-a+dotprod", SDOT),
        ("-march=armv8.4-a", SDOT),
        ("-march=armv8.6-a", SDOT + SMMLA),
        ("-mcpu=neoverse-v1", SDOT + SMMLA),
        ("-march=armv9-a", SDOT),
    ],
)
def test_compilers_may_be_told_of_a_cpu(flags: str, known: int, tmp_path: Path) -> None:
    """As by CFLAGS=-mcpu=native: what it has is taken without a question, what it may have with one."""
    for source in ("dots.c", "step.c"):
        command = [CROSS, *OPTIONS, flags, "-c", SOURCES / source, "-o", tmp_path / f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    listed = subprocess.run(["nm", tmp_path / "dots.c.o"], capture_output=True, text=True, check=True).stdout
    assert {"panel_product_int8_sdot", "panel_product_int8_smmla"} <= set(listed.split())
    asked = [CROSS, flags, "-dM", "-E", "-x", "c", "/dev/null"]
    macros = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    given = [("__ARM_FEATURE_DOTPROD", SDOT), ("__ARM_FEATURE_MATMUL_INT8", SMMLA)]
    assert sum(bit for name, bit in given if f"{name} 1" in macros) == known


@pytest.fixture(scope="module")
def rest_on_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for ARM without dots.c, compiled."""
    compiled = tmp_path_factory.mktemp("neon") / "rest.o"
    subprocess.run([CROSS, *OPTIONS, "-c", PROGRAM, "-o", compiled], check=True)
    return compiled


@pytest.mark.slow
@needs_an_emulator
@pytest.mark.parametrize(
    ("line", "bug"),
    [
        ("fours[i / 4], i % 4", "fours[i / 4], (i + 1) % 4"),
        ("return vdotq_laneq_s32(sum, codes, rows, 2);", "return vdotq_laneq_s32(sum, codes, rows, 3);"),
        ("source == INT8 ? 0 : of->minus[i] * 8", "0"),
        ("of->minus[2 * i + 1] * 8", "of->minus[2 * i] * 8"),
        ("if (2 * i + 1 < rows)", "if (2 * i + 2 < rows)"),
        ("vzip2q_s64(left, right)", "vzip2q_s64(right, left)"),
        ("of->scale[2 * i + 1]", "of->scale[2 * i]"),
        ("halves_arm(codes, high || j >= 8)", "halves_arm(codes, high)"),
        ("(first - 4 * high) * 32", "first * 32"),
        ("(high ? vshrq_n_u8(bytes, 4)", "(high ? vshrq_n_u8(bytes, 5)"),
        ("x += packed_rows * group + 8 * m", "x += packed_rows * group + 4 * m"),
    ],
)
def test_a_planted_bug_is_seen(tmp_path: Path, on_x86: Path, rest_on_arm: Path, line: str, bug: str) -> None:
    source = (SOURCES / "products_arm.h").read_text()
    assert source.count(line) == 1
    (tmp_path / "products_arm.h").write_text(source.replace(line, bug))
    (tmp_path / "dots.c").write_text((SOURCES / "dots.c").read_text())
    right = made_by([], on_x86, "sse", "sse 0", "products")
    program = built([CROSS, "-static"], tmp_path, rest_on_arm, tmp_path / "dots.c")
    assert any(
        made_by([EMULATOR], program, name, f"neon {extra}", "products") != right
        for name, extra in (("dots", SDOT), ("", SDOT + SMMLA))
    )
