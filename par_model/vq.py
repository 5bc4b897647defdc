"""The image tokenizer: a VQGAN. The defaults are VQ-16 (16x downsampling, 16384 codes of 8).

Read top-down: model, encoder, decoder, then the blocks; ``VQConfig`` is in ``config.py``. Modules have the key names
of the published checkpoint, so ``load_state_dict`` takes ``vq_ds16_c2i.pt`` as it is. Source: paper, section 4.1 (the
tokenizer is LlamaGen's), and the behaviour of the published code.

Letters: B images, F downsampling factor, h = H/F and w = W/F code rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_model.config import VQConfig

#: Length of the checkpoint's usage ring buffer. It is loaded and never read.
CODEBOOK_USED_LENGTH = 65536


class VQModel(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Code ids [B,h,w] int64 of ``images`` [B,3,H,W] in [-1,1]: the nearest codes. Raises ValueError."""
        factor = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected [B,3,H,W] with H and W multiples "
                f"of {factor}; crop or resize the images"
            )
        return self.quantize.nearest(self.quant_conv(self.encoder(images)))

    def decode(self, ids: Tensor) -> Tensor:
        """Images [B,3,H,W] of code ids [B,h,w], nominally in [-1,1], not clamped. Raises ValueError."""
        if ids.ndim != 3:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected [B,h,w]")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.config.codebook_size):
            raise ValueError(
                f"ids lie in {int(ids.min())}..{int(ids.max())}; this codebook has ids "
                f"0..{self.config.codebook_size - 1}"
            )
        return self.decode_codes(self.quantize.lookup(ids))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images [B,3,H,W], not clamped, of normalised codes [B,codebook_dim,h,w]."""
        return self.decoder(self.post_quant_conv(codes))


class Quantizer(nn.Module):
    """Nearest neighbour on the unit sphere: codes and encoder outputs are L2-normalised."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        bound = 1.0 / config.codebook_size
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        self.register_buffer("codebook_used", torch.zeros(CODEBOOK_USED_LENGTH))

    def nearest(self, z: Tensor) -> Tensor:
        """Ids [B,h,w] of the codes nearest to ``z`` [B,codebook_dim,h,w]."""
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)  # [B, h, w, c]
        codebook = F.normalize(self.embedding.weight, dim=-1)  # [V, c]
        # Squared distance written out as in the published code, so that near-ties are rounded alike.
        flat = z.reshape(-1, z.shape[-1])
        distance = (flat**2).sum(1, keepdim=True) + (codebook**2).sum(1) - 2 * flat @ codebook.T
        return distance.argmin(1).reshape(z.shape[:-1])

    def lookup(self, ids: Tensor) -> Tensor:
        """Normalised codes [B,codebook_dim,h,w] of ``ids`` [B,h,w]."""
        return F.normalize(self.embedding.weight, dim=-1)[ids].permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Images [B,3,H,W] to features [B,z_channels,h,w]; attention at the last level only."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = config.channels
        for level, out in enumerate(widths):
            self.conv_blocks.append(
                Level(
                    width,
                    out,
                    config.res_blocks,
                    config.norm_groups,
                    attention=level == last,
                    downsample=level != last,
                )
            )
            width = out
        self.mid = _middle(width, config.norm_groups)
        self.norm_out = _norm(width, config.norm_groups)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B,3,H,W] to features [B,z_channels,h,w]."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features [B,z_channels,h,w] to images [B,3,H,W]; attention at the first (smallest) level."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_multipliers)]
        last = len(widths) - 1
        width = widths[0]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = _middle(width, config.norm_groups)
        self.conv_blocks = nn.ModuleList()
        for level, out in enumerate(widths):
            self.conv_blocks.append(
                Level(
                    width,
                    out,
                    config.res_blocks + 1,
                    config.norm_groups,
                    attention=level == 0,
                    upsample=level != last,
                )
            )
            width = out
        self.norm_out = _norm(width, config.norm_groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B,z_channels,h,w] to images [B,3,H,W]."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(
        self,
        width: int,
        out: int,
        blocks: int,
        groups: int,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width if i == 0 else out, out, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out, groups) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(out) if downsample else None
        self.upsample = Upsample(out) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,width,H,W] to [B,out,H',W']; H' and W' are half or twice as large where the level resamples."""
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class ResBlock(nn.Module):
    """Twice norm, swish and convolution, plus the input; a 1x1 convolution of the input where the width changes."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(width, groups)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = _norm(out, groups)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,width,H,W] to [B,out,H,W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Attention with one head over all pixels, scale c^-0.5."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,width,H,W] to the same shape."""
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (conv(y).reshape(b, c, h * w).transpose(1, 2) for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # [B, hw, c]
        return x + self.proj_out(y.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """One pixel of padding on the right and below, then a 3x3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,width,H,W] to [B,width,H/2,W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B,width,H,W] to [B,width,2H,2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(width: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(width, width, groups), AttnBlock(width, groups), ResBlock(width, width, groups)])


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)
