"""The tests for a GPU, run on the stand-in: so that they are known to work before somebody has a GPU for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="engines are built with the export extra")


@pytest.mark.slow
def test_the_gpu_tests_pass_on_the_stand_in(tiny: Path) -> None:
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "double.plugin", "-rs", str(tests / "test_gpu.py")]
    small = {"PARVIS_GPU_BUNDLE": str(tiny), "PARVIS_GPU_REPEATS": "1", "PARVIS_GPU_STRESS": "2"}
    path = os.pathsep.join([str(tests), str(tests / "runtime"), *sys.path])
    run = subprocess.run(
        command, env=os.environ | small | {"PYTHONPATH": path}, capture_output=True, text=True, cwd=tests.parent
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "skipped" not in run.stdout, run.stdout[-3000:]
    assert "GPU report" in run.stdout
    assert "median" in run.stdout


def test_without_a_gpu_the_gpu_tests_do_not_pass() -> None:
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", str(tests / "test_gpu.py")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests.parent, env=env)
    assert run.returncode == 1, run.stdout[-3000:]
    assert "no GPU: " in run.stdout
    assert "passed" not in run.stdout
