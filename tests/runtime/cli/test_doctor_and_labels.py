"""``parvis doctor`` and ``parvis labels``."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from par_runtime import Bundle
from par_runtime.backends.native.library import library_file
from par_runtime.bundle import seal
from par_runtime.cli import dispatch

DEMO = Path(__file__).parents[3] / "models" / "demo"
EXTRAS = (
    "onnxruntime onnx torch tensorrt tensorrt_rtx cuda ml_dtypes safetensors huggingface_hub starlette uvicorn "
    "prometheus_client"
)


def test_the_doctor_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    backends = {backend["name"]: backend for backend in facts["backends"]}
    assert backends["onnxruntime-cpu"]["runs"]
    assert facts["can_run"]
    assert facts["packages"]["numpy"]
    assert 1 <= facts["cpu"]["cores_to_use"] <= facts["cpu"]["cores"]
    assert dispatch.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "runs  onnxruntime-cpu" in text
    assert text.endswith("ready: parvis generate BUNDLE --label 0\n")


NO_KERNELS = (
    "from par_runtime.backends.native import decoding, library; from pathlib import Path\n"
    "decoding.decoder_file = lambda: None\n"
)


@pytest.mark.parametrize(
    ("hidden", "runs"),
    [
        pytest.param("", ["native-cpu"], marks=pytest.mark.skipif(library_file() is None, reason="not built")),
        (f"{NO_KERNELS}library.library_file = lambda: None\n", []),
        (NO_KERNELS, []),  # the step in C alone decodes nothing
    ],
    ids=["kernels", "none", "no decoder"],
)
def test_the_doctor_needs_nothing(hidden: str, runs: list[str], tmp_path: Path) -> None:
    """The C kernels run without ONNX Runtime; without both nothing does."""
    code = (
        f"import sys\nfor name in {EXTRAS.split()!r}: sys.modules[name] = None\n{hidden}"
        "from par_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == (0 if runs else 1), done.stderr
    facts = json.loads(done.stdout)
    assert facts["can_run"] == bool(runs)
    assert [backend["name"] for backend in facts["backends"] if backend["runs"]] == runs
    assert not facts["gpus"]["found"]
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert facts["gpus"]["why"] == "no NVIDIA driver found (libcuda is missing); with a driver, nvidia-smi works"
    else:
        assert "a GPU needs cuda-python" in facts["gpus"]["why"]
    for backend in facts["backends"]:
        if backend["runs"]:
            continue
        assert "install" in backend["why"] or "not built" in backend["why"], backend
    for verbs in facts["verbs"]:
        assert verbs["missing"]
        assert "pip install" in verbs["install"]
    assert {"parvis calibrate", "parvis build"} < {verbs["verbs"] for verbs in facts["verbs"]}


@pytest.mark.skipif(library_file() is None, reason="the C kernels were not built")
def test_what_the_doctor_calls_ready_without_onnx_runtime_is(tmp_path: Path) -> None:
    """Images of a bundle with a table of its decoder's weights, and tokens of one that ends there."""
    tokens = Path(shutil.copytree(DEMO, tmp_path / "tokens"))
    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps(seal(manifest | {"tokenizer": None})))
    code = (
        f"import sys\nfor name in {EXTRAS.split()!r}: sys.modules[name] = None\n"
        "from par_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for bundle, *out in ((DEMO, "--out", "a.png"), (tokens, "--tokens", "a.npy")):
        command = [sys.executable, "-c", code, "generate", str(bundle), "--label", "0", *out]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / out[1]).stat().st_size


def test_tuning_needs_a_gpu_and_building_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("par_runtime.cli.doctor._missing", lambda _: [])
    for found, why, line in (
        ([], "no driver", "no    parvis tune: needs a GPU: no driver"),
        (["0: NVIDIA A100, SM80"], "", "runs  parvis tune"),
    ):
        monkeypatch.setattr("par_runtime.cli.doctor._gpus", lambda f=found, w=why: {"found": f, "why": w})
        assert dispatch.main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert f"\nruns  parvis build\nruns  parvis build --engine kernels\n{line}\n" in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["tune", "DEMO"], "tuning needs a GPU: "),
        (["build", "DEMO", "--target", "local"], "target local needs a GPU: "),
        (["build", "DEMO", "--target", "SM80"], "'parvis build' needs onnx, which is not installed; "),
    ],
)
def test_a_gpu_is_missed_before_packages_for_it(arguments: list[str], error: str, tmp_path: Path) -> None:
    """An installation without TensorRT, on a machine without a GPU."""
    code = (
        f"import sys\nfor name in {EXTRAS.split()[1:]!r}: sys.modules[name] = None\n"
        "from par_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    demo = str(Path(__file__).parents[3] / "models" / "demo")
    given = [demo if a == "DEMO" else a for a in arguments]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *given], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"parvis: error: {error}")
    assert done.stderr.count("\n") == 1


def test_one_broken_part_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("spoilt\nin two lines")

    monkeypatch.setattr("par_runtime.backends.cuda.device_count", broken)
    monkeypatch.setattr("par_runtime.backends.trt.module.load", broken)
    assert dispatch.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "gpu       none: RuntimeError: spoilt\n" in text
    assert "runs  onnxruntime-cpu" in text


def test_labels_are_listed_and_searched(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(tiny)
    names = bundle.class_names
    assert names is not None
    assert dispatch.main(["labels", str(tiny)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{i}\t{name}" for i, name in enumerate(names)]
    assert dispatch.main(["labels", str(tiny), "OTTER", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["classes"]
    assert found == [{"index": i, "name": name, "synset": None} for i, name in enumerate(names) if "otter" in name]
    assert found
    assert dispatch.main(["labels", str(tiny), "otter", "red"]) == 2
    assert "no class of" in capsys.readouterr().err
    assert dispatch.main(["labels"]) == 2
    assert "the following arguments are required: BUNDLE; 'parvis labels --help'" in capsys.readouterr().err
    shutil.copytree(tiny, nameless := tmp_path / "nameless")
    manifest = json.loads((tiny / "manifest.json").read_text())
    manifest["class_names"] = None
    (nameless / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert dispatch.main(["labels", str(nameless), "4"]) == 0
    assert capsys.readouterr().out == "4\n"
    assert dispatch.main(["labels", str(nameless), "otter"]) == 2
    said = "this bundle has no class names to search, only indices 0..5; 'parvis export --class-names FILE' gives"
    assert said in capsys.readouterr().err
    assert dispatch.main(["labels", str(tmp_path)]) == 2
