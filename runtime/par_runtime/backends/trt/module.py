"""The one place that imports TensorRT: classic ``tensorrt``, or else ``tensorrt_rtx``. Both have the same Python API.

Classic TensorRT builds and tunes on the GPU it runs on. TensorRT-RTX builds for any named target, on a machine
without a GPU too, and compiles the kernels when a plan is first loaded.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from par_runtime.backends.engines import RTX as RTX
from par_runtime.errors import TensorRTMissingError, how_to_install
from par_runtime.late import importing

CLASSIC = "tensorrt"


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT: ``module`` has the API, ``name`` is "tensorrt" or "tensorrt_rtx"."""

    module: Any
    name: str
    version: str

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.name == RTX


def load(name: str | None = None) -> TensorRT:
    """Import TensorRT ``name``; without a name, classic TensorRT or else TensorRT-RTX. Raises TensorRTMissingError."""
    reasons = []
    for candidate in (CLASSIC, RTX) if name is None else (name,):
        try:
            with importing(candidate):
                module = importlib.import_module(candidate)
            version = str(module.__version__)
        except (ImportError, OSError, AttributeError) as error:
            # AttributeError: a package of that name without its libraries is an empty namespace.
            reasons.append(f"{candidate}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        return TensorRT(module, candidate, version)
    wanted = "TensorRT" if name is None else name
    extra = "tensorrt" if name == CLASSIC else "tensorrt-rtx"
    raise TensorRTMissingError(
        f"{wanted} cannot be imported ({'; '.join(reasons)}); {how_to_install(extra)}"
        + ("" if name else f" (on a data-centre GPU: {how_to_install('tensorrt')})")
    )
