"""Run PAR bundles: ``Pipeline.load(path).generate(labels)``. Knows nothing of torch; see ``docs/design.md``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Bundle", "BundleError", "Pipeline", "RequestError", "Result", "__version__"]

if TYPE_CHECKING:
    from par_runtime.bundle import Bundle
    from par_runtime.errors import BundleError, RequestError
    from par_runtime.pipeline import Pipeline, Result


def __getattr__(name: str) -> Any:
    # Lazy, so that `parvis --help` and error messages do not wait for numpy and onnxruntime.
    if name in ("Bundle", "BundleError"):
        from par_runtime import bundle

        return getattr(bundle, name)
    if name in ("Pipeline", "RequestError", "Result"):
        from par_runtime import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
