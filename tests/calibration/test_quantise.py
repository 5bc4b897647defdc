"""Codes and scales: GPTQ against its obvious twin, against plain rounding on rows it has not seen, and what is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from par_calibration.errors import CalibrationError
from par_calibration.quantise.choice import How, check_groups, kept_names
from par_calibration.quantise.gptq import DAMPING, factor, gptq, hessian, order
from par_calibration.quantise.layers import Layers, by_gptq, errors
from par_calibration.quantise.scales import search, searched
from par_calibration.record.record import RecordOptions, maker_of, plan_of, record
from par_calibration.record.recording import Recording
from par_export.quantised import nearest, stored_scales
from par_export.restored import StoredWeights, stored_table
from par_runtime.bundle import WEIGHTS, Bundle, matrix_names
from par_runtime.dtypes import Float
from par_runtime.quantised import LEAST_CODE, MOST_CODE

DEMO = Path(__file__).parents[2] / "models" / "demo"


def correlated(rng: np.random.Generator, n: int, k: int) -> Float:
    """Rows [n,K] whose numbers depend on each other, and differ in size, as activations do."""
    mix = rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))[:, None]
    return (rng.standard_normal((n, k)) @ mix / np.sqrt(k)).astype(np.float32)


def obvious(matrix: Float, dtype: str, group: int, h: Float) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ as its paper derives it: after each row, the others move by the inverse of H without the rows that are
    done. Slow: a new inverse for each row.
    """
    k, n = matrix.shape
    taken = order(np.diagonal(h), group)
    damped = h.astype(np.float64) + DAMPING * np.diagonal(h).mean() * np.eye(k)
    w = matrix.astype(np.float64).copy()
    codes, scales = np.zeros((k, n), np.int8), np.zeros((k // group, n), np.float32)
    for at, row in enumerate(taken):
        left = taken[at:]
        if at % group == 0:
            block = left[:group]
            scales[row // group] = search(
                w[block].astype(np.float32), dtype, np.diagonal(h)[block].astype(np.float32), "float16"
            )
        scale = scales[row // group]
        codes[row] = np.clip(np.rint(w[row] / scale), LEAST_CODE[dtype], MOST_CODE[dtype])
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        w[left] -= inverse[:, :1] * ((w[row] - codes[row] * scale) / inverse[0, 0])
    return codes, scales


@pytest.mark.parametrize(("dtype", "group", "k"), [("int4", 32, 192), ("int8", 64, 192), ("int4", 128, 128)])
def test_gptq_does_what_its_obvious_twin_does(dtype: str, group: int, k: int) -> None:
    rng = np.random.default_rng(k + group)
    matrix = rng.standard_normal((k, 24)).astype(np.float32)
    h = hessian(correlated(rng, 600, k))
    fast = gptq(matrix, dtype, group, h, "float16")
    codes, scales = obvious(matrix, dtype, group, h)
    np.testing.assert_allclose(fast.scales, scales, rtol=2e-3)
    # A number in the middle between two codes may fall to either side, and then moves those behind it.
    assert (fast.codes == codes).mean() > 0.97
    assert np.abs(fast.codes.astype(int) - codes).max() <= 2


def test_the_factor_is_that_of_the_inverse() -> None:
    h = hessian(correlated(np.random.default_rng(1), 300, 130))
    upper = factor(h).astype(np.float64)
    damped = h.astype(np.float64) + DAMPING * np.diagonal(h).mean() * np.eye(130)
    assert (np.tril(upper, -1) == 0).all()
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(130), atol=2e-4)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_searched_scale_loses_less_than_the_largest_number_gives(dtype: str) -> None:
    rng = np.random.default_rng(3)
    block = rng.standard_normal((64, 50)).astype(np.float32)
    block[5] *= 8  # far larger than the rest, and of no importance
    importance = np.ones(64, np.float32)
    importance[5] = 0
    found, plain = searched(block, dtype, 64, importance, "float16"), nearest(block, dtype, 64)

    def loss(codes: Float) -> float:
        return float((importance[:, None] * np.square(codes - block)).sum())

    assert loss(found.dequantised()) < (0.8 if dtype == "int8" else 0.5) * loss(plain.dequantised())
    assert (stored_scales(found.scales, "float16") == found.scales).all()
    zero = searched(np.zeros((32, 4), np.float32), dtype, 32, np.ones(32, np.float32), "float16")
    assert not zero.codes.any()
    assert (zero.scales > 0).all()


@pytest.fixture(scope="module")
def demo_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Recording, Recording]:
    """What the demo multiplies: to calibrate with, and other images of other seeds to judge with."""
    bundle, made = Bundle.open(DEMO), []
    for seed, images in ((0, 6), (100, 2)):
        plan = plan_of(bundle, RecordOptions(images=images, samples=images * 256, seed=seed))
        recording = Recording(tmp_path_factory.mktemp("rows"), plan, bundle)
        recording.begin(False)
        record(recording, lambda: maker_of(bundle, 2))
        made.append(recording)
    return bundle, *made


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.8), ("int4", 0.75)])
def test_it_beats_plain_rounding_on_images_it_has_not_seen(
    demo_rows: tuple[Bundle, Recording, Recording], dtype: str, most: float
) -> None:
    """By a fifth and more (the geometric mean over matrices of every kind), and on none of them it is worse."""
    bundle, seen, unseen = demo_rows
    stored = StoredWeights(bundle.path / WEIGHTS, stored_table(bundle))
    how, ratios = How(dtype, 64, "float16"), []
    for name in ("layers.0.wqkv", "layers.3.wo", "layers.5.w13", "layers.1.w2", "output"):
        matrix = stored.tensor(name).float().numpy()
        off = []
        for quantised in (by_gptq(name, matrix, seen.rows(name), how), nearest(matrix, dtype, 64)):
            [error] = errors(name, matrix, quantised, unseen.rows(name), np.zeros(512, np.int64), ["all"])
            off.append(error.relative_error)
        ratios.append(off[0] / off[1])
    assert np.exp(np.mean(np.log(ratios))) < most
    assert max(ratios) < 1


