"""The artefact build: bundle, plans, self-tests, archive, and only what is new the second time."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'")
CMAKE = shutil.which("cmake", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
if CMAKE is None or shutil.which("make") is None:
    if os.environ.get("CI"):
        raise RuntimeError("the artefact build is tested in CI; cmake or make is missing")
    pytest.skip("needs cmake and make", allow_module_level=True)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run cmake, ctest or cpack; the engine cache is the test's own."""
    paths = [str(ROOT), str(ROOT / "export"), str(ROOT / "runtime"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PARVIS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    env["OMP_NUM_THREADS"] = "1"  # tiny models: threads that wait for each other cost a fifth of the time
    if shutil.which("cc"):  # the C kernels of the wheel are only packed here: optimising them takes longest
        quick = tmp_path / "cc-quick"
        quick.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
        quick.chmod(0o755)
        env["CC"] = str(quick)

    def command(tool: str, *arguments: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        assert CMAKE is not None
        line = [str(Path(CMAKE).with_name(tool)), *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False, env=env, cwd=cwd)

    return command


def configure(
    run: Run, build: Path, generator: str = "Unix Makefiles", **variables: object
) -> subprocess.CompletedProcess[str]:
    given = {"PARVIS_PYTHON": sys.executable, "PARVIS_MAX_IMAGES": 1, "PARVIS_NAME": "tiny"} | variables
    values = (f"-D{name}={value}" for name, value in given.items())
    return run("cmake", "-G", generator, "-S", ROOT, "-B", build, *values)


def built(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a build says that it makes."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        line.partition("] ")[2] for line in done.stdout.splitlines() if re.search(r"\] (bundle|plans|kernels) ", line)
    ]


@pytest.mark.slow
def test_bundle_plans_tests_and_archive_and_nothing_twice(run: Run, tiny: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    done = configure(run, build, PARVIS_BUNDLE=tiny, PARVIS_TARGETS="SM80;SM80")  # named twice, built once
    assert done.returncode == 0, done.stderr
    tests = run("ctest", "--test-dir", build, "--output-on-failure")
    assert tests.stdout.count("is not built; run: cmake --build") == 3
    done = run("cmake", "--build", build, "-j2")
    assert "warning" not in done.stderr
    assert [line.partition(",")[0] for line in built(done)] == ["bundle tiny", "plans of tiny for SM80"]
    assert built(run("cmake", "--build", build)) == []
    configure(run, build, PARVIS_BUNDLE=tiny, PARVIS_TARGETS="SM80;SM89")  # only what is new
    assert built(run("cmake", "--build", build)) == ["plans of tiny for SM89"]
    engines = build / "artefacts" / "tiny" / "engines"
    sm80, sm89 = sorted(engines.iterdir())
    shutil.copytree(sm80, sm80.with_name("by-hand"))  # not of this build: goes
    shutil.rmtree(sm89)  # removed by hand: built again, and nothing else
    assert built(run("cmake", "--build", build)) == ["plans of tiny for SM89"]
    assert sorted(engines.iterdir()) == [sm80, sm89]
    (sm80 / "gpu.runtime.cache").touch()  # of a GPU here: not packed

    tests = run("ctest", "--test-dir", build, "--output-on-failure")
    assert tests.returncode == 0, tests.stdout
    assert "100% tests passed" in tests.stdout
    assert "out of 4" in tests.stdout
    packed = run("cpack", cwd=build)
    assert packed.returncode == 0, packed.stdout + packed.stderr
    with tarfile.open(build / "parvis-tiny.tar.gz") as archive:
        assert not [name for name in archive.getnames() if "runtime.cache" in name]
        assert len([name for name in archive.getnames() if name.endswith("engine.json")]) == 2
        # Python before 3.11.4 has no filters; from 3.12 on it asks for one.
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    top = tmp_path / "unpacked" / "parvis-tiny"
    (wheel,), (sources,) = top.glob("parvis-*.whl"), top.glob("parvis-*.tar.gz")
    assert {path.name for path in top.iterdir()} == {"LICENSE", "README.txt", "tiny", wheel.name, sources.name}
    readme = (top / "README.txt").read_text()
    assert f"pip install './{wheel.name}[cpu]'\n    parvis generate tiny" in readme
    assert f"pip install './{sources.name}[cpu]'" in readme
    assert "\nThe folder tiny is the bundle. Its folder engines holds plans for SM80, SM89; any other" in readme
    with zipfile.ZipFile(wheel) as archive_of_wheel:
        packed_files = archive_of_wheel.namelist()
    assert {"par_runtime/cli/dispatch.py", "par_export/imagenet_classes.tsv", "par_model/config.py"} <= set(
        packed_files
    )
    if shutil.which("cc"):
        assert any(name.startswith("par_runtime/backends/native/_step") for name in packed_files)
    image = [sys.executable, "-m", "par_runtime", "generate", str(top / "tiny"), "--label", "0"]
    image += ["--out", str(tmp_path / "x.png")]
    subprocess.run(image, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})

    # Self-tests fail where an artefact is spoilt.
    plan = engines / sm80.name / "step.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    tests = run("ctest", "--test-dir", build, "--output-on-failure")
    assert tests.returncode != 0
    assert "step.plan: truncated" in tests.stdout
    assert "1 tests failed out of 4" in tests.stdout

    configure(run, build, PARVIS_BUNDLE=tiny, PARVIS_TARGETS="SM89")  # what is not asked for goes
    assert built(run("cmake", "--build", build)) == []
    assert list(engines.iterdir()) == [sm89]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
def test_with_ninja_another_precision_leaves_no_plan_and_a_failed_build_no_archive(
    run: Run, tiny: Path, tmp_path: Path
) -> None:
    build, source = tmp_path / "build", tmp_path / "source"
    shutil.copytree(tiny, source)
    variables = {"PARVIS_BUNDLE": source, "PARVIS_TARGETS": "SM80"}
    for precision in ("fp16", "fp32"):
        assert configure(run, build, "Ninja", PARVIS_PRECISION=precision, **variables).returncode == 0
        done = run("cmake", "--build", build)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name.split("-")[3] for path in (build / "artefacts/tiny/engines").iterdir()] == ["fp32"]
    assert "no work to do" in run("cmake", "--build", build).stdout
    with (source / "weights.data").open("ab") as file:
        file.write(b"x")
    packed = run("cpack", cwd=build)
    assert packed.returncode != 0
    assert "weights.data: too long" in packed.stdout + packed.stderr
    assert not list(build.glob("*.tar.gz"))


