"""Mask images as people make them: painted, in the alpha channel, coloured, soft, and of the wrong shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from par_runtime.errors import RequestError
from par_runtime.images.photo import Fit, fit_image, fitted_box
from par_runtime.images.region import Beside, Region, region

SIZE = (16, 16)
WANTED = np.zeros(SIZE, bool)
WANTED[:, 8:] = True


def photo() -> Image.Image:
    rows, columns = np.mgrid[0:32, 0:32]
    return Image.fromarray(np.stack([columns * 7, rows * 7, (rows + columns) * 3], -1).astype(np.uint8))


def half(inside: tuple[int, ...], outside: tuple[int, ...], mode: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A mask whose right half is ``inside``."""
    image = Image.new(mode, size, outside if len(outside) > 1 else outside[0])
    image.paste(inside if len(inside) > 1 else inside[0], (size[0] // 2, 0, *size))
    return image


def with_hole(image: Image.Image) -> Image.Image:
    """``image`` with its right half erased."""
    out = image.convert("RGBA")
    out.paste((0, 0, 0, 0), (image.width // 2, 0, *image.size))
    return out


def taken(mask: Image.Image, tmp_path: Path, **options: object) -> Region:
    """The region by a file, which is that of the PIL image."""
    path = tmp_path / ("mask.tif" if mask.mode == "I" else "mask.png")
    mask.save(path)
    found = region(str(path), SIZE, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(region(mask, SIZE, **options).pixels, found.pixels)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("mask", "meaning"),
    [
        (half((255,), (0,), "L"), "brightness"),
        (half((255,), (0,), "1"), "brightness"),
        (half((255, 255, 255), (0, 0, 0), "RGB"), "brightness"),
        (half((255, 255, 255, 255), (0, 0, 0, 255), "RGBA"), "brightness"),  # alpha says nothing
        (half((65535,), (0,), "I;16"), "brightness"),
        (half((255,), (0,), "I"), "brightness"),
        (half((255, 255, 0), (0, 0, 0), "RGB"), "brightness"),  # yellow is bright, with any rule
        (half((255, 255, 255, 255), (255, 255, 255, 0), "RGBA"), "alpha"),  # strokes on a layer
        (half((250, 255, 240, 255), (0, 0, 0, 0), "RGBA"), "alpha"),
        (half((255, 255), (0, 0), "LA"), "alpha"),
        (with_hole(photo()), "inverse-alpha"),
    ],
)
@pytest.mark.parametrize("beside", [None, photo()])
def test_what_people_draw(mask: Image.Image, meaning: str, beside: Image.Image | None, tmp_path: Path) -> None:
    found = taken(mask, tmp_path, photo=beside and Beside.of(beside))
    np.testing.assert_array_equal(found.pixels, WANTED)
    assert found.mask_from == meaning


def test_a_flat_drawing_with_a_hole_is_known_by_the_drawing(tmp_path: Path) -> None:
    flat = half((0, 0, 200), (200, 0, 0), "RGB")
    with pytest.raises(RequestError, match=r"give mask_from= \(--mask-from\) alpha"):
        taken(with_hole(flat), tmp_path)
    assert taken(with_hole(flat), tmp_path, photo=Beside.of(flat)).mask_from == "inverse-alpha"
    np.testing.assert_array_equal(taken(with_hole(flat), tmp_path, photo=Beside.of(flat)).pixels, WANTED)
    white = Image.new("RGB", (32, 32), "white")  # strokes on a white picture, or a white picture with a hole?
    with pytest.raises(RequestError, match="it is not known whether its opaque or its transparent part"):
        taken(with_hole(white), tmp_path, photo=Beside.of(white))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (half((0, 0, 0, 0), (0, 0, 0, 255), "RGBA"), "not known whether its opaque or its transparent part"),
        (half((255, 0, 0, 255), (0, 0, 0, 0), "RGBA"), "not known whether its opaque or its transparent part"),
        (half((0, 0, 0, 0), (255, 255, 255, 0), "RGBA"), "all of it is transparent"),
        (half((255, 0, 0), (0, 0, 0), "RGB"), r"neither white nor black \(#ff0000 at 16,0\)"),
        (half((255, 0, 0), (255, 255, 255), "RGB"), "neither white nor black"),
        (half((100,), (0,), "L"), "marks nothing by its brightness"),
        (half((1,), (0,), "L"), "marks nothing"),
        (half((255,), (0,), "L", (64, 32)), "is 64x32 pixels, the image 32x32; expected the shape of the image, or"),
    ],
)
def test_masks_that_could_mean_two_things_or_nothing(mask: Image.Image, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        taken(mask, tmp_path, photo=Beside.of(photo()))
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def test_a_choice_settles_it(tmp_path: Path) -> None:
    black_hole = half((0, 0, 0, 0), (0, 0, 0, 255), "RGBA")
    np.testing.assert_array_equal(taken(black_hole, tmp_path, mask_from="inverse-alpha").pixels, WANTED)
    np.testing.assert_array_equal(taken(black_hole, tmp_path, mask_from="alpha").pixels, ~WANTED)
    red = half((255, 0, 0), (255, 255, 255), "RGB")
    np.testing.assert_array_equal(taken(red, tmp_path, mask_from="brightness").pixels, ~WANTED)
    strokes = half((255, 255, 255, 255), (255, 255, 255, 0), "RGBA")
    np.testing.assert_array_equal(taken(strokes, tmp_path, mask_from="brightness").pixels, WANTED)
    with pytest.raises(RequestError, match="has no transparent part"):
        taken(red, tmp_path, mask_from="alpha")
    with pytest.raises(RequestError, match="mask_from 'green': expected one of auto, brightness"):
        taken(red, tmp_path, mask_from="green")


def test_soft_edges_count_from_the_middle_on() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8), (32, 32))
    np.testing.assert_array_equal(region(Image.fromarray(ramp), SIZE).pixels, WANTED)
    strokes = np.full((32, 32, 4), 255, np.uint8)
    strokes[..., 3] = ramp
    np.testing.assert_array_equal(region(Image.fromarray(strokes), SIZE).pixels, WANTED)
    hole = np.dstack([np.asarray(photo()), 255 - ramp])
    np.testing.assert_array_equal(region(Image.fromarray(hole), SIZE).pixels, WANTED)


def test_a_mask_may_be_smaller_than_the_photo_or_of_the_models_size() -> None:
    wide = photo().resize((64, 32))
    for size in ((32, 16), (64, 32), (63, 32), (16, 16)):
        mask = half((255,), (0,), "L", size)
        np.testing.assert_array_equal(region(mask, SIZE, photo=Beside.of(wide)).pixels, WANTED)


def test_a_region_in_python() -> None:
    assert region(WANTED, SIZE).pixels is WANTED
    for bad in (WANTED[:8], WANTED.astype(int), 5, None, ["left"]):
        with pytest.raises(RequestError, match=r"^region "):
            region(bad, SIZE)  # type: ignore[arg-type]
    for name in ("no\0name", "x" * 10_000, "\x1b[31m"):
        with pytest.raises(RequestError, match=r"^region ") as caught:
            region(name, SIZE)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("photo_size", "size", "fit", "box", "wanted"),
    [
        ((800, 600), (64, 64), "crop", (300, 180, 500, 300), (21, 19, 43, 32)),  # (300-100)*64/600 = 21.3, ...
        ((800, 600), (64, 64), "stretch", (300, 180, 500, 300), (24, 19, 40, 32)),
        ((600, 800), (64, 64), "crop", (180, 300, 300, 500), (19, 21, 32, 43)),
        ((800, 600), (64, 64), "crop", (0, 0, 800, 600), (0, 0, 64, 64)),
        ((800, 600), (64, 64), "crop", (100, 0, 101, 1), (0, 0, 1, 1)),
        ((800, 600), (64, 64), "crop", (0, 0, 101, 600), (0, 0, 1, 64)),
        ((800, 600), (64, 64), "crop", (0, 0, 100, 600), None),
        ((800, 600), (64, 64), "crop", (700, 0, 800, 600), None),
        ((800, 600), (384, 384), "crop", (300, 180, 500, 300), (128, 115, 256, 192)),
        ((7, 5), (16, 32), "crop", (0, 1, 7, 3), (0, 1, 32, 11)),  # of 5 rows the middle 3.5 stay: (1-0.75)*16/3.5
        ((30, 20), (16, 16), "crop", (5, 0, 25, 20), (0, 0, 16, 16)),
    ],
)
def test_a_box_of_a_photo_in_the_pixels_of_the_model(
    photo_size: tuple[int, int],
    size: tuple[int, int],
    fit: Fit,
    box: tuple[int, int, int, int],
    wanted: tuple[int, int, int, int] | None,
) -> None:
    assert fitted_box(box, photo_size, size, fit) == wanted


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_the_box_covers_what_fitting_makes_of_that_part(fit: Fit) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        width, height = rng.integers(20, 200, 2)
        (x0, x1), (y0, y1) = (sorted(rng.choice(n, 2, replace=False)) for n in (width, height))
        drawn = np.zeros((height, width), np.uint8)
        drawn[y0:y1, x0:x1] = 255
        pixels = fit_image(Image.fromarray(drawn), (16, 24), fit) > 0
        found = fitted_box((x0, y0, x1, y1), (width, height), (16, 24), fit)
        box = np.zeros((16, 24), bool)
        if found is not None:
            box[found[1] : found[3], found[0] : found[2]] = True
        assert not (pixels & ~box).any()
        # A mask is sampled in the middle of each pixel, so it may miss the outermost ones.
        if found is not None and found[2] - found[0] > 2 and found[3] - found[1] > 2:
            assert pixels[found[1] + 1 : found[3] - 1, found[0] + 1 : found[2] - 1].all()


