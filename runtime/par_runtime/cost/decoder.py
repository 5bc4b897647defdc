"""Parameters and operations of the decoder, of images or clips, counted from the manifest's entry of the tokenizer.

The layers are those of ``decoder.onnx``: convolutions and one-headed attention over all pixels. Operations are counted
of convolutions and of products of matrices alone; everything else is a few operations per number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from par_runtime.video_shapes import FRAMES_BEFORE, decoder_layers, tensor_shapes

#: Multiplications that the decoder in C needs at least, as a share of a convolution's, of images and of clips, which
#: have no upsampling. With Winograd's F(4x4,3x3), in fp32 and in dot products: 36 of 144, and 25 behind an upsampling.
LEAST_OF_WINOGRAD = (25 / 144, 36 / 144)
#: With AMX: all 9 of a convolution, and 4 behind an upsampling, where weights that see the same number are added up.
LEAST_OF_SUMS = (4 / 9, 1.0)


def count_decoder(config: Mapping[str, Any], grid: tuple[int, int, int]) -> tuple[int, int]:
    """(parameters, operations per image) of the decoder; a multiplication with its addition counts as two operations.

    ``config`` is the manifest's ``tokenizer.config``.
    """
    count = _Count(grid[1] * grid[2])
    widths = [config["channels"] * m for m in reversed(config["channel_multipliers"])]
    width = widths[0]
    count.conv(config["codebook_dim"], config["z_channels"], kernel=1)
    count.conv(config["z_channels"], width)
    count.res(width, width)
    count.attention(width)
    count.res(width, width)
    for level, out in enumerate(widths):
        for _ in range(config["res_blocks"] + 1):
            count.res(width, out)
            width = out
            if level == 0:
                count.attention(out)
        if level != len(widths) - 1:
            count.pixels *= 4
            count.conv(out, out)
    count.norm(width)
    count.conv(width, 3)
    return count.parameters, count.operations


def count_video_decoder(config: Mapping[str, Any], grid: tuple[int, int, int]) -> tuple[int, int]:
    """As :func:`count_decoder`, for one clip of ``grid`` latent frames, rows and columns.

    Of the first frame of a layer a third is counted: all that a convolution sees is the same frame there.
    """
    frames, pixels, operations = grid[0], grid[1] * grid[2], 0
    for layer in decoder_layers(config):
        if layer.kind == "space":
            frames, pixels = 1 + (frames - 1) * layer.stride[0], pixels * math.prod(layer.stride[1:])
        for shape in tensor_shapes(iter([layer])).values():
            if len(shape) == 4:
                seen = FRAMES_BEFORE + 1 if shape[2] > 1 else 1
                operations += 2 * math.prod(shape) * pixels * (seen * (frames - 1) + 1) // seen
    parameters = sum(math.prod(shape) for shape in tensor_shapes(decoder_layers(config)).values())
    return parameters, operations


class _Count:
    """Sums of parameters and operations over layers, at the current resolution."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self.parameters, self.operations = pixels, 0, 0

    def conv(self, width: int, out: int, kernel: int = 3) -> None:
        weights = kernel * kernel * width * out
        self.parameters += weights + out
        self.operations += 2 * weights * self.pixels

    def norm(self, width: int) -> None:
        self.parameters += 2 * width

    def res(self, width: int, out: int) -> None:
        self.norm(width)
        self.conv(width, out)
        self.norm(out)
        self.conv(out, out)
        if width != out:
            self.conv(width, out, kernel=1)

    def attention(self, width: int) -> None:
        self.norm(width)
        for _ in range(4):  # q, k, v, out
            self.conv(width, width, kernel=1)
        self.operations += 4 * self.pixels**2 * width
