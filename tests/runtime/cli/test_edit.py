"""`parvis reconstruct` and `parvis edit` with images of all kinds, right and wrong."""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from par_runtime import Pipeline
from par_runtime.backends.ort import sessions
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.errors import RequestError
from par_runtime.images import opening, photo, png, region
from par_runtime.tokenizer import Tokenizer

SIZE = (16, 16)


def run(*arguments: object) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def region_mask(named: str, size: tuple[int, int], fit: photo.Fit = "crop") -> np.ndarray:
    return region.region(named, size, fit).pixels


@pytest.fixture
def sheet(tiny: Path, tmp_path: Path) -> Path:
    """Six generated images, three in a row."""
    out = tmp_path / "sheet.png"
    assert (
        run(
            "generate",
            tiny,
            "--label",
            1,
            "--label",
            4,
            "--count",
            3,
            "--columns",
            3,
            "--seed",
            1,
            "--out",
            out,
            "--quiet",
        )
        == 0
    )
    return out


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A photo: 40 wide, 20 high, JPEG."""
    rows, columns = np.mgrid[0:20, 0:40]
    pixels = np.stack([columns * 6, rows * 12, (rows + columns) * 4], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95)
    return tmp_path / "photo.jpg"


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
