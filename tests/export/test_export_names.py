"""The package's public names, and the one convention of its verbs."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys

import pytest

import par_export


def test_importing_the_package_loads_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, par_export; par_export.BuildError; bad = {'torch', 'onnx', 'tensorrt_rtx'} & set(sys.modules)\n"
        "assert not bad, bad; par_export.BuildRequest; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    for name in par_export.__all__:
        assert getattr(par_export, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = par_export.nothing


@pytest.mark.parametrize("verb", ["export", "build", "tune"])
def test_verbs_have_one_convention(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"par_export.cli.{verb}")
    assert isinstance(module.parser(), argparse.ArgumentParser)
    assert callable(module.run)
    with pytest.raises(SystemExit) as stopped:
        module.main(["--no-such-option"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("parvis: error: ")
    assert error.count("\n") == 1
