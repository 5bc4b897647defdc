"""The extras of ``pyproject.toml``: no combination installs two wheels that own the same files by accident."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer read TOML")
PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def packages(requirements: list[str]) -> set[str]:
    """Names of the packages that ``requirements`` bring, through the project's own extras."""
    names: set[str] = set()
    for requirement in requirements:
        own = re.fullmatch(r"parvis\[([^\]]+)\]", requirement)
        if own:
            for extra in own.group(1).split(","):
                names |= packages(EXTRAS[extra.strip()])
        else:
            names.add(re.split(r"[ \[<>=!~;]", requirement)[0])
    return names


def test_the_runtime_alone_brings_no_onnxruntime() -> None:
    assert packages(PROJECT["dependencies"]) == {"numpy", "pillow", "tqdm"}


def test_no_combination_brings_both_onnxruntimes_by_accident() -> None:
    others = [name for name in EXTRAS if name not in ("onnxruntime-gpu", "cpu")]
    both = {"onnxruntime", "onnxruntime-gpu"}
    for one in ("cpu", "onnxruntime-gpu"):
        for count in range(len(others) + 1):
            for chosen in itertools.combinations(others, count):
                brought = set().union(*(packages(EXTRAS[name]) for name in (one, *chosen)))
                if "dev" in chosen and one == "onnxruntime-gpu":
                    continue  # the development environment has the CPU's
                assert not both <= brought, (one, chosen)


def test_the_extra_brings_an_onnxruntime_gpu_that_cuda_ort_takes() -> None:
    from par_runtime.backends.ort.gpu import CUDA_SINCE

    newest = EXTRAS["onnxruntime-gpu"][0]
    assert newest == f"onnxruntime-gpu>={'.'.join(map(str, CUDA_SINCE))}; python_version >= '3.11'"


def test_every_extra_is_explained() -> None:
    text = (Path(__file__).parents[3] / "docs" / "install.md").read_text()
    for extra in EXTRAS:
        assert f"`{extra}`" in text, extra


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("onnxruntime", ["generate", "BUNDLE", "--label", "0", "--out", "x.png"], "parvis[cpu]"),
        ("onnxruntime", ["verify", "BUNDLE"], "parvis[cpu]"),
        ("onnx", ["build", "BUNDLE", "--target", "SM80"], "parvis[build,tensorrt-rtx]"),
        ("tensorrt_rtx", ["build", "BUNDLE", "--target", "SM80"], "parvis[tensorrt-rtx]"),
        ("torch", ["export", "--help"], "parvis[cpu,export]"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    tiny: Path, tmp_path: Path, missing: str, arguments: list[str], extra: str
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from par_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *(str(tiny) if a == "BUNDLE" else a for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("parvis: error: ")
    assert f"pip install '{extra}'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_imports_no_other_package() -> None:
    code = (
        "import sys\n"
        "for name in 'onnxruntime onnx torch tensorrt tensorrt_rtx cuda ml_dtypes numpy PIL'.split():\n"
        "    sys.modules[name] = None\n"
        "import par_runtime; from par_runtime.cli import main; sys.exit(main(['--help']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_comparing_backends_needs_no_onnxruntime() -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from par_runtime.verify import compare_logits"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
