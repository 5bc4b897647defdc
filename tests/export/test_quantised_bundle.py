"""Bundles with quantised matrices: what is stored, what is copied, what PyTorch and ONNX Runtime make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from par_export.errors import ExportError
from par_export.quantised import can_quantise, nearest, quantised_with, stored_scales, write_bundle
from par_export.restored import StoredWeights, read_weights, stored_table
from par_runtime.bundle import HELDOUT, WEIGHTS, Bundle
from par_runtime.dtypes import DTYPE
from par_runtime.pipeline import Pipeline
from par_runtime.quantised import SCALE, Quantised


def write(source: Path, out: Path, dtype: str, group: int = 32, kept: tuple[str, ...] = (), **how: Any) -> Path:
    """The bundle at ``source`` with all but the ``kept`` matrices rounded to the nearest codes."""
    bundle = Bundle.open(source)
    quantise = quantised_with(dtype, group, DTYPE[bundle.precision], kept)
    return write_bundle(bundle, out, quantise, {"weights": dtype, "group": group}, say=lambda _: None, **how)


@pytest.mark.parametrize(("dtype", "ends"), [("int8", (-127, 127)), ("int4", (-8, 7))])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_the_nearest_codes_are_at_most_half_a_scale_away(dtype: str, ends: tuple[int, int], stored: str) -> None:
    matrix = np.random.default_rng(0).normal(0, 0.02, (128, 6)).astype(np.float32)
    matrix[64:] = 0
    quantised = nearest(matrix, dtype, 64, stored)
    assert quantised.scales.shape == (2, 6)
    assert (stored_scales(quantised.scales, stored) == quantised.scales).all()
    assert (quantised.scales > 0).all()
    codes = quantised.codes[:64]
    assert ((codes.min(0) == ends[0]) | (codes.max(0) == ends[1])).all()
    assert codes.min() == ends[0]
    assert not quantised.codes[64:].any()
    # Rounding a scale to bf16 makes it up to 0.4 % smaller, so the largest number may be cut by 0.004 * 127 codes.
    beyond = ends[1] * (0.004 if stored == "bfloat16" else 5e-4)
    assert (np.abs(matrix - quantised.dequantised())[:64] <= max(0.5001, beyond) * quantised.scales[0]).all()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", "int4"), pytest.param("bf16", "int8", marks=pytest.mark.slow)]
)
def test_a_quantised_bundle_passes_the_gate_and_its_self_test(
    bundles: dict[str, Path], tmp_path: Path, precision: str, dtype: str
) -> None:
    source = Bundle.open(bundles[precision])
    out = Bundle.open(write(bundles[precision], tmp_path / "q", dtype, kept=("layers.0.w2",)), verify="full")
    assert out.quantised == dtype
    assert out.precision == precision
    assert out.calibration is not None
    assert (out.calibration.kept, out.calibration.source) == (("layers.0.w2",), source.hash)
    assert out.weight_bytes < 0.6 * source.weight_bytes
    stored, before = read_weights(out), read_weights(source)
    table = stored_table(out)
    quantised = {name for name, at in table.entries.items() if at.dtype == dtype}
    assert quantised == {name.removesuffix(SCALE) for name in table.entries if name.endswith(SCALE)}
    assert len(quantised) == 4 * out.model["n_layers"]  # with the head, without the one that is kept
    for name, tensor in before.items():
        if name in quantised:
            wanted = nearest(tensor.float().numpy(), dtype, 32, DTYPE[precision]).dequantised()
            np.testing.assert_array_equal(stored[name].numpy(), wanted, err_msg=name)
        else:
            assert (table.entries[name].dtype, stored[name].tolist()) == (
                str(tensor.dtype).removeprefix("torch."),
                tensor.tolist(),
            ), name
    assert len(out.selftest["tokens"][0]) == out.n_tokens
    assert out.parity["phases"].keys() == source.parity["phases"].keys()
    assert out.parity["decoder"] == source.parity["decoder"]
    with Pipeline.load(out.path, device="cpu-ort") as pipeline:  # the self-test's tokens, on the runtime's own sessions
        assert pipeline.generate(0, seed=1).images.shape[0] == 1


def test_decide_may_add_to_the_calibration_or_stop(bundles: dict[str, Path], tmp_path: Path) -> None:
    seen = []

    def decide(bundle: Bundle) -> dict[str, Any]:
        seen.append((bundle.quantised, bundle.path.parent))
        return {"report": {"kl": 0.01}, "arithmetic": "int8"}

    out = Bundle.open(write(bundles["fp16"], tmp_path / "q", "int8", gate=False, decide=decide), verify="full")
    assert out.calibration is not None
    assert (out.calibration.report, out.calibration.arithmetic) == ({"kl": 0.01}, "int8")
    assert seen == [("int8", tmp_path)]

    def refuse(_: Bundle) -> dict[str, Any]:
        raise ExportError("too far")

    with pytest.raises(ExportError, match="too far"):
        write(bundles["fp16"], tmp_path / "other", "int8", gate=False, decide=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_codes_that_do_not_fit_the_calibration_are_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = Bundle.open(bundles["fp16"])

    def other_group(_: str, matrix: np.ndarray) -> Quantised:
        return nearest(matrix, "int8", 64)

    def other_scales(_: str, matrix: np.ndarray) -> Quantised:
        return nearest(matrix, "int8", 32, "float32")

    for quantise, why in ((other_group, "the calibration needs"), (other_scales, "numbers of float16")):
        with pytest.raises(ValueError, match=why):
            write_bundle(bundle, tmp_path / "q", quantise, {"weights": "int8", "group": 32})
    assert not list(tmp_path.iterdir())


def test_a_quantised_bundle_is_no_source(bundles: dict[str, Path], tmp_path: Path) -> None:
    source = Bundle.open(bundles["fp16"])
    path = write(bundles["fp16"], tmp_path / "q", "int8", gate=False)
    with pytest.raises(ExportError, match=f"are int8 already; give the bundle .* from .*{source.hash[:12]}"):
        write(path, tmp_path / "again", "int4")


def test_matrices_that_have_no_whole_groups_are_kept(tiny: Path, tmp_path: Path) -> None:
    assert not can_quantise((24, 64), "int8", 32)
    assert not can_quantise((32, 63), "int4", 32)
    out = Bundle.open(write(tiny, tmp_path / "q", "int8"))
    assert out.calibration is not None
    assert set(out.calibration.kept) == {
        name for name, at in Bundle.open(tiny).weights.items() if len(at.shape) == 2 and at.shape[0] % 32
    } - {"embed", "cos", "sin"}
    manifest = json.loads((out.path / "manifest.json").read_text())
    assert manifest["parity"]["greedy"]["tokens"]


def test_tensors_are_copied_byte_for_byte(bundles: dict[str, Path], tmp_path: Path) -> None:
    source, out = Bundle.open(bundles["bf16"]), Bundle.open(write(bundles["bf16"], tmp_path / "q", "int8", gate=False))
    before, after = (StoredWeights(b.path / WEIGHTS, stored_table(b)) for b in (source, out))
    same = [name for name, at in before.table.entries.items() if after.table.entries[name].dtype == at.dtype]
    assert "tokenizer.codebook" in same or any("codebook" in name for name in same)
    for name in same:
        assert b"".join(after.parts(name, 1000)) == b"".join(before.parts(name)), name
        assert after.table.entries[name].offset % (4096 if after.table.entries[name].length >= 65536 else 64) == 0


def test_held_out_images_go_along(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "models" / "demo"
    path = write(demo, tmp_path / "q", "int8", gate=False)
    assert Bundle.open(path, verify="full").files[HELDOUT] == Bundle.open(demo).files[HELDOUT]
    assert (path / HELDOUT).read_bytes() == (demo / HELDOUT).read_bytes()
