"""Photos in every form that callers have them, as pixels of the model's size; and which tokens of them stay."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from par_runtime.errors import RequestError
from par_runtime.images.photo import fit_image, to_pixels
from par_runtime.images.region import keep_mask

SIZE = (16, 16)
WIDE = np.random.default_rng(0).integers(0, 256, (20, 40, 3)).astype(np.uint8)
FITTED = fit_image(Image.fromarray(WIDE), SIZE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Image.fromarray(WIDE).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_every_form_gives_the_same_pixels(path: Path) -> None:
    image = Image.fromarray(WIDE)
    for one in (path, str(path), image, WIDE, image.convert("RGBA"), WIDE[None], (w for w in [WIDE])):
        np.testing.assert_array_equal(to_pixels(one, SIZE), FITTED[None])
    exact = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    several = to_pixels([path, image, str(path), WIDE, exact], SIZE)
    np.testing.assert_array_equal(several, np.stack([FITTED] * 4 + [exact]))
    np.testing.assert_array_equal(
        to_pixels([WIDE, WIDE], SIZE, "stretch"), to_pixels(np.stack([WIDE] * 2), SIZE, "stretch")
    )
    assert (to_pixels(WIDE, SIZE, "stretch") != FITTED).any()
    batch = np.stack([exact, exact])
    assert to_pixels(batch, SIZE) is batch  # nothing is copied, and nothing changed
    assert to_pixels([], SIZE).shape == (0, 16, 16, 3)
    assert to_pixels(WIDE[None][:0], SIZE).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        5,
        WIDE.astype(np.float32),
        WIDE[..., 0],
        WIDE[..., :2],
        WIDE[:0],
        WIDE[None, None],
        [WIDE, None],
        [[WIDE], [WIDE, WIDE]],
        [WIDE, WIDE.astype(int)],
        [1, 2],
        b"\x89PNG",
        io.BytesIO(b"\x89PNG"),
        {"a.png": 1},
        [b"\x89PNG"],
    ],
    ids=lambda bad: str(getattr(bad, "shape", bad))[:20],
)
def test_what_is_no_picture(bad: object) -> None:
    with pytest.raises(RequestError, match=r"^images have .*; expected uint8 \[16, 16, 3\], or a batch") as caught:
        to_pixels(bad, SIZE)
    assert len(str(caught.value)) < 350


def test_a_fit_that_there_is_not() -> None:
    with pytest.raises(RequestError, match="fit 'pad': expected crop or stretch"):
        to_pixels(WIDE, SIZE, "pad")  # type: ignore[arg-type]


def test_which_tokens_stay(tmp_path: Path) -> None:
    right = np.zeros((8, 8), bool)
    right[:, 4:] = True
    pixels = right.repeat(2, 0).repeat(2, 1)
    Image.fromarray(pixels.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    for named in ("right", "8,0,16,16", pixels, tmp_path / "mask.png", Image.open(tmp_path / "mask.png")):
        np.testing.assert_array_equal(keep_mask(SIZE, (8, 8), keep=named), right)
        np.testing.assert_array_equal(keep_mask(SIZE, (8, 8), change=named), ~right)
    for beside in (tmp_path / "mask.png", Image.new("RGB", (16, 16)), np.zeros((32, 32, 3), np.uint8)):
        assert keep_mask(SIZE, (8, 8), keep=tmp_path / "mask.png", photo=beside).sum() == 32
    for bad in (5, np.zeros((16, 16), np.uint8), b"x", "a\0b", "x" * 10_000):
        with pytest.raises(RequestError) as caught:
            keep_mask(SIZE, (8, 8), keep="left", photo=bad)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 300
    with pytest.raises(RequestError, match="fit 'pad': expected crop or stretch"):
        keep_mask(SIZE, (8, 8), keep="left", fit="pad")  # type: ignore[arg-type]
    for both in ({}, {"keep": "left", "change": "left"}):
        with pytest.raises(RequestError, match="give one of change="):
            keep_mask(SIZE, (8, 8), **both)  # type: ignore[arg-type]
