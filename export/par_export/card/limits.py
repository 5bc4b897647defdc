"""What the card itself allows, measured in the same run as everything that is compared with it.

Memory by large copies on the device (each byte counts twice: read and written), matrices by one large product, and what
a launch costs by graphs of kernels that do nothing.
"""

from __future__ import annotations

from functools import partial

from par_export.card.lines import Emit, limit
from par_runtime.backends import cuda
from par_runtime.backends.kernels.modules import Module, Prepared
from par_runtime.backends.program import Kernel, Launch
from par_runtime.bench import gpu

COPY_BYTES, COPIES = 2**31, 20
MATRIX, PRODUCTS = 8192, 20
#: Kernels of a graph, and how often it is replayed.
LAUNCHES, REPLAYS = 1000, 10
COPY, READ, MATRICES = "copy bandwidth", "read bandwidth", "fp16 matrix peak"
LAUNCH, DEPENDENT = "launch", "dependent launch"
_EMPTY = """.version {version}
.target {target}
.address_size 64
.visible .entry empty()
{{
{wait}    ret;
}}
"""


def copies(index: int, emit: Emit, size: int = COPY_BYTES) -> None:
    """The bandwidth of copies on GPU ``index``. Raises CudaError."""
    took = gpu.copies_ms(index, size, COPIES)
    how = f"{size / 1e9:.1f} GB of random bytes copied on the device, read and written"
    limit(emit, COPY, "GB/s", [2 * size / ms / 1e6 for ms in took], how)


def reads(name: str, emit: Emit, size: int = COPY_BYTES) -> None:
    """The bandwidth of reading on PyTorch's device ``name``: the largest of ``size`` bytes of random numbers.

    A step reads and hardly writes, so that a copy may be slower than what it could reach.
    """
    import torch  # here: only what is PyTorch's needs it

    from par_export.card.timing import samples_ms

    device = torch.device(name)
    random = torch.Generator(device).manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device, generator=random)
    took = samples_ms(numbers.amax, COPIES, device)
    how = f"torch.amax of {size / 1e9:.1f} GB of random numbers"
    limit(emit, READ, "GB/s", [size / ms / 1e6 for ms in took], how)


def matrices(name: str, emit: Emit, side: int = MATRIX) -> None:
    """The rate of one large product of fp16 matrices on PyTorch's device ``name``, of random numbers."""
    import torch  # here: only what is PyTorch's needs it

    from par_export.card.timing import samples_ms

    device = torch.device(name)
    random = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=random).half() for _ in range(2))
    took = samples_ms(lambda: a @ b, PRODUCTS, device)
    how = f"torch.matmul of {side}x{side}x{side}, random numbers"
    limit(emit, MATRICES, "TFLOP/s", [2 * side**3 / ms / 1e9 for ms in took], how)


def launches(index: int, emit: Emit, count: int = LAUNCHES) -> None:
    """What one launch of a kernel that does nothing costs inside of a graph, with and without dependent launches.

    The kernels are written in PTX, which the driver compiles: no compiler is needed. Raises CudaError.
    """
    with cuda.Device.open(index) as device, device.stream() as stream:
        capable = device.capability >= (9, 0)
        for name, dependent in ((LAUNCH, False), (DEPENDENT, True)):
            if dependent and not capable:
                emit("note", text=f"{name}: this GPU has none (SM90 and newer)")
                continue
            with Module(*empty_kernel(dependent)) as module:
                launch = (Launch("empty", (1, 1, 1), ()), 0)
                prepared = Prepared({"empty": module}, [launch] * count, {}, stream)
                with stream.capture() as captured:
                    prepared.enqueue()
                with captured.graph as graph:
                    took = gpu.runs_ms(device, stream, partial(graph.launch, stream), REPLAYS)
            limit(emit, name, "us", [1e3 * ms / count for ms in took], f"{count} empty kernels of one block in a graph")


def empty_kernel(dependent: bool) -> tuple[Kernel, bytes]:
    """A kernel that does nothing, or that waits for its predecessor and lets its successor begin; and its PTX."""
    wait = "    griddepcontrol.launch_dependents;\n    griddepcontrol.wait;\n" if dependent else ""
    version, target = ("7.8", "sm_90") if dependent else ("7.0", "sm_80")
    text = _EMPTY.format(version=version, target=target, wait=wait).encode() + b"\0"
    return Kernel("empty.ptx", len(text), "", "empty", "card.empty", {}, (), 0, 4, 0, 0, 0, dependent), text
