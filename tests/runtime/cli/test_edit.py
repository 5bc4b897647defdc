"""``parvis reconstruct`` and ``parvis edit`` with images of all kinds: tokens that stay, masks, boxes, photos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from edited import six_images, small_photo
from PIL import Image

from par_runtime import Pipeline
from par_runtime.backends.ort import sessions
from par_runtime.bundle import Bundle
from par_runtime.errors import RequestError
from par_runtime.images import opening, photo, png, region
from par_runtime.tokenizer import Tokenizer

SIZE = (16, 16)


def region_mask(named: str, size: tuple[int, int], fit: photo.Fit = "crop") -> np.ndarray:
    return region.region(named, size, fit).pixels


@pytest.fixture
def sheet(tiny: Path, tmp_path: Path) -> Path:
    return six_images(tiny, tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return small_photo(tmp_path)


def tokens_of(path: Path) -> np.ndarray:
    return png.read(path)[0].tokens


def left_half(tiny: Path) -> np.ndarray:
    keep = np.zeros((8, 8), bool)
    keep[:, :4] = True
    return keep.reshape(-1)[list(Bundle.open(tiny).order)]


def test_a_generated_image_is_edited_from_its_own_tokens(
    tiny: Path, sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.png"
    assert (
        run("edit", sheet, "--which", 4, "--bundle", tiny, "--keep", "left", "--count", 2, "--seed", 15, "--out", out)
        == 0
    )
    assert "2 images of" in (output := capsys.readouterr().out)
    assert "32 of 64 tokens kept as they were generated" in output
    before, after, left = tokens_of(sheet)[4], tokens_of(out), left_half(tiny)
    assert (after[:, left] == before[left]).all()
    assert (after[:, ~left] != before[~left]).any(1).all()
    assert (after[0] != after[1]).any()
    recipe, pixels = png.read(out)
    assert recipe.labels == [4, 4]  # the class it was made with
    assert recipe.kept is not None
    assert (recipe.kept == left).all()
    assert pixels.shape == (16, 32, 3)
    # The same as in Python.
    keep = np.zeros((8, 8), bool)
    keep[:, :4] = True
    result = Pipeline.load(tiny, device="cpu").generate([4, 4], seed=15, keep=keep, tokens=before)
    np.testing.assert_array_equal(result.tokens, after)


def test_an_edit_can_be_redone_and_edited_again(
    tiny: Path, sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "1.png", tmp_path / "2.png"
    assert (
        run(
            "edit",
            sheet,
            "--which",
            0,
            "--bundle",
            tiny,
            "--change",
            "center",
            "--label",
            3,
            "--seed",
            1,
            "--out",
            first,
        )
        == 0
    )
    assert run("edit", first, "--bundle", tiny, "--keep", "0,0,16,8", "--seed", 2, "--out", second) == 0
    capsys.readouterr()
    for path, drawn in ((first, 16), (second, 32)):
        assert run("redo", path, "--bundle", tiny) == 0
        said = f"identical: 1 image, 64 tokens ({drawn} of them drawn, the others given), every pixel"
        assert said in capsys.readouterr().out
    assert png.read(second)[0].labels == [3]
    # A redo that ignored what was kept would draw these tokens otherwise.
    free = Pipeline.load(tiny, device="cpu").generate(3, seed=1)
    assert (free.tokens != tokens_of(first)).any()


def test_a_photo_is_encoded_and_keeps_its_pixels_if_asked(
    tiny: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.png"
    common = ("--bundle", tiny, "--label", "otter", "--keep", "top", "--seed", 1, "--out", out)
    assert run("edit", picture, *common, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["encoded"] is True
    assert (row["kept_tokens"], row["tokens"]) == (32, 64)
    pixels = photo.fit_image(opening.open_image(picture), SIZE)
    tokens = Tokenizer(Bundle.open(tiny)).encode(pixels)[0]
    keep = region.kept_tokens(region_mask("top", SIZE), (8, 8)).reshape(-1)[list(Bundle.open(tiny).order)]
    assert (tokens_of(out)[0][keep] == tokens[keep]).all()
    assert (png.read(out)[1][:8] != pixels[:8]).any()  # decoded, so not the same
    assert run("edit", picture, *common, "--paste", "--quiet") == 0
    recipe, pasted = png.read(out)
    assert recipe.pasted
    np.testing.assert_array_equal(pasted[:8], pixels[:8])
    assert (pasted[8:] != pixels[8:]).any()
    assert run("redo", out, "--bundle", tiny) == 0
    assert "the pixels were not compared, because those of the original were pasted" in capsys.readouterr().out


def test_outpainting_shrinks_the_photo_into_a_box(tiny: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.png"
    assert run("edit", picture, "--bundle", tiny, "--label", 0, "--place", "4,4,12,12", "--seed", 1, "--out", out) == 0
    kept = png.read(out)[0].kept
    assert kept is not None
    assert kept.sum() == 16
    canvas, inside = photo.place_image(opening.open_image(picture), SIZE, (4, 4, 12, 12))
    assert inside.sum() == 64
    np.testing.assert_array_equal(canvas[4:12, 4:12], photo.fit_image(opening.open_image(picture), (8, 8)))
    assert (canvas[0, 4:12] == canvas[4, 4:12]).all()


def test_a_mask_image_is_fitted_as_the_photo_is(picture: Path, tmp_path: Path) -> None:
    mask = np.zeros((20, 40), np.uint8)
    mask[:, 20:] = 255  # the right half of the photo, and of its middle part
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(region_mask(str(tmp_path / "mask.png"), SIZE), region_mask("right", SIZE))
    mask[:] = 0
    mask[:, :10] = 255  # cropped away, but there when stretched
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert not region_mask(str(tmp_path / "mask.png"), SIZE).any()
    assert region_mask(str(tmp_path / "mask.png"), SIZE, "stretch").sum() == 16 * 4


def test_regions_and_the_tokens_that_stay() -> None:
    halves = [region_mask(side, SIZE) for side in ("left", "right", "top", "bottom")]
    assert [int(h.sum()) for h in halves] == [128] * 4
    assert (halves[0] ^ halves[1]).all()
    assert (halves[2] ^ halves[3]).all()
    assert (region_mask("center", SIZE) ^ region_mask("border", SIZE)).all()
    assert region_mask("center", SIZE).sum() == 64
    one_pixel = ~region_mask("5,5,6,6", SIZE)  # one pixel changes, so its token does
    kept = region.kept_tokens(one_pixel, (8, 8))
    assert kept.sum() == 63
    assert not kept[2, 2]


def test_images_of_all_kinds_open_upright_and_opaque(tmp_path: Path) -> None:
    upright = Image.new("RGB", (30, 10), "red")
    exif = upright.getexif()
    exif[0x0112] = 6  # turned by the camera
    upright.save(tmp_path / "turned.jpg", exif=exif)
    assert opening.open_image(tmp_path / "turned.jpg").size == (10, 30)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert opening.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert opening.open_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    Image.new("P", (4, 4)).save(tmp_path / "palette.gif")
    Image.new("CMYK", (4, 4)).save(tmp_path / "print.jpg")
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    for name in ("palette.gif", "print.jpg", "bits.png"):
        assert photo.fit_image(opening.open_image(tmp_path / name), SIZE).shape == (16, 16, 3)


def test_reconstruct_writes_a_sheet_and_tokens_and_reports_the_loss(
    tiny: Path, picture: Path, sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tokens = tmp_path / "r.png", tmp_path / "r.npy"
    assert run("reconstruct", picture, sheet, "--bundle", tiny, "--beside", "--out", out, "--tokens", tokens) == 0
    output = capsys.readouterr().out
    count = output.count("16x16 pixels in 64 tokens")
    saved = np.load(tokens)
    recipe, whole = png.read(sheet)
    assert (count, len(saved)) == (1 + len(recipe), count)  # of a sheet of parvis all its images
    assert f"{sheet} (1): 16x16 pixels" in output
    with Image.open(out) as image:
        pixels = np.asarray(image)
    pair = png.sheet_image(pixels, 3, count, 2)
    np.testing.assert_array_equal(pair[:, :16], png.sheet_image(whole, recipe.columns, len(recipe), 1))
    original = photo.fit_image(opening.open_image(picture), SIZE)
    np.testing.assert_array_equal(pixels[:16, :16], original)
    np.testing.assert_array_equal(pixels[:16, 16:32], Pipeline.load(tiny, device="cpu").decode(saved)[0])
    assert run("reconstruct", picture, "--bundle", tiny, "--out", out, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    mse = ((original.astype(float) - pixels[:16, 16:32]) ** 2).mean()
    assert row["images"][0]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / mse))
    assert row["images"][0]["codes"] == len(np.unique(saved[0]))


def test_the_tokenizer_alone_is_the_pipelines(tiny: Path) -> None:
    pipeline, tokenizer = Pipeline.load(tiny, device="cpu"), Tokenizer(Bundle.open(tiny), threads=1)
    tokens = np.random.default_rng(0).integers(0, 64, (3, 64))
    images = tokenizer.decode(tokens)
    np.testing.assert_array_equal(images, pipeline.decode(tokens))
    np.testing.assert_array_equal(tokenizer.encode(images), pipeline.encode(images))
    assert tokenizer.encode(np.zeros((0, 16, 16, 3), np.uint8)).shape == (0, 64)
    for bad in (images.astype(np.float32), images[..., :2], images[0, 0]):
        with pytest.raises(
            RequestError, match=r"images have shape .*; expected uint8 \[16, 16, 3\], or a batch of such"
        ):
            pipeline.encode(bad)


def test_more_images_than_one_call_takes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(Bundle.open(tiny), threads=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    whole = tokenizer.encode(images)
    monkeypatch.setattr("par_runtime.tokenizer.CHUNK_PIXELS", 2 * 16 * 16)
    sizes = []
    once = sessions.run
    monkeypatch.setattr(sessions, "run", lambda s, n, v: (sizes.append(len(v)), once(s, n, v))[1])
    np.testing.assert_array_equal(tokenizer.encode(images), whole)
    assert sizes == [2, 2, 1]


def test_a_sheet_of_another_bundle_is_encoded(
    tiny: Path, sheet: Path, bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.png"
    arguments = (sheet, "--which", 2, "--bundle", bundles["fp32"], "--keep", "left", "--seed", 1, "--out", out)
    assert run("edit", *arguments, "--label", 1) == 0
    assert "was made by bundle 'tiny'; encoding its pixels" in capsys.readouterr().err
    pixels = png.read(sheet)[1][:16, 32:48]
    tokens = Tokenizer(Bundle.open(bundles["fp32"])).encode(pixels)[0]
    left = left_half(bundles["fp32"])
    assert (tokens_of(out)[0][left] == tokens[left]).all()


def test_the_demo_encodes_what_it_decodes() -> None:
    """The shipped encoder was trained for the shipped decoder: a picture survives both, and mostly as the same codes.

    A broken encoder, or one in another order, gives 10 dB and one code in a thousand.
    """
    pipeline = Pipeline.load(Path(__file__).parents[3] / "models" / "demo", device="cpu")
    made = pipeline.generate(["lorelei", "micah"], seed=1)
    tokens = pipeline.encode(made.images)
    again = pipeline.decode(tokens)
    mse = ((made.images.astype(float) - again) ** 2).mean((1, 2, 3))
    assert (10 * np.log10(255**2 / mse) > 27).all()
    assert (tokens == made.tokens).mean() > 0.2  # several codes decode to nearly the same pixels
    assert (pipeline.encode(again) == tokens).mean() > 0.6


def test_a_box_in_the_pixels_of_an_enlarged_png(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    assert run("generate", tiny, "--label", 1, "--count", 2, "--scale", 4, "--seed", 1, "--out", out, "--quiet") == 0
    edit = ("edit", out, "--bundle", tiny, "--which", 1, "--out", tmp_path / "b.png", "--change")
    assert run(*edit, "16,30,48,64") == 2
    error = capsys.readouterr().err
    assert error.endswith(
        "the photo of 64x64 is fitted to 16x16 first (fit crop), where this part of it is 4,7,12,16: give that\n"
    )
    assert run(*edit, "4,7,12,16") == 0
