"""The decoder's kernels in Triton's interpreter, each against float64: ragged tiles, odd widths, memory full of NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from kernel_arrays import KIND, ROUNDING, empty, launch, stored, wide
from scipy.special import softmax

Array = np.ndarray
PRECISIONS = ("fp16", pytest.param("bf16", marks=pytest.mark.slow), "fp32")
NOTHING = ("*fp32", np.zeros(1, np.float32))


def random(shape: tuple[int, ...], precision: str = "fp32", seed: int = 0) -> Array:
    return stored(np.random.default_rng([seed, *shape]).normal(size=shape), precision)


def close(got: Array, wanted: Array, precision: str, floor: float = 0.01) -> None:
    """``got`` is ``wanted`` rounded once and nowhere NaN; beside 0, up to ``floor`` of the rounding of its maximum."""
    apart = np.abs(wide(got) - wanted)
    assert (apart <= 1.01 * ROUNDING[precision] * (np.abs(wanted) + np.abs(wanted).max() * floor) + 1e-6).all()


def convolved(x: Array, w: Array, bias: Array) -> Array:
    """A convolution of x [B,H,W,C] with w [O,C,R,R] that keeps the size, in float64."""
    side = w.shape[-1]
    x = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))  # [B,H,W,C,R,R]
    out: Array = np.einsum("bhwcij,ocij->bhwo", views, w, optimize=True) + bias
    return out


def packed(raw: Array, kind: str, precision: str, side: int, bk: int, up: bool = False) -> Array:
    out_channels, channels = raw.shape[:2]
    blocks = -(-channels // bk)
    out = empty((4 if up else 1, out_channels, side, blocks, side, bk), precision)
    constants = {"C": channels, "O": out_channels, "SIDE": side, "BK": bk, "UP": up, "BLOCK": 256}
    grid = (-(-(out[0].size) // 256), len(out), 1)
    launch("decoder_pack.pack_conv", constants, grid, {"raw": (KIND[kind], raw), "packed": (KIND[precision], out)})
    return out


@pytest.mark.parametrize("kind", PRECISIONS)
def test_weights_are_packed_in_the_order_of_the_product(kind: str) -> None:
    raw = random((5, 20, 3, 3), kind)
    got = packed(raw, kind, "fp16", 3, 16)
    plain = wide(got)[0].transpose(0, 2, 4, 1, 3).reshape(5, 32, 3, 3)  # [O,KB*BK,dy,dx]
    assert (plain[:, :20] == wide(stored(wide(raw), "fp16"))).all()
    assert (plain[:, 20:] == 0).all()


@pytest.mark.parametrize("kind", PRECISIONS)
def test_a_vector_changes_its_dtype(kind: str) -> None:
    raw, out = random((300,), kind), empty((300,), "fp32")
    arguments = {"raw": (KIND[kind], raw), "packed": ("*fp32", out)}
    launch("decoder_pack.pack_vector", {"COUNT": 300, "BLOCK": 128}, (3,), arguments)
    assert (out == wide(raw)).all()


def sums_of(out: Array, tiles: list[Array], unit: int) -> Array:
    """Sum and M2 of each tile's rows and each unit of channels: [2,tiles,units] of out [M,O]."""
    blocks = [out[tile].reshape(len(tile), -1, unit) for tile in tiles]
    sums = np.stack([b.sum((0, 2)) for b in blocks])
    m2 = np.stack([((b - b.mean((0, 2), keepdims=True)) ** 2).sum((0, 2)) for b in blocks])
    return np.stack([sums, m2])


