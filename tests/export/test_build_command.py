"""``parvis build``: its output, its errors, Ctrl-C."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import child
from par_export.cli import build as build_cli

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'")


def test_the_command_prints_the_report_or_json(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny_copy), "--target", "sm80", "--max-images", "2"]
    assert build_cli.main([*arguments, "--kernels"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"tiny: step, decoder for SM80 with tensorrt_rtx .*, fp16, sampling topk, in .* s, peak memory \d+ MB", out
    )
    assert re.search(r"step +1 +2/2 fused +4/4 +2/2 +\d+ +10 ", out)
    assert "_gemv_mha" in out
    assert build_cli.main([*arguments, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert [p["images"] for p in entry["report"]["plans"]["step"]["profiles"]] == [1, 2]
    assert entry["report"]["plans"]["step"]["form"] == {
        "grouped": True,
        "lengths": True,
        "norm_after": False,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "A100"], "'A100': expected SM and a compute capability"),
        (["--target", "SM70"], "target 'SM70': tensorrt_rtx .* builds for SM75, SM80, .* or local"),
        (["--target", "local"], r"target local needs a GPU: .*; name the GPU to build for, for instance --target SM80"),
        (
            ["--target", "SM75", "--max-images", "1", "--no-cache"],
            r"no fp32 matrix products for Turing \(SM75\) \(layer decoder/.*\): add --decoder-precision fp16$",
        ),
        (
            ["--target", "SM75", "--max-images", "1", "--no-cache", "--precision", "fp32"],
            r"for Turing \(SM75\) \(layer step/.*\): add --precision fp16 --decoder-precision fp16$",
        ),
        (["--target", "SM80", "--max-images", "0"], "'0': expected a number of images from 1 to 256"),
        (["--target", "SM80", "--precision", "int3"], "invalid choice: 'int3'"),
        (["--target", "SM80", "--sampling", "dynamic"], "invalid choice: 'dynamic'"),
        (["--target", "SM80", "--cache-gb", "inf"], "'inf': expected gigabytes, 0 or more"),
        (["--target", "SM80", "--list", "NONE/x.json"], "--list NONE/x.json: no folder NONE; give a file in one"),
        ([], "required: --target"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(
    tiny_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = build_cli.main([str(tiny_copy), *arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(message, error)
    assert error.startswith("parvis: error: ")
    assert error.count("\n") == 1
    assert not (tiny_copy / "engines").exists()


def test_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_cli.main([str(tmp_path / "none"), "--target", "SM80"]) == 2
    assert "no such folder; give the path of a bundle" in capsys.readouterr().err


def test_ctrl_c_ends_a_build_and_leaves_nothing(tiny_copy: Path) -> None:
    """The signal comes from the builder's own progress, so it always falls into the build."""
    code = (
        "import os, signal, sys; from par_export.cli import build as build_cli\n"
        "build_cli.PlanBar.__call__ = lambda self, *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(build_cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(tiny_copy), "--target", "SM80", "--no-cache"]
    started = time.monotonic()
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "parvis: stopped; nothing was written" in error
    assert not (tiny_copy / "engines").exists()
    assert time.monotonic() - started < 60


def test_a_build_needs_no_torch(tiny_copy: Path) -> None:
    code = (
        "import sys; from par_export.cli import build as build_cli\n"
        "code = build_cli.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(tiny_copy), "--target", "SM80", "--quiet", "--images", "1"]
    subprocess.run(command, check=True)
