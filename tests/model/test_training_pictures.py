"""Folders of pictures as training data: any format and size, one folder per class."""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from par_model.config import VQConfig
from par_model.training.cli import encode, tokenizer
from par_model.training.data import ImageFolder, picture
from par_model.training.files import InputError
from par_model.training.run import Run
from par_model.vq import VQModel

pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures in two classes, in as many formats."""
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for i, (name, size) in enumerate(
        [
            ("boote/a.png", (40, 30)),
            ("boote/b.jpg", (16, 50)),
            ("boote/deeper/c.webp", (33, 33)),
            ("füchse/d.bmp", (9, 12)),
            ("füchse/e.gif", (64, 64)),
            ("füchse/f.TIFF", (20, 20)),
            ("füchse/g.png", (16, 16)),
        ]
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        if i == 3:
            image = image.convert("L")
        image.save(file)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "boote" / ".hidden.png").write_text("not a picture")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tokenizer with random weights: 2 pixels a code, 16 codes."""
    import torch

    config = VQConfig(16, 4, channels=8, channel_multipliers=(1, 1), res_blocks=1, z_channels=8, norm_groups=4)
    torch.manual_seed(0)
    file = tmp_path / "vq.pt"
    torch.save({"model": VQModel(config).state_dict(), "config": vars(config) | {"kind": "vq"}}, file)
    return file


