"""Quantised bundles on ONNX Runtime: which products are fused, in what they multiply, what they read and take."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from par_export.quantised import quantised_with, write_bundle
from par_export.random_bundle import write_family
from par_model.config import PARConfig
from par_runtime.backends.ort.cpu import OrtBackend
from par_runtime.backends.ort.sessions import INT8_FUSED_SINCE, OPSET24_SINCE, fuses, set_arithmetic, version
from par_runtime.bundle import Bundle
from par_runtime.dtypes import DTYPE, Float
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule, rows_of

CONFIG = PARConfig(dim=512, n_layers=2, n_heads=8, vocab_size=512, n_classes=4, grid=(1, 4, 4), group_size=4)
PRODUCTS = 4 * CONFIG.n_layers + 1
#: A process that opens the step of a bundle, runs a call and prints by how many bytes its peak memory grew.
GROWTH = """
import sys
import numpy as np
from par_runtime.backends.ort.cpu import OrtBackend
from par_runtime.bundle import Bundle
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule
from par_runtime.system import peak_bytes
bundle, before = Bundle.open(sys.argv[1]), peak_bytes()
backend = OrtBackend(bundle, 1)
schedule = Schedule.of(bundle, [1], image_settings(bundle, 1))
call, batch, ids, write = next(schedule.walk(np.zeros((1, bundle.n_tokens), np.int64)))
backend.step(batch, ids, write, schedule.noise[:, call.positions])
print(peak_bytes() - before)
"""
needs_fused_int8 = pytest.mark.skipif(version() < INT8_FUSED_SINCE, reason="needs onnxruntime 1.25")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "fp16", "int8-32" and so on: one model as it was exported, and quantised, by dtype and group."""
    folder = tmp_path_factory.mktemp("family")
    out = {}
    for precision, variants in (
        ("fp16", (("int8", 32), ("int4", 64), ("int4", 128))),
        ("fp32", (("int4", 32),)),
        ("bf16", (("int8", 128), ("int4", 64))),
    ):
        out[precision] = write_family(CONFIG, [4], folder, name=precision, precision=precision)[4]
        bundle = Bundle.open(out[precision])
        for dtype, group in variants:
            name = f"{precision}-{dtype}-{group}"
            quantise = quantised_with(dtype, group, DTYPE[precision])
            out[name] = write_bundle(
                bundle, folder / name, quantise, {"weights": dtype, "group": group}, say=lambda _: None
            )
    return out


def optimised(bundle: Bundle, graph: str, arithmetic: str, folder: Path) -> tuple[Counter[str], set[int]]:
    """Operators of the graph as a session runs it, and the accuracy levels of its fused products."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    set_arithmetic(options, bundle, arithmetic)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    for key, value in (("file_name", "optimised.data"), ("min_size_in_bytes", "1024")):
        options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    ort.InferenceSession(bundle.path / f"{graph}.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimised.onnx", load_external_data=False).graph.node
    levels = {a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if "accuracy" in a.name}
    return Counter(node.op_type for node in nodes), levels


@pytest.mark.parametrize("graph", ["step", "step_opset23"])
@pytest.mark.parametrize(
    ("name", "arithmetic", "level"),
    [
        pytest.param("fp16-int8-32", "int8", 4, marks=needs_fused_int8),
        pytest.param("bf16-int8-128", "int8", 4, marks=needs_fused_int8),
        ("fp16-int4-64", "int8", 4),
        ("fp16-int4-128", "fp32", 1),
        ("fp32-int4-32", "bf16", 1),
        ("bf16-int4-64", "fp32", 1),
    ],
)
def test_every_product_is_fused(
    family: dict[str, Path], tmp_path: Path, graph: str, name: str, arithmetic: str, level: int
) -> None:
    if graph == "step" and version() < OPSET24_SINCE:
        pytest.skip("needs onnxruntime 1.25")
    bundle = Bundle.open(family[name])
    assert fuses(bundle, arithmetic)
    operators, levels = optimised(bundle, graph, arithmetic, tmp_path)
    assert operators["MatMulNBits"] == PRODUCTS
    assert not operators["MatMul"] + operators["DequantizeLinear"]
    assert levels == {level}


def test_int8_without_rounded_activations_is_widened_once(family: dict[str, Path], tmp_path: Path) -> None:
    """There is no kernel for it: fused, every call would dequantise all weights anew."""
    bundle = Bundle.open(family["fp16-int8-32"])
    assert not fuses(bundle, "fp32")
    operators, _ = optimised(bundle, "step_opset23", "fp32", tmp_path)
    assert operators["MatMul"] == PRODUCTS
    assert not operators["MatMulNBits"] + operators["DequantizeLinear"]


def logits(bundle: Bundle, arithmetic: str) -> tuple[Float, OrtBackend]:
    """The logits [N,V] of one guided image, teacher-forced with zeros."""
    backend = OrtBackend(bundle, 1, arithmetic=arithmetic)
    schedule = Schedule.of(bundle, [1], image_settings(bundle, 1, guidance=2.0, greedy=True))
    out = []
    with rows_of(backend, schedule):
        for call, batch, ids, write in schedule.walk(np.zeros((1, bundle.n_tokens), np.int64)):
            backend.step(batch, ids, write, schedule.noise[:, call.positions])
            out.append(backend.logits(batch, ids, write)[0])
    backend.close()
    return np.concatenate(out), backend


@pytest.mark.parametrize("name", ["fp16-int8-32", "fp16-int4-64"])
def test_what_is_rounded_and_what_is_read(family: dict[str, Path], name: str) -> None:
    bundle = Bundle.open(family[name])
    exact, backend = logits(bundle, "fp32")
    assert backend.info.computes == "fp32"
    codes = {"int8": 1.0, "int4": 0.5}[bundle.quantised or ""]
    scales = 4 / int(name.rpartition("-")[2])
    assert backend.info.weight_bytes == pytest.approx(4 if bundle.quantised == "int8" else codes + scales, rel=0.01)
    rounded, backend = logits(bundle, "int8")
    if version() >= INT8_FUSED_SINCE:
        assert backend.info.computes == "int8"
        assert backend.info.weight_bytes == pytest.approx(codes + scales, rel=0.01)  # gains are in fp32
        error = np.abs(rounded - exact).max() / np.abs(exact).max()
        assert 1e-5 < error < backend.tie


def test_fused_weights_are_not_held_in_fp32_too(family: dict[str, Path]) -> None:
    """Growth of memory while the step is opened and run, against what its weights take in fp32."""
    weights = sum(int(np.prod(at.shape)) for at in Bundle.open(family["fp16"]).weights.values())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    grown = {
        name: int(subprocess.check_output([sys.executable, "-c", GROWTH, family[name]], env=environment))
        for name in ("fp16", "fp16-int4-64")
    }
    assert grown["fp16"] > 4 * weights
    assert grown["fp16-int4-64"] < grown["fp16"] - 3 * weights
