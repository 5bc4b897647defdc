"""Turn checkpoints into bundles and bundles into engines: ``export(ExportRequest(...))``, ``build(BuildRequest(...))``
for TensorRT, ``build_kernels(KernelsRequest(...))`` for kernels of our own.

See ``docs/design.md``, ``docs/engines.md`` and ``docs/kernels.md``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import par_runtime as _par_runtime  # noqa: F401, before onnxruntime, whose usage data it switches off

if TYPE_CHECKING:
    from par_export.bundle import ExportRequest, export
    from par_export.engines.build import build
    from par_export.engines.request import BuildRequest
    from par_export.engines.tune import tune
    from par_export.errors import BuildError, ExportError, OutputError, ParityError
    from par_export.kernels.build import build_kernels
    from par_export.kernels.request import KernelsRequest
    from par_export.kernels.tune import tune_kernels

__all__ = [
    "BuildError",
    "BuildRequest",
    "ExportError",
    "ExportRequest",
    "KernelsRequest",
    "OutputError",
    "ParityError",
    "build",
    "build_kernels",
    "export",
    "tune",
    "tune_kernels",
]
#: public name -> its module. They are imported when asked for: exporting needs torch, which building engines does not.
_MODULES = {
    "ExportRequest": "bundle",
    "export": "bundle",
    "BuildRequest": "engines.request",
    "build": "engines.build",
    "tune": "engines.tune",
    "KernelsRequest": "kernels.request",
    "build_kernels": "kernels.build",
    "tune_kernels": "kernels.tune",
    **dict.fromkeys(("BuildError", "ExportError", "OutputError", "ParityError"), "errors"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"par_export.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
