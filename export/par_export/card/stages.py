"""The stages of a GPU's report, each a process of its own: ``python -m par_export.card.stages NAME SPEC``.

A kernel that reads where it must not, or never ends, takes its process with it. What that process had said before is
kept; the report goes on with the next stage. A stage writes JSON lines: ``check``, ``limit``, ``kernel``, ``product``
and ``note``, and ``begin`` before each check that could end it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from par_export.card.lines import Emit
from par_runtime.errors import CudaError
from par_runtime.metrics import finite

Spec = Mapping[str, Any]
#: name -> function of a spec that emits lines.
Stage = Callable[[Spec, Emit], None]


def driver_stage(spec: Spec, emit: Emit) -> None:
    """What is counted on of the driver of GPU ``index``; see ``card/driver.py``."""
    from par_export.card.driver import check_driver

    check_driver(spec, emit)


def driver_fault_stage(spec: Spec, emit: Emit) -> None:
    """A kernel that fails on GPU ``index``, which this process cannot use afterwards."""
    from par_export.card.driver import check_fault

    check_fault(spec, emit)


def driver_pytorch_stage(spec: Spec, emit: Emit) -> None:
    """The driver of GPU ``index`` beside PyTorch on ``torch``."""
    from par_export.card.driver import check_beside_pytorch

    check_beside_pytorch(spec, emit)


def ort_stage(spec: Spec, emit: Emit) -> None:
    """The bundle ``path`` on ONNX Runtime; see ``card/ort.py``."""
    from par_export.card.ort import check_ort

    check_ort(spec, emit)


def plan_stage(spec: Spec, emit: Emit) -> None:
    """A TensorRT plan of the bundle ``path``, built and loaded; see ``card/rtx.py``."""
    from par_export.card.rtx import check_plan

    check_plan(spec, emit)


def tune_stage(spec: Spec, emit: Emit) -> None:
    """Every form of a plan, timed."""
    from par_export.card.rtx import tune_plans

    tune_plans(spec, emit)


def limits_stage(spec: Spec, emit: Emit) -> None:
    """The limits of GPU ``index``, and of PyTorch's device ``torch``; sizes are given for a rehearsal without a GPU."""
    from par_export.card import limits
    from par_runtime.backends import cuda

    size = spec.get("copy_bytes", limits.COPY_BYTES)
    # Held until the end: PyTorch would find a context that was destroyed, which no program of CUDA's runtime meets.
    with cuda.Device.open(spec["index"]):
        limits.copies(spec["index"], emit, size)
        limits.launches(spec["index"], emit, spec.get("launches", limits.LAUNCHES))
        limits.reads(spec["torch"], emit, size)
        limits.matrices(spec["torch"], emit, spec.get("side", limits.MATRIX))


def kernels_stage(spec: Spec, emit: Emit) -> None:
    """Every kernel of the bundle ``path``, which has an engine; see ``card/kernels.py``."""
    from par_export.card.kernels import check_kernels

    check_kernels(spec, emit)


def images_stage(spec: Spec, emit: Emit) -> None:
    """Whole images of the bundle ``path``, which has an engine; see ``card/images.py``."""
    from par_export.card.images import check_images

    check_images(spec, emit)


def products_stage(spec: Spec, emit: Emit) -> None:
    """Single products, each in several shapes; see ``card/product_times.py``."""
    from par_export.card.product_times import time_products

    time_products(spec, emit)


def memory_stage(spec: Spec, emit: Emit) -> None:
    """The memory of the device over many images."""
    from par_export.card.images import check_memory

    check_memory(spec, emit)


def one_image_stage(spec: Spec, emit: Emit) -> None:
    """One image, launched kernel by kernel: what ``compute-sanitizer`` watches. It has nothing to report itself."""
    from par_export.card.images import make_one

    make_one(spec)


STAGES: dict[str, Stage] = {
    "driver": driver_stage,
    "driver_fault": driver_fault_stage,
    "driver_pytorch": driver_pytorch_stage,
    "limits": limits_stage,
    "kernels": kernels_stage,
    "products": products_stage,
    "images": images_stage,
    "memory": memory_stage,
    "one_image": one_image_stage,
    "ort": ort_stage,
    "plan": plan_stage,
    "tune": tune_stage,
}


def main(argv: list[str]) -> int:
    """Run the stage ``argv[0]`` with the JSON object ``argv[1]``; its lines go to standard output, all else aside."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the report ends this
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)

        def emit(kind: str, **fields: Any) -> None:
            print(json.dumps(finite({"kind": kind} | fields), allow_nan=False), file=lines, flush=True)

        try:
            STAGES[argv[0]](json.loads(argv[1]), emit)
        except Exception as error:
            if not isinstance(error, CudaError):
                traceback.print_exc()
            emit("failed", text=f"{type(error).__name__}: {str(error) or 'without a message'}"[:2000])
            return 1
        emit("done")
        return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
