"""What ``parvis build --engine kernels`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from par_export.engines.cache import DEFAULT_LIMIT_BYTES
from par_runtime.system import cache_folder

#: What to do where there is no GPU to build for.
NAME_A_TARGET = "; name the GPU to build for, for instance --target SM90 for an H100 (kernels are built without one)"
PRECISIONS = ("fp16", "bf16")  #: that the step's kernels compute in
#: What they do not compute in -> why
NARROW = {
    "fp8": "GPUs of SM80 and SM86 have no matrix units for fp8, and no report has proven fp8 activations harmless",
    "int8": "no report has proven int8 activations harmless: those of class and learnable tokens are far from others",
}
DECODER_PRECISIONS = ("fp16", "fp32")  #: fp32 multiplies in TF32


@dataclass(frozen=True)
class KernelsRequest:
    """Which engines of kernels to build: one for each of ``targets``, "SM90" and the like, or "local".

    ``precision`` None is the bundle's; ``decoder_precision`` None is fp16 where the export checked it, else fp32.
    ``workers``: processes that compile; None: as many as there are cores.
    """

    bundle: Path
    targets: tuple[str, ...]
    precision: str | None = None
    images: tuple[int, ...] = (1, 2, 4, 8)
    decoder_precision: str | None = None
    workers: int | None = None
    out: Path | None = None  #: where engines are put, one folder per bundle; None: see ``engines/place.py``
    use_cache: bool = True
    cache_folder: Path | None = field(default_factory=cache_folder)  #: None: a user without a home; no cache then
    cache_limit_bytes: int = DEFAULT_LIMIT_BYTES
