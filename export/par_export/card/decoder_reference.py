"""What each kernel of the decoder must leave, in float64: the sources say what they compute, ``stand.py`` what for.

The sums that a convolution leaves for the norm behind it are tested by that norm's scale and shift, which are compared
with those of the map itself.

Letters: B images, H x W rows and columns of a map, C channels of what is read, O of what is written, M = H * W.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from par_export.card.stand import ALLOWED, TYPES, Expected, Reference, View

#: Relative errors that are allowed: of products in TF32, which fp32 maps are multiplied in; and how many times more of
#: sums of weights that are rounded once more (upsampling), and of attention.
TF32, TWICE = 2e-3, 2.0
LARGEST_STEP = 1  #: of a pixel: grey levels


def _allowed(v: View, parameter: str, times: float = 1.0) -> float:
    kind = v.kinds[parameter]
    return times * (TF32 if kind == "*fp32" else ALLOWED[kind])


def lookup(v: View) -> list[Expected]:
    """Codes of the tokens in raster order through the 1x1 convolution, with a border of zeros."""
    c = v.constants
    images, h, w, width = v.launch.grid[2], c["H"], c["W"], c["C"]
    place = v.tensor("place", h * w)
    tokens = v.tensor("tokens", images, h * w)[:, place].clamp(0, c["V"] - 1)
    codes = v.weight("codebook")[tokens]  # [B, M, D]
    made = codes @ v.weight("w").reshape(width, c["D"]).T + v.weight("bias")
    out = F.pad(made.reshape(images, h, w, width), (0, 0, 1, 1, 1, 1))
    return [Expected("out", tuple(out.shape), out, allowed=_allowed(v, "out"))]


def conv(v: View) -> list[Expected]:
    """A convolution with bias, residual, shortcut or upsampling; or pixels."""
    c = v.constants
    h, w, channels, width, side, up = (c[name] for name in ("H", "W", "C", "O", "SIDE", "UP"))
    images = v.launch.grid[2]
    border = 2 if side == 3 else 0
    x = v.tensor("x", images, h + border, w + border, channels).permute(0, 3, 1, 2)
    if up:
        x = F.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 1, 1, 1))
        h, w = 2 * h, 2 * w
    out = F.conv2d(x, v.weight("w"), v.weight("bias")).permute(0, 2, 3, 1)
    if c["RESIDUAL"]:
        out = out + v.tensor("residual", images, h, w, width)
    if c["OTHER"]:
        other = v.tensor("other_x", images, h, w, c["OTHER"])
        out = out + other @ v.weight("other_w").reshape(width, -1).T + v.weight("other_bias")
    if c["PIXELS"]:
        wanted = (127.5 * out + 128).floor().clamp(0, 255)

        def judge(after: Tensor) -> tuple[float, str]:
            off = (after.double() - wanted).abs()
            worst, share = int(off.max()), float((off > 0).double().mean())
            text = f"pixels differ by up to {worst} of 255, {100 * share:.2g} % of them"
            return worst / LARGEST_STEP, text

        return [Expected("out", tuple(out.shape), wanted, judge=judge)]
    if c["UNIT"]:
        v.memory["map"] = v.address("out"), TYPES[v.kinds["out"]]  # whose sums the next norm reads
    return [Expected("out", tuple(out.shape), out, allowed=_allowed(v, "out", TWICE if up else 1.0))]


def _scale_and_shift(v: View, x: Tensor) -> tuple[Tensor, Tensor]:
    """Those [B,C] of the group norm of the map ``x`` [B,M,C]."""
    c = v.constants
    images, _, channels = x.shape
    each = channels // c["GROUPS"]
    grouped = x.reshape(images, -1, c["GROUPS"], each)
    mean = grouped.mean((1, 3)).repeat_interleave(each, 1)
    deviation = (grouped.var((1, 3), correction=0) + c["EPSILON"]).sqrt().repeat_interleave(each, 1)
    scale = v.weight("gain").reshape(-1) / deviation
    return scale, v.weight("bias").reshape(-1) - mean * scale


def moments(v: View) -> list[Expected]:
    """Scale and shift of every channel: those of the map that the convolution before has left."""
    c = v.constants
    address, kind = v.memory["map"]
    x = v.stand.read(address, kind, (v.launch.grid[1], c["PARITIES"] * c["M"], c["C"])).double()
    norm = torch.stack(_scale_and_shift(v, x), 1)
    return [Expected("norm", tuple(norm.shape), norm)]


def normalise(v: View) -> list[Expected]:
    """Scale and shift, swish, and the border of zeros."""
    c = v.constants
    x = v.tensor("x", v.launch.grid[2], c["H"], c["W"], c["C"])
    return [_applied(v, x, *v.tensor("norm", len(x), 2, c["C"]).unbind(1))]


def norm(v: View) -> list[Expected]:
    """Both in one."""
    c = v.constants
    x = v.tensor("x", v.launch.grid[2], c["H"], c["W"], c["C"])
    return [_applied(v, x, *_scale_and_shift(v, x.flatten(1, 2)))]


def _applied(v: View, x: Tensor, scale: Tensor, shift: Tensor) -> Expected:
    """``x`` [B,H,W,C] times ``scale`` [B,C] plus ``shift``, with what follows."""
    x = x * scale[:, None, None] + shift[:, None, None]
    if v.constants["SWISH"]:
        x = x * x.sigmoid()
    border = v.constants["BORDER"] // 2
    out = F.pad(x, (0, 0, border, border, border, border))
    return Expected("out", tuple(out.shape), out)


def qkv(v: View) -> list[Expected]:
    """Queries, keys and values of all pixels."""
    c = v.constants
    m, channels, images = c["M"], c["C"], v.launch.grid[2]
    x = v.tensor("x", images, m, channels)
    made = [
        x @ v.weight(f"w_{name}").reshape(channels, channels).T + v.weight(f"bias_{name}") for name in ("q", "k", "v")
    ]
    out = torch.cat(made, -1)
    return [Expected("out", tuple(out.shape), out, allowed=_allowed(v, "out"))]


def attention(v: View) -> list[Expected]:
    """One head over all pixels."""
    c = v.constants
    m, channels, images = c["M"], c["C"], v.launch.grid[1]
    q, k, values = v.tensor("x", images, m, 3, channels).unbind(2)
    score = q @ k.transpose(1, 2) * (c["SCALE"] * math.log(2.0))
    out = score.softmax(-1) @ values
    return [Expected("out", tuple(out.shape), out, allowed=_allowed(v, "out", TWICE))]


REFERENCES: dict[str, Reference] = {
    "decoder.lookup": lookup,
    "decoder.conv": conv,
    "decoder.moments": moments,
    "decoder.normalise": normalise,
    "decoder.norm": norm,
    "decoder_attention.qkv": qkv,
    "decoder_attention.attention": attention,
}
