"""Modules and launches through the real cuda-python, on the stub of libcuda: what arrives at the driver, and errors.

How it runs: ``stub_cuda/children.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from stub_cuda.children import live, needs_cuda_python, refused

from par_runtime.backends.cuda import Device
from par_runtime.errors import CudaError

pytestmark = needs_cuda_python


def check_launches() -> None:
    import struct
    from dataclasses import replace

    from par_runtime.backends.kernels.modules import Module, Prepared
    from par_runtime.backends.program import Kernel, Launch, Pointer

    parameters = (("out", "*i64"), ("count", "i32"), ("scale", "fp32"), ("long", "i64"), ("other", "*fp16"))
    kernel = Kernel(
        "probe.cubin", 1, "", "probe", "step.probe", {}, parameters,
        trailing=2, warps=4, shared=64 * 1024, registers=32, spills=0, dependent=True,
    )  # fmt: skip
    gpu = Device.open(0)
    stream, pinned = gpu.stream(), gpu.pinned(1024)
    memory, elsewhere = gpu.allocate(1024, "words"), gpu.allocate(1024, "words")
    idle = live()
    module = Module(kernel, b"STUB probe pifllpp\0", most_shared=True)
    first = Launch("probe", (3, 2, 1), (Pointer("out"), -7, -0.0, -(2**40), Pointer("w", 32, 16)))
    second = Launch("probe", (1, 65535, 5), (Pointer("out", 256), 2**31 - 1, 1.5, 2**40, Pointer("out", 16)))
    launches = Prepared({"probe": module}, [(first, 0), (second, 0), (first, 3)], {"w": 4096}, stream)
    with refused(ValueError, "no address for out"):
        launches.enqueue()

    def words(at: int, count: int = 13) -> list[int]:
        stream.download(pinned, memory.pointer + at, 8 * count)
        stream.synchronize()
        return pinned.array[: 8 * count].view(np.int64).tolist()

    def bits(value: float) -> int:
        return struct.unpack("<I", struct.pack("<f", value))[0]

    def as_unsigned(value: int) -> int:
        return value % 2**32

    launches.set("out", memory.pointer)
    launches.enqueue()
    # The last launch of all overwrote the first one's words: it is of layer 3, and may begin early, unlike the first.
    out = memory.pointer
    assert words(0) == [3, 2, 1, 128, 65536, 1, out, as_unsigned(-7), bits(-0.0), -(2**40), 4096 + 32 + 48, 0, 0]
    assert words(256)[:6] == [1, 65535, 5, 128, 65536, 1]
    assert words(256)[6:] == [out + 256, 2**31 - 1, bits(1.5), 2**40, out + 16, 0, 0]
    launches.enqueue([0])
    assert words(0, 11) == [3, 2, 1, 128, 65536, 0, out, as_unsigned(-7), bits(-0.0), -(2**40), 4096 + 32]

    # In a graph, launches keep the addresses that they were captured with.
    with stream.capture() as captured:
        launches.enqueue()
        launches.set("out", elsewhere.pointer)
        launches.enqueue()
    assert captured.graph.nodes == 6
    memory.zero(stream)
    launches.set("w", 2**20)
    captured.graph.launch(stream)
    assert words(0, 11)[10] == 4096 + 32 + 48
    captured.graph.free()

    for image, words_of_error in (
        (b"no cubin\0", ("cuModuleLoadData of step.probe (probe.cubin) failed: CUDA_ERROR_INVALID_IMAGE", "again")),
        (b"STUB other p\0", ("cuModuleGetFunction of step.probe (probe.cubin) failed: CUDA_ERROR_NOT_FOUND", "again")),
    ):
        with refused(CudaError, *words_of_error):
            Module(kernel, image)
    with refused(CudaError, "cuFuncSetAttribute of 102400 bytes of shared memory for step.probe (probe.cubin) failed"):
        Module(replace(kernel, shared=100 * 1024), b"STUB probe p\0")
    launches.set("out", 2**40)  # nothing is there
    with refused(CudaError, "cuLaunchKernelEx of step.probe (probe.cubin) failed: CUDA_ERROR_INVALID_VALUE"):
        launches.enqueue()
    module.free()
    module.free()
    assert live() == idle


def test_launches(stub: Path, run: Callable[..., None]) -> None:
    run(check_launches, stub)
