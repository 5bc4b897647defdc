"""The extras of ``pyproject.toml``: no combination installs two wheels that own the same files by accident."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from par_runtime.cli.dispatch import VERBS
from par_runtime.errors import how_to_install, requirements

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
    ("missing", "arguments", "packages"),
    [
        ("onnxruntime", ["generate", "BUNDLE", "--label", "0", "--out", "x.png"], "'onnxruntime>="),
        ("onnxruntime", ["verify", "BUNDLE"], "'onnxruntime>="),
        (
            "uvicorn",
            ["serve", "BUNDLE"],
            "'onnxruntime>=1.23' 'starlette>=0.46' 'uvicorn>=0.34' 'prometheus-client>=0.21'",
        ),
        ("onnx", ["build", "BUNDLE", "--target", "SM80"], "'onnx>=1.20' 'ml_dtypes>=0.5' 'tensorrt-rtx>=1.7' "),
        ("tensorrt_rtx", ["build", "BUNDLE", "--target", "SM80"], "'tensorrt-rtx>=1.7' 'cuda-python>=13'"),
        (
            "torch",
            ["export", "--checkpoint", "x.pt", "--tokenizer", "none", "--out", "x"],
            "'onnxruntime>=1.23' 'torch>=2.9' ",
        ),
        (
            "torch",
            ["encode", "--data", "x", "--tokenizer", "x.pt", "--out", "x.npz"],
            "'onnxruntime>=1.23' 'torch>=2.9' ",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    tiny: Path, tmp_path: Path, missing: str, arguments: list[str], packages: str
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from par_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *(str(tiny) if a == "BUNDLE" else a for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("parvis: error: ")
    assert f"pip install {packages}" in done.stderr
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


def test_the_options_of_a_verb_need_no_extra() -> None:
    """Neither to be shown, nor to be checked."""
    code = (
        "import sys\n"
        "extras = 'onnxruntime onnx torch tensorrt tensorrt_rtx cuda ml_dtypes safetensors huggingface_hub shtab'\n"
        "extras += ' starlette uvicorn prometheus_client'\n"
        "for name in extras.split():\n"
        "    sys.modules[name] = None\n"
        "from par_runtime.cli.dispatch import VERBS, main\n"
        "for verb in VERBS:\n"
        "    assert main([verb, '--help']) == 0, verb\n"
        "    assert main([verb, '--no-such-option']) == 2, verb\n"
        "    assert main([verb, '--version']) == 0, verb\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^usage: parvis (\S+)", done.stdout, re.MULTILINE) == list(VERBS)
    errors = done.stderr.splitlines()
    for verb, error in zip(VERBS, errors, strict=True):
        assert error.startswith("parvis: error: unknown option --no-such-option")
        assert error.endswith(f"'parvis {verb} --help' lists the options")


def test_a_command_that_installs_an_extra_names_the_packages_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        "numpy>=1.26",
        'onnxruntime>=1.23; extra == "cpu"',
        'onnxruntime-gpu>=1.27; python_version >= "3.11" and extra == "onnxruntime-gpu"',
        'onnxruntime-gpu>=1.23; python_version < "3.11" and extra == "onnxruntime-gpu"',
        "tensorrt-rtx>=1.7 ; extra == 'tensorrt-rtx'",
        "cuda-python>=13 ; extra == 'tensorrt-rtx'",
        "onnx>=1.20; extra == 'build'",
        "parvis[build]; extra == 'kernels-build'",
        "triton>=3.6; sys_platform == 'linux' and extra == 'kernels-build'",
        "cuda-python>=13; extra == 'kernels'",
    ]
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", lambda _: listed)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert requirements("onnxruntime-gpu") == ["onnxruntime-gpu>=1.23"]
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert requirements("onnxruntime-gpu") == ["onnxruntime-gpu>=1.27"]
    assert requirements("kernels-build") == ["onnx>=1.20", "triton>=3.6"]  # parvis is on no package index
    assert requirements("cpu,tensorrt-rtx") == ["onnxruntime>=1.23", "tensorrt-rtx>=1.7", "cuda-python>=13"]
    installed["onnxruntime-gpu"] = "1.27"  # its files and those of onnxruntime are the same ones
    assert requirements("cpu,tensorrt-rtx") == ["tensorrt-rtx>=1.7", "cuda-python>=13"]
    monkeypatch.setattr("shutil.which", lambda _: str(Path(sys.executable).parent / "pip"))
    assert how_to_install("kernels") == "pip install 'cuda-python>=13'"
    monkeypatch.setattr("shutil.which", lambda _: "/elsewhere/bin/pip")  # an environment that is not activated
    monkeypatch.setattr(sys, "executable", "/a place/bin/python")
    assert how_to_install("kernels") == "'/a place/bin/python' -m pip install 'cuda-python>=13'"

    def none(_: str) -> list[str]:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", none)
    assert how_to_install("cpu") == "pip install '.[cpu]' in a clone of parvis"


def test_comparing_backends_needs_no_onnxruntime() -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from par_runtime.verify import compare_logits"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
