"""Known GPUs by their data sheets, and the least time that each allows a model: predicted, never measured."""

from __future__ import annotations

from dataclasses import dataclass

from par_runtime.cost.architecture import Architecture, model_name
from par_runtime.cost.bound import bound
from par_runtime.cost.work import image_work


@dataclass(frozen=True)
class DataSheet:
    """A GPU as its maker describes it: memory bandwidth, and the peak of dense fp16 matrices summed in fp32."""

    gb_s: float
    tflop_s: float


DATA_SHEETS = {
    "A100-40": DataSheet(1555, 312),
    "A100-80": DataSheet(2039, 312),
    "H100": DataSheet(3350, 989),
    "H200": DataSheet(4800, 989),
    "L4": DataSheet(300, 121),
    "RTX 4090": DataSheet(1008, 165),
}


@dataclass(frozen=True)
class Prediction:
    """The least time of a batch on a GPU by data sheet: no measurement, and no promise that it can be reached.

    The model's calls in fp16 arithmetic, without decoding. ``weight_bytes``: of one parameter, as it is read.
    """

    bundle: str
    model: str
    n: int
    images: int
    guided: bool
    gpu: str
    gb_s: float
    tflop_s: float
    bound_ms: float
    by: str
    weight_bytes: float


def predictions(
    architecture: Architecture,
    bundle: str,
    n: int,
    images: int,
    guided: bool,
    weight_bytes: float = 2,
    number_bytes: float = 2,
) -> list[Prediction]:
    """One prediction for each GPU of :data:`DATA_SHEETS`.

    ``weight_bytes``: of one parameter, ``number_bytes``: of one number of the cache.
    """
    work = image_work(architecture, images, guided, weight_bytes, number_bytes)
    name = model_name(architecture)
    out = []
    for gpu, sheet in DATA_SHEETS.items():
        least = bound(work, sheet.gb_s, sheet.tflop_s)
        limits = (sheet.gb_s, sheet.tflop_s, least.ms, least.by)
        out.append(Prediction(bundle, name, n, images, guided, gpu, *limits, weight_bytes))
    return out


def bandwidth_bounds_ms(architecture: Architecture, weight_bytes: float, number_bytes: float) -> dict[str, float]:
    """GPU -> the least time of one guided image in ms, by memory bandwidth alone and without decoding.

    ``weight_bytes``: of one parameter, ``number_bytes``: of one number of the cache.
    """
    work = image_work(architecture, 1, True, weight_bytes, number_bytes)
    return {gpu: bound(work, sheet.gb_s, None).ms for gpu, sheet in DATA_SHEETS.items()}
