"""The video tokenizer: causal 3-D convolutions around finite scalar quantisation (FSQ), the layout of MAGVIT-v2.

The defaults of ``VideoTokenizerConfig`` are the published one (8x in space, 4x in time, 64,000 codes; 370,372,105
parameters). Read top-down: model, quantiser, then the blocks. Modules have the key names of the published checkpoint.
Source: section 4.1 of the paper names the tokenizer ("MAGVIT-v2 reproduced by [32]"); its layout, and what the
convolutions pad with, are the behaviour of that published code.

Everything is causal in time: frame t depends on frames 0 .. t alone, and the first frame stands alone. So an image is
a clip of one frame, and a decoder may be given one latent frame after another. Norms see one frame at a time.

Letters: B clips, T frames, t latent frames, H x W pixels, h x w codes of a latent frame, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_model.config import FSQ_BOUND_EPS, VideoTokenizerConfig

Stride = tuple[int, int, int]


class VideoTokenizer(nn.Module):
    """Encoder, quantiser and decoder."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_layers = encoder_layers(config)
        self.decoder_layers = decoder_layers(config)
        self.quantizers = FSQ(config.levels)

    def encode(self, clips: Tensor) -> Tensor:
        """Code ids [B,t,h,w] int64 of ``clips`` [B,3,T,H,W] in [0,1]; t = 1 + (T-1) / 4 for the published strides.

        Raises ValueError for another shape.
        """
        return self.quantizers.ids(self.features(clips))

    def features(self, clips: Tensor) -> Tensor:
        """What the quantiser gets: [B,c,t,h,w] of ``clips`` [B,3,T,H,W] in [0,1]. Raises ValueError."""
        time, side = self.config.downsampling
        shape = tuple(clips.shape)
        if len(shape) != 5 or shape[1] != 3 or (shape[2] - 1) % time or shape[3] % side or shape[4] % side:
            raise ValueError(
                f"clips have shape {shape}; expected [B,3,T,H,W] with T one more than a multiple of {time}, and H and "
                f"W multiples of {side}; cut or resize the clips"
            )
        x = clips
        for layer in self.encoder_layers:
            x = layer(x)
        return x

    def decode(self, ids: Tensor) -> Tensor:
        """Clips [B,3,T,H,W] of code ids [B,t,h,w], nominally in [0,1], not clamped. Raises ValueError."""
        if ids.ndim != 4:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected [B,t,h,w]")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.config.codebook_size):
            raise ValueError(
                f"ids lie in {int(ids.min())}..{int(ids.max())}; this codebook has ids "
                f"0..{self.config.codebook_size - 1}"
            )
        return self.decode_codes(self.quantizers.lookup(ids))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Clips [B,3,T,H,W], not clamped, of codes [B,c,t,h,w]."""
        x = codes
        for layer in self.decoder_layers:
            x = layer(x)
        return x


def to_pixels(clips: Tensor) -> Tensor:
    """``clips`` [B,3,T,H,W], nominally in [0,1], as uint8 [B,T,H,W,3], rounded."""
    return (clips.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 4, 1)


class FSQ(nn.Module):
    """Finite scalar quantisation: each of c numbers is rounded to one of its levels; no codebook is learned.

    An id is a number whose digits, the lowest first, are the levels; see ``VideoTokenizerConfig.levels``.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, x: Tensor) -> Tensor:
        """``x`` [B,c,...] squeezed so that rounding gives one of the levels, counted from ``-(level // 2)``."""
        levels = self._column(self.levels, x)
        half = (levels - 1) * (1 - FSQ_BOUND_EPS) / 2
        offset = 0.5 * (levels % 2 == 0).to(x.dtype)  # an even number of levels has none at 0
        return (x + (offset / half).tan()).tanh() * half - offset

    def quantise(self, x: Tensor) -> Tensor:
        """Codes [B,c,...] in [-1,1] of ``x`` [B,c,...]; gradients pass the rounding as they are."""
        bounded = self.bound(x)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self._column(self.levels // 2, x)

    def ids(self, x: Tensor) -> Tensor:
        """Ids [B,...] int64 of ``x`` [B,c,...]."""
        digits = self.bound(x).round().long() + self._column(self.levels // 2, x).long()
        return (digits * self._column(self.basis, x).long()).sum(1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes [B,c,...] fp32 in [-1,1] of ``ids`` [B,...]."""
        digits = ids[..., None] // self.basis % self.levels
        half = self.levels // 2
        return ((digits - half) / half).movedim(-1, 1)

    @staticmethod
    def _column(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.dtype).view(1, -1, *[1] * (like.ndim - 2))


def encoder_layers(config: VideoTokenizerConfig) -> nn.ModuleList:
    """Clips [B,3,T,H,W] to what is quantised, [B,c,t,h,w]."""
    width, groups = config.widths[0], config.norm_groups
    layers: list[nn.Module] = [CausalConv3d(3, width)]
    for level, out in enumerate(config.widths):
        layers += residual_units(width, out, config.blocks(level), groups)
        width = out
        if level < len(config.strides):
            layers.append(CausalConv3d(width, width, stride=config.strides[level]))
    return nn.ModuleList(
        [*layers, FrameNorm(groups, width), Swish(width), nn.Conv3d(width, len(config.levels), 1)]  # 1x1x1: no frames
    )


def decoder_layers(config: VideoTokenizerConfig) -> nn.ModuleList:
    """Codes [B,c,t,h,w] to clips [B,3,T,H,W]."""
    width, groups = config.widths[-1], config.norm_groups
    layers: list[nn.Module] = [CausalConv3d(len(config.levels), width)]
    for level, out in reversed(list(enumerate(config.widths))):
        layers += residual_units(width, out, config.blocks(level), groups)
        width = out
        if level:
            stride = config.strides[level - 1]
            layers += [CausalConv3d(width, width * math.prod(stride)), DepthToSpace(stride)]
    return nn.ModuleList([*layers, FrameNorm(groups, width), Swish(width), CausalConv3d(width, 3)])


def residual_units(width: int, out: int, count: int, groups: int) -> list[nn.Module]:
    """``count`` residual units, of which the first changes the width."""
    return [ResidualUnit(width if i == 0 else out, out, groups) for i in range(count)]


class ResidualUnit(nn.Module):
    """Twice norm, swish and convolution, plus the input; a 1x1x1 convolution of the input where the width changes."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.fn = nn.Sequential(
            FrameNorm(groups, width),
            Swish(width),
            CausalConv3d(width, out),
            FrameNorm(groups, out),
            Swish(out),
            CausalConv3d(out, out),
        )
        self.residual_fn = nn.Identity() if width == out else nn.Sequential(CausalConv3d(width, out, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,width,T,H,W] to [B,out,T,H,W]."""
        return self.fn(x) + self.residual_fn(x)


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame: it pads in front in time, on all sides in space, with the edge's values.

    ``kernel`` is the side of the cube; with ``stride`` every so many frames and pixels are kept.
    """

    def __init__(self, width: int, out: int, kernel: int = 3, stride: Stride = (1, 1, 1)) -> None:
        super().__init__()
        side = kernel // 2
        self.pad = (side, side, side, side, 2 * side, 0)
        self.conv = nn.Conv3d(width, out, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,width,T,H,W] to [B,out,T',H',W']."""
        return self.conv(F.pad(x, self.pad, mode="replicate") if any(self.pad) else x)


class FrameNorm(nn.GroupNorm):
    """GroupNorm (eps 1e-5) of each frame by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,C,T,H,W] to the same shape."""
        batch, frames = x.shape[0], x.shape[2]
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)


class Swish(nn.Module):
    """``x * sigmoid(beta * x)`` with a learned beta for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,C,T,H,W] to the same shape."""
        return x * torch.sigmoid(self.beta * x)


class DepthToSpace(nn.Module):
    """Channels become frames and pixels, for a stride (a, b, c).

    Channel ``((i*b + j)*c + l)*C + k`` becomes channel k of frame i, row j and column l of its block of a x b x c.

    The first frame of a clip is not doubled in time: where time grows, the frames before the last of its block go.
    """

    def __init__(self, stride: Stride) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,C*a*b*c,T,H,W] to [B,C,T*a-(a-1),H*b,W*c]."""
        a, b, c = self.stride
        batch, channels, frames, height, width = x.shape
        y = x.view(batch, a, b, c, channels // (a * b * c), frames, height, width)
        y = y.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(batch, -1, frames * a, height * b, width * c)
        return y[:, :, a - 1 :]
