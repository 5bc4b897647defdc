"""What the tests of ``parvis evaluate`` share: the verb in this process, real images in folders, and other bundles."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from par_calibration.cli.evaluate import main
from par_runtime import Pipeline
from par_runtime.bundle import MANIFEST, seal
from par_runtime.samples import Plan, make_samples

TESTS = Path(__file__).parents[1]
TINY, SMALL = TESTS / "data" / "tiny", TESTS / "data" / "small"  #: of the same classes, sizes and codes
MODELS = TESTS.parent / "models"
NAMES: list[str] = json.loads((TINY / MANIFEST).read_text())["class_names"]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What ``parvis evaluate --json`` prints: one object, of finite numbers."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--threads", "1", "--json"])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads(printed.out, parse_constant=refuse)
    return found


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The lines that ``parvis evaluate`` prints."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--threads", "1"])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return printed.out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an input that the verb refuses, before it prints or writes anything."""
    capsys.readouterr()
    try:
        code: object = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, ""), printed
    assert printed.err.startswith("parvis: error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("parvis: error: ").rstrip("\n")


def png_folder(path: Path, images: np.ndarray, labels: Sequence[int], names: Sequence[str] = NAMES) -> Path:
    """One folder of PNGs for each class, which sort in the order of ``images`` uint8 [M,H,W,3]."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (path / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / names[label] / f"{i:03}.png")
    return path


def clip_folder(path: Path, clips: np.ndarray, labels: Sequence[int], names: Sequence[str]) -> Path:
    """A folder of raw clips as the trainer of the video tokenizer takes it: ``clips`` uint8 [M,T,S,S,channels]."""
    path.mkdir()
    clips.tofile(path / "clips.u8")
    np.asarray(labels, np.uint8).tofile(path / "labels.u8")
    count, frames, size, _, channels = clips.shape
    meta = {"count": count, "frames": frames, "size": size, "channels": channels, "class_names": list(names)}
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def changed(path: Path, change: Callable[[dict[str, Any]], object], of: Path = TINY) -> Path:
    """A copy of a bundle at ``path`` with another manifest, which is whole all the same."""
    shutil.copytree(of, path)
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(seal(manifest)))
    return path


def without_encoder(path: Path) -> Path:
    """A copy of the tiny bundle that was exported without its encoder."""
    return changed(path, lambda manifest: _drop(manifest, "encoder"))


def ending_at_tokens(path: Path) -> Path:
    """A copy of the tiny bundle that was exported without its tokenizer."""

    def change(manifest: dict[str, Any]) -> None:
        _drop(manifest, "encoder", "decoder", "decoder_fp16")
        manifest["tokenizer"] = None

    return changed(path, change)


def _drop(manifest: dict[str, Any], *graphs: str) -> None:
    for name in graphs:
        del manifest["graphs"][name], manifest["files"][f"{name}.onnx"]


def samples(pipeline: Pipeline, path: Path, count: int, **settings: Any) -> Path:
    """A file of ``parvis sample``."""
    make_samples(pipeline, Plan.of(pipeline.bundle, count, **settings), path)
    return path


def doctored(path: Path, to: Path, **change: object) -> Path:
    """A copy of samples that say something else about themselves."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as archive:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename == "about.json":
                content = json.dumps(json.loads(content) | change).encode()
            archive.writestr(entry, content)
    return to


def sheet_rows(path: Path, count: int, columns: int) -> np.ndarray:
    """The images [count,columns,16,16,3] of a sheet."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (count * 16, columns * 16, 3)
    return pixels.reshape(count, 16, columns, 16, 3).swapaxes(1, 2)
