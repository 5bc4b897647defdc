"""Pictures of every kind that Pillow knows, from files and as objects: the right colours, or one clear line."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from par_runtime.errors import RequestError
from par_runtime.images import opening
from par_runtime.images.opening import open_image, opened

#: A picture of four grey values, and what they are in eight bits.
GREY = np.array([[0, 51], [128, 255]], np.uint8)


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def through(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    image.save(path, **options)
    return array(open_image(path))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.gif", "a.webp", "a.ppm", "a.tga", "a.jp2"])
def test_formats(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(np.stack([GREY, GREY.T, 255 - GREY], -1).repeat(8, 0).repeat(8, 1))
    options = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_allclose(through(image, tmp_path / name, **options), np.asarray(image), atol=1)


@pytest.mark.parametrize(
    ("mode", "value", "wanted"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),
        ("La", (50, 128), (177, 177, 177)),  # half of grey 100, over white
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBX", (10, 20, 30, 0), (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("I;16", 32768, (128, 128, 128)),
        ("I;16B", 32768, (128, 128, 128)),
        ("I;16L", 65535, (255, 255, 255)),
        ("I", 200, (200, 200, 200)),
        ("I", 65535, (255, 255, 255)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 200.0, (200, 200, 200)),
    ],
)
def test_modes_of_pil_images(mode: str, value: object, wanted: tuple[int, int, int]) -> None:
    image = Image.new(mode, (3, 2), value)  # type: ignore[arg-type]
    np.testing.assert_allclose(array(open_image(image)), np.broadcast_to(wanted, (2, 3, 3)), atol=1)
    assert image.mode == mode  # the caller's image is not changed


def test_palettes_with_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    for options, wanted in (
        ({}, [red, blue]),
        ({"transparency": 1}, [red, white]),
        ({"transparency": b"\0\xff"}, [white, blue]),
    ):
        np.testing.assert_array_equal(through(palette, tmp_path / "p.png", **options)[0], wanted)
    np.testing.assert_array_equal(array(open_image(palette.convert("PA")))[0], [red, blue])


def test_one_transparent_grey_of_a_png_with_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    data = png16(0, [struct.pack(">2H", 0, 40000)], 2)
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + chunk(b"tRNS", struct.pack(">H", 40000)) + data[at:])
    np.testing.assert_array_equal(array(open_image(path))[0, :, 0], [0, 255])
    np.testing.assert_array_equal(np.asarray(opened(path).alpha), [[255, 0]])


@pytest.mark.parametrize(
    "scale",
    [np.float32(1 / 255), np.float32(1), np.float32(257), np.int32(1), np.int32(257), np.uint16(1), np.uint16(257)],
)
def test_wide_values_are_scaled(tmp_path: Path, scale: np.generic) -> None:
    """float and integer TIFFs of 0..1, 0..255 and 0..65535 show the same picture."""
    values = through(Image.fromarray((GREY * scale).astype(scale.dtype)), tmp_path / "a.tif")
    np.testing.assert_array_equal(values[..., 1], GREY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, np.nan]], np.float32), "not finite"),
        (np.array([[0, np.inf]], np.float32), "not finite"),
        (
            np.array([[-1, 1]], np.float32),
            "its values lie in -1..1, so what is white is not known; expected 0..1, 0..255",
        ),
        (np.array([[0, 3.5]], np.float32), "its values lie in 0..3.5"),
        (np.array([[0, 1e9]], np.float32), "its values lie in 0..1e+09"),
        (np.array([[-5, 255]], np.int32), "its values lie in -5..255, so what is white is not known; expected 0..255"),
        (np.array([[0, 2**30]], np.int32), "its values lie in 0..1.07374e+09"),
        (np.array([[0, 1000]], np.uint16), "its values lie in 0..1000"),
    ],
)
def test_values_whose_white_is_unknown_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(RequestError, match=message.replace("+", r"\+")):
        open_image(tmp_path / "a.tif")


def test_a_dark_png_of_16_bits_is_dark(tmp_path: Path) -> None:
    """A PNG says what white is; a TIFF with these values is refused."""
    values = through(Image.fromarray(np.array([[0, 1000]], np.uint16)), tmp_path / "a.png")
    np.testing.assert_array_equal(values[0, :, 0], [0, 3])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(color_type: int, rows: list[bytes], width: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), 16, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def test_colours_of_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png16(2, [struct.pack(">3H", 65535, 32896, 0)], 1))
    np.testing.assert_array_equal(array(open_image(path))[0, 0], [255, 128, 0])
    path.write_bytes(png16(6, [struct.pack(">4H", 65535, 0, 0, 0)], 1))
    np.testing.assert_array_equal(array(open_image(path))[0, 0], [255, 255, 255])
    path.write_bytes(png16(2, [struct.pack(">3H", 255, 128, 0)], 1))  # 8-bit values, which would be black
    with pytest.raises(RequestError, match="all its 16-bit values lie below 256, so it is black"):
        open_image(path)


def test_the_first_of_several_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.tif", "a.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(array(open_image(tmp_path / name))[0, 0], [255, 0, 0])


def test_an_animated_png_shows_its_first_frame_and_decodes_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts would otherwise be read behind the last frame: a small file may hold thousands of large ones."""
    path, chunk = tmp_path / "a.png", PngImagePlugin.PngInfo()
    chunk.add_itxt("parvis", "before the frames")
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], pnginfo=chunk)
    seek = PngImagePlugin.PngImageFile.seek

    def watched(self: PngImagePlugin.PngImageFile, frame: int) -> None:
        assert frame == 0
        seek(self, frame)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "seek", watched)
    found = opened(path)
    assert (array(found.color) == [255, 0, 0]).all()
    assert found.text == {"parvis": "before the frames"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format(tmp_path: Path, orientation: int) -> None:
    image = Image.effect_noise((32, 16), 90).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "a.tif", exif=exif)
    wanted = array(open_image(tmp_path / "a.png"))
    assert wanted.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    with Image.open(tmp_path / "a.png") as png, Image.open(tmp_path / "a.tif") as tif:
        for source in (tmp_path / "a.tif", png, tif):
            np.testing.assert_array_equal(array(open_image(source)), wanted)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_orientation(tmp_path: Path, name: str) -> None:
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("white", (16, 0, 32, 16))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    image.save(tmp_path / name, exif=exif)
    upright = open_image(tmp_path / name)
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 28))[1] > 200  # type: ignore[index]
    assert upright.getpixel((8, 4))[1] < 50  # type: ignore[index]


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"\xff" * 50]
)
def test_broken_exif_says_nothing_about_the_picture(tmp_path: Path, exif: bytes) -> None:
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (8, 4), "red").save(tmp_path / name, exif=exif)
        assert open_image(tmp_path / name).size == (8, 4)


