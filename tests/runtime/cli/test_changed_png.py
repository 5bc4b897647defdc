"""PNGs of parvis that were repainted, cropped, resized, turned or saved again before they are edited or redone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from PIL import Image, ImageDraw, PngImagePlugin

from par_runtime.bundle import Bundle
from par_runtime.images import opening, photo, png
from par_runtime.pipeline import Pipeline
from par_runtime.tokenizer import Tokenizer

EDIT = ("--keep", "left", "--seed", 1)


@pytest.fixture
def one(tiny: Path, tmp_path: Path) -> Path:
    assert run("generate", tiny, "--label", 2, "--seed", 7, "--out", tmp_path / "one.png", "--quiet") == 0
    return tmp_path / "one.png"


@pytest.fixture
def sheet(tiny: Path, tmp_path: Path) -> Path:
    out = tmp_path / "sheet.png"
    assert run("generate", tiny, "--label", "all", "--columns", 3, "--seed", 7, "--out", out, "--quiet") == 0
    return out


def saved_again(
    path: Path, change: Callable[[Image.Image], Image.Image], out: Path, drop: tuple[str, ...] = ()
) -> Path:
    """What an editor makes of ``path`` that keeps the metadata. ``drop``: keys of each image's entry to leave out."""
    with Image.open(path) as image:
        image.load()
        entry = json.loads(image.text["parvis"])  # type: ignore[attr-defined]
        for each in entry["images"]:
            for key in drop:
                del each[key]
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parvis", json.dumps(entry))
        change(image.copy()).save(out, pnginfo=info)
    return out


def painted(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).rectangle((1, 1, 4, 4), fill=(255, 0, 255))
    return image


