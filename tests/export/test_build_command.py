"""``parvis build``: its output, its errors, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
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
        (["--target", "SM80", "--max-images", "-1,4"], "'-1,4': expected a number of images from 1 to 256"),
        (["--target", "SM80", "--images", "-1,4"], "'-1': expected a number of images from 1 to 256"),
        (["--target", "SM80", "--precision", "int3"], "invalid choice: 'int3'"),
        (["--target", "SM80", "--sampling", "dynamic"], "invalid choice: 'dynamic'"),
        (["--target", "SM80", "--cache-gb", "inf"], "'inf': expected gigabytes, 0 or more"),
        (["--target", "SM80", "--list", "NONE/x.json"], "--list NONE/x.json: no folder NONE; give a file in one"),
        (["--target", "SM80", "--list", "x", "--out", "x"], "x/engine: lies in x, another output of this command"),
        (
            ["--target", "SM80", "--images", "1", "--max-images", "3"],
            "--max-images: not allowed with argument",
        ),
        (
            ["--target", "SM80", "--images", "1", "--max-images", "8"],
            "--max-images: not allowed with argument",
        ),
        (["--target", "SM80", "--no-cache", "--cache-dir", "x"], "--cache-dir: --no-cache uses no cache; leave one of"),
        (["--target", "SM80", "--no-cache", "--cache-gb", "40"], "--cache-gb: --no-cache uses no cache; leave one of"),
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


def test_all_targets_are_checked_before_the_first_is_built(
    tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_cli.main([str(tiny_copy), "--target", "SM80,SM999", "--out", str(tmp_path / "new" / "engines")]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.match(r"parvis: error: target 'SM999': tensorrt_rtx .* builds for SM75, SM80, .* or local\n$", error)
    assert not (tmp_path / "new").exists()


def test_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_cli.main([str(tmp_path / "none"), "--target", "SM80"]) == 2
    assert "no such folder; give the path of a bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "where", "code"),
    [
        (signal.SIGINT, "progress", 130),
        (signal.SIGTERM, "parser", 143),
        pytest.param(signal.SIGTERM, "progress", 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "parser", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_build_and_leaves_nothing(tiny_copy: Path, sent: int, where: str, code: int) -> None:
    """It comes while TensorRT calls Python, which it does to log and to tell its progress, where an exception would be
    lost or end the process."""
    program = (
        "import os, sys; from par_export.cli import build as build_cli; from par_export.engines import builder\n"
        "from par_runtime.cli import dispatch\n"
        "sent, where = int(sys.argv[1]), sys.argv[2]\n"
        "def told(*_): os.kill(os.getpid(), sent)\n"
        "if where == 'progress': build_cli.PlanBar.__call__ = told\n"
        "def logger(trt, real=builder.make_logger):\n"
        "    log = real(trt)\n"
        "    if where == 'parser': type(log).log = told\n"
        "    return log\n"
        "builder.make_logger = logger\n"
        "sys.exit(dispatch.main(['build', *sys.argv[3:]]))"
    )
    options = [str(tiny_copy), "--target", "SM80", "--no-cache"]
    with child(
        [sys.executable, "-c", program, str(int(sent)), where, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        out, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "parvis: stopped; nothing was written" in error if code == 130 else "stopped" not in error
    assert "Traceback" not in error
    assert "SM80 with" not in out  # what the end of a build says
    assert not (tiny_copy / "engines").exists()


def test_a_build_needs_no_torch(tiny_copy: Path) -> None:
    code = (
        "import sys; from par_export.cli import build as build_cli\n"
        "code = build_cli.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(tiny_copy), "--target", "SM80", "--quiet", "--images", "1"]
    subprocess.run(command, check=True)
