"""TensorRT on this GPU: is a plan accepted, and what is said where it is not?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from par_export.card.lines import EXPECTED, Emit
from par_export.engines.build import build
from par_export.engines.request import BuildRequest
from par_export.engines.tune import tune
from par_runtime.backends.engines import ENGINES
from par_runtime.pipeline import Pipeline


def check_plan(spec: Mapping[str, Any], emit: Emit) -> None:
    """Build a plan of the bundle ``path`` for ``target`` ("local", "SM90") and load it; ``name`` begins the checks.

    Each way that it can be refused is a check with the sentence that was said, so nothing raises.
    """
    path, name, target = Path(spec["path"]), spec["name"], spec["target"]

    def attempt(what: str, work: Any) -> bool:
        emit("begin", name=f"{name}: {what}")
        began = time.monotonic()
        try:
            text = str(work())
            passed = True
        except EXPECTED as error:
            text, passed = f"{type(error).__name__}: {error}", False
        emit("check", name=f"{name}: {what}", passed=passed, text=f"{text} ({time.monotonic() - began:.1f} s)")
        return passed

    request = BuildRequest(path, target, spec["precision"], tuple(spec["images"]), use_cache=False)

    def loads() -> str:
        pipeline = Pipeline.load(path, spec["device"], selftest=False)
        pipeline.generate([0], seed=1, guidance=1.5)
        text = f"{pipeline.backend.info.name}, launched by {getattr(pipeline.backend, 'capturing', '')}"
        pipeline.close()
        return text

    if attempt(f"a plan is built for {target}", lambda: build(request, lambda _: None).name):
        attempt(f"a plan for {target} loads and makes an image", loads)


def tune_plans(spec: Mapping[str, Any], emit: Emit) -> None:
    """Every form of a plan of the bundle ``path``, timed; what is said of it becomes notes."""
    path = Path(spec["path"])
    emit("begin", name=f"{spec['name']}: tune")
    request = BuildRequest(path, "local", spec["precision"], (1,), use_cache=False)
    kept = tune(request, index=spec["index"], say=lambda text: emit("note", text=f"{spec['name']}: tune: {text}"))
    emit("check", name=f"{spec['name']}: tune", passed=(path / ENGINES / kept.name).is_dir(), text=kept.name)
