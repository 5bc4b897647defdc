"""Edits, images and masks that ``parvis edit`` and ``parvis reconstruct`` cannot take: each ends in one line."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from command_line import run
from edited import six_images, small_photo
from PIL import Image


@pytest.fixture
def sheet(tiny: Path, tmp_path: Path) -> Path:
    return six_images(tiny, tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return small_photo(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "north"], "region 'north': expected one of left, right, top"),
        (["--keep", "1,2,3"], "region '1,2,3': expected one of"),
        (["--keep", "none.png"], "region 'none.png': no such file; expected one of"),
        (["--keep", "0,0,99,16"], "expected 0 <= X0 < X1 <= 16"),
        (
            ["--change", "14,4,26,20"],
            "fitted to 16x16 first (fit crop), where this part of it is 3,3,13,16: give",
        ),
        (["--change", "4,0,40,20", "--fit", "stretch"], "(fit stretch), where this part of it is 1,0,16,16: give that"),
        (["--keep", "0,a,9,16"], "expected four whole numbers X0,Y0,X1,Y1"),
        (["--place", "8,8,8,16"], "expected 0 <= X0 < X1 <= 16"),
        (["--keep", "0,0,1,1"], "no token stays, so there is nothing to edit; a token is 2x2 pixels"),
        (["--keep", "none"], "no token stays"),
        (["--change", "none"], "all 64 tokens stay, so there is nothing to edit"),
        (["--keep", "left", "--label", "badger"], "unknown label 'badger'"),
        (["--keep", "left", "--count", "0"], "--count 0: expected 1 or more"),
        (["--keep", "left", "--count", "1000000"], "--count 1000000: expected 1 or more, at most 100000"),
        (["--keep", "left", "--threads", "0"], "threads 0: expected 1 or more"),
        (["--change", "/"], "/: is a folder, not a file"),
        (["--keep", "left", "--out", "x.jpg"], "--out x.jpg: expected a name that ends in .png"),
        (["--keep", "left", "--tokens", "x.npz"], "expected a name that ends in .npy"),
        (["--keep", "left", "--guidance", "-1"], "guidance -1.0: expected 0 or more"),
        (["--keep", "left", "--change", "top"], "not allowed with argument"),
        ([], "one of the arguments --keep --change --place is required"),
        (["--keep", "left", "--which", "0"], "is one image, not a sheet"),
        (["--keep", "left"], "its class is not known (it is no image of parvis); give one with --label"),
    ],
)
def test_bad_edits_end_in_one_line(
    tiny: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    label = [] if message.startswith("its class") or "--label" in arguments else ["--label", "otter"]
    out = [] if "--out" in arguments else ["--out", tmp_path / "e.png"]
    assert run("edit", picture, "--bundle", tiny, *label, *out, *arguments) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"photo.jpg"}


def test_images_that_cannot_be_edited_end_in_one_line(
    tiny: Path, sheet: Path, picture: Path, bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(picture.read_bytes()[:300])
    (tmp_path / "notes.png").write_text("not an image")
    keep = ("--keep", "left", "--label", "0", "--out", tmp_path / "e.png")
    for image, which, message in (
        (tmp_path / "none.png", [], "no such file or folder"),
        (tmp_path / "notes.png", [], "not an image that can be read"),
        (cut, [], "truncated"),
        (sheet, [], "holds 6 images; choose one with --which 0 .. 5"),
        (sheet, ["--which", 6], "holds 6 images; choose one with --which 0 .. 5"),
        (tmp_path, [], "is a folder, not a file"),
    ):
        assert run("edit", image, "--bundle", tiny, *keep, *which) == 2, image
        output = capsys.readouterr().err
        assert message in output
        assert output.count("\n") == 1
        assert not (tmp_path / "e.png").exists()
    assert run("edit", picture, "--bundle", bundles["n1"], *keep) == 2
    assert "this bundle ends at tokens and makes no images" in capsys.readouterr().err


def test_a_damaged_tiff_ends_in_one_line_too(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libtiff prints lines of its own, from C."""
    path = tmp_path / "a.tif"
    Image.effect_noise((40, 30), 80).save(path, compression="tiff_lzw")
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    for arguments in (
        ("edit", path, "--label", 0, "--keep", "left"),
        ("reconstruct", path),
        ("redo", path),
    ):
        assert run(*arguments, "--bundle", tiny) == 2
        error = capfd.readouterr().err
        assert "not an image that can be read" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("where", "error"),
    [
        (["--keep", "-1,0,3,3"], "box '-1,0,3,3': expected 0 <= X0 < X1 <= 16 and 0 <= Y0 < Y1 <= 16, the pixels of"),
        (["--change", "-1,0"], "region '-1,0': expected one of left, right, top, bottom, center, border, all, none,"),
        (["--change", "-.5,0,1,1"], "box '-.5,0,1,1': expected four whole numbers X0,Y0,X1,Y1"),
        (["--place", "-1,0,3,3"], "box '-1,0,3,3': expected 0 <= X0 < X1 <= 16"),
        (["--place", "-1,0"], "box '-1,0': expected four whole numbers X0,Y0,X1,Y1"),
        (["--keep", "left", "--guidance", "-1e3"], "guidance -1000.0: expected 0 or more"),
        (["--keep", "left", "--seed", "-1"], "seed -1: expected a whole number 0 .. 2**64-1"),
    ],
)
def test_a_negative_number_is_a_value_and_no_option(
    tiny: Path, sheet: Path, where: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("edit", sheet, "--which", 0, *where, "--bundle", tiny) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"parvis: error: {error}")
    assert printed.count("\n") == 1


def test_a_picture_of_too_many_pixels_ends_in_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, content = tmp_path / "a.png", io.BytesIO()
    Image.new("L", (1, 1)).save(content, "PNG")
    data = bytearray(content.getvalue())
    data[16:24] = struct.pack(">II", 10**4, 10**4)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)
    for arguments in (("edit", path, "--label", 0, "--keep", "left"), ("reconstruct", path), ("redo", path)):
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # as outside of tests
            assert run(*arguments, "--bundle", tiny) == 2
        assert capsys.readouterr().err == (
            f"parvis: error: {path}: 10000x10000 is too many pixels; expected at most 89478485 in all: give a smaller "
            "picture\n"
        )


def test_a_pipe_is_not_waited_for(
    tiny: Path, tiny_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_waiting: None
) -> None:
    path = tmp_path / "a.png"
    os.mkfifo(path)
    for bundle in (tiny, tiny_video):
        for arguments in (
            ("edit", path, "--label", 0, "--keep", "left"),
            ("reconstruct", path),
            ("redo", path),
        ):
            assert run(*arguments, "--bundle", bundle) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"parvis: error: {path}: is a pipe, not a file; ")
            assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("where", "error"),
    [
        (["--keep", "left"], "is for a mask image, 'left' is none; leave it out"),
        (["--change", "0,0,8,8"], "is for a mask image, '0,0,8,8' is none; leave it out"),
        (["--place", "0,0,8,8"], "is for a mask image, --place takes none; leave it out"),
    ],
)
def test_a_way_to_read_a_mask_without_a_mask(
    tiny: Path, sheet: Path, where: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("edit", sheet, "--bundle", tiny, "--which", 0, *where, "--mask-from", "alpha") == 2
    assert capsys.readouterr().err == f"parvis: error: --mask-from alpha: {error}\n"
