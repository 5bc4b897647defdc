"""The process that measures a CPU: ``python -m par_runtime.bench.probes THREADS BYTES...`` prints one JSON object.

Its environment switches off the threads of the matrix library. Each thread here reads, or multiplies, a part of its
own, so the bench decides the number of threads and not the library. numpy and the C kernels release the interpreter's
lock while they compute.

Everything is measured with each tool that is there, because a bound is what the machine can do, not what one library
does: reading by numpy's dot products and by the product of the C kernels (one row of activations, as in a step);
multiplying by numpy, by ONNX Runtime, and by the C kernels on operands that stay in the first cache. The C kernels also
multiply in bf16 and int8, each measured for the rows that compute in it.

Each call takes about a millisecond, and the best time of some milliseconds counts (:func:`shortest_window`): a process
that shares the cores leaves some short times alone, where it disturbs every long one. An array is read whole in that
time, so that no part of it is counted that a cache still held.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.native.library import Matrix, library, matrix_of
from par_runtime.backends.native.memory import empty

MATRIX = 384  #: rows and columns of a product of a thread in numpy, about a millisecond
SHARED_MATRIX = 1024  #: of the product that ONNX Runtime shares among its threads
INNER, ROWS, TIMES = 64, 24, 600  #: the product of the C kernels: K, M, and how often in a call: a quarter millisecond
ROWS_DOT = 32  #: M of products of smaller numbers: that of whole tiles, where the CPU has AMX
INNERS_DOT = (128, 256)  #: and their K, of which the faster one counts: a product of tiles takes long to begin
#: arithmetic -> the dtype and group of weights that need the least decoding
DOTS = (("bf16", "bfloat16", 0), ("int8", "int8", 128))
READ_INNER = 1024  #: K of the products that read
PIECE_BYTES = 2**22  #: what a call reads of a larger array
TOGETHER = 4  #: calls of each thread in the time that counts, where operands stay in caches
CALLS = 5  #: times the calls that count, at least
SECONDS = 0.15  #: how long one probe takes at least


def main(argv: Sequence[str]) -> int:
    """Measure and print one JSON object: the number of threads and the array sizes in bytes are the arguments."""
    p = argparse.ArgumentParser(prog="python -m par_runtime.bench.probes", description=__doc__)
    p.add_argument("threads", type=int)
    p.add_argument("bytes", type=int, nargs="+")
    args = p.parse_args(argv)
    reads = [(size, dict(read_gb_s(args.threads, size))) for size in args.bytes]
    peaks, dots = dict(matrix_tflop_s(args.threads)), dict(dot_tflop_s(args.threads))
    print(json.dumps({"reads": reads, "peaks": peaks, "dots": dots}))
    return 0


def read_gb_s(threads: int, size: int) -> Iterator[tuple[str, float]]:
    """GB/s at which ``threads`` read an array of ``size`` bytes, each a part of it, by the name of the tool."""
    array = np.empty(size // 4, np.float32)
    parts = np.array_split(array, threads)
    fastest(threads, lambda i: parts[i].fill(1e-3), 1, 0)  # each thread touches its own part first
    pieces = [cycle(np.array_split(part, -(-part.nbytes // PIECE_BYTES))) for part in parts]
    calls = threads * -(-parts[0].nbytes // PIECE_BYTES)

    def dot(i: int) -> None:
        piece = next(pieces[i])
        np.dot(piece, piece)

    yield "numpy", array.nbytes / fastest(threads, dot, calls) / 1e9
    lib = library()
    if lib is None:
        return
    panel = READ_INNER * lib.parvis_panel()  # numbers
    panels = min(PIECE_BYTES // 4, len(parts[-1])) // panel
    if not panels:
        return
    products = [Product(lib, np.ones((1, READ_INNER), np.float32)) for _ in range(threads)]
    starts = [cycle(range(0, len(part) - panels * panel + 1, panels * panel)) for part in parts]
    calls = threads * (len(parts[-1]) // (panels * panel))

    def product(i: int) -> None:
        products[i](parts[i].ctypes.data + 4 * next(starts[i]), panels, 1)

    yield "C kernels", 4 * calls * panels * panel / fastest(threads, product, calls) / 1e9


def matrix_tflop_s(threads: int, side: int = MATRIX) -> Iterator[tuple[str, float]]:
    """TFLOP/s at which ``threads`` multiply in fp32, by the name of the tool; ``side``: rows of numpy's matrices."""
    random = np.random.default_rng(0)
    pairs = [[random.standard_normal((side, side), np.float32) for _ in range(3)] for _ in range(threads)]
    calls = TOGETHER * threads
    took = fastest(threads, lambda i: np.matmul(pairs[i][0], pairs[i][1], out=pairs[i][2]), calls)
    yield f"numpy, {blas_name()}", calls * 2 * side**3 / took / 1e12
    lib = library()
    if lib is not None:
        yield c_kernels(lib), product_tflop_s(lib, threads, matrix_of(lib, "float32", "fp32"), ROWS, INNER)
    try:
        import onnxruntime as ort
    except ImportError:
        return
    multiply_there = onnxruntime_matmul(ort, threads, SHARED_MATRIX)
    yield f"ONNX Runtime {ort.__version__}", 2 * SHARED_MATRIX**3 / fastest(1, lambda _: multiply_there(), 1) / 1e12


def dot_tflop_s(threads: int) -> Iterator[tuple[str, float]]:
    """TFLOP/s at which ``threads`` of the C kernels multiply in other arithmetics than fp32, by its name."""
    lib = library()
    if lib is not None:
        for arithmetic, dtype, group in DOTS:
            matrix = matrix_of(lib, dtype, arithmetic, group)
            yield arithmetic, max(product_tflop_s(lib, threads, matrix, ROWS_DOT, inner) for inner in INNERS_DOT)


