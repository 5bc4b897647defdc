"""The names that ``import par_runtime`` offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import par_runtime
from par_runtime import batcher, bundle, errors, pipeline, request, result, schedule

PUBLIC = {
    "Batcher": batcher.Batcher,
    "Bundle": bundle.Bundle,
    "BundleError": errors.BundleError,
    "BusyError": errors.BusyError,
    "CudaError": errors.CudaError,
    "EngineError": errors.EngineError,
    "Pipeline": pipeline.Pipeline,
    "RequestError": errors.RequestError,
    "Result": result.Result,
    "Schedule": schedule.Schedule,
    "Settings": request.Settings,
}


def test_public_names_are_those_of_their_modules_and_listed() -> None:
    assert set(par_runtime.__all__) == {*PUBLIC, "__version__"}
    assert set(par_runtime.__all__) <= set(dir(par_runtime))
    for name, wanted in PUBLIC.items():
        assert getattr(par_runtime, name) is wanted
    with pytest.raises(AttributeError, match="module 'par_runtime' has no attribute 'Image'"):
        par_runtime.Image  # noqa: B018


def test_the_package_and_its_errors_import_without_numpy() -> None:
    code = "import sys; sys.modules['numpy'] = None; import par_runtime; dir(par_runtime); par_runtime.CudaError"
    subprocess.run([sys.executable, "-c", code], check=True)
