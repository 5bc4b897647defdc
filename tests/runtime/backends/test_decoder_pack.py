"""The weights of the C decoder as it packs them: against numpy, in every form that a bundle may store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from instruction_sets import EVERY
from numpy.typing import NDArray

from par_runtime import Pipeline
from par_runtime.backends.native import backend as native_backend
from par_runtime.backends.native.decoder import CONV, LANES, PANEL, UPSAMPLE, Op, Packing, lanes
from par_runtime.backends.native.decoding import decoder_file, open_decoder_library
from par_runtime.backends.native.pool import Pool
from par_runtime.backends.native.weights import Weights
from par_runtime.dtypes import STORAGE, Float, to_float32
from par_runtime.errors import BundleError

FILE = decoder_file()
DEMO = Path(__file__).parents[3] / "models" / "demo"
pytestmark = pytest.mark.skipif(FILE is None, reason="no compiled decoder here")

#: N, frames, K, numbers of the kernel, parts: channels that fill no vector, no panel, and several of both.
SHAPES = [(33, 1, 40, 9, 1), (64, 1, 64, 9, 1), (3, 1, 17, 9, 1), (72, 3, 20, 9, 4), (8, 3, 16, 9, 8), (65, 1, 5, 1, 1)]
DTYPES = ["float32", "float16", "bfloat16"]


def stored(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    n, frames, k, taps, _ = shape
    side = round(taps**0.5)
    numbers = np.random.default_rng(n).standard_normal((n, frames * k, side, side)).astype(np.float32)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(STORAGE[dtype])


def expected(shape: tuple[int, ...], numbers: Float) -> Float:
    n, frames, k, taps, parts = shape
    padded = np.zeros((parts, lanes(n // parts), frames, lanes(k), taps), np.float32)
    padded[:, : n // parts, :, :k] = numbers.reshape(parts, n // parts, frames, k, taps)
    columns = padded.reshape(-1, frames * lanes(k), taps)
    panels = np.zeros((-(-len(columns) // PANEL) * PANEL, *columns.shape[1:]), np.float32)
    panels[: len(columns)] = columns
    return panels.reshape(-1, PANEL, *columns.shape[1:]).transpose(0, 2, 3, 1)


@contextmanager
def packing(numbers: NDArray[Any], dtype: str, threads: int = 3) -> Iterator[Packing]:
    """Of a decoder whose every tensor is ``numbers``."""
    lib = open_decoder_library(FILE)
    pool = Pool(lib, "parvis_decoder_", threads)
    tensors = SimpleNamespace(
        stored=lambda _: (numbers, dtype), not_finite=lambda name: BundleError(f"{name} is not finite")
    )
    try:
        yield Packing(lib, pool.handle, tensors)  # type: ignore[arg-type]
    finally:
        pool.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_panels_have_every_number_at_its_place(shape: tuple[int, ...], dtype: str) -> None:
    numbers = stored(shape, dtype)
    for threads in (1, 3):
        with packing(numbers, dtype, threads) as packs:
            found = packs.convolution("a tensor", shape[1], shape[4])
        assert np.array_equal(found, expected(shape, to_float32(numbers, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_number_that_is_none_is_found_wherever_it_lies(shape: tuple[int, ...], dtype: str) -> None:
    none = {"float32": [np.nan, np.inf], "float16": [np.nan, -np.inf], "bfloat16": [0x7FC0, 0xFF80]}[dtype]
    places = np.random.default_rng(0).integers(0, stored(shape, dtype).size, 20)
    for at in (0, -1, *places):
        numbers = stored(shape, dtype)
        numbers.reshape(-1)[at] = none[at % 2]
        with packing(numbers, dtype) as packs, pytest.raises(BundleError, match="a tensor is not finite"):
            packs.convolution("a tensor", shape[1], shape[4])


def test_the_largest_numbers_and_the_smallest_are_finite() -> None:
    numbers = stored((8, 1, 16, 9, 1), "float16")
    numbers.reshape(-1)[:4] = 65504, -65504, 2.0**-24, -(2.0**-24)
    with packing(numbers, "float16") as packs:
        assert packs.convolution("x")[0, 0, :4, 0].tolist() == [65504, -65504, 2.0**-24, -(2.0**-24)]


@pytest.mark.parametrize("kind", [CONV, UPSAMPLE])
def test_threads_transform_as_one_does(kind: int) -> None:
    found = []
    for threads in (1, 4):
        with packing(stored((72, 1, 40, 9, 1), "float32"), "float32", threads) as packs:
            panels = packs.convolution("x")
            op = Op(kind=kind, in_channels=lanes(40), out_channels=lanes(72), frames=1, weights=panels.ctypes.data)
            points = packs.transformed(op).reshape(-1, lanes(40) * PANEL + LANES)
            found.append(points[:, :-LANES].copy())  # what lies behind each point is not filled
    assert np.array_equal(*found)
    assert np.count_nonzero(found[0])


_HASH = """
import sys, zlib
import numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_decoder_pack as tests
for shape in tests.SHAPES:
    for dtype in tests.DTYPES:
        with tests.packing(tests.stored(shape, dtype), dtype) as packs:
            print(zlib.crc32(packs.convolution("x", shape[1], shape[4])))
"""


def test_every_instruction_set_packs_the_same_bits() -> None:
    printed = set()
    for name in EVERY:
        here = os.path.dirname(__file__)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PARVIS_NATIVE": name}
        done = subprocess.run(
            [sys.executable, "-c", _HASH, here], env=environment, check=True, capture_output=True, text=True
        )
        printed.add(done.stdout)
        assert len(done.stdout.split()) == len(SHAPES) * len(DTYPES)
    assert len(printed) == 1


def test_the_c_kernels_need_no_onnx_runtime() -> None:
    """Its import takes longer than this bundle's loading."""
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from par_runtime import Pipeline\n"
        "pipeline = Pipeline.load(sys.argv[1], 'cpu'); pipeline.generate([0]); print(pipeline.backend.info.name)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(DEMO)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("native-cpu")


def test_threads_end_where_weights_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Broken(Weights):
        def __init__(self, files: Any, lib: Any, pool: Any, *others: Any) -> None:
            opened.append(pool)
            raise MemoryError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(native_backend, "Weights", Broken)
        with pytest.raises(MemoryError, match="none left"):
            Pipeline.load(DEMO, "cpu")
    assert [bool(pool) for pool in opened] == [False]  # closed, so that it is not there any more
    with closing(Pipeline.load(DEMO, "cpu")) as pipeline:
        assert pipeline.generate([0], seed=1).tokens.shape == (1, 256)
