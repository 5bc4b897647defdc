"""The instruction sets of the C kernels that a test can ask for with PARVIS_NATIVE, beside the one that this CPU takes.

On x86-64 "sse" are the kernels of 64-bit ARM, whose vectors have 16 bytes too. On ARM there is one set.
"""

from __future__ import annotations

import platform

OTHERS = ("avx2", "sse") if platform.machine() in ("x86_64", "AMD64") else ()
EVERY = ("", "avx512", *OTHERS) if OTHERS else ("",)