def test_colour_profiles(tmp_path: Path) -> None:
    """A profile is obeyed; sRGB changes nothing; one that is broken or of other colours is ignored."""
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, lab, b"rubbish", srgb[:200], b""):
        np.testing.assert_array_equal(through(image, tmp_path / "a.png", icc_profile=profile)[0, 0], (200, 100, 50))
    linear = gamma_profile(srgb)
    wanted = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(linear)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert wanted is not None
    got = through(image, tmp_path / "a.png", icc_profile=linear)
    np.testing.assert_allclose(got, np.asarray(wanted), atol=2)
    assert (got[0, 0] > (220, 150, 110)).all()  # linear light looks darker where it is taken for sRGB


def gamma_profile(srgb: bytes) -> bytes:
    """The sRGB profile with linear curves, and another name."""
    out, at = bytearray(srgb.replace(b"s\0R\0G\0B", b"l\0i\0n\0e").replace(b"sRGB", b"line")), 132
    for i in range(struct.unpack(">I", srgb[128:132])[0]):
        name, offset, _ = struct.unpack(">4sII", srgb[at + 12 * i : at + 12 * i + 12])
        if name.endswith(b"TRC"):
            out[offset : offset + 16] = b"para" + bytes(8) + struct.pack(">i", 65536)
    return bytes(out)


def test_gamma_of_a_png(tmp_path: Path) -> None:
    def with_gamma(value: int) -> np.ndarray:
        info = PngImagePlugin.PngInfo()
        info.add(b"gAMA", struct.pack(">I", value))
        return through(Image.new("RGB", (2, 2), (64, 128, 255)), tmp_path / "a.png", pnginfo=info)[0, 0]

    np.testing.assert_array_equal(with_gamma(45455), (64, 128, 255))
    np.testing.assert_allclose(with_gamma(100000), [255 * (v / 255) ** 0.45455 for v in (64, 128, 255)], atol=1)
    np.testing.assert_array_equal(with_gamma(0), (64, 128, 255))


# -- files that are no pictures ---------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims so many pixels."""
    good = io.BytesIO()
    Image.new("L", (1, 1)).save(good, "PNG")
    data = bytearray(good.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_what_is_no_picture_ends_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bomb.png").write_bytes(bomb(10**5, 10**5))
    (tmp_path / "large.png").write_bytes(bomb(10**4, 10**4))
    (tmp_path / "huge.png").write_bytes(bomb(2**31 - 1, 2**31 - 1))
    (tmp_path / "cut.png").write_bytes(bomb(4, 4)[:-16])
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(a) run\n")
    for name, message in (
        ("pipe.png", "is a pipe, not a file"),
        ("folder.png", "is a folder, not a file"),
        ("text.png", "not an image that can be read"),
        ("empty.png", "it is empty"),
        ("bomb.png", "too many pixels; expected at most 89478485"),
        ("large.png", "10000x10000 is too many pixels"),
        ("huge.png", "not an image|too many pixels"),
        ("cut.png", "it may be truncated or damaged"),
        ("page.eps", "not an image that can be read; expected PNG"),
        ("/dev/zero", "is a device, not a file"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            open_image(tmp_path / name)
        assert len(str(caught.value)) < len(str(tmp_path)) + 250
        assert str(caught.value).isprintable()
    (tmp_path / "file").write_text("text")
    for name, message in (
        ("none.png", "none.png: no such file or folder; check the name"),
        ("file/x.png", "cannot be read"),
    ):
        with pytest.raises(RequestError, match=message):
            open_image(tmp_path / name)
    with pytest.raises(RequestError, match="expected at least one"):
        open_image(Image.new("RGB", (0, 5)))


def test_a_picture_of_more_pixels_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (400, 200), "red")
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "a.png")
    monkeypatch.setattr(opening, "MOST_PIXELS", 30_000)
    assert open_image(tmp_path / "a.jpg").size == (200, 100)  # a JPEG can be decoded smaller
    for source in (tmp_path / "a.png", image):
        with pytest.raises(RequestError, match="400x200 is too many pixels"):
            open_image(source)


def test_transparency_of_a_large_picture_is_put_on_white_in_parts() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (1100, 1000, 4)).astype(np.uint8))
    white = Image.new("RGBA", image.size, "white")
    np.testing.assert_array_equal(array(open_image(image)), array(Image.alpha_composite(white, image).convert("RGB")))