def test_a_folder_of_pictures_becomes_codes(
    pictures: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "codes.npz"
    arguments = ["--data", str(pictures), "--tokenizer", str(weights), "--out", str(out), "--batch", "3"]
    assert encode.main([*arguments, "--size", "8"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{out}: 7 images of 4x4 codes, 2 classes\n"
    with np.load(out) as file:
        assert file["codes"].shape == (7, 4, 4)
        assert file["labels"].tolist() == [0, 0, 0, 1, 1, 1, 1]
        assert file["class_names"].tolist() == ["boote", "füchse"]
        again = file["codes"]
    assert encode.main(arguments) == 0
    with np.load(out) as file:
        assert file["codes"].shape == (7, 24, 24)
    # Each image alone, from a folder of one class, gives the same codes.
    one = tmp_path / "one"
    one.mkdir()
    (pictures / "füchse" / "g.png").rename(one / "g.png")
    arguments[1] = str(one)
    assert encode.main([*arguments, "--size", "8"]) == 0
    with np.load(out) as file:
        assert (file["codes"] == again[6:]).all()
        assert file["class_names"].tolist() == ["one"]
    assert [path.name for path in out.parent.iterdir()] == ["codes.npz"]


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not allow")
def test_names_of_folders_become_names_that_a_bundle_may_have(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (b"b\xff", b"f\x1b[2J", "füchse".encode()):
        folder = Path("pictures") / os.fsdecode(name)
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / "a.png")
    data = ["--data", "pictures", "--size", "16", "--tokenizer", str(weights)]
    assert encode.main([*data, "--out", "c\x1b[2J.npz"]) == 0
    assert capsys.readouterr().out == "c\\x1b[2J.npz: 3 images of 8x8 codes, 3 classes\n"
    with np.load("c\x1b[2J.npz") as file:
        assert file["class_names"].tolist() == ["b\\xff", "f\\x1b[2J", "füchse"]


def test_pictures_are_fitted(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = (200, 100, 50)  # the middle square
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    assert (picture(file, 10) == (200, 100, 50)).all()
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turn it by a quarter
    image.crop((10, 0, 30, 20)).save(tmp_path / "b.png", exif=exif)
    assert picture(tmp_path / "b.png", 4).shape == (4, 4, 3)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(file)
    assert (picture(file, 4) == 255).all()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(file)
    with pytest.raises(InputError, match="grey values of more than 8 bits"):
        picture(file, 4)


def test_a_tokenizer_is_trained_on_pictures(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = "--steps 1 --report 1 --batch 2 --codes 16 --channels 8 --multipliers 1 1 --z-channels 8 --norm-groups 4"
    arguments = ["--data", str(pictures), "--val", str(pictures), "--run", str(run), *small.split()]
    assert tokenizer.main([*arguments, "--size", "8"]) == 0, capsys.readouterr().err
    assert (run / "model.pt").is_file()
    with Image.open(run / "sheet.png") as sheet:
        assert sheet.size == (7 * 8, 2 * 8)
    assert tokenizer.main([*arguments, "--size", "9"]) == 2
    assert "images of 9 pixels a side; expected a multiple of 2" in capsys.readouterr().err
    assert tokenizer.main(arguments) == 2
    assert "give --size, the pixels of a side" in capsys.readouterr().err


def test_what_cannot_be_encoded_is_one_line_and_leaves_nothing(
    pictures: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codes.npz"
    base = ["--tokenizer", str(weights), "--out", str(out)]

    def refused(message: str, *arguments: object) -> None:
        assert encode.main([*base, *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    refused("expected a multiple of 2", "--data", pictures, "--size", 7)
    refused("--batch 0: expected 1 to 1000000", "--data", pictures, "--batch", 0)
    refused("no such folder", "--data", tmp_path / "none")
    empty = tmp_path / "empty"
    (empty / "class").mkdir(parents=True)
    refused("holds no pictures", "--data", empty)
    (pictures / "loose.png").write_bytes((pictures / "boote" / "a.png").read_bytes())
    refused("1 picture beside the folders of classes", "--data", pictures)
    (pictures / "loose.png").unlink()
    cut = pictures / "boote" / "a.png"
    cut.write_bytes(cut.read_bytes()[:500])
    refused("a.png: no picture that can be read (image file is truncated", "--data", pictures, "--size", 8)
    cut.write_text("text")
    refused("a.png: no picture that can be read", "--data", pictures, "--size", 8)
    cut.unlink()
    for name in ("page.eps", "page.ps", "a.png"):  # Pillow would give the page to Ghostscript
        file = pictures / "boote" / name
        Image.new("RGB", (16, 16)).save(file, format="EPS")
        refused(f"{name}: no picture that can be read; expected PNG, JPEG,", "--data", pictures, "--size", 8)
        with pytest.raises(InputError, match="no picture that can be read"):
            picture(file, 8)
        file.unlink()
    raw = tmp_path / "raw"
    raw.mkdir()
    for text in ("{", "[]", '{"count": 3}', '{"count": 3, "size": 8, "styles": ["a"]}'):
        (raw / "meta.json").write_text(text)
        refused("not the raw form of images", "--data", raw)
    (raw / "images.u8").write_bytes(bytes(10))
    refused("not the raw form of images", "--data", raw)
    (raw / "images.u8").write_bytes(bytes(3 * 8 * 8 * 3))
    (raw / "labels.u8").write_bytes(bytes([0, 1, 0]))
    refused("has label 1 and 1 class names", "--data", raw)
    assert len(ImageFolder.open(pictures / "füchse", 8)) == 4


@pytest.mark.parametrize(
    "fault",
    [
        ValueError("not enough\nimage data"),
        RuntimeError("Failed to decode frame 0: Truncated data"),
        OSError(errno.EINVAL, "Invalid argument"),
        OSError("decoder error -2 when reading image file"),
        KeyError("tile"),
        struct.error("unpack requires a buffer of 4 bytes"),
        AssertionError(),
    ],
)
@pytest.mark.parametrize("reader", ["open", "convert"])
def test_whatever_a_reader_raises_names_the_picture(
    pictures: Path,
    weights: Path,
    tmp_path: Path,
    fault: Exception,
    reader: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(Image if reader == "open" else Image.Image, reader, fails)
    data = ["--data", str(pictures), "--size", "8"]
    assert encode.main([*data, "--tokenizer", str(weights), "--out", str(tmp_path / "codes.npz")]) == 2
    line = capsys.readouterr().err
    why = getattr(fault, "strerror", None) or " ".join(str(fault).split()) or "AssertionError"
    name = pictures / "boote" / "a.png"
    assert line == f"parvis: error: {name}: no picture that can be read ({why}); mend it or take it away\n"
    assert not (tmp_path / "codes.npz").exists()


def test_damaged_pictures_of_real_readers_are_one_line(tmp_path: Path) -> None:
    for name, content in (
        ("a.ppm", b"P6\n4 x\n255\n"),  # ValueError, when it is identified
        ("b.ppm", b"P6\n4 4\n255\n" + bytes(7)),
        ("c.ppm", b"P3\n2 2\n255\n1 2 x"),  # ValueError, when it is decoded
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: no picture that can be read .*; mend it or take it away"):
            picture(tmp_path / name, 8)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES])
def test_what_the_system_cannot_read_is_no_fault_of_the_picture(
    pictures: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        picture(pictures / "boote" / "a.png", 8)
    assert caught.value.filename == str(pictures / "boote" / "a.png")


def test_memory_that_runs_out_is_no_fault_of_the_picture(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(MemoryError):
        picture(pictures / "boote" / "a.png", 8)


def test_a_full_disk_names_the_file_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.save("checkpoint.pt", {"a": 1})
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        run.save("checkpoint.pt", {"a": 2})
    assert caught.value.filename == str(tmp_path / "checkpoint.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
