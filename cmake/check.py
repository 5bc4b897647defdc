"""Steps and self-tests of the artefact build (CMakeLists.txt) that are more than one command of parvis."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from par_runtime import Pipeline
from par_runtime.bundle import Bundle, BundleError
from par_runtime.engines import ENGINE_JSON, ENGINES, Engine


def copy(source: str, out: str) -> None:
    """Copy a bundle, without the engines it may have; checked, then renamed."""
    bundle, target = Bundle.open(source, verify="full"), Path(out)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in (*bundle.files, "manifest.json"):
        shutil.copyfile(bundle.path / name, part / name)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def stamps(folder: str, bundle: str, *targets: str) -> None:
    """Remove the stamps of engines that are gone, and the engines of targets that are not asked for any more."""
    for stamp in Path(folder).glob("*.engine"):
        engines = [Path(bundle) / ENGINES / Path(name).name for name in json.loads(stamp.read_text())]
        if stamp.suffixes[-2].removeprefix(".") not in targets:
            for engine in engines:
                shutil.rmtree(engine, ignore_errors=True)
            stamp.unlink()
        elif not all((engine / ENGINE_JSON).is_file() for engine in engines):
            stamp.unlink()


def bundle(path: str) -> None:
    """Every file has the size and hash of the manifest."""
    opened = Bundle.open(path, verify="full")
    print(f"{path}: {len(opened.files)} files as in the manifest")


def selftest(path: str) -> None:
    """The bundle's test image has the tokens of the export, on the CPU."""
    with Pipeline.load(path, device="cpu") as pipeline:
        print(f"{path}: self-test passed on {pipeline.backend.name}")


def engine(stamp: str, path: str) -> None:
    """Every plan is whole, belongs to the bundle, and was built with all attention fused and caches in place."""
    opened = Bundle.open(path)
    for name in json.loads(Path(stamp).read_text()):
        found = Engine.open(Path(path) / ENGINES / Path(name).name, opened, verify="full")
        for plan in found.plans:
            report = found.report["plans"][plan]
            layers = report["layers"]
            wanted = {"ATTENTION": layers["model"], "KV_CACHE_UPDATE": 2 * layers["model"]}
            wrong = {kind: layers[kind] for kind, count in wanted.items() if layers[kind] != count}
            fused = [profile["attention"] for profile in report["profiles"]]
            if wrong or (found.precision != "fp32" and set(fused) != {layers["model"]}):
                sys.exit(
                    f"{found.path.name}/{plan}: {layers}, fused attention per profile {fused}, for {layers['model']} layers"
                )
        print(f"{found.path.name}: {len(found.plans)} plans for batches of {', '.join(map(str, found.images))} images")


if __name__ == "__main__":
    steps = {f.__name__: f for f in (copy, stamps, bundle, selftest, engine)}
    try:
        steps[sys.argv[1]](*sys.argv[2:])
    except BundleError as error:
        sys.exit(f"parvis: error: {error}")
