"""What a report of a GPU is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from par_export.card.plan import BASELINES, BATCHES, CODES, MODELS, Model
from par_export.card.prepare import MakeEngine
from par_export.card.samples import SAMPLES, Sample
from par_export.quantised import Codes
from par_model.config import PARConfig, VQConfig, named
from par_runtime.bench.run import GPU_MINUTES
from par_runtime.bench.suites.gpu import DEFAULT_PARTS

STRESS_IMAGES = 200
REPETITIONS = 5
COLD_BYTES = 400 * 10**6  #: several times a GPU's L2 cache


@dataclass(frozen=True)
class CardOptions:
    """What to report. ``parts``: of ``bench.suites.gpu.PARTS``. ``checked``: bundles whose whole images are checked;
    ``samples``: those whose kernels are; ``models`` and ``baselines``: those whose rows are made, by our engines and in
    PyTorch; ``images``: the batches of these rows; ``engines``: a folder of ready engines.

    Of the largest bundle of ``checked`` whole images are checked with quantised weights too, in each form of ``codes``.
    ``engines`` holds a folder for each bundle, by its name, with the engines of it in ``engines/``. ``torch``:
    PyTorch's device; ``groups``: how many calls of the last phase ``verify`` compares; ``limits``: other sizes for
    :func:`par_export.card.stages.limits_stage`; ``cold_bytes``: of weights that single products read until they read
    the first again. ``published``: name, shape and decoder of the model that ONNX Runtime
    and TensorRT run beside the largest of ``checked``; ``predicted``: whether operators must lie where the docs say.
    """

    device: int = 0
    parts: Sequence[str] = DEFAULT_PARTS
    minutes: float = GPU_MINUTES
    checked: Sequence[Path] = ()
    samples: Sequence[Sample] = SAMPLES
    codes: Sequence[Codes] = CODES
    models: Sequence[Model] = MODELS
    baselines: Sequence[Model] = BASELINES
    engines: Path | None = None
    repetitions: int = REPETITIONS
    images: Sequence[int] = BATCHES
    twins: bool = True
    work: Path | None = None
    torch: str = "cuda:0"
    groups: int | None = 8
    stress: int = STRESS_IMAGES
    limits: Mapping[str, int] = field(default_factory=dict)
    build: MakeEngine | None = None
    cold_bytes: int = COLD_BYTES
    published: tuple[str, PARConfig, VQConfig | None] = ("PAR-L", named("L"), VQConfig())
    predicted: bool = True


def bundles_to_check() -> list[Path]:
    """The bundles of the checkout that this package runs in: the demo and the tiny one; none where it is installed."""
    root = Path(__file__).resolve().parents[3]
    return [path for path in (root / "tests" / "data" / "tiny", root / "models" / "demo") if path.is_dir()]