def test_errors_are_those_of_each_phase(demo_rows: tuple[Bundle, Recording, Recording]) -> None:
    bundle, seen, _ = demo_rows
    stored = StoredWeights(bundle.path / WEIGHTS, stored_table(bundle))
    layers = Layers(seen, How("int4", 32, "float16"), {"output"})
    matrix = stored.tensor("layers.2.wo").float().numpy()
    quantised = layers("layers.2.wo", matrix)
    assert layers("output", stored.tensor("output").float().numpy()) is None
    assert quantised is not None
    assert [(e.name, e.phase) for e in layers.errors] == [
        ("layers.2.wo", phase) for phase in ("prefill", "sequential", "transition", "group")
    ]
    here = seen.about.phase == 2
    rows = seen.rows("layers.2.wo")[here]
    off = np.linalg.norm(rows @ quantised.dequantised() - rows @ matrix) / np.linalg.norm(rows @ matrix)
    assert layers.errors[2].relative_error == pytest.approx(off, rel=1e-3)


def test_what_stays_as_it_is() -> None:
    bundle = Bundle.open(DEMO)
    assert kept_names(bundle, ["head"]) == {"output"}
    assert kept_names(bundle, ["none"]) == set()
    assert kept_names(bundle, ["w2", "layers.1"]) == {
        *(f"layers.{i}.w2" for i in range(8)),
        *(f"layers.1.{kind}" for kind in ("wqkv", "wo", "w13")),
    }
    assert kept_names(bundle, ["layers.7.wo"]) == {"layers.7.wo"}
    for wrong in ("w1", "layers.8", "layers", "layers.0.w", "embed", "", "x" * 500, "layers.1.w2.x", "none "):
        with pytest.raises(CalibrationError, match=r"there are head, wqkv, .* layers\.0 to layers\.7") as caught:
            kept_names(bundle, ["head", wrong])
        assert len(str(caught.value)) < 400


def test_a_group_that_does_not_divide_is_refused(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    kept = kept_names(bundle, ["wqkv", "wo", "w13", "head"])
    check_groups(bundle, How("int8", 64, "float16"), kept)
    with pytest.raises(CalibrationError, match=r"16 rows of layers\.0\.wqkv; no other --group does; .* --keep wqkv,wo"):
        check_groups(bundle, How("int8", 64, "float16"), set())
    with pytest.raises(CalibrationError, match="--group 48: expected one of 32, 64, 128"):
        check_groups(bundle, How("int8", 48, "float16"), kept)
    with pytest.raises(CalibrationError, match="keeps every matrix"):
        check_groups(bundle, How("int8", 64, "float16"), matrix_names(bundle))
    from dataclasses import replace

    odd = replace(bundle.weights["layers.0.w2"], shape=(96, 16))
    other = replace(bundle, weights={**bundle.weights, "layers.0.w2": odd})
    with pytest.raises(CalibrationError, match=r"--group 64: does not divide the 96 rows.*--group 32 divides every"):
        check_groups(other, How("int8", 64, "float16"), kept)
