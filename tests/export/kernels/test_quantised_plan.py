"""Steps with quantised matrices, launch by launch, against the bundle's own graph on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_step_plan import Both

from par_export.quantised import quantised_with, write_bundle
from par_runtime.bundle import Bundle


def test_it(bundles: dict[str, Path], tmp_path: Path) -> None:
    source = Bundle.open(bundles["fp16"])
    print(source.model)
    for dtype, group in (("int8", 32), ("int4", 32), ("int8",64), ("int4",64)):
        out = write_bundle(source, tmp_path / f"{dtype}-{group}", quantised_with(dtype, group, "float16"), {"weights": dtype, "group": group}, gate=False, say=lambda _: None)
        bundle=Bundle.open(out)
        print({n: a.dtype for n,a in bundle.weights.items() if a.dtype.startswith("int")}.__len__())
        both = Both(out, 1, "fp16")
        ids = np.array([[both.bundle.class_base], [both.bundle.no_class]])
        both.check(both.inputs(ids, np.zeros(2, np.int64), 1, 0), 1)
