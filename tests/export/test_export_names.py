"""The package's public names, and the one convention of its verbs."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import par_export
from par_export.cli import common
from par_export.errors import OutputError
from par_export.staging import staging
from par_runtime.cli import dispatch


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


@pytest.mark.skipif(sys.platform != "linux", reason="names of files that are no text")
def test_a_bundle_is_not_written_where_it_could_not_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / os.fsdecode(b"m\xfcller")
    assert dispatch.main(["export", "--checkpoint", "no.pt", "--tokenizer", "none", "--out", str(out)]) == 2
    assert "its path is not UTF-8, and ONNX Runtime opens no other files; give another --out" in capsys.readouterr().err
    assert not out.exists()


def test_a_write_that_finds_no_room_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large") as caught, staging(tmp_path / "out", force=False):
        raise OSError(errno.EFBIG, "File too large")  # as of an open file
    assert caught.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_command_made_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second() -> None:
        with staging(out, force=False) as part:
            (part / "manifest.json").write_text("second")
            out.mkdir()
            (out / "manifest.json").write_text("first")

    with pytest.raises(OutputError, match="was made by another command meanwhile"):
        second()
    assert (out / "manifest.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_of_a_report_names_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "report" / "page.html"))

    assert common.guarded(work, out=tmp_path / "out") == 2
    assert f"no space left on the disk of {tmp_path}/report/page.html" in capsys.readouterr().err


def test_memory_that_is_missing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def of_torch() -> int:
        return len(torch.empty(2**50, dtype=torch.uint8))

    def of_numpy() -> int:
        return len(np.empty(2**50, np.uint8))

    for work in (of_torch, of_numpy):
        assert common.guarded(work) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"parvis: error: not enough memory \(.+\); free some, or run it where .+\n", error)
    with pytest.raises(RuntimeError, match="another"):
        common.guarded(lambda: (_ for _ in ()).throw(RuntimeError("another")))
