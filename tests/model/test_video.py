"""The video tokenizer against the specification in plain numpy: FSQ for every code, and both networks by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from video_bundles import TOKENIZER, tiny_tokenizer

from par_model.config import VideoTokenizerConfig
from par_model.video import FSQ, VideoTokenizer

Array = NDArray[np.float64]
LEVELS = np.array([8, 8, 8, 5, 5, 5])  #: the published ones
BASIS = np.array([1, 8, 64, 512, 2560, 12800])
SMALL = replace(TOKENIZER, widths=(8, 16, 24), strides=((1, 2, 2), (2, 2, 2)), last_blocks=2)


# -- FSQ --------------------------------------------------------------------------------------------------------------


def test_every_id_has_the_code_of_the_specification() -> None:
    ids = np.arange(64000)
    digits = ids[:, None] // BASIS % LEVELS
    codes = (digits - LEVELS // 2) / (LEVELS // 2)
    got = FSQ(LEVELS.tolist()).lookup(torch.from_numpy(ids)).numpy()
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, codes.astype(np.float32))
    assert len(np.unique(got, axis=0)) == 64000


@pytest.mark.parametrize("off", [-0.45, 0.0, 0.45])
def test_every_code_is_rounded_to_from_around_it(off: float) -> None:
    """Numbers within half a level of a code give its id. The outermost ones are reached from inside alone: they bound
    what the encoder's numbers can become."""
    fsq = FSQ(LEVELS.tolist())
    ids = torch.arange(64000)
    wanted = fsq.lookup(ids).double() * torch.from_numpy(LEVELS // 2)
    half = torch.from_numpy((LEVELS - 1) * (1 - 1e-3) / 2)
    offset = torch.from_numpy(np.where(LEVELS % 2 == 0, 0.5, 0.0))
    bounded = (wanted + off).clamp(min=-half - offset + 1e-3, max=half - offset - 1e-3)
    x = torch.atanh((bounded + offset) / half) - torch.tan(offset / half)
    np.testing.assert_array_equal(fsq.ids(x.reshape(64000, 6, 1)).numpy()[:, 0], ids.numpy())
    quantised = fsq.quantise(x.reshape(64000, 6, 1))[:, :, 0]
    np.testing.assert_allclose(quantised.numpy(), fsq.lookup(ids).numpy(), atol=1e-6)


def test_numbers_of_any_size_have_an_id() -> None:
    fsq = FSQ(LEVELS.tolist())
    for value, wanted in ((-1e30, 0), (1e30, 63999), (-np.inf, 0), (np.inf, 63999)):
        assert fsq.ids(torch.full((1, 6, 1), value)).item() == wanted
    middle = int((LEVELS // 2 * BASIS).sum())
    assert fsq.ids(torch.zeros(1, 6, 1)).item() == middle  # zero is the middle level, of even numbers of levels too


def test_gradients_pass_the_rounding() -> None:
    x = torch.zeros(1, 6, 2, requires_grad=True)
    FSQ(LEVELS.tolist()).quantise(x).sum().backward()
    assert x.grad is not None
    assert (x.grad > 0).all()


# -- both networks in numpy -------------------------------------------------------------------------------------------


class Reference:
    """The layers, in float64, of the state dict ``weights``; arrays are [C,T,H,W]."""

    def __init__(self, weights: Mapping[str, torch.Tensor], groups: int) -> None:
        self.weights = {name: tensor.double().numpy() for name, tensor in weights.items()}
        self.groups = groups

    def conv(self, x: Array, key: str, stride: tuple[int, int, int] = (1, 1, 1)) -> Array:
        w, b = self.weights[f"{key}.weight"], self.weights[f"{key}.bias"]
        side = w.shape[-1]
        pad = side // 2
        x = np.pad(x, ((0, 0), (2 * pad, 0), (pad, pad), (pad, pad)), mode="edge")
        a, b_, c = stride
        t, h, v = ((size - side) // step + 1 for size, step in zip(x.shape[1:], stride, strict=True))
        out = np.zeros((len(w), t, h, v)) + b[:, None, None, None]
        for i, j, k in np.ndindex(side, side, side):
            seen = x[:, i : i + a * t : a, j : j + b_ * h : b_, k : k + c * v : c][:, :t, :h, :v]
            out += np.einsum("oc,cthw->othw", w[:, :, i, j, k], seen)
        return out

    def norm(self, x: Array, key: str) -> Array:
        c, t, h, w = x.shape
        out = np.empty_like(x)
        for frame in range(t):
            groups = x[:, frame].reshape(self.groups, -1)
            even = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
            out[:, frame] = even.reshape(c, h, w)
        gain, bias = (self.weights[f"{key}.{part}"][:, None, None, None] for part in ("weight", "bias"))
        return out * gain + bias

    def swish(self, x: Array, key: str) -> Array:
        return x / (1 + np.exp(-self.weights[f"{key}.beta"][0] * x))

    def unit(self, x: Array, key: str) -> Array:
        y = x
        for at in (0, 3):
            y = self.swish(self.norm(y, f"{key}.fn.{at}"), f"{key}.fn.{at + 1}")
            y = self.conv(y, f"{key}.fn.{at + 2}.conv")
        inside = f"{key}.residual_fn.0.conv"
        return y + (self.conv(x, inside) if f"{inside}.weight" in self.weights else x)

    def end(self, x: Array, side: str, at: int) -> Array:
        return self.swish(self.norm(x, f"{side}.{at}"), f"{side}.{at + 1}")


def to_space(x: Array, stride: tuple[int, int, int]) -> Array:
    a, b, c = stride
    channels = len(x) // (a * b * c)
    _, t, h, w = x.shape
    out = np.empty((channels, t * a, h * b, w * c))
    for i, j, k in np.ndindex(a, b, c):
        block = ((i * b + j) * c + k) * channels
        out[:, i::a, j::b, k::c] = x[block : block + channels]
    return out[:, a - 1 :]


def decoded(model: VideoTokenizer, codes: Array) -> Array:
    """A clip [3,T,H,W] of codes [c,t,h,w]."""
    config = model.config
    r = Reference(model.state_dict(), config.norm_groups)
    x, at = r.conv(codes, "decoder_layers.0.conv"), 1
    for level in reversed(range(len(config.widths))):
        for _ in range(config.last_blocks if level == len(config.widths) - 1 else config.res_blocks):
            x, at = r.unit(x, f"decoder_layers.{at}"), at + 1
        if level:
            x = to_space(r.conv(x, f"decoder_layers.{at}.conv"), config.strides[level - 1])
            at += 2
    return r.conv(r.end(x, "decoder_layers", at), f"decoder_layers.{at + 2}.conv")


def encoded(model: VideoTokenizer, clip: Array) -> Array:
    """What is quantised, [c,t,h,w], of a clip [3,T,H,W]."""
    config = model.config
    r = Reference(model.state_dict(), config.norm_groups)
    x, at = r.conv(clip, "encoder_layers.0.conv"), 1
    for level in range(len(config.widths)):
        for _ in range(config.last_blocks if level == len(config.widths) - 1 else config.res_blocks):
            x, at = r.unit(x, f"encoder_layers.{at}"), at + 1
        if level < len(config.strides):
            x, at = r.conv(x, f"encoder_layers.{at}.conv", config.strides[level]), at + 1
    return r.conv(r.end(x, "encoder_layers", at), f"encoder_layers.{at + 2}")


@pytest.mark.parametrize("config", [TOKENIZER, SMALL], ids=["one level", "two levels"])
def test_the_decoder_is_that_of_the_specification(config: VideoTokenizerConfig) -> None:
    model = tiny_tokenizer(3, config)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.codebook_size, (1, 3, 4, 5)))
    with torch.no_grad():
        got = model.decode(ids)[0].numpy()
    wanted = decoded(model, model.quantizers.lookup(ids)[0].double().numpy())
    time, side = config.downsampling
    assert got.shape == wanted.shape == (3, 1 + 2 * time, 4 * side, 5 * side)
    assert wanted.std() > 0.05
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("config", [TOKENIZER, SMALL], ids=["one level", "two levels"])
def test_the_encoder_is_that_of_the_specification(config: VideoTokenizerConfig) -> None:
    model = tiny_tokenizer(4, config)
    time, side = config.downsampling
    clip = torch.from_numpy(np.random.default_rng(1).random((1, 3, 1 + 2 * time, 3 * side, 4 * side), np.float32))
    with torch.no_grad():
        got = model.features(clip)[0].numpy()
    wanted = encoded(model, clip[0].double().numpy())
    assert got.shape == wanted.shape == (len(config.levels), 3, 3, 4)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    with torch.no_grad():  # the first frame alone is an image, and nothing behind a frame changes it
        np.testing.assert_allclose(model.features(clip[:, :, :1])[0].numpy(), got[:, :1], atol=2e-5)
        np.testing.assert_allclose(model.features(clip[:, :, : 1 + time])[0].numpy(), got[:, :2], atol=2e-5)
