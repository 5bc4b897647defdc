"""What the gate holds in memory: packed weights where they fit, and the same logits with and without packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from conftest import golden_config
from par_export.cli import export as cli
from par_export.gate import model as model_gate
from par_export.gate import runner
from par_export.gate.runner import run_step
from par_export.graphs import step
from par_export.graphs.step import COMPATIBLE_STEP
from par_export.graphs.writer import WeightTable

GB = 10**9


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bundle counts as a large one, and this machine has much memory."""
    monkeypatch.setattr(model_gate, "PACK_FROM_BYTES", 0)
    monkeypatch.setattr(model_gate, "available_bytes", lambda: 100 * GB)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("graph", [None, COMPATIBLE_STEP])
def test_packed_weights_give_the_same_logits(
    golden: dict[str, dict[str, Any]], bundles: dict[str, Path], precision: str, graph: str | None
) -> None:
    config = golden_config(golden["par_n4_grid8"])
    labels, guidance = np.array([1, 2]), np.array([1.0, 2.0], np.float32)
    tokens, plain = run_step(bundles[precision], config, labels, guidance, None, graph, groups=2)
    same, packed = run_step(bundles[precision], config, labels, guidance, None, graph, groups=2, pack=True)
    assert np.abs(packed - plain).max() < 1e-5 * np.abs(plain).max()
    assert (same == tokens).all()


def test_weights_fit_by_their_size_in_fp32(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {p: WeightTable.read(bundles[p] / "step.onnx") for p in ("fp32", "fp16", "bf16")}
    needs = sum(stored.length for stored in tables["fp32"].entries.values()) + model_gate.MARGIN_BYTES
    for table in tables.values():
        monkeypatch.setattr(model_gate, "available_bytes", lambda: needs)
        assert model_gate.fits(table)
        monkeypatch.setattr(model_gate, "available_bytes", lambda: needs - 1)
        assert not model_gate.fits(table)


@pytest.fixture
def good(checkpoints: dict[str, Path], tmp_path: Path) -> list[str]:
    where = ["--checkpoint", checkpoints["par_n4_grid8"], "--tokenizer", checkpoints["vq"], "--out", tmp_path / "out"]
    return [*map(str, where), "--heads", "4", "--grid", "8"]


def packs(session: ort.InferenceSession) -> bool:
    """Whether ONNX Runtime was told nothing against packing the weights of ``session``."""
    try:
        return str(session.get_session_options().get_session_config_entry("session.disable_prepacking")) != "1"
    except RuntimeError:  # there is no such entry
        return True


def test_sessions_pack_their_weights_where_they_are_asked_to(bundles: dict[str, Path]) -> None:
    path = bundles["fp32"] / f"{COMPATIBLE_STEP}.onnx"
    assert not packs(runner.session(path))
    assert not packs(runner.session(path, keep=False))
    assert packs(runner.session(path, pack=True))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs of the sessions that packed their weights."""
    names: list[str] = []
    real = runner.session

    def spy(path: Path, pack: bool = False) -> Any:
        made = real(path, pack)
        if packs(made):
            names.append(path.name)
        return made

    monkeypatch.setattr(runner, "session", spy)
    return names


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("precision", "room"),
    [
        ("fp32", True),
        *(pytest.param("fp16", room, marks=pytest.mark.slow) for room in (True, False)),
        pytest.param("bf16", True, marks=pytest.mark.slow),
    ],
)
def test_a_whole_export_of_a_large_model(
    bundles: dict[str, Path],
    good: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    room: bool,
    packed: list[str],
) -> None:
    if not room:
        monkeypatch.setattr(model_gate, "available_bytes", lambda: 0)
    assert cli.main([*good, "--precision", precision]) == 0
    newest = "step.onnx" if runner.runnable_opset() == 24 else "step_opset23.onnx"
    assert packed == ([newest] if room else [])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    mine, usual = (json.loads((b / "manifest.json").read_text()) for b in (tmp_path / "out", bundles[precision]))
    assert mine["selftest"] == usual["selftest"]
    assert mine["files"] == usual["files"]


@pytest.mark.usefixtures("large")
def test_a_failed_gate_leaves_nothing(
    good: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    packed: list[str],
) -> None:
    monkeypatch.setattr(step, "NORM_EPS", 0.1)
    assert cli.main([*good, "--precision", "fp16"]) == 1
    assert packed
    assert "Nothing was published" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
