"""Run PAR bundles: ``Pipeline.load(path).generate(labels)``. Imports no torch; see ``docs/design.md``."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from par_runtime.late import importing

__version__ = "0.1.0"
__all__ = [
    "Batcher",
    "Bundle",
    "BundleError",
    "BusyError",
    "CudaError",
    "EngineError",
    "Pipeline",
    "RequestError",
    "Result",
    "Schedule",
    "Settings",
    "__version__",
]

if TYPE_CHECKING:
    from par_runtime.batcher import Batcher
    from par_runtime.bundle import Bundle
    from par_runtime.errors import BundleError, BusyError, CudaError, EngineError, RequestError
    from par_runtime.pipeline import Pipeline
    from par_runtime.request import Settings
    from par_runtime.result import Result
    from par_runtime.schedule import Schedule

#: public name -> the module that defines it
_MODULES = {
    "Batcher": "batcher",
    "Bundle": "bundle",
    "BundleError": "errors",
    "BusyError": "errors",
    "CudaError": "errors",
    "EngineError": "errors",
    "Pipeline": "pipeline",
    "RequestError": "errors",
    "Result": "result",
    "Schedule": "schedule",
    "Settings": "request",
}


# ONNX Runtime 1.32 sends usage data to its makers, keeps an id of the machine in the user's cache folder, and prints a
# line of its own where it cannot. It reads this when it is imported; whoever wants it sets it to 0 before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Nothing is printed unless the program sets up logging: loggers are "par_runtime" and its modules.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    # Imported at the first use, so that `parvis --help` and error messages do not wait for numpy and onnxruntime.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_MODULES[name]}"
    with importing(module):
        return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
