"""Options of ``parvis generate`` that change no image, and what each of them does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from double import tensorrt
from double.driver import Driver

from par_runtime import Pipeline
from par_runtime.bundle import Bundle, seal


@pytest.mark.parametrize(
    ("options", "batches"), [([], 1), (["--batch", 3], 3), (["--batch", 8], 1), (["--batch", 1], 8)]
)
def test_batch_is_how_many_images_are_made_at_once(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], batches: int
) -> None:
    ask = ["generate", tiny, "--label", 1, "--count", 8, "--seed", 1, "--tokens", tmp_path / "t.npy"]
    assert run(*ask, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["timings_ms"]["calls"] == batches * Bundle.open(tiny).calls
    if options:
        made = np.load(tmp_path / "t.npy")
        assert run(*ask, "--quiet") == 0
        assert (np.load(tmp_path / "t.npy") == made).all()


def test_more_than_an_engine_takes_is_refused(
    tiny: Path, tmp_path: Path, driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    tensorrt.write_engine(Bundle.open(bundle), (1, 2))
    ask = ["generate", bundle, "--label", 1, "--count", 4, "--device", "cuda", "--tokens", tmp_path / "t.npy"]
    assert run(*ask, "--batch", 3) == 2
    assert "--batch 3: expected 1 to 2 on tensorrt_rtx" in capsys.readouterr().err
    assert run(*ask, "--batch", 2) == 0


@pytest.mark.parametrize(
    ("options", "wanted"), [([], "image"), *((["--capture", way], way) for way in ("image", "call", "none"))]
)
def test_capture_is_how_a_gpu_is_fed(
    tiny: Path, tmp_path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch, options: list[str], wanted: str
) -> None:
    bundle = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    tensorrt.write_engine(Bundle.open(bundle))
    seen: list[str] = []
    original = Pipeline.generate

    def generate(self: Pipeline, *given: Any, **how: Any) -> Any:
        made = original(self, *given, **how)
        seen.append(self.backend.capturing)  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(Pipeline, "generate", generate)
    assert run("generate", bundle, "--label", 1, "--device", "cuda", "--out", tmp_path / "a.png", *options) == 0
    assert seen == [wanted]


def test_no_selftest_makes_images_of_a_bundle_that_fails_its_own(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    first = manifest["selftest"]["tokens"][0][0]
    manifest["selftest"]["tokens"][0][0] = other = (first + 1) % manifest["model"]["vocab_size"]
    del manifest["hash"]
    (bundle / "manifest.json").write_text(json.dumps(seal(manifest)))
    run("generate", tiny, "--label", 1, "--seed", 2, "--out", tmp_path / "source.png", "--quiet")
    out = tmp_path / "a.png"
    for verb in (
        ("generate", bundle, "--label", 1),
        ("edit", tmp_path / "source.png", "--bundle", bundle, "--label", 1, "--change", "top"),
    ):
        assert run(*verb, "--out", out) == 2
        error = capsys.readouterr().err
        assert f"gives token {first} at position 0, at export it was {other}" in error
        assert "(--no-selftest) loads it regardless" in error
        assert not out.exists()
        assert run(*verb, "--out", out, "--no-selftest") == 0
        out.unlink()
        capsys.readouterr()
