"""Plans of quantised bundles, built by TensorRT-RTX for an A100: what they keep, what their report says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest

from par_export.engines import weights as engine_weights
from par_export.engines.build import build
from par_export.engines.request import BuildRequest
from par_export.errors import BuildError
from par_export.graphs.writer import WeightTable
from par_export.quantised import quantised_with, write_bundle
from par_export.random_bundle import write_family
from par_model.config import PARConfig
from par_runtime.backends.engines import Engine
from par_runtime.bundle import Bundle, Stored
from par_runtime.errors import BundleError
from par_runtime.quantised import SCALE

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'")
CONFIG = PARConfig(dim=256, n_layers=2, n_heads=4, vocab_size=512, n_classes=4, grid=(1, 4, 4), group_size=4)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in fp16, and quantised to int8 (its head is kept) and int4."""
    folder = tmp_path_factory.mktemp("family")
    out = {"fp16": write_family(CONFIG, [4], folder, name="fp16", precision="fp16")[4]}
    for dtype, kept in (("int8", ("output",)), ("int4", ())):
        quantise = quantised_with(dtype, 32, "float16", kept)
        calibration = {"weights": dtype, "group": 32}
        bundle = Bundle.open(out["fp16"])
        out[dtype] = write_bundle(bundle, folder / dtype, quantise, calibration, say=lambda _: None)
    return out


def built(path: Path, precision: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The report of the step's plan of the bundle at ``path``, and the lines that a build prints."""
    lines: list[str] = []
    folder = build(BuildRequest(path, "SM80", precision, images=(1,), use_cache=False), lines.append)
    bundle = Bundle.open(path)
    engine = Engine.open(folder, bundle, verify="full")
    assert engine.precision == (precision or bundle.precision)
    return json.loads((folder / "engine.json").read_text())["report"]["plans"]["step"], lines


def test_plans_keep_int8_and_int4(family: dict[str, Path]) -> None:
    whole, lines = built(family["fp16"])
    assert not any("unpack" in line for line in lines)
    for dtype, precision, unpacked in (("int8", None, 8), ("int4", None, 0), ("int4", "bf16", 0)):
        report, lines = built(family[dtype], precision)
        assert report["weights_bytes"] == pytest.approx(report["bundle_weights_bytes"], rel=0.02)
        step = Bundle.open(family[dtype]).weight_bytes / 2
        embed = (CONFIG.vocab_size + CONFIG.n_classes + 4) * CONFIG.dim * 2
        assert report["weights_bytes"] - embed < 1.1 * step * (whole["weights_bytes"] - embed)
        assert report["profiles"][0]["unpack"] == unpacked
        assert report["profiles"][0]["total"] == whole["profiles"][0]["total"] + unpacked
        told = [line for line in lines if "kernels of a call only unpack quantised weights" in line]
        assert len(told) == (unpacked > 0)


@pytest.mark.parametrize(("scale", "ok"), [(1e-9, True), (2000.0, False)])
def test_scales_are_converted_so_that_every_code_fits(tmp_path: Path, scale: float, ok: bool) -> None:
    """To fp16: what is smaller than its smallest number is not zero, and the largest code times a scale is finite."""
    file, codes = tmp_path / "weights.data", np.ones((32, 2), np.int8)
    scales = np.full((1, 2), scale, np.float32)
    file.write_bytes(codes.tobytes() + scales.tobytes())
    table = WeightTable(
        {"w": Stored("int8", (32, 2), 0, 64), "w" + SCALE: Stored("float32", (1, 2), 64, 8)},
    )
    if not ok:
        with (
            pytest.raises(BuildError, match=r"weight 'w' reaches 2.54e\+05, beyond float16; give --precision"),
            engine_weights.weights_in(file, table, "float16", tmp_path),
        ):
            pass
        return
    with engine_weights.weights_in(file, table, "float16", tmp_path) as (converted, _):
        at = converted.entries["w" + SCALE]
        assert (at.dtype, converted.entries["w"].dtype) == ("float16", "int8")
        got = np.fromfile(tmp_path / ".weights", np.float16, 2, offset=at.offset)
        assert got.tolist() == [2.0**-24] * 2


def test_a_graph_that_is_quantised_otherwise_than_its_manifest_is_refused(
    family: dict[str, Path], tmp_path: Path
) -> None:
    """A bundle of a graph and weights that its manifest, which has no table of weights, does not tell of."""
    path = shutil.copytree(family["fp16"], tmp_path / "mixed", ignore=shutil.ignore_patterns("engines"))
    files, other = dict(Bundle.open(path).files), Bundle.open(family["int8"])
    for name in ("group.onnx", "weights.data"):
        shutil.copyfile(other.path / name, path / name)
        files[name] = other.files[name]
    manifest = json.loads((path / "manifest.json").read_text()) | {"files": files, "weights": {}}
    hostile.write(path, hostile.sealed(manifest))
    with pytest.raises(BundleError, match=r"layers.0.wqkv is int8 in its graphs and nowhere in its manifest"):
        build(BuildRequest(path, "SM80", images=(1,)), lambda _: None)
