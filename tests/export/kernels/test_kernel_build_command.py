"""``parvis build --engine kernels``: its output, its errors, Ctrl-C, what it needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import child
from par_export.cli import build as build_cli

pytest.importorskip("triton", reason="needs triton: pip install '.[kernels-build]'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "shared"], "--engines: an engine of kernels is always shared"),
        (["--sampling", "plain"], "--sampling: kernels sample exactly, with every top-k and top-p"),
        (["--attention", "grouped"], "--attention: kernels have one form of attention"),
        (["--visible", "mask"], "--visible: kernels read as many keys as each row has"),
        (["--norm", "before"], "--norm: kernels always apply a norm to the product behind it"),
        (["--reproducible"], "--reproducible: kernels are compiled without timing anything"),
        (["--precision", "fp32"], "precision fp32: kernels compute in fp16 or bf16; give one of these$"),
        (["--decoder-precision", "bf16"], "decoder precision bf16: the decoder's kernels compute in fp16 or fp32"),
        (["--target", "SM80,SM75"], "target 'SM75': engines of kernels are built for SM80, .*SM120, or local; before"),
        (["--target", "local"], "target local needs a GPU: .*; name the GPU to build for, for instance --target SM90"),
        (["--target", "SM\u0668\u0660"], "'SM..': expected SM and a compute capability"),
        (["--target", "sm080"], "'sm080': expected SM and a compute capability"),
        (["--list", "/tmp"], "/tmp is a folder; give a file name"),
        (["--list", "/dev/null"], "/dev/null is a device or a pipe; give the name of a file"),
        (["--out", "/proc/parvis"], "/proc/parvis: no such file or folder; check the name, or choose another place"),
        (["--images", "0"], "'0': expected a number of images from 1 to 256"),
        (["--precision", "int8"], r"do not compute in int8: no report has proven .* \(parvis calibrate\)"),
        (["--precision", "fp8"], "do not compute in fp8: GPUs of SM80 and SM86 have no matrix units for fp8"),
        (["--engine", "cuda"], r"invalid choice: 'cuda' \(choose from '?tensorrt'?, '?kernels'?\)"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(
    tiny_copy: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = build_cli.main([str(tiny_copy), "--engine", "kernels", "--target", "SM80", *arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(f"^parvis: error: .*{message}", error)
    assert error.count("\n") == 1
    assert not (tiny_copy / "engines").exists()


def test_ctrl_c_ends_a_build_and_leaves_nothing(tiny_copy: Path) -> None:
    """The signal comes while kernels are being compiled, of whose number the bar is told."""
    code = (
        "import os, signal, sys; from par_export.cli import build as build_cli\n"
        "build_cli.PlanBar.__call__ = lambda self, what, _: 'kernel' in what and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(build_cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(tiny_copy), "--engine", "kernels", "--target", "SM80", "--no-cache"]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "parvis: stopped; nothing was written" in error
    assert not (tiny_copy / "engines").exists()


def test_a_missing_package_is_named_with_what_to_install(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("par_export.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.delitem(sys.modules, "par_export.engines.weights", raising=False)
    assert build_cli.main([str(tiny_copy), "--engine", "kernels", "--target", "SM80"]) == 2
    error = capsys.readouterr().err
    assert re.search("^parvis: error: --engine kernels needs ml_dtypes, which is not installed; .*install", error)
