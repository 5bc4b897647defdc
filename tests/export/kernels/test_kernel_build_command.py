"""``parvis build --engine kernels``: its output, its errors, Ctrl-C, what it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
        (["--images", "0"], "'0': expected a number of images from 1 to 256"),
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