def erased(image: Image.Image) -> Image.Image:
    image.putalpha(255)
    image.paste((0, 0, 0, 0), (2, 2, 5, 5))
    return image


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "painted": painted,
    "erased": erased,
    "turned": lambda image: image.rotate(90),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "resized": lambda image: image.resize((40, 30)),
    "cropped": lambda image: image.crop((0, 0, 12, 12)),
    "one grey level": lambda image: image.point(lambda v: min(255, v + 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pixels_are_encoded(
    tiny: Path, one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    changed, out = saved_again(one, CHANGES[change], tmp_path / "c.png"), tmp_path / "e.png"
    assert run("edit", changed, "--bundle", tiny, *EDIT, "--out", out, "--paste", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["encoded"] is True
    assert (
        "than parvis wrote" in row["encoded_because"] or "were changed since parvis wrote it" in row["encoded_because"]
    )
    assert row["label"] == 2
    pixels = photo.fit_image(opening.open_image(changed), (16, 16))
    tokens = Tokenizer(Bundle.open(tiny)).encode(pixels)[0]
    recipe, made = png.read(out)
    assert recipe.kept is not None
    np.testing.assert_array_equal(recipe.tokens[recipe.kept], tokens[recipe.kept[0]])
    np.testing.assert_array_equal(made[:, :8], pixels[:, :8])
    assert run("edit", changed, "--bundle", tiny, *EDIT, "--out", out) == 0
    assert "encoding its pixels" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("drop", [(), ("pixels",)], ids=["with hashes", "older file"])
def test_the_same_pixels_saved_by_another_program_keep_their_tokens(
    tiny: Path, one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, drop: tuple[str, ...]
) -> None:
    again = saved_again(one, lambda image: image.convert(mode), tmp_path / "c.png", drop)
    assert run("edit", again, "--bundle", tiny, *EDIT, "--out", tmp_path / "e.png") == 0
    assert "tokens kept as they were generated" in capsys.readouterr().out
    assert run("redo", again, "--bundle", tiny) == 0
    assert "every pixel" in capsys.readouterr().out


def test_older_files_are_compared_with_what_their_tokens_decode_to(
    tiny: Path, one: Path, sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = saved_again(one, painted, tmp_path / "c.png", ("pixels",))
    assert run("edit", changed, "--bundle", tiny, *EDIT, "--out", tmp_path / "e.png") == 0
    assert "were changed since parvis wrote it; encoding its pixels" in capsys.readouterr().err
    nearly = saved_again(one, CHANGES["one grey level"], tmp_path / "n.png", ("pixels",))  # another device's decoder
    assert run("edit", nearly, "--bundle", tiny, *EDIT, "--out", tmp_path / "e.png") == 0
    assert "as they were generated" in capsys.readouterr().out
    # Pasted pixels are no decoded ones, and are no change.
    pasted = tmp_path / "p.png"
    Image.effect_noise((16, 16), 90).save(tmp_path / "noise.png")
    assert run("edit", tmp_path / "noise.png", "--bundle", tiny, "--label", 0, *EDIT, "--paste", "--out", pasted) == 0
    for change, encoded in ((lambda image: image, False), (lambda image: image.rotate(180), True)):
        older = saved_again(pasted, change, tmp_path / "c.png", ("pixels",))
        capsys.readouterr()
        assert run("edit", older, "--bundle", tiny, *EDIT, "--out", tmp_path / "e.png", "--json") == 0
        assert json.loads(capsys.readouterr().out)["encoded"] is encoded


def test_images_of_a_sheet_are_judged_one_by_one(
    tiny: Path, sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, out = saved_again(sheet, painted, tmp_path / "c.png"), tmp_path / "e.png"
    for which, encoded in ((0, True), (4, False)):
        assert run("edit", changed, "--which", which, "--bundle", tiny, *EDIT, "--out", out, "--json") == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["encoded"], row["label"]) == (encoded, which)
    assert run("redo", changed, "--bundle", tiny) == 1
    assert "1 of 6 images were changed since parvis wrote them" in capsys.readouterr().out


def test_one_image_cut_out_of_a_sheet_has_its_tokens(
    tiny: Path, sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fifth = saved_again(sheet, lambda image: image.crop((16, 16, 32, 32)), tmp_path / "c.png")
    assert run("edit", fifth, "--bundle", tiny, *EDIT, "--out", tmp_path / "e.png", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["encoded"], row["label"]) == (False, 4)
    assert run("redo", fifth, "--bundle", tiny) == 2
    assert "was cropped, resized or turned since parvis wrote it" in capsys.readouterr().err
    other = saved_again(sheet, lambda image: image.crop((10, 16, 26, 32)), tmp_path / "c.png")
    assert run("edit", other, "--bundle", tiny, *EDIT, "--out", tmp_path / "e.png") == 2
    assert "its class is not known (" in (error := capsys.readouterr().err)
    assert "c.png has another size than parvis wrote); give one with --label" in error
    assert run("edit", other, "--which", 4, "--bundle", tiny, *EDIT, "--out", tmp_path / "e.png") == 2
    assert "its images cannot be told apart; crop the one that you want" in capsys.readouterr().err


def test_outpainting_one_image_of_a_sheet(
    tiny: Path, sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = (
        "edit",
        sheet,
        "--bundle",
        tiny,
        "--place",
        "4,4,12,12",
        "--seed",
        1,
        "--paste",
        "--out",
        tmp_path / "e.png",
    )
    assert run(*place, "--which", 4) == 0
    recipe, made = png.read(tmp_path / "e.png")
    assert recipe.labels == [4]
    image = png.sheet_image(png.read(sheet)[1], 3, 6, 4)
    np.testing.assert_array_equal(made[4:12, 4:12], photo.fit_image(Image.fromarray(image), (8, 8)))
    capsys.readouterr()
    assert run(*place) == 2
    assert "holds 6 images; choose one with --which 0 .. 5" in capsys.readouterr().err


def test_a_mask_over_the_whole_sheet_is_no_mask_of_one_image(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four images in a square have the shape of one."""
    sheet, mask = tmp_path / "sheet.png", tmp_path / "mask.png"
    assert run("generate", tiny, "--label", 0, "--count", 4, "--seed", 7, "--out", sheet, "--quiet") == 0
    Image.new("L", (32, 32), 255).save(mask)
    edit = ("edit", sheet, "--which", 1, "--bundle", tiny, "--change", mask, "--out", tmp_path / "e.png")
    assert run(*edit) == 2
    assert "as the whole sheet; the image is 16x16: draw the mask over that image alone" in capsys.readouterr().err


def test_redo_says_that_pasted_pixels_were_changed(
    tiny: Path, one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pasted = tmp_path / "p.png"
    assert run("edit", one, "--bundle", tiny, *EDIT, "--paste", "--out", pasted) == 0
    assert run("redo", pasted, "--bundle", tiny) == 0
    assert "pasted over the kept ones, and none was changed since" in capsys.readouterr().out
    assert run("redo", saved_again(pasted, painted, tmp_path / "c.png"), "--bundle", tiny) == 1
    assert "the pixels are not (1 of 1 images were changed since" in capsys.readouterr().out


def test_where_all_tokens_were_given_nothing_is_proved(
    tiny: Path, one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(one) as image:
        image.load()
        entry = json.loads(image.text["parvis"])  # type: ignore[attr-defined]
        entry["images"][0]["kept"] = "//////////8="  # 64 bits
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parvis", json.dumps(entry))
        image.save(tmp_path / "k.png", pnginfo=info)
    assert run("redo", tmp_path / "k.png", "--bundle", tiny) == 2
    assert "nothing to make again: all its 64 tokens were given, none was drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "BUNDLE", "--label", 0, "--columns", 100_000),
        ("generate", "BUNDLE", "--label", 0, "--count", 5000, "--guidance", 1, 2),
        ("generate", "BUNDLE", "--label", 0, "--columns", 10**30),
        ("edit", "ONE", "--bundle", "BUNDLE", "--keep", "left", "--count", 100_000),
    ],
)
def test_a_sheet_that_nothing_opens_is_refused_before_any_work(
    tiny: Path,
    one: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(png, "MOST_SIDE", 4000)
    filled = [{"BUNDLE": tiny, "ONE": one}.get(a, a) if isinstance(a, str) else a for a in arguments]
    assert run(*filled, "--out", tmp_path / "x.png") == 2
    error = capsys.readouterr().err
    assert "expected at most 4000 on a side and 89478485 in all" in error
    assert error.count("\n") == 1
    assert len(error) < 500
    assert {p.name for p in tmp_path.iterdir()} == {"one.png"}


def test_a_reconstruction_beside_the_originals_is_measured_with_them(
    tiny: Path, one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png, "MOST_SIDE", 100)
    many = [one] * 12  # 4 columns of 16 pixels, or of 32
    assert run("reconstruct", *many, "--bundle", tiny, "--out", tmp_path / "r.png") == 0
    assert run("reconstruct", *many, "--bundle", tiny, "--beside", "--out", tmp_path / "r2.png") == 2
    assert "has 128x48 pixels; expected at most 100 on a side" in capsys.readouterr().err


def test_the_columns_of_a_sheet_are_a_count() -> None:
    for bad in (0, -1, True, 1.5, "3", None):
        with pytest.raises(ValueError, match=r"^columns .*: expected a whole number, 1 or more"):
            png.check_sheet(4, bad, (16, 16))  # type: ignore[arg-type]
    png.check_sheet(4, np.int64(2), (16, 16))  # type: ignore[arg-type]


@pytest.mark.parametrize(("levels", "code"), [(0, 0), (1, 0), (2, 1)])
def test_what_another_decoder_rounded_is_the_same_image(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], levels: int, code: int
) -> None:
    """The C decoder and ONNX Runtime's differ by one grey level, here and there."""
    with Pipeline.load(tiny) as pipeline:
        result = pipeline.generate([2], seed=7)
    assert result.images is not None
    images = result.images.copy()
    images[0, 3:5, 7] -= levels * (images[0, 3:5, 7] > 1).astype(np.uint8)
    replace(result, images=images).save(tmp_path / "same.png")
    assert run("redo", tmp_path / "same.png", "--bundle", tiny, "--quiet") == code
    said = capsys.readouterr().out.partition("same.png: ")[2]
    assert "decode" not in said.partition("another --device")[0]  # the file says that it was the same one
    replace(result, images=images, made_on=None).save(tmp_path / "other.png")
    capsys.readouterr()
    assert run("redo", tmp_path / "other.png", "--bundle", tiny, "--quiet") == code
    said = capsys.readouterr().out
    assert {
        0: "identical: 1 image, 64 tokens, every pixel",
        1: "identical: 1 image, 64 tokens; 2 of its pixels differ by 1 of 255, as another decoder rounds them",
        2: "different: the tokens are the same, the pixels are not (2 pixels, by up to 2 of 255; another --device or "
        "--decoder-precision decodes otherwise, and so does another CPU in bf16)",
    }[levels] in said
    one_more = saved_again(tmp_path / "other.png", CHANGES["one grey level"], tmp_path / "changed.png")
    assert run("redo", one_more, "--bundle", tiny, "--quiet") == 1
    assert "1 of 1 images were changed since parvis wrote them" in capsys.readouterr().out


def test_an_image_of_onnx_runtime_is_redone_by_the_decoder_in_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, sheet = Path(__file__).parents[3] / "models" / "demo", tmp_path / "sheet.png"
    generate = ("generate", demo, "--label", "0", "4", "11", "--seed", 1, "--out", sheet, "--quiet")
    assert run(*generate, "--device", "cpu-ort") == 0
    exact = ("--arithmetic", "fp32", "--cache", "fp32")
    assert run("redo", sheet, "--bundle", demo, "--device", "cpu", "--quiet", *exact) == 0
    assert "identical: 3 images, 768 tokens" in capsys.readouterr().out
