"""The kernels of 64-bit ARM, in an emulator, give the bits of the same kernels in SSE, which all other tests run.

``short_vectors.c`` runs the step with all weights, arithmetics and caches, and writes its logits and tokens; then
products in int8 and bf16, in which ARM has instructions of its own. Those of bf16 round sums otherwise.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from instruction_sets import X86
from numpy.typing import NDArray

from par_runtime.backends import native

SOURCES = Path(native.__file__).parent
PROGRAM = Path(__file__).parent / "short_vectors.c"
#: As pyproject.toml has them, and warnings are errors.
OPTIONS = ("-std=gnu11", "-O3", "-pthread", "-ffp-contract=off", "-Wall", "-Werror", f"-I{SOURCES}")
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"

#: of each run: runs of 10 rows of 100 logits in fp32 and 10 tokens in int64
LOGITS, TOKENS = 10 * 100, 10
RUNS = (5, 3, 2, 6)  #: weights, arithmetics (fp32, bf16, int8), caches (fp32, bf16), calls
#: of products: int8 and int4, groups, scales; fp32, fp16 and bf16, two depths; rows of 1 to 33 activations, 32 columns
IN_INT8, IN_BF16, NUMBERS = 2 * 3 * 3, 2 * 3 * 3 + 3 * 2, 33 * 34 // 2 * 32
BF16, SDOT, MATRICES = 1, 2, 8  #: of parvis_extra_instructions()
ALL = BF16 + SDOT + MATRICES
ROUNDING = 5e-6  #: of products, as in test_products.py
#: Of logits, relative to the largest, where activations or keys are rounded to bf16: one that rounds otherwise moves
#: the next ones.
FAR = 1e-2

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


@dataclass
class Made:
    """What the program wrote; without the steps where it was asked for products alone."""

    logits: NDArray[np.float32]  #: [*RUNS,LOGITS]
    tokens: NDArray[np.int64]
    in_int8: NDArray[np.float32]  #: [products,NUMBERS]
    in_bf16: NDArray[np.float32]

    @staticmethod
    def of(written: bytes) -> Made:
        steps, products = written[: -4 * NUMBERS * (IN_INT8 + IN_BF16)], written[-4 * NUMBERS * (IN_INT8 + IN_BF16) :]
        rows = np.frombuffer(steps, np.uint8).reshape(-1, 4 * LOGITS + 8 * TOKENS)
        in_int8, in_bf16 = np.split(np.frombuffer(products, np.float32).reshape(-1, NUMBERS), [IN_INT8])
        return Made(
            rows[:, : 4 * LOGITS].copy().view(np.float32), rows[:, 4 * LOGITS :].copy().view(np.int64), in_int8, in_bf16
        )

    def is_near(self, right: Made) -> bool:
        """Whether all that no bf16 is in has the same bits, and the rest is near."""
        near = bool((self.in_int8 == right.in_int8).all()) and _far(self.in_bf16, right.in_bf16) < ROUNDING
        if len(self.logits):
            mine, its = (each.logits.reshape(*RUNS, LOGITS) for each in (self, right))
            for weights, arithmetic in itertools.product(range(5), range(3)):
                exact = arithmetic == 0 or (arithmetic == 2 and weights > 2)  # of floats int8 is bf16
                at = (weights, arithmetic)
                near &= _far(mine[at], its[at]) < FAR
                near &= not exact or bool((mine[at][0] == its[at][0]).all())
        return near


def _far(made: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """The largest difference, relative to the largest number of its row."""
    made, right = (each.reshape(-1, each.shape[-1]) for each in (made, right))
    return float((np.abs(made - right).max(1) / np.abs(right).max(1)).max())


@pytest.mark.slow
@needs_an_emulator
def test_arm_computes_the_same_bits(tmp_path: Path, on_x86: Path) -> None:
    sse = made_by([], on_x86, "sse", "sse 0")
    program = built([CROSS, "-static"], tmp_path, PROGRAM, SOURCES / "dots.c")
    assert made_by([EMULATOR], program, "neon", "neon 0") == sse
    assert made_by([EMULATOR], program, "dots", f"neon {SDOT}") == sse
    right, with_all = Made.of(sse), Made.of(made_by([EMULATOR], program, "", f"neon {ALL}"))
    assert with_all.is_near(right)
    assert (with_all.in_bf16 != right.in_bf16).any()  # or other instructions were taken
    assert (with_all.logits != right.logits).any()
    # What a CPU lacks is not taken.
    products = sse[-4 * NUMBERS * (IN_INT8 + IN_BF16) :]
    assert made_by([EMULATOR, "-cpu", "neoverse-n1"], program, "", f"neon {SDOT}", "products") == products
    assert made_by([EMULATOR, "-cpu", "cortex-a57"], program, "", "neon 0", "products") == products
    assert np.isfinite(right.logits).all()
    assert (right.logits.std(axis=1) > 0.1).all()
    assert ((right.tokens >= 0) & (right.tokens < 100)).all()
    assert len(np.unique(right.tokens)) > 50
    for made in (right.in_int8, right.in_bf16, with_all.in_bf16):
        assert np.isfinite(made).all()
        assert (made.std(axis=1) > 0.1).all()


@pytest.mark.slow
@needs_an_emulator
def test_in_bf16_a_row_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """To the last bit, so that an image does not depend on the batch that it is made in: of m rows the last m of 33."""
    program = built([CROSS, "-static"], tmp_path, PROGRAM, SOURCES / "dots.c")
    for product in Made.of(made_by([EMULATOR], program, "", f"neon {ALL}", "products")).in_bf16:
        of = np.split(product.reshape(-1, 32), np.cumsum(range(1, 33)))
        for m, rows in enumerate(of, 1):
            assert np.array_equal(rows, of[31 + m % 2][-m:])  # those of an odd m see the second panel


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
        ("-march=armv8.6-a", ALL),
        ("-mcpu=neoverse-v1", ALL),
        ("-march=armv9-a", SDOT),
        ("-march=armv8.2-a+bf16", BF16),
        ("-march=armv8.2-a+i8mm", MATRICES),
    ],
)
def test_compilers_may_be_told_of_a_cpu(flags: str, known: int, tmp_path: Path) -> None:
    """As by CFLAGS=-mcpu=native: what it has is taken without a question, what it may have with one."""
    for source in ("dots.c", "step.c"):
        command = [CROSS, *OPTIONS, flags, "-c", SOURCES / source, "-o", tmp_path / f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    listed = subprocess.run(["nm", tmp_path / "dots.c.o"], capture_output=True, text=True, check=True).stdout
    ours = ("int8_sdot", "int8_smmla", "bf16_bfmmla")
    assert {f"panel_product_{name}" for name in ours} <= set(listed.split())
    asked = [CROSS, flags, "-dM", "-E", "-x", "c", "/dev/null"]
    macros = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    given = {"DOTPROD": SDOT, "MATMUL_INT8": MATRICES, "BF16_VECTOR_ARITHMETIC": BF16}
    assert sum(bit for name, bit in given.items() if f"__ARM_FEATURE_{name} 1" in macros) == known


@pytest.fixture(scope="module")
def rest_on_arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for ARM without dots.c, compiled."""
    compiled = tmp_path_factory.mktemp("neon") / "rest.o"
    subprocess.run([CROSS, *OPTIONS, "-c", PROGRAM, "-o", compiled], check=True)
    return compiled


