"""The recipe's part of the drawings with more of the classes that a model draws worst."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from recipe_scripts import full_disk, scripts

from par_model.training.data import ImageFolder

LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 2]


@pytest.fixture(scope="module")
def subset() -> Iterator[ModuleType]:
    """``subset.py``."""
    with scripts("subset") as (module,):
        yield module


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Ten images of three classes; image i is of the value i."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    np.repeat(np.arange(10, dtype=np.uint8), 8 * 8 * 3).tofile(folder / "images.u8")
    np.array(LABELS, np.uint8).tofile(folder / "labels.u8")
    meta = {"count": 10, "size": 8, "seed_prefix": "train", "styles": ["a", "b", "a=c"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    ("start", "more", "expected"),
    [
        (6, [], [6, 7, 8, 9]),
        (6, ["b=1", "a=2"], [0, 3, 4, 6, 7, 8, 9]),
        (6, ["a=c=1"], [5, 6, 7, 8, 9]),
        (0, [], list(range(10))),
        (9, ["a=3"], [0, 3, 6, 9]),
    ],
)
def test_all_from_the_start_on_and_the_last_ones_before_it(
    subset: ModuleType, drawings: Path, tmp_path: Path, start: int, more: list[str], expected: list[int]
) -> None:
    out = tmp_path / "out"
    options = ["--more", *more] if more else []
    assert subset.main(["--data", str(drawings), "--out", str(out), "--start", str(start), *options]) == 0
    part = ImageFolder.open(out)
    assert part.images[:, 0, 0, 0].tolist() == expected
    assert part.images.shape == (len(expected), 8, 8, 3)
    assert (out / "labels.u8").read_bytes() == bytes(LABELS[i] for i in expected)
    meta = json.loads((out / "meta.json").read_text())
    assert meta == {
        "count": len(expected),
        "size": 8,
        "seed_prefix": "train",
        "styles": ["a", "b", "a=c"],
        "images_sha256": hashlib.sha256((out / "images.u8").read_bytes()).hexdigest(),
    }
    assert sorted(path.name for path in out.iterdir()) == ["images.u8", "labels.u8", "meta.json"]


def held_out(folder: Path, values: list[int], size: int = 8) -> Path:
    """Held-out images in ``folder``, one of each value."""
    folder.mkdir()
    np.repeat(np.array(values, np.uint8), size * size * 3).tofile(folder / "images.u8")
    np.zeros(len(values), np.uint8).tofile(folder / "labels.u8")
    (folder / "meta.json").write_text(json.dumps({"count": len(values), "size": size, "styles": ["a", "b", "a=c"]}))
    return folder


def test_held_out_images_are_left_out(
    subset: ModuleType, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, seen = tmp_path / "out", held_out(tmp_path / "seen", [3, 5, 7, 99])
    options = ["--data", str(drawings), "--out", str(out), "--start", "6", "--more", "a=2", "--without", str(seen)]
    assert subset.main(options) == 0
    part = ImageFolder.open(out)
    assert part.images[:, 0, 0, 0].tolist() == [0, 6, 8, 9]
    assert (out / "labels.u8").read_bytes() == bytes(LABELS[i] for i in (0, 6, 8, 9))
    assert capsys.readouterr().out == f"{out}: 4 images of 10; left out 2 that {seen} has too\n"


def test_what_it_cannot_use_is_one_line_and_writes_nothing(
    subset: ModuleType, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "out"

    def refused(
        text: str, *more: str, start: int = 6, given: Path = drawings, to: Path = out, without: Path | None = None
    ) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        options = (["--more", *more] if more else []) + (["--without", str(without)] if without else [])
        assert subset.main(["--data", str(given), "--out", str(to), "--start", str(start), *options]) == 2, text
        printed = capsys.readouterr()
        assert printed.err.startswith(f"subset.py: error: {text}")
        assert (printed.err.count("\n"), printed.out) == (1, "")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    refused("--start 10: expected 0 to 9", start=10)
    refused("--start -1: expected 0 to 9", start=-1)
    refused("--more b=3: only 2 images of b are before --start 6", "b=3")
    refused("--more a=3: only 0 images of a are before --start 0", "a=3", start=0)
    for text in ("b", "b=", "b=0", "b=-1", "b=1.5", "b=²", "nix=1", "=1", "a=c", "b=0000000001"):
        refused(f"--more {text}: expected CLASS=COUNT", text)
    refused("--more b=1: expected CLASS=COUNT, each class once", "b=2", "b=1")
    refused(f"{tmp_path / 'none' / 'meta.json'}: no such file or folder", given=tmp_path / "none")
    refused(f"--out {drawings}: would write {drawings / 'images.u8'}, in the folder of --data {drawings}", to=drawings)
    refused(f"--out {drawings / 'in'}: would write", to=drawings / "in")
    refused(f"--out {tmp_path / 'file'}: is a file", to=tmp_path / "file")
    small, every = held_out(tmp_path / "small", [1], size=4), held_out(tmp_path / "every", list(range(10)))
    refused(f"--without {small}: holds images of 4x4 pixels; expected 8x8, as --data", without=small)
    refused(f"--without {every}: holds every chosen image; give a lower --start", without=every)
    refused(f"{tmp_path / 'none' / 'meta.json'}: no such file or folder", without=tmp_path / "none")
    refused(f"--out {every}: would write {every / 'images.u8'}, in the folder of --without", to=every, without=every)


def test_a_disk_that_is_full_at_the_last_file_leaves_all_three_of_the_part_before(
    subset: ModuleType, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    meta = json.loads((drawings / "meta.json").read_text())
    (drawings / "meta.json").write_text(json.dumps(meta | {"note": 2000 * "x"}))
    assert subset.main(["--data", str(drawings), "--out", str(out), "--start", "6"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    with full_disk(2000):  # room for five images, not for what is said of them
        assert subset.main(["--data", str(drawings), "--out", str(out), "--start", "5"]) == 2
    assert capsys.readouterr().err.startswith(f"subset.py: error: {out / 'meta.json'} is larger than")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