CONVOLUTIONS = {
    "3x3": {},
    "ragged": {"H": 7, "W": 9, "C": 24, "O": 12, "UNIT": 4, "BM": 32, "BN": 16},
    "few channels": {"C": 8, "O": 8, "UNIT": 2, "BM": 16, "BN": 16, "BK": 16},
    "residual": {"RESIDUAL": True, "UNIT": 16},
    "1x1": {"SIDE": 1, "RESIDUAL": True, "C": 40, "O": 48},
    "shortcut": {"OTHER": 24, "O": 48, "BM": 16},
    "up": {"SIDE": 2, "UP": True, "H": 5, "W": 6, "C": 16, "O": 40, "BM": 16},
    "up ragged": {"SIDE": 2, "UP": True, "H": 3, "W": 4, "C": 24, "O": 8, "UNIT": 1},
    "no statistics": {"UNIT": 0},
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize(
    "precision", ["fp16", *(pytest.param(other, marks=pytest.mark.slow) for other in ("bf16", "fp32"))]
)
def test_convolutions(case: str, precision: str) -> None:
    c: dict[str, Any] = {"H": 8, "W": 6, "C": 32, "O": 32, "SIDE": 3, "UP": False, "RESIDUAL": False, "OTHER": 0}
    c |= {"UNIT": 4, "PIXELS": False, "BM": 32, "BN": 32, "BK": 16, "OTHER_BK": 16, "DEPENDENT": False}
    c |= CONVOLUTIONS[case]
    h, w, channels, out_channels, up = c["H"], c["W"], c["C"], c["O"], c["UP"]
    kind, images, m = KIND[precision], 2, h * w
    side = 3 if up else c["SIDE"]
    border = 1 if c["SIDE"] == 3 else 0
    x = random((images, h, w, channels), precision)
    raw = stored(random((out_channels, channels, side, side)) / math.sqrt(channels * side * side), precision)
    bias, more = random((out_channels,), seed=1), random((out_channels,), seed=2)
    read = x if not border else np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pixels = np.repeat(np.repeat(wide(x), 2, 1), 2, 2) if up else wide(x)
    wanted = convolved(pixels, wide(raw), wide(bias)).reshape(images, -1, out_channels)
    places = 4 if up else 1
    tiles = places * -(-m // c["BM"])
    out = empty((images, places * m, out_channels), precision)
    units = out_channels // (c["UNIT"] or 1)
    partial = empty((images, 2, tiles, units), "fp32")
    arguments = {
        "x": (kind, np.ascontiguousarray(read)),
        "w": (kind, packed(raw, precision, precision, c["SIDE"], c["BK"], up)),
        "bias": ("*fp32", bias),
        "residual": NOTHING,
        "other_x": NOTHING,
        "other_w": NOTHING,
        "other_bias": NOTHING,
        "out": (kind, out),
        "steps": ("i32", c["SIDE"] ** 2 * -(-channels // c["BK"])),
        "partial": ("*fp32", partial),
    }
    if c["RESIDUAL"]:
        before = random((images, m, out_channels), precision, seed=3)
        arguments["residual"] = (kind, before)
        wanted += wide(before)
    if c["OTHER"]:
        other = random((images, m, c["OTHER"]), precision, seed=4)
        other_raw = stored(random((out_channels, c["OTHER"], 1, 1), seed=5) / 5, precision)
        arguments["other_x"] = (kind, other)
        arguments["other_w"] = (kind, packed(other_raw, precision, precision, 1, 16))
        arguments["other_bias"] = ("*fp32", more)
        wanted += wide(other) @ wide(other_raw)[:, :, 0, 0].T + more
    grid = (tiles // places * -(-out_channels // c["BN"]), places, images)
    launch("decoder.conv", c, grid, arguments, shuffle=0)
    # Weights that were added up for upsampling are rounded once more.
    close(out, wanted, precision, 0.5 if up else 0.01)
    if not c["UNIT"]:
        assert np.isnan(partial).all()
        return
    at = np.arange(places * m)
    y, col = (at // (2 * w), at % (2 * w)) if up else (at, at * 0)
    sets = [at[(y % 2 == p // 2) & (col % 2 == p % 2)] for p in range(4)] if up else [at]
    rows = [part for s in sets for part in np.split(s, range(c["BM"], m, c["BM"]))]
    for image in range(images):
        sums = sums_of(wide(out[image]), rows, c["UNIT"])
        np.testing.assert_allclose(partial[image], sums, rtol=1e-4, atol=1e-3)


def test_pixels_are_clamped_and_truncated() -> None:
    """The last convolution: of 3 channels, 16 are computed; only bytes of pixels are written."""
    h, w = 5, 7
    x = random((1, h, w, 16), "fp16")
    raw = stored(random((3, 16, 3, 3)) / 4, "fp16")
    bias = np.array([0.1, 0.0, -0.4], np.float32)
    wanted = np.floor(np.clip(convolved(wide(x), wide(raw), wide(bias)) * 127.5 + 128, 0, 255))
    memory = np.full(h * w * 3 + 16, 77, np.uint8)
    constants = {"H": h, "W": w, "C": 16, "O": 3, "SIDE": 3, "UP": False, "RESIDUAL": False, "OTHER": 0, "UNIT": 0}
    constants |= {"PIXELS": True, "BM": 16, "BN": 16, "BK": 16, "OTHER_BK": 16, "DEPENDENT": False}
    arguments = {
        "x": ("*fp16", np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))),
        "w": ("*fp16", packed(raw, "fp16", "fp16", 3, 16)),
        "bias": ("*fp32", bias),
        **dict.fromkeys(("residual", "other_x", "other_w", "other_bias"), NOTHING),
        "out": ("*u8", memory),
        "steps": ("i32", 9),
        "partial": NOTHING,
    }
    launch("decoder.conv", constants, (3,), arguments)
    got = memory[: h * w * 3].reshape(1, h, w, 3)
    assert (wanted == 0).any()
    assert (wanted == 255).any()
    apart = np.abs(got.astype(int) - wanted)
    assert apart.max() <= 1  # a sum in fp32 beside a whole number
    assert (apart == 0).mean() > 0.98
    assert (memory[h * w * 3 :] == 77).all()


NORMS = {
    "of 4 channels": {"C": 16, "GROUPS": 4, "UNIT": 4},
    "of 12": {"C": 96, "GROUPS": 8, "UNIT": 4},
    "of 3": {"C": 12, "GROUPS": 4, "UNIT": 1},
    "of 32 in units of 16": {"C": 64, "GROUPS": 2, "UNIT": 16},
    "after upsampling": {"C": 16, "GROUPS": 4, "UNIT": 4, "PARITIES": 4},
    "one tile": {"C": 8, "GROUPS": 8, "UNIT": 1, "BM": 64, "M": 50},
}


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_moments(case: str, mean: float) -> None:
    """Scale and shift, out of the sums of tiles; a large mean costs no digits."""
    c: dict[str, Any] = {"M": 70, "PARITIES": 1, "BM": 16, "EPSILON": 1e-6, "BT": 4, "DEPENDENT": False} | NORMS[case]
    width = c["C"] // c["GROUPS"]
    c |= {"BU": 2 ** math.ceil(math.log2(width // c["UNIT"])), "BC": 2 ** math.ceil(math.log2(width))}
    images, m, bm = 2, c["M"], c["BM"]
    x = np.random.default_rng(0).normal(mean, 1 + np.arange(c["C"]) % 5, (images, c["PARITIES"] * m, c["C"]))
    tiles = [
        np.arange(p * m + t, min(p * m + t + bm, (p + 1) * m)) for p in range(c["PARITIES"]) for t in range(0, m, bm)
    ]
    partial = np.stack([sums_of(image, tiles, c["UNIT"]) for image in x]).astype(np.float32)
    gain, bias = random((c["C"],)), random((c["C"],), seed=1)
    out = empty((images, 2, c["C"]), "fp32")
    arguments = {name: ("*fp32", value) for name, value in (("partial", partial), ("gain", gain), ("bias", bias))}
    launch("decoder.moments", c, (c["GROUPS"], images), arguments | {"norm": ("*fp32", out)})
    grouped = x.reshape(images, -1, c["GROUPS"], width)
    variance = np.repeat(grouped.var((1, 3)), width, 1)
    scale = gain / np.sqrt(variance + 1e-6)
    np.testing.assert_allclose(out[:, 0], scale, rtol=2e-4)
    np.testing.assert_allclose(
        out[:, 1], bias - np.repeat(grouped.mean((1, 3)), width, 1) * scale, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("channels", "bc"), [(32, 32), (96, 32), (24, 32), (8, 8)])
@pytest.mark.parametrize("border", [0, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_normalise(channels: int, bc: int, border: int, precision: str) -> None:
    h, w, images = 5, 6, 2
    x, norm = random((images, h, w, channels), precision), random((images, 2, channels))
    out = empty((images, h + border, w + border, channels), precision)
    c = {"H": h, "W": w, "C": channels, "BORDER": border, "SWISH": border == 2, "BP": 16, "BC": bc, "DEPENDENT": False}
    grid = (-(-(h + border) * (w + border) // 16), -(-channels // bc), images)
    arguments = {"x": (KIND[precision], x), "norm": ("*fp32", norm), "out": (KIND[precision], out)}
    launch("decoder.normalise", c, grid, arguments)
    wanted = wide(x) * norm[:, 0, None, None] + norm[:, 1, None, None]
    if border:
        wanted = np.pad(wanted / (1 + np.exp(-wanted)), ((0, 0), (1, 1), (1, 1), (0, 0)))
        assert (wide(out)[:, 0] == 0).all()  # exactly: the border adds nothing to a convolution
        assert (wide(out)[:, :, -1] == 0).all()
    close(out, wanted, precision)


@pytest.mark.parametrize(
    "change",
    [{}, {"border": 0}, {"channels": 64, "groups": 2, "unit": 16, "bc": 64}, {"parities": 4, "bm": 16}, {"bm": 64}],
)
def test_norm_of_a_small_map(change: dict[str, int]) -> None:
    """Sums, norm, swish and border at once, in two blocks of channels, about a large mean."""
    s = {"channels": 32, "groups": 8, "unit": 4, "bc": 16, "bm": 16, "parities": 1, "border": 2} | change
    h, w, images, channels, border = 6, 8, 2, s["channels"], s["border"]
    x = stored(random((images, h, w, channels)) * 2 + 30, "fp16")
    at = np.arange(h * w).reshape(h, w)
    sets = [at[i::2, j::2].ravel() for i in range(2) for j in range(2)] if s["parities"] == 4 else [at.ravel()]
    tiles = [part for rows in sets for part in np.split(rows, range(s["bm"], len(rows), s["bm"]))]
    flat = wide(x).reshape(images, -1, channels)
    gain, bias = random((channels,)), random((channels,), seed=1)
    out = empty((images, h + border, w + border, channels), "fp16")
    arguments = {
        "x": ("*fp16", x),
        "partial": ("*fp32", np.stack([sums_of(image, tiles, s["unit"]) for image in flat]).astype(np.float32)),
        "gain": ("*fp32", gain),
        "bias": ("*fp32", bias),
        "out": ("*fp16", out),
    }
    c: dict[str, Any] = {"H": h, "W": w, "C": channels, "BORDER": border, "SWISH": border == 2, "GROUPS": s["groups"]}
    c |= {"UNIT": s["unit"], "PARITIES": s["parities"], "BM": s["bm"], "EPSILON": 1e-6, "BT": 4, "BP": 16}
    grid = (-(-(h + border) * (w + border) // 16), channels // s["bc"], images)
    launch("decoder.norm", c | {"BC": s["bc"], "DEPENDENT": False}, grid, arguments)
    grouped = flat.reshape(images, h * w, s["groups"], -1)
    wanted = (grouped - grouped.mean((1, 3), keepdims=True)) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-6)
    wanted = wanted.reshape(images, h, w, channels) * gain + bias
    if border:
        wanted = np.pad(wanted / (1 + np.exp(-wanted)), ((0, 0), (1, 1), (1, 1), (0, 0)))
        assert (out[:, [0, -1]] == 0).all()
    close(out, wanted, "fp16", 0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lookup(precision: str) -> None:
    """Tokens leave the order of the sequence; what is no token reads no memory outside of the codebook."""
    h, w, channels, width, codes = 3, 5, 20, 4, 7
    rng = np.random.default_rng(0)
    place = rng.permutation(h * w).astype(np.int32)
    tokens = rng.integers(0, codes, (2, h * w))
    tokens[1, 0], tokens[1, 1] = -1, 2**40
    codebook, kernel, bias = random((codes, width), precision), random((channels, width)), random((channels,), seed=1)
    out = empty((2, h + 2, w + 2, channels), precision)
    c = {"H": h, "W": w, "C": channels, "D": width, "V": codes, "BP": 8, "BC": 16, "DEPENDENT": False}
    arguments = {"tokens": ("*i64", tokens), "place": ("*i32", place), "codebook": (KIND[precision], codebook)}
    arguments |= {"w": ("*fp32", kernel), "bias": ("*fp32", bias), "out": (KIND[precision], out)}
    launch("decoder.lookup", c, (-(-(h + 2) * (w + 2) // 8), 2, 2), arguments)
    raster = np.clip(tokens, 0, codes - 1)[:, place].reshape(2, h, w)
    wanted = np.pad(wide(codebook)[raster] @ wide(kernel).T + bias, ((0, 0), (1, 1), (1, 1), (0, 0)))
    close(out, wanted, precision)


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention(channels: int, precision: str) -> None:
    """Queries, keys and values of all pixels, then attention: 50 pixels in tiles of 16."""
    m, images, kind = 50, 2, KIND[precision]
    x = random((images, m, channels), precision)
    raws = [stored(random((channels, channels, 1, 1), seed=s) / math.sqrt(channels), precision) for s in (1, 2, 3)]
    biases = [random((channels,), seed=s) for s in (4, 5, 6)]
    three = empty((images, m, 3 * channels), precision)
    c = {"M": m, "C": channels, "BM": 16, "BN": 16, "BK": 16, "DEPENDENT": False}
    arguments = {"x": (kind, x)}
    arguments |= {f"w_{n}": (kind, packed(w, precision, precision, 1, 16)) for n, w in zip("qkv", raws, strict=True)}
    arguments |= {f"bias_{n}": ("*fp32", b) for n, b in zip("qkv", biases, strict=True)}
    launch("decoder_attention.qkv", c, (4 * -(-channels // 16), 3, images), arguments | {"out": (kind, three)})
    parts = [wide(x) @ wide(w)[:, :, 0, 0].T + b for w, b in zip(raws, biases, strict=True)]
    close(three, np.concatenate(parts, 2), precision)
    out = empty((images, m, channels), precision)
    c = {"M": m, "C": channels, "SCALE": channels**-0.5 * math.log2(math.e), "BM": 16, "BN": 16, "DEPENDENT": False}
    launch(
        "decoder_attention.attention",
        c | {"BC": 32 if channels == 24 else 16},
        (4, images),
        {"x": (kind, three), "out": (kind, out)},
    )
    q, k, v = np.split(wide(three), 3, 2)
    wanted = softmax(q @ k.transpose(0, 2, 1) * channels**-0.5, -1) @ v
    # Shares of fp16 and bf16 are rounded before they weigh values, and a sum of such can end near zero.
    assert np.abs(wide(out) - wanted).max() <= 2 * ROUNDING[precision] * np.abs(v).max() + 1e-6