@pytest.mark.slow
def test_from_a_checkpoint_again_when_it_changes(run: Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    build, model = tmp_path / "build", tmp_path / "model.pt"
    shutil.copyfile(checkpoints["par_n4_grid8"], model)
    variables = {
        "PARVIS_CHECKPOINT": model,
        "PARVIS_TOKENIZER": checkpoints["vq"],
        "PARVIS_EXPORT_ARGS": "--heads;4;--grid;8",
        "PARVIS_PRECISION": "fp32",
    }
    assert configure(run, build, **variables).returncode == 0
    assert [line.partition(":")[0] for line in built(run("cmake", "--build", build))] == ["bundle tiny"]
    file = build / "artefacts" / "tiny" / "manifest.json"
    assert json.loads(file.read_text())["precision"] == "fp32"
    assert built(run("cmake", "--build", build)) == []
    assert configure(run, build, **variables | {"PARVIS_PRECISION": "fp16", "PARVIS_TOKENIZER": "none"}).returncode == 0
    assert len(built(run("cmake", "--build", build))) == 1
    manifest = json.loads(file.read_text())
    assert (manifest["name"], manifest["precision"]) == ("tiny", "fp16")
    model.write_bytes(b"no checkpoint")
    failed = run("cmake", "--build", build)
    assert failed.returncode != 0
    assert "parvis: error: " in failed.stderr
    assert "model.pt" in failed.stderr
    assert json.loads(file.read_text()) == manifest  # the good one stays, and does not count as done
    assert (build / "artefacts" / "tiny.bundle").stat().st_mtime < model.stat().st_mtime


def test_kernels_in_place_of_plans(run: Run, tiny: Path, kernels_bundle: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    cache = kernels_bundle.parent / "cache"  # they were compiled before
    variables = {"PARVIS_BUNDLE": tiny, "PARVIS_TARGETS": "SM90", "PARVIS_ENGINE": "kernels"}
    assert configure(run, build, **variables, PARVIS_BUILD_ARGS=f"--cache-dir;{cache}").returncode == 0
    done = built(run("cmake", "--build", build))
    assert [line.partition(",")[0] for line in done] == ["bundle tiny", "kernels of tiny for SM90"]
    assert built(run("cmake", "--build", build)) == []
    (engine,) = (build / "artefacts" / "tiny" / "engines").iterdir()
    assert engine.name == "kernels-1-sm90-fp16"
    tests = run("ctest", "--test-dir", build, "--output-on-failure", "-R", "engine")
    assert tests.returncode == 0, tests.stdout
    readme = (build / "README.in").read_text()
    assert (
        "Its folder engines holds kernels for SM90; any other machine runs it on the CPU.\nThey need NVIDIA's" in readme
    )
    assert "pip install './{wheel}[cpu,kernels]'" in readme
    cubin = next(engine.glob("*.cubin"))
    content = cubin.read_bytes()
    cubin.unlink()  # it is a hard link to the cache's
    cubin.write_bytes(content[:-1])
    tests = run("ctest", "--test-dir", build, "--output-on-failure", "-R", "engine")
    assert tests.returncode != 0
    assert f"{cubin.name}: truncated" in tests.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "nothing to build from"),
        (
            {"PARVIS_BUNDLE": "BUNDLE", "PARVIS_ENGINE": "kernels", "PARVIS_PRECISION": "fp32"},
            "PARVIS_PRECISION=fp32: kernels compute in fp16 or bf16",
        ),
        (
            {"PARVIS_BUNDLE": "BUNDLE", "PARVIS_ENGINE": "kernels", "PARVIS_ENGINES": "per-phase"},
            "PARVIS_ENGINES=per-phase: an engine of kernels is always shared",
        ),
        ({"PARVIS_BUNDLE": "BUNDLE", "PARVIS_ENGINE": "cuda"}, "PARVIS_ENGINE=cuda: expected one of tensorrt, kernels"),
        ({"PARVIS_BUNDLE": "BUNDLE", "PARVIS_CHECKPOINT": "x.pt"}, "are both given"),
        ({"PARVIS_CHECKPOINT": "none.pt"}, "PARVIS_CHECKPOINT: .*none.pt does not exist"),
        ({"PARVIS_BUNDLE": "EMPTY"}, "holds no manifest.json, so it is not a bundle"),
        (
            {"PARVIS_BUNDLE": "BUNDLE", "PARVIS_PRECISION": "int3"},
            "PARVIS_PRECISION=int3: expected one of fp32, fp16, bf16",
        ),
        (
            {"PARVIS_BUNDLE": "BUNDLE", "PARVIS_ENGINES": "both"},
            "PARVIS_ENGINES=both: expected one of shared, per-phase",
        ),
        ({"PARVIS_BUNDLE": "BUNDLE", "PARVIS_TARGETS": "SM80;A100"}, "A100 is no target; expected SM80"),
        ({"PARVIS_BUNDLE": "BUNDLE", "PARVIS_MAX_IMAGES": "0"}, "PARVIS_MAX_IMAGES=0: expected a number from 1 to 256"),
        ({"PARVIS_BUNDLE": "OWN"}, "is what this build would write; give another bundle"),
        ({"PARVIS_BUNDLE": "BUNDLE", "PARVIS_NAME": "../x"}, "PARVIS_NAME=../x: expected letters"),
        ({"PARVIS_BUNDLE": "BUNDLE", "PARVIS_PYTHON": "/bin/false"}, "/bin/false has no parvis; install it there"),
    ],
)
def test_bad_requests_are_told(run: Run, tiny: Path, tmp_path: Path, variables: dict[str, str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    own = tmp_path / "build" / "artefacts" / "tiny"
    if "OWN" in variables.values():
        shutil.copytree(tiny, own)
    places = {"BUNDLE": tiny, "EMPTY": tmp_path / "empty", "OWN": own}
    done = configure(run, tmp_path / "build", **{name: places.get(value, value) for name, value in variables.items()})
    assert done.returncode != 0
    assert re.search(message, " ".join(done.stderr.split()))