def c_kernels(lib: ctypes.CDLL) -> str:
    return f"C kernels, {lib.parvis_instructions().decode()}"


def product_tflop_s(lib: ctypes.CDLL, threads: int, matrix: Matrix, rows: int, inner: int) -> float:
    """TFLOP/s of ``rows`` of activations and a panel of ``inner`` rows, which both stay in the first cache."""
    size = lib.parvis_matrix_bytes(ctypes.byref(matrix), inner, lib.parvis_panel())
    panels = empty((threads, size), np.uint8)
    panels.fill(0x11)  # a small number in every dtype
    x = np.ones((rows, inner), np.float32)
    products = [Product(lib, x, Matrix.from_buffer_copy(matrix)) for _ in range(threads)]
    calls = TOGETHER * threads
    took = fastest(threads, lambda i: products[i](panels[i].ctypes.data, 1, TIMES), calls)
    return float(calls * TIMES * 2 * inner * rows * lib.parvis_panel() / took / 1e12)


class Product:
    """The product of the C kernels alone: rows ``x`` [M,K] times panels of ``matrix``, in one thread.

    Without ``matrix``, panels are fp32.
    """

    def __init__(self, lib: ctypes.CDLL, x: NDArray[np.float32], matrix: Matrix | None = None) -> None:
        self._lib, self._x = lib, x
        self._matrix = matrix_of(lib, "float32", "fp32") if matrix is None else matrix
        self._packed = empty(lib.parvis_packed_bytes(*x.shape), np.uint8)  # lines of a cache, as in a step
        self.tile = empty((lib.parvis_product_rows(len(x)), lib.parvis_panel()), np.float32)[: len(x)]

    def __call__(self, panels: int, count: int, times: int) -> None:
        """Multiply by each of ``count`` panels from the address ``panels`` on, ``times`` times.

        ``tile`` [M,panel] is the last product.
        """
        self._matrix.data = panels
        self._lib.parvis_products(
            ctypes.byref(self._matrix), self._x.ctypes.data, *self._x.shape, count, times,
            self.tile.ctypes.data, self._packed.ctypes.data,
        )  # fmt: skip


def onnxruntime_matmul(ort: Any, threads: int, side: int) -> Callable[[], None]:
    """A function that multiplies two fp32 matrices of ``side`` rows and columns in ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(matmul_model(side), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.float32]] = {
        name: random.standard_normal((side, side), np.float32) for name in ("a", "b", "c")
    }
    binding = session.io_binding()
    for name, array in arrays.items():
        bind = binding.bind_output if name == "c" else binding.bind_input
        bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def multiply(_held: object = arrays) -> None:
        session.run_with_iobinding(binding)

    return multiply


def matmul_model(side: int) -> bytes:
    """An ONNX model of one node, c = MatMul(a, b), as bytes. The runtime has no package that writes ONNX.

    The numbers are the fields of onnx.proto; lengths stand before their content.
    """

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    def nested(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    shape = nested(2, b"".join(nested(1, number(1, side)) for _ in range(2)))  # dim { dim_value }, twice
    of_floats = nested(2, nested(1, number(1, 1) + shape))  # type { tensor_type { elem_type: FLOAT, shape } }
    a, b, c = (nested(1, name) + of_floats for name in (b"a", b"b", b"c"))
    node = nested(1, b"a") + nested(1, b"b") + nested(2, b"c") + nested(4, b"MatMul")
    graph = nested(1, node) + nested(2, b"matmul") + nested(11, a) + nested(11, b) + nested(12, c)
    return number(1, 8) + nested(7, graph) + nested(8, number(2, 13))  # IR version 8, opset 13


def blas_name() -> str:
    """The library that numpy multiplies with, and its version."""
    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    except (KeyError, TypeError):
        return "BLAS"


def fastest(threads: int, work: Callable[[int], Any], together: float, seconds: float = SECONDS) -> float:
    """The shortest time, in seconds, in which ``threads`` have made ``together`` calls of ``work(index)`` among them.

    Each thread calls its ``work`` again and again for ``seconds`` or a few times; :func:`shortest_window` finds the
    time in which all were fast.
    """
    begin = threading.Barrier(threads)
    ends = [list[float]() for _ in range(threads)]
    failed: list[BaseException] = []

    def run(index: int) -> None:
        try:
            begin.wait()
            ends[index].append(time.perf_counter())
            least = max(1.0, CALLS * together / threads)
            while len(ends[index]) <= least or ends[index][-1] - ends[index][0] < seconds:
                work(index)
                ends[index].append(time.perf_counter())
        except BaseException as error:
            failed.append(error)
            begin.abort()

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    return shortest_window(ends, together)


def shortest_window(ends: Sequence[Sequence[float]], together: float) -> float:
    """The shortest time in which ``together`` calls were made, in seconds; the mean time of so many if there is none.

    ``ends``: for each thread, when it began and when each of its calls ended. Only the time in which all threads work
    counts; inside of a call the work is spread evenly.
    """
    first, last = max(each[0] for each in ends), min(each[-1] for each in ends)
    times = np.unique(np.concatenate([np.asarray(each) for each in ends]).clip(first, last))
    made = sum(np.interp(times, each, np.arange(len(each))) for each in ends)
    until = np.interp(made + together, made, times, right=np.inf)
    shortest = float(np.min(until - times))
    if np.isfinite(shortest):
        return shortest
    return together / sum((len(each) - 1) / (each[-1] - each[0]) for each in ends)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
