"""The recipe's last step: from the weights that a GPU trained to bundles that ship, and a sheet of all of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import golden_config, golden_weights
from par_model.transformer import PAR
from par_runtime.bundle import Bundle

RECIPE = Path(__file__).parents[2] / "models/recipe"
CLASSES = 4


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """``gpu_bundles.py``."""
    before = list(sys.path)
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module("gpu_bundles")
    sys.path[:] = before
    del sys.modules["gpu_bundles"]


@pytest.fixture
def results(golden: dict[str, dict[str, Any]], small_vq: Any, tmp_path: Path) -> Path:
    """What ``gpu.py`` leaves: three small models in halves with golden weights, their tokenizer, held-out codes."""
    folder = tmp_path / "results"
    folder.mkdir()
    for n in (1, 4, 16):
        config = replace(golden_config(golden["par_n4_grid8"]), group_size=n, n_classes=CLASSES)
        state = {key: value.half() for key, value in golden_weights(PAR(config)).state_dict().items()}
        names = [f"class {i}" for i in range(CLASSES)]
        content = {"model": state, "config": asdict(config) | {"kind": "par"}, "class_names": names}
        torch.save(content, folder / f"model-n{n}.pt")
    vq = {"model": small_vq.state_dict(), "config": asdict(small_vq.config) | {"kind": "vq"}}
    torch.save(vq, folder / "tokenizer.pt")
    codes = np.random.default_rng(0).integers(0, 512, (8, 8, 8)).astype(np.uint16)
    np.savez(
        folder / "val.npz",
        codes=codes,
        labels=np.arange(8, dtype=np.uint8) % CLASSES,
        class_names=np.array([f"class {i}" for i in range(CLASSES)]),
    )
    return folder


@pytest.mark.slow
def test_three_bundles_and_a_sheet(
    recipe: ModuleType, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(results), "--work", str(tmp_path / "work"), "--out", str(out)]
    options = "--group 32 --generated 0 --images 4 --samples 512 --budget top1=0.9 --quiet"
    assert recipe.main([*command, "--calibrate-options", options]) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    for n, name, calls in ((4, "demo", 19), (1, "demo-n1", 64), (16, "demo-n16", 19)):
        bundle = Bundle.open(out / name, verify="full")
        assert (bundle.name, bundle.quantised) == (name, "int8")
        assert "heldout.npz" in bundle.files
        assert (bundle.defaults.guidance, bundle.defaults.top_p) == (1.5, 0.95)
        assert f"| n = {n} | {calls} | " in printed
    with Image.open(out / "siblings.png") as sheet:
        assert sheet.size == (2 * CLASSES * 16, 2 * (3 * (12 + 2 * 16 + 8) - 8))
    assert recipe.main([*command, "--calibrate-options", options, "--most-mb", "0.01"]) == 1
    assert "--most-mb 0.01 allows less" in capsys.readouterr().err


def test_results_that_are_not_there_are_one_line(
    recipe: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert recipe.main([str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 1
    assert "gpu_bundles.py: no bundle demo, demo-n1, demo-n16" in capfd.readouterr().err
