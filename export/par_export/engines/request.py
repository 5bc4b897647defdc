"""What ``parvis build`` is asked for. Its options can be shown without onnx and TensorRT, so neither is needed here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from par_export.engines.cache import DEFAULT_LIMIT_BYTES
from par_export.errors import BuildError
from par_runtime.backends.tails import Tail
from par_runtime.system import cache_folder

#: What to do where there is no GPU to build for.
NAME_A_TARGET = "; name the GPU to build for, for instance --target SM80 for an A100 (TensorRT-RTX builds without one)"
MODES = ("shared", "per-phase")


@dataclass(frozen=True)
class BuildRequest:
    """What to build. None is the bundle's own setting, or that of :meth:`Form.of` for the query length;
    of ``sampling``, ``engines.build.tail_of``."""

    bundle: Path
    target: str  #: "SM80" and the like, or "local"
    precision: str | None = None
    images: tuple[int, ...] = (1, 2, 4, 8)
    mode: str = "shared"
    sampling: Tail | None = None
    grouped: bool | None = None
    lengths: bool | None = None
    norm_after: bool = False
    decoder_precision: str = "fp32"
    out: Path | None = None  #: where engines are put, one folder per bundle; None: see :func:`place`
    label: str = ""  #: further part of the folder's name, for engines side by side
    use_cache: bool = True
    cache_folder: Path | None = field(default_factory=cache_folder)  #: None: a user without a home; no cache then
    cache_limit_bytes: int = DEFAULT_LIMIT_BYTES
    reproducible: bool = False


def check_local_gpu(index: int = 0, what: str = "target local", otherwise: str = "") -> None:
    """Raise BuildError where this machine has no GPU ``index``: before anything else is found missing, since installing
    that would not help. ``what`` needs the GPU; ``otherwise``: what to do without one."""
    from par_runtime.backends import cuda  # as late as its numpy

    if not 0 <= index < cuda.device_count():
        why = cuda.why_no_device() or f"there is no GPU {index}"
        raise BuildError(f"{what} needs a GPU: {why}{otherwise}")


def local_gpu(index: int = 0, otherwise: str = NAME_A_TARGET) -> tuple[str, str]:
    """Compute capability ("SM80") and name of GPU ``index`` of this machine. Raises BuildError."""
    from par_runtime.backends import cuda

    check_local_gpu(index, otherwise=otherwise)
    with cuda.Device.open(index) as device:
        return f"SM{device.capability[0]}{device.capability[1]}", device.name


MOST_IMAGES = 8  #: of a batch, where nothing is said


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Batch sizes to build for: 1, 2, 4, ... and ``most`` itself. Other sizes are padded to the next larger one."""
    return tuple(sorted({most, *(2**i for i in range(most.bit_length()) if 2**i < most)}))
