"""The instruction sets of the C kernels that a test can ask for with PARVIS_NATIVE.

On x86-64 "sse" are the kernels of 64-bit ARM, whose vectors have 16 bytes too. On ARM there is one set, and in int8
"dots" without SMMLA and "neon" without SDOT.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from par_runtime.backends.native.compiled import KernelError
from par_runtime.backends.native.decoder import AMX, DOTS, bf16_form
from par_runtime.backends.native.decoding import decoder_file, open_decoder_library, why_not_bf16
from par_runtime.backends.native.library import has_tiles, library
from par_runtime.bundle import Bundle

X86 = platform.machine() in ("x86_64", "AMD64")
_SETS = ("avx512", "avx2", "sse") if X86 else ()
_LIBRARY = library()
_TAKEN = _LIBRARY.parvis_instructions().decode() if _LIBRARY else ""
#: Those below the one that this CPU takes by itself. One that the CPU lacks would be that one once more.
OTHERS = _SETS[_SETS.index(_TAKEN) + 1 :] if _TAKEN in _SETS else _SETS[1:]
_TILES = _LIBRARY is not None and has_tiles(_LIBRARY)
#: What this CPU takes by itself; "dots" where it has tiles beside dots, "avx512" where it has these, and the others.
EVERY = ("", *(("dots",) if _TILES else ()), *(("avx512",) if _TAKEN == "avx512" else ()), *OTHERS)
#: In int8 there are two more: AVX2 without dot products of bytes, and with them.
EVERY_INT8 = (*EVERY, *(name for name in (("avx2", "vnni") if X86 else ("dots", "neon")) if name not in EVERY))
_WHY = why_not_bf16(Bundle.open(Path(__file__).parents[1] / "models" / "demo", "none"))


def _form(least_exact: bool) -> str:
    """``bf16_form`` of the decoder in C; "" where it cannot be used here, as on a CPU without AVX2."""
    try:
        return bf16_form(open_decoder_library(decoder_file()), least_exact)
    except KernelError:
        return ""


_FORM = _form(least_exact=False)
#: The decoder computes in bf16 where it is asked to, with AMX or with dot products.
needs_bf16 = pytest.mark.skipif(_WHY is not None, reason=str(_WHY))
needs_amx = pytest.mark.skipif(_FORM != AMX, reason="no AMX for the decoder")
#: What the name of a decoder in bf16 ends with here.
IN_BF16 = "(avx512, amx, bf16)" if _FORM == AMX else "(avx512, bf16)"
#: A proof takes dot products, also where AMX is faster.
needs_dots = pytest.mark.skipif(_form(least_exact=True) != DOTS, reason="no dot products in bf16")

_DECODER = """
import sys
import numpy as np
from par_runtime.backends.native.decoding import NativeDecoder
from par_runtime.bundle import Bundle
from par_runtime.loaded import LoadedFiles
decoder = NativeDecoder(LoadedFiles(Bundle.open(sys.argv[1])), 2, sys.argv[5])
assert sys.argv[4] in decoder.name
np.save(sys.argv[3], decoder.run(np.load(sys.argv[2])))
"""


def decoded_by(
    instructions: str,
    bundle: Path,
    tokens: NDArray[Any],
    folder: Path,
    precision: str = "fp32",
    name: str | None = None,
) -> NDArray[np.uint8]:
    """What the decoder in C makes of ``tokens``, in a process of its own: the set is chosen when it is loaded.

    ``name``: what the decoder's name must have; default the set's.
    """
    np.save(folder / "tokens.npy", tokens)
    places = (bundle, folder / "tokens.npy", folder / "pixels.npy")
    command = [sys.executable, "-c", _DECODER, *map(str, places), instructions if name is None else name, precision]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PARVIS_NATIVE": instructions}
    subprocess.run(command, env=environment, check=True)
    pixels: NDArray[np.uint8] = np.load(folder / "pixels.npy")
    return pixels