def test_a_box_outside_names_the_box_to_give() -> None:
    where = "expected 0 <= X0 < X1 <= 16 and 0 <= Y0 < Y1 <= 16, the pixels of this model's images"
    beside = Beside.of(Image.new("RGB", (800, 600)))
    fitted = "; the photo of 800x600 is fitted to 16x16 first"
    for named, fit, end in (
        ("300,180,500,300", "crop", f"{fitted} (fit crop), where this part of it is 5,4,11,8: give that"),
        ("300,180,500,300", "stretch", f"{fitted} (fit stretch), where this part of it is 6,4,10,8: give that"),
        (
            "0,0,90,600",
            "crop",
            f"{fitted} (fit crop), which cuts this part of it off; with fit='stretch' (--fit stretch) it is 0,0,2,16",
        ),
        ("0,0,801,600", "crop", f"{fitted} (fit crop)"),
        ("9,9,3,3", "crop", f"{fitted} (fit crop)"),
    ):
        with pytest.raises(RequestError) as caught:
            region(named, SIZE, fit, photo=beside)  # type: ignore[arg-type]
        assert str(caught.value) == f"box {named!r}: {where}{end}"
    for without in (None, Beside.of(Image.new("RGB", (16, 16)))):
        with pytest.raises(RequestError) as caught:
            region("0,0,17,16", SIZE, photo=without)
        assert str(caught.value) == f"box '0,0,17,16': {where}"
    assert region("5,4,11,8", SIZE, photo=beside).pixels.sum() == 24


def test_a_large_mask_is_judged_by_a_part_of_its_pixels() -> None:
    mask = with_hole(photo().resize((2400, 1800)))
    np.testing.assert_array_equal(region(mask, SIZE).pixels, WANTED)
    with pytest.raises(RequestError, match=r"#ff0000 at 120\d,0"):
        region(half((255, 0, 0), (0, 0, 0), "RGB", (2400, 1800)), SIZE)
