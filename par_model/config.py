"""The numbers that define a PAR model and its tokenizer, and the table of named sizes.

Source: paper, table 6; the heads, and what no table lists, from the published checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Order = Literal["distant", "raster"]
ORDERS: tuple[Order, ...] = ("distant", "raster")  #: the first is the method, the second an ablation
NORM_EPS = 1e-5  #: epsilon of every RMSNorm
FSQ_BOUND_EPS = 1e-3  #: how far from the outermost levels a video tokenizer holds its numbers before rounding
ROPE_BASE = 10000.0  #: of the rotary embedding's frequencies


@dataclass(frozen=True)
class PARConfig:
    """Architecture of one model. Raises ValueError for numbers that do not fit each other.

    Letters: T x H x W grid (T = 1 for images), N = T*H*W tokens, n tokens per group, V codes, d width,
    D head size. ``group_size=1`` is plain raster autoregression (LlamaGen).
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = 16384
    n_classes: int = 1000
    grid: tuple[int, int, int] = (1, 24, 24)
    group_size: int = 4
    # Ablations of the paper (table 4). The defaults are the method itself.
    order: Order = "distant"  #: "raster": a group is n neighbours of the raster order
    sequential_initial: bool = True  #: False: the first group is generated in parallel too
    causal_groups: bool = False  #: True: causal attention inside a group
    dropout: float = field(default=0.0, compare=False)  #: of the training; generation and export ignore it

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(int(g) for g in self.grid))
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid={self.grid}; expected (T, H, W), each at least 1, with T = 1 for images")
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "n_classes", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.dim % self.n_heads:
            raise ValueError(
                f"dim={self.dim} is not a multiple of n_heads={self.n_heads}; choose n_heads so that it is"
            )
        if self.head_dim % 4:
            raise ValueError(
                f"head size {self.head_dim} (dim={self.dim} / n_heads={self.n_heads}) is not a multiple of 4, "
                "which the 2-D rotary embedding needs; choose other n_heads"
            )
        _, height, width = self.grid
        n, s = self.group_size, math.isqrt(self.group_size)
        if s * s != n:
            raise ValueError(
                f"group_size={n} is not a square; expected 1, 4, 9, 16, ... (a group takes one token in each of s x s "
                "regions)"
            )
        if height % s or width % s:
            raise ValueError(f"a grid of {height}x{width} does not split into {s}x{s} equal regions (group_size={n})")
        if n * 2 > height * width:
            raise ValueError(
                f"group_size={n} is more than half of the {height * width} tokens of a frame; choose a smaller group"
            )

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.dim // self.n_heads

    @property
    def n_tokens(self) -> int:
        """N, the tokens of one image or video."""
        t, h, w = self.grid
        return t * h * w

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layers: two thirds of 4d, rounded up to a multiple of 256."""
        return -(-int(2 * (4 * self.dim) / 3) // 256) * 256


#: name -> (d, layers, heads); the published image sizes differ in nothing else. "tiny" is ours. "video" is the model of
#: table 3, of which "792 M" is all that is published. **(Ours)**: of the widths that the paper's own models have, 1536
#: (PAR-XXL's blocks) with 21 layers comes nearest, 791.4 M; XL's blocks give 793.9 M with 31.
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (256, 8, 4),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "3B": (3200, 24, 32),
    "video": (1536, 21, 24),
}
VIDEO_GRID, VIDEO_CODES, VIDEO_CLASSES = (5, 16, 16), 64000, 101  #: 17 frames of 128x128; FSQ's codes; UCF-101


def named(size: str, **changes: Any) -> PARConfig:
    """The configuration of a named size; ``changes`` are further fields of :class:`PARConfig`. Raises ValueError.

    "video" also has the grid, the codes and the classes of the paper's video model.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; expected one of {', '.join(SIZES)}")
    dim, n_layers, n_heads = SIZES[size]
    if size == "video":
        changes = {"grid": VIDEO_GRID, "vocab_size": VIDEO_CODES, "n_classes": VIDEO_CLASSES} | changes
    return PARConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, **changes)


@dataclass(frozen=True)
class VQConfig:
    """Architecture of the tokenizer. The defaults are VQ-16: 71,883,403 parameters, 344 keys.

    Raises ValueError for numbers that do not fit each other.
    """

    codebook_size: int = 16384
    codebook_dim: int = 8
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2  #: per encoder level; the decoder has one more
    z_channels: int = 256
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        for multiplier in self.channel_multipliers:
            if multiplier < 1 or (self.channels * multiplier) % self.norm_groups:
                raise ValueError(
                    f"channels={self.channels} times multiplier {multiplier} is not a multiple of "
                    f"norm_groups={self.norm_groups}; choose channels so that every level is"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per code in each direction."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class VideoTokenizerConfig:
    """Architecture of the video tokenizer. The defaults are the published one: 370,372,105 parameters, 64,000 codes.

    Level i has ``widths[i]`` channels and ``res_blocks`` residual units (the last one ``last_blocks``); between level i
    and i + 1 frames, rows and columns shrink by ``strides[i]``, each 1 or 2. ``levels`` are those of FSQ: how many
    values each number of a code has. An id is ``sum(digit[i] * prod(levels[:i]))``, and number i of its code is
    ``(digit - level // 2) / (level // 2)``. Raises ValueError for numbers that do not fit each other.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    widths: tuple[int, ...] = (128, 256, 256, 512)
    strides: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    res_blocks: int = 4
    last_blocks: int = 8
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "strides", tuple(tuple(stride) for stride in self.strides))
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels={self.levels}; expected one or more numbers, each at least 2")
        if len(self.strides) != len(self.widths) - 1:
            raise ValueError(
                f"{len(self.widths)} widths and {len(self.strides)} strides; expected a stride between each two levels"
            )
        for stride in self.strides:
            if len(stride) != 3 or stride[0] not in (1, 2) or stride[1:] != (2, 2):
                raise ValueError(f"stride {stride}; expected (1, 2, 2), or (2, 2, 2) where time shrinks too")
        for width in self.widths:
            if width < 1 or width % self.norm_groups:
                raise ValueError(f"width {width} is not a multiple of norm_groups={self.norm_groups}")
        if min(self.res_blocks, self.last_blocks) < 1:
            raise ValueError(f"res_blocks={self.res_blocks}, last_blocks={self.last_blocks}; expected at least 1")

    def blocks(self, level: int) -> int:
        """Residual units of a level."""
        return self.last_blocks if level == len(self.widths) - 1 else self.res_blocks

    @property
    def codebook_size(self) -> int:
        """V, the number of codes."""
        return math.prod(self.levels)

    @property
    def downsampling(self) -> tuple[int, int]:
        """Frames per latent frame, behind the first one; pixels per code in each direction."""
        return math.prod(stride[0] for stride in self.strides), int(2 ** len(self.strides))

    def frames(self, latent: int) -> int:
        """Frames of a clip of ``latent`` latent frames: the first one is a single frame."""
        return 1 + (latent - 1) * self.downsampling[0]