ARM, BFMMLA, BFDOT = "products_arm.h", "products_bfmmla.h", "attention_bfdot.h"


@pytest.mark.slow
@needs_an_emulator
@pytest.mark.parametrize(
    ("file", "line", "bug"),
    [
        (ARM, "fours[i / 4], i % 4", "fours[i / 4], (i + 1) % 4"),
        (ARM, "return vdotq_laneq_s32(sum, codes, rows, 2);", "return vdotq_laneq_s32(sum, codes, rows, 3);"),
        (ARM, "source == INT8 ? 0 : of->minus[i] * 8", "0"),
        (ARM, "of->minus[2 * i + 1] * 8", "of->minus[2 * i] * 8"),
        (ARM, "if (2 * i + 1 < rows)", "if (2 * i + 2 < rows)"),
        (ARM, "vzip2q_s64(left, right)", "vzip2q_s64(right, left)"),
        (ARM, "of->scale[2 * i + 1]", "of->scale[2 * i]"),
        (ARM, "halves_arm(codes, high || j >= 8)", "halves_arm(codes, high)"),
        (ARM, "(first - 4 * high) * 32", "first * 32"),
        (ARM, "(high ? vshrq_n_u8(bytes, 4)", "(high ? vshrq_n_u8(bytes, 5)"),
        (ARM, "x += packed_rows * group + 8 * m", "x += packed_rows * group + 4 * m"),
        (BFMMLA, "eight = vdupq_n_s8(8)", "eight = vdupq_n_s8(7)"),
        (BFMMLA, "out + high * 4 * PANEL + j", "out + (1 - high) * 4 * PANEL + j"),
        (BFMMLA, "if (!codes && accumulate)", "if (accumulate)"),
        (BFMMLA, "if (2 * i + 1 < rows) other =", "if (2 * i + 2 < rows) other ="),
        (BFMMLA, "if (2 * i + r < rows)", "if (2 * i + r + 1 < rows)"),
        (
            BFMMLA,
            "scales_arm(of->scales_stored, of->scales, first + j)",
            "scales_arm(of->scales_stored, of->scales, j)",
        ),
        (BFMMLA, "bfmmla_pass(&of, c + i * PANEL, first > 0)", "bfmmla_pass(&of, c + i * PANEL, 0)"),
        (BFMMLA, "first * packed_rows + 4 * i", "first * packed_rows + 4 * unit"),
        (BFDOT, "x + i * ldx + 2 * p", "x + i * ldx + 2 * p + 2"),
        (BFDOT, "w + PANEL, ldw, pairs, c + PANEL / 2", "w, ldw, pairs, c + PANEL / 2"),
    ],
)
def test_a_planted_bug_is_seen(tmp_path: Path, on_x86: Path, file: str, line: str, bug: str) -> None:
    source = (SOURCES / file).read_text()
    assert source.count(line) == 1
    (tmp_path / file).write_text(source.replace(line, bug))
    # A file is looked for beside the one that includes it, so that one is copied as well.
    sources = [PROGRAM, SOURCES / "dots.c"]
    for name in ("products_arm.h", "dots.c"):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text((SOURCES / name).read_text())
    sources[1] = tmp_path / "dots.c"
    given = ["products"]
    if file == BFDOT:
        (tmp_path / "step.c").write_text((SOURCES / "step.c").read_text())
        sources[0] = Path(shutil.copy(PROGRAM, tmp_path / PROGRAM.name))
        given = []
    right = Made.of(made_by([], on_x86, "sse", "sse 0", *given))
    program = built([CROSS, "-static"], tmp_path, *sources)
    sets = (("dots", SDOT), ("", ALL)) if file == ARM else (("", ALL),)
    made = [Made.of(made_by([EMULATOR], program, name, f"neon {extra}", *given)) for name, extra in sets]
    assert not all(each.is_near(right) for each in made)
