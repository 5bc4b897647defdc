"""Turn checkpoints into bundles and bundles into engines: ``export(ExportRequest(...))``, ``build(BuildRequest(...))``.

See ``docs/design.md`` and ``docs/engines.md``.
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

__all__ = [
    "BuildError",
    "BuildRequest",
    "ExportError",
    "ExportRequest",
    "OutputError",
    "ParityError",
    "build",
    "export",
    "tune",
]
#: public name -> its module. They are imported when asked for: exporting needs torch, which building engines does not.
_MODULES = {
    "ExportRequest": "bundle",
    "export": "bundle",
    "BuildRequest": "engines.request",
    "build": "engines.build",
    "tune": "engines.tune",
    **dict.fromkeys(("BuildError", "ExportError", "OutputError", "ParityError"), "errors"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"par_export.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
