"""The draw in C: the same tokens as the draw in numpy, for any logits and settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import top_k_8000
from instruction_sets import OTHERS, X86

from par_runtime.backends.draws import Float, distance_of, draw, draw_all
from par_runtime.backends.native.library import library
from par_runtime.dtypes import Int

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler at installation, or an older CPU")
#: The C kernels compute e^x as numpy does on x86-64; numpy's for ARM differs in last bits.
NUMPYS_EXP = X86
SETTINGS = [  # temperature, top-k, top-p
    (1.0, 0, 1.0), (1.0, 1, 1.0), (0.0, 0, 1.0), (1e-5, 0, 0.9), (50.0, 0, 0.9), (1e6, 7, 1.0), (1.0, 2, 1.0),
    (1.0, 0, 0.0), (1.0, 0, 1e-30), (1.0, 0, 0.5), (1.0, 0, 0.95), (1.0, 0, 1 - 2**-24), (0.7, 100, 0.8),
    (1.0, -1, 0.3), (1.0, -2, 0.9), (1.0, 1, 0.0), (1.0, 1000000, 1.0),
]  # fmt: skip


def drawn_in_c(logits: Float, uniform: Float, temperature: Float, top_k: Int, top_p: Float) -> Int:
    """What ``parvis_draw`` gives; as ``draw_all``."""
    lib = library()
    assert lib is not None
    rows, vocab = logits.shape
    columns = -(-vocab // lib.parvis_panel()) * lib.parvis_panel()
    guarded = np.full(4 * columns + 64, 12345, np.float32)  # 64 numbers that nobody may write
    tokens = np.full(rows, -1, np.int64)
    arrays = (uniform, temperature, top_k, top_p, tokens, guarded)
    lib.parvis_draw(np.ascontiguousarray(logits).ctypes.data, rows, vocab, *(array.ctypes.data for array in arrays))
    assert (guarded[4 * columns :] == 12345).all()
    return tokens


def assert_the_same(
    tokens: Int, wanted: Int | list[int], logits: Float, uniform: Float, temperature: float, top_k: int, top_p: float
) -> None:
    """Numpy's tokens; or, where its e^x is another one, those that this explains."""
    for row, token, numpys, u in zip(logits, tokens.tolist(), wanted, uniform.tolist(), strict=True):
        if NUMPYS_EXP or token == numpys:
            assert token == numpys, (temperature, top_k, top_p)
        else:
            distance, explained = distance_of(row, row, token, u, temperature, top_k, top_p)
            assert distance is not None, (temperature, top_k, top_p)
            assert distance <= explained, (temperature, top_k, top_p)


def rows_of(vocab: int, seed: int) -> Float:
    """Rows of logits: spread narrowly and widely, tied in many ways, with few likely codes, with -inf and zeros."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal((12, vocab)).astype(np.float32)
    normal *= np.array([0, 0.01, 1, 1, 3, 10, 40, 1000, 2, 2, 4, 1], np.float32)[:, None]
    normal[3] = np.round(normal[3])
    normal[8] = np.round(normal[8] * 4) / 4
    normal[9] = -np.abs(np.round(normal[9]))  # many at the top, some of them -0.0
    normal[10, random.random(vocab) < 0.9] = -np.inf
    normal[11] = np.where(random.random(vocab) < 0.01, 30, normal[11])
    return normal


@pytest.mark.parametrize("vocab", [12, 31, 32, 1000, 1023, 1024, 16384, 64000])
def test_the_tokens_are_numpys(vocab: int) -> None:
    logits = rows_of(vocab, vocab)
    random = np.random.default_rng(vocab + 1)
    few = 1 if vocab > 20000 else 4
    for temperature, top_k, top_p in SETTINGS:
        k = top_k if top_k >= 0 else vocab + top_k  # so many below the number of codes
        count = len(logits)
        settings = (np.full(count, temperature, np.float32), np.full(count, k), np.full(count, top_p, np.float32))
        for _ in range(few):
            uniform = (random.integers(0, 2**24, count) / 2**24).astype(np.float32)
            wanted = [
                draw(row, float(u), temperature, k, top_p) for row, u in zip(logits, uniform, strict=True)
            ] if vocab <= 1024 else draw_all(logits, uniform, *settings)  # fmt: skip
            assert_the_same(drawn_in_c(logits, uniform, *settings), wanted, logits, uniform, temperature, k, top_p)


def test_the_ends_of_the_noise() -> None:
    logits = rows_of(1024, 5)
    for uniform in (0.0, 2**-24, 1 - 2**-24):
        for temperature, top_k, top_p in SETTINGS:
            k = max(top_k, 0)
            wanted = [draw(row, uniform, temperature, k, top_p) for row in logits]
            each = [np.full(len(logits), value, np.float32) for value in (uniform, temperature, top_p)]
            tokens = drawn_in_c(logits, each[0], each[1], np.full(len(logits), k), each[2])
            assert_the_same(tokens, wanted, logits, each[0], temperature, k, top_p)


@pytest.mark.slow
def test_top_k_8000_of_64000_is_distributed_as_promised() -> None:
    ones = np.ones(200, np.float32)
    top_k_8000.check(lambda x, u: drawn_in_c(x, u, ones, np.full(200, 8000), ones), 1600, 200)


def test_every_top_p_between_two_ties() -> None:
    """Eight codes of equal logits: top-p keeps the first ones of them, and each is drawn as often as it should be."""
    logits = np.full((64, 1024), -50, np.float32)
    logits[:, 100:900:100] = 2
    uniform = (np.arange(64, dtype=np.float32) + 0.5) / 64
    ones = np.ones(64, np.float32)
    for kept in range(1, 9):
        top_p = np.full(64, (kept - 0.5) / 8, np.float32)
        tokens = drawn_in_c(logits, uniform, ones, np.zeros(64, np.int64), top_p)
        assert set(tokens.tolist()) == {100 * (i + 1) for i in range(kept)}
        assert tokens.tolist() == draw_all(logits, uniform, ones, np.zeros(64, np.int64), top_p).tolist()


def test_logits_that_are_no_numbers_give_a_code() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        logits = np.zeros((3, 1024), np.float32)
        logits[0] = bad
        logits[1, 7] = bad
        logits[2, ::3] = bad
        for temperature, top_k, top_p in SETTINGS:
            each = [np.full(3, value, np.float32) for value in (0.3, temperature, top_p)]
            tokens = drawn_in_c(logits, each[0], each[1], np.full(3, max(top_k, 0)), each[2])
            assert ((tokens >= 0) & (tokens < 1024)).all()


@pytest.mark.parametrize("instructions", OTHERS)
def test_the_other_instruction_set_draws_the_same(instructions: str) -> None:
    """In a process of its own: the instruction set is chosen when the library is loaded."""
    code = (
        f"import test_native_draw as t; assert t.library().parvis_instructions() == {instructions.encode()!r}; "
        "t.test_the_tokens_are_numpys(1024); t.test_the_ends_of_the_noise(); t.test_every_top_p_between_two_ties(); "
        "t.test_logits_that_are_no_numbers_give_a_code()"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "PARVIS_NATIVE": instructions}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
