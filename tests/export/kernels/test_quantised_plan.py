"""Steps with quantised matrices, launch by launch, against the bundle's own graph on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_step_plan import Both

from par_export.kernels.targets import TARGETS
from par_export.quantised import quantised_with, write_bundle
from par_export.random_bundle import write_family
from par_model.config import PARConfig
from par_runtime.bundle import Bundle
from par_runtime.dtypes import DTYPE


def quantised(source: Path, out: Path, dtype: str, group: int, kept: tuple[str, ...] = ()) -> Path:
    bundle = Bundle.open(source)
    quantise = quantised_with(dtype, group, DTYPE[bundle.precision], kept)
    return write_bundle(bundle, out, quantise, {"weights": dtype, "group": group}, say=lambda _: None, gate=False)


@pytest.mark.parametrize(
    ("stored", "dtype", "group", "precision", "target"),
    [("fp32", "int8", 64, "fp16", "SM90"), ("bf16", "int4", 32, "bf16", "SM80"), ("fp16", "int4", 64, "fp16", "SM90")],
)
def test_a_call(
    stored: str, dtype: str, group: int, precision: str, target: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Scales in fp32, bf16 and fp16; every matrix is quantised."""
    both = Both(quantised(bundles[stored], tmp_path / "q", dtype, group), 1, precision, TARGETS[target])
    packed = {spec.source for spec in both.planned.specs.values() if spec.source.startswith("pack.")}
    assert packed == {"pack.codes", "pack.scales"}
    ids = np.array([[both.bundle.class_base], [both.bundle.no_class]])
    both.check(both.inputs(ids, np.zeros(2, np.int64), 1, 0), 1)


def test_layers_that_differ_have_launches_of_their_own(bundles: dict[str, Path], tmp_path: Path) -> None:
    kept = ("layers.0.w2", "layers.1.wqkv", "layers.2.wo", "output")
    both = Both(quantised(bundles["fp16"], tmp_path / "q", "int8", 32, kept), 2, "fp16")
    step = both.planned.programs["step"]
    layers = both.bundle.model["n_layers"]
    assert (step.layers, step.profiles[2].layer) == (0, ())
    assert [len(step.profiles[2].before), len(step.profiles[2].after)] == [1 + 5 * layers, 2]
    sources = [both.planned.specs[launch.kernel] for launch, _ in step.launches(2)]
    bits = [dict(spec.constants)["BITS"] for spec in sources if "BITS" in dict(spec.constants)]
    assert bits == [8, 8, 8, 0, 0, 8, 8, 8, 8, 0, 8, 8, 0]
    rng = np.random.default_rng(0)
    for write, real in ((0, 1), (1, 4)):
        both.check(both.inputs(rng.integers(0, 512, (4, real)), np.full(4, write), real, write), real)


def test_heads_that_the_caches_pad(tmp_path: Path) -> None:
    """Heads of 100 numbers in 104: groups of wo are rows as they are stored, with those of padding."""
    config = PARConfig(dim=400, n_layers=1, n_heads=4, vocab_size=70, n_classes=3, grid=(1, 4, 4), group_size=4)
    source = write_family(config, [4], tmp_path / "random", name="padded", precision="fp16")[4]
    both = Both(quantised(source, tmp_path / "q", "int8", 32), 1, "fp16")
    stored = {name: at.dtype for name, at in both.bundle.weights.items()}
    assert (stored["layers.0.wo"], stored["layers.0.wqkv"]) == ("int8", "float16")  # 400 has no whole groups
    wo = next(
        s for s in both.planned.specs.values() if dict(s.constants).get("BITS") and "K_STRIDE" in dict(s.constants)
    )
    assert dict(wo.constants)["K"] == 4 * 104
    rng = np.random.default_rng(0)
    for write, real in ((0, 1), (1, 4)):  # unwritten slots hold NaN until then
        both.check(both.inputs(rng.integers(0, 70, (2, real)), np.full(2, write), real, write), real)
