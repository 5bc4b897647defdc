"""Calibrations that are wrong on purpose: the report refuses each, and no bundle appears. A good one passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from par_calibration.report import Options, Report, compare
from par_calibration.run import OverBudgetError
from par_export.quantised import nearest, stored_scales, write_bundle
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Float
from par_runtime.quantised import MOST_CODE, Quantised

DEMO = Path(__file__).parents[2] / "models" / "demo"
GROUP = 64
FEW = Options(images=4, samples=0, threads=1)  # 1,024 positions


def calibrate(out: Path, quantise: Any, options: Options = FEW) -> Report:
    """What ``parvis calibrate`` does with these codes and scales. Raises OverBudgetError where they are refused."""
    original = Bundle.open(DEMO)
    made = []

    def decide(candidate: Bundle) -> dict[str, Any]:
        made.append(compare(original, candidate, options))
        lines = made[0].exceeded()
        if lines:
            raise OverBudgetError(made[0], lines)
        return {"report": made[0].summary()}

    calibration = {"weights": "int8", "group": GROUP}
    write_bundle(original, out, quantise, calibration, decide=decide, gate=False, say=lambda _: None)
    return made[0]


def good(_: str, matrix: Float) -> Quantised:
    return nearest(matrix, "int8", GROUP)


def doubled(layer: str) -> Any:
    """All scales of one matrix are twice what they are."""

    def quantise(name: str, matrix: Float) -> Quantised:
        q = nearest(matrix, "int8", GROUP)
        return Quantised(q.dtype, q.codes, 2 * q.scales) if name == layer else q

    return quantise


def clipped(name: str, matrix: Float) -> Quantised:
    """Scales so small that the largest weights of every block are cut: what attention sinks are made of."""
    blocks = matrix.reshape(-1, GROUP, matrix.shape[1])
    most = MOST_CODE["int8"]
    scales = stored_scales(0.8 * np.abs(blocks).max(1) / most, "float16")
    codes = np.clip(np.rint(blocks / scales[:, None]), -most, most).astype(np.int8)
    return Quantised("int8", codes.reshape(matrix.shape), scales)


def head_of_four_bits(one_scale: bool) -> Any:
    """The head has 15 values for each column, or for all of it: one scale, repeated for each group."""

    def quantise(name: str, matrix: Float) -> Quantised:
        if name != "output":
            return nearest(matrix, "int8", GROUP)
        largest = np.abs(matrix).max() if one_scale else np.abs(matrix).max(0)
        scale = stored_scales(np.full(matrix.shape[1:], largest / 7, np.float32), "float16")
        codes = np.clip(np.rint(matrix / scale), -7, 7).astype(np.int8)
        return Quantised("int8", codes, np.repeat(scale[None], len(matrix) // GROUP, 0))

    return quantise


HEAD_DOUBLED = doubled("output")


def test_a_good_calibration_passes_with_room(tmp_path: Path) -> None:
    report = calibrate(tmp_path / "int8", good)
    measures, limits = report.measures(), report.budget.limits
    assert measures["top1"] > 0.982  # of 1,024 positions, so by chance 0.4 points away from the 99 % of a whole report
    for key in ("kl", "kl_p95", "kl_inputs", "likelihood"):
        assert measures[key] < 0.5 * limits[key], key
    made = Bundle.open(tmp_path / "int8")
    assert made.calibration is not None
    assert made.calibration.report["measures"]["kl"] == pytest.approx(measures["kl"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "quantise"),
    [
        ("scales of one layer doubled", doubled("layers.3.wo")),
        pytest.param("scales of the first matrix doubled", doubled("layers.0.wqkv"), marks=pytest.mark.slow),
        pytest.param("scales of the head doubled", HEAD_DOUBLED, marks=pytest.mark.slow),
        pytest.param("sinks clipped", clipped, marks=pytest.mark.slow),
        pytest.param("head of four bits, a scale for each", head_of_four_bits(one_scale=False), marks=pytest.mark.slow),
        pytest.param("head of four bits, one scale", head_of_four_bits(one_scale=True), marks=pytest.mark.slow),
    ],
)
def test_sabotage_is_refused_and_nothing_is_published(tmp_path: Path, name: str, quantise: Any) -> None:
    with pytest.raises(OverBudgetError, match=r"at most .* times as much.*; try ") as error:
        calibrate(tmp_path / "int8", quantise)
    beyond = error.value.lines
    assert any(line.startswith("mean KL divergence") for line in beyond)
    # Twice the logits have the same most probable code: there the likelihood says it.
    others = ("held-out log-likelihood",) if quantise is HEAD_DOUBLED else ("top-1 agreement",)
    assert any(line.startswith(others) for line in beyond)
    assert len(beyond) >= 3  # with margin: no single measure decides
    assert not list(tmp_path.iterdir())
