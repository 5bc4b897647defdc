"""``--scale``: small images written large, and read as if they had not been."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from par_runtime import Pipeline
from par_runtime.cli import dispatch
from par_runtime.errors import RequestError
from par_runtime.images import png


def run(*arguments: object) -> int:
    return dispatch.main([str(argument) for argument in arguments])


@pytest.fixture
def sheets(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The same three images as they are, and three times as large."""
    base = ["generate", tiny, "--label", 0, 3, 1, "--seed", 5, "--columns", 2, "--quiet"]
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    assert run(*base, "--out", small) == 0
    assert run(*base, "--out", large, "--scale", 3) == 0
    return small, large


def saved(path: Path, change: tuple[int, int] | None = None, size: tuple[int, int] | None = None) -> None:
    """Save a PNG again with its metadata, one pixel changed or resized."""
    with Image.open(path) as image:
        image.load()
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parvis", image.text["parvis"])  # type: ignore[attr-defined]
        if change is not None:
            r, g, b = image.getpixel(change)  # type: ignore[misc]
            image.putpixel(change, (r ^ 1, g, b))
        out = image if size is None else image.resize(size)
        out.save(path, pnginfo=info)


def test_each_pixel_is_a_square_and_all_else_is_the_same(sheets: tuple[Path, Path]) -> None:
    small, large = (np.asarray(Image.open(path)) for path in sheets)
    assert (large == small.repeat(3, 0).repeat(3, 1)).all()
    recipe, pixels = png.read(sheets[1])
    plain, plain_pixels = png.read(sheets[0])
    assert (recipe.scale, plain.scale) == (3, 1)
    assert (pixels == plain_pixels).all()
    assert recipe.pixel_hashes == plain.pixel_hashes
    with Image.open(sheets[0]) as image:
        assert "scale" not in json.loads(image.text["parvis"])  # type: ignore[attr-defined]


def test_redo_and_edit_undo_it(
    tiny: Path, sheets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, large = sheets
    assert run("redo", large, "--bundle", tiny, "--out", tmp_path / "again.png") == 0
    assert "every pixel" in capsys.readouterr().out
    assert (tmp_path / "again.png").read_bytes() == large.read_bytes()
    outs = [tmp_path / "a.png", tmp_path / "b.png"]
    for image, out in zip(sheets, outs, strict=True):
        edit = ["edit", image, "--which", 1, "--bundle", tiny, "--keep", "top", "--seed", 2, "--out", out, "--quiet"]
        assert run(*edit) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert run(*edit, "--scale", 2) == 0
    with Image.open(outs[1]) as twice, Image.open(outs[0]) as once:
        assert twice.size == (32, 32)
        assert twice.resize(once.size, Image.Resampling.NEAREST).tobytes() == once.tobytes()
    assert run("redo", outs[1], "--bundle", tiny, "--quiet") == 0


def test_one_pixel_of_a_square_is_a_change_of_its_image_alone(
    tiny: Path, sheets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, large = sheets
    saved(large, change=(70, 10))  # in the second image: the mean of its square rounds to what it was
    recipe, _ = png.read(large)
    assert recipe.pixel_hashes is not None
    assert [bool(each) for each in recipe.pixel_hashes] == [True, False, True]
    assert run("redo", large, "--bundle", tiny) == 1
    assert "1 of 3 images were changed" in capsys.readouterr().out


def test_one_that_was_resized_is_refused(
    tiny: Path, sheets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    saved(sheets[1], size=(97, 95))
    assert run("redo", sheets[1], "--bundle", tiny) == 2
    assert "it was cropped, resized or turned" in capsys.readouterr().err


def test_scales_that_cannot_be(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scale in ("0", "65", "-1"):
        for verb in (["generate", tiny, "--label", 0], ["edit", "x.png", "--bundle", tiny, "--keep", "left"]):
            assert run(*verb, "--out", tmp_path / "x.png", "--scale", scale) == 2
            assert f"scale {scale}: expected a whole number from 1 to 64" in capsys.readouterr().err
    assert run("generate", tiny, "--label", 0, "--count", 200, "--scale", 64, "--out", tmp_path / "x.png") == 2
    assert "expected at most 65535 on a side" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_scale_in_python_reconstruct_previews_and_single_files(tiny: Path, tmp_path: Path) -> None:
    with Pipeline.load(tiny) as pipeline:
        result = pipeline.generate(0, seed=1)
    result.save(tmp_path / "a.png", scale=4)
    with pytest.raises(RequestError, match=r"scale 1\.5: expected a whole number"):
        result.save(tmp_path / "a.png", scale=1.5)  # type: ignore[arg-type]
    run("reconstruct", tmp_path / "a.png", "--bundle", tiny, "--scale", 2, "--out", tmp_path / "b.png")
    run("generate", tiny, "--label", 0, "--seed", 1, "--scale", 2, "--out-dir", tmp_path / "d", "--quiet")
    out = tmp_path / "p.png"
    run("generate", tiny, "--label", 0, "--seed", 1, "--scale", 2, "--out", out, "--preview-every", 10, "--quiet")
    sizes = {}
    for path in sorted(tmp_path.rglob("*.png")):
        with Image.open(path) as image:
            sizes[path.name] = image.size[0]
    assert sizes == {"a.png": 64, "b.png": 32, "red-fox-1.png": 32, "p-0010.png": 32, "p.png": 32}
