"""The one table of precisions in PyTorch's terms, and where products of one are fast.

A *precision* is what a user names ("fp16"), a *dtype* is torch's (``torch.float16``).
"""

from __future__ import annotations

import platform

import torch

#: precision -> torch's dtype, the most exact first.
PRECISION_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def bf16_is_fast(device: torch.device) -> bool:
    """Whether PyTorch multiplies bfloat16 on ``device`` by instructions made for it: any GPU, and CPUs that have them.

    A CPU without AVX-512 takes 10 to 100 times as long as in fp32; with AVX-512 alone, which only converts, it gains
    nothing.
    """
    if device.type != "cpu":
        return True
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
