"""What the card itself allows, measured in the same run as everything that is compared with it.

Memory by large copies on the device (each byte counts twice: read and written), matrices by one large product.
"""

from __future__ import annotations

import torch

from par_export.card.timing import Emit, limit, samples_ms
from par_runtime.bench import gpu

COPY_BYTES, COPIES = 2**31, 20
MATRIX, PRODUCTS = 8192, 20
COPY, MATRICES = "copy bandwidth", "fp16 matrix peak"


def copies(index: int, emit: Emit, size: int = COPY_BYTES) -> None:
    """The bandwidth of copies on GPU ``index``. Raises CudaError."""
    took = gpu.copies_ms(index, size, COPIES)
    how = f"{size / 1e9:.1f} GB of random bytes copied on the device, read and written"
    limit(emit, COPY, "GB/s", [2 * size / ms / 1e6 for ms in took], how)


def matrices(device: torch.device, emit: Emit, side: int = MATRIX) -> None:
    """The rate of one large product of fp16 matrices in PyTorch, of random numbers."""
    random = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=random).half() for _ in range(2))
    took = samples_ms(lambda: a @ b, PRODUCTS, device)
    how = f"torch.matmul of {side}x{side}x{side}, random numbers"
    limit(emit, MATRICES, "TFLOP/s", [2 * side**3 / ms / 1e9 for ms in took], how)
