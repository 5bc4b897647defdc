"""Steps and self-tests of the artefact build (CMakeLists.txt) that are more than one command of parvis."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from par_runtime import Pipeline
from par_runtime.backends.engines import ENGINE_JSON, ENGINES, Engine
from par_runtime.backends.program import Kernels
from par_runtime.backends.trt.module import RTX
from par_runtime.bundle import MANIFEST, Bundle
from par_runtime.errors import BundleError

MOST_PER_LAYER, MOST_AROUND = 5, 6  #: launches of a step of an engine of kernels


def copy(source: str, out: str) -> None:
    """Copy a bundle, without the engines it may have; checked, then renamed."""
    bundle, target = Bundle.open(source, verify="full"), Path(out)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in (*bundle.files, MANIFEST):
        shutil.copyfile(bundle.path / name, part / name)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def stamps(bundle: str, *targets: str) -> None:
    """Remove the stamps whose artefact is gone or not asked for, and the engines that are left without a stamp."""
    path = Path(bundle)
    for stamp in path.parent.glob("*.bundle"):
        if stamp.stem != path.name or not (path / MANIFEST).is_file():
            stamp.unlink()
    kept = set()
    wanted = {f"{path.name}.{target}.engine" for target in targets}
    for stamp in path.parent.glob("*.engine"):
        engines = _engines(stamp, path)
        if stamp.name in wanted and all((engine / ENGINE_JSON).is_file() for engine in engines):
            kept.update(engines)
        else:
            stamp.unlink()
    for folder in (path / ENGINES).glob("[!.]*"):
        if folder.is_dir() and folder not in kept:
            shutil.rmtree(folder)


def packages(source: str, readme: str, out: str) -> None:
    """Build parvis into the folder ``out``: a wheel for this Python, the sources, and a README that names them."""
    folder = Path(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build = (
        "import sys; out = sys.argv[1]; import setuptools.build_meta as b; "  # which changes sys.argv
        "open(out + '/names', 'w').write(b.build_wheel(out) + ' ' + b.build_sdist(out))"
    )
    with tempfile.TemporaryDirectory() as copied:  # setuptools builds in place, with what it built before
        for name in ("par_model", "export", "runtime"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(Path(source) / name, Path(copied) / name, ignore=ignored)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(Path(source) / name, copied)
        done = subprocess.run(
            [sys.executable, "-c", build, str(folder.absolute())],
            cwd=copied,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        sys.exit(
            f"parvis: error: parvis could not be packed ({last}); this needs setuptools 77 or newer: "
            f"{sys.executable} -m pip install 'setuptools>=77'"
        )
    names = folder / "names"
    wheel, sources = names.read_text().split()
    names.unlink()
    machine = f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"
    text = Path(readme).read_text(encoding="utf-8").format(wheel=wheel, sources=sources, machine=machine)
    (folder / "README.txt").write_text(text, encoding="utf-8")


def _built(stamp: Path) -> None:
    if not stamp.is_file():
        sys.exit(f"parvis: error: {stamp.stem} is not built; run: cmake --build {stamp.parent.parent}")


def _engines(stamp: Path, bundle: Path) -> list[Path]:
    """The engine folders of a stamp, which 'parvis build --list' wrote."""
    _built(stamp)
    return [bundle / ENGINES / Path(name).name for name in json.loads(stamp.read_text())]


def bundle(path: str) -> None:
    """Every file has the size and hash of the manifest."""
    _built(Path(f"{path}.bundle"))
    opened = Bundle.open(path, verify="full")
    print(f"{path}: {len(opened.files)} files as in the manifest")


def selftest(path: str) -> None:
    """The bundle's test image has the tokens of the export, on the CPU."""
    _built(Path(f"{path}.bundle"))
    with Pipeline.load(path, device="cpu") as pipeline:
        print(f"{path}: self-test passed on {pipeline.backend.info.name}")


def _kernels(found: Engine, kernels: Kernels) -> None:
    """An engine of kernels keeps no registers in memory, and launches at most what docs/kernels.md says."""
    spilling = [name for name, kernel in kernels.kernels.items() if kernel.spills]
    step = found.report["programs"]["step"]["profiles"]
    long = [profile for profile in step if profile["per_layer"] > MOST_PER_LAYER or profile["around"] > MOST_AROUND]
    if spilling or long:
        sys.exit(f"{found.path.name}: spills in {spilling}; more launches than expected in {long}")
    images = ", ".join(map(str, found.images))
    print(f"{found.path.name}: {len(kernels.kernels)} kernels for batches of {images} images")


def engine(stamp: str, path: str) -> None:
    """Every engine is whole and of the bundle; plans have all attention fused, caches in place; kernels no spills."""
    folders = _engines(Path(stamp), Path(path))
    opened = Bundle.open(path)
    for folder in folders:
        found = Engine.open(folder, opened, verify="full")
        if found.kernels is not None:
            _kernels(found, found.kernels)
            continue
        # Where parvis build checks it too; fp32 may be decomposed, classic TensorRT refuses by itself.
        countable = found.precision != "fp32" and found.runtime == RTX
        for plan in found.plans:
            report = found.report["plans"][plan]
            layers = report["layers"]
            wanted = {"ATTENTION": layers["model"], "KV_CACHE_UPDATE": 2 * layers["model"]}
            wrong = {kind: layers[kind] for kind, count in wanted.items() if layers[kind] != count}
            fused = [profile["attention"] for profile in report["profiles"]]
            if wrong or (countable and set(fused) != {layers["model"]}):
                sys.exit(
                    f"{found.path.name}/{plan}: {layers}, fused attention per profile {fused}, for {layers['model']} "
                    "layers"
                )
        print(f"{found.path.name}: {len(found.plans)} plans for batches of {', '.join(map(str, found.images))} images")


if __name__ == "__main__":
    steps = {f.__name__: f for f in (copy, stamps, packages, bundle, selftest, engine)}
    try:
        steps[sys.argv[1]](*sys.argv[2:])
    except BundleError as error:
        sys.exit(f"parvis: error: {error}")
