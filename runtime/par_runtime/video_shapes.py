"""The layers of a video tokenizer, and the shapes of their tensors: both follow from its sizes.

Mirrors ``par_model.video``: names are those of the tokenizer's checkpoint. In a bundle a convolution over three frames
is a convolution over 3 times as many channels, [out, 3 * width, 3, 3], the earliest frame's first: a runtime has faster
kernels for images than for clips. ``config``: of the manifest's tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FRAMES_BEFORE = 2  #: frames that a causal convolution sees beside its own
CODEBOOK = "codebook"  #: [codes, numbers of a code] fp32: the code of each id


@dataclass(frozen=True)
class Layer:
    """A layer: ``name`` begins the names of its tensors; ``width`` channels become ``out``.

    "conv" and "res" see earlier frames, "point" is a convolution of 1x1x1 without. ``stride``: of a "conv" of the
    encoder; of "space", what channels become.
    """

    kind: Literal["conv", "res", "space", "norm", "swish", "point"]
    name: str
    width: int
    out: int
    stride: tuple[int, int, int] = (1, 1, 1)


def encoder_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Clips of 3 channels to what is quantised, in order."""
    widths, strides, width = config["widths"], config["strides"], config["widths"][0]
    layers = [("conv", 3, width, (1, 1, 1))]
    for level, out in enumerate(widths):
        layers += [("res", width if i == 0 else out, out, (1, 1, 1)) for i in range(_blocks(config, level))]
        width = out
        if level < len(strides):
            layers.append(("conv", width, width, tuple(strides[level])))
    layers += [("norm", width, width, (1, 1, 1)), ("swish", width, width, (1, 1, 1))]
    layers.append(("point", width, len(config["levels"]), (1, 1, 1)))
    return _named("encoder_layers", layers)


def decoder_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Codes to clips of 3 channels, in order."""
    widths, strides, width = config["widths"], config["strides"], config["widths"][-1]
    layers = [("conv", len(config["levels"]), width, (1, 1, 1))]
    for level, out in reversed(list(enumerate(widths))):
        layers += [("res", width if i == 0 else out, out, (1, 1, 1)) for i in range(_blocks(config, level))]
        width = out
        if level:
            stride = tuple(strides[level - 1])
            layers.append(("conv", width, width * math.prod(stride), (1, 1, 1)))
            layers.append(("space", width * math.prod(stride), width, stride))
    layers += [("norm", width, width, (1, 1, 1)), ("swish", width, width, (1, 1, 1)), ("conv", width, 3, (1, 1, 1))]
    return _named("decoder_layers", layers)


def _blocks(config: Mapping[str, Any], level: int) -> int:
    blocks: int = config["last_blocks"] if level == len(config["widths"]) - 1 else config["res_blocks"]
    return blocks


def _named(prefix: str, layers: Sequence[tuple[Any, ...]]) -> Iterator[Layer]:
    return (Layer(kind, f"{prefix}.{i}", *sizes) for i, (kind, *sizes) in enumerate(layers))


def tensor_shapes(layers: Iterator[Layer]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that ``layers`` read, as it lies in a bundle."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, width: int, out: int, kernel: int = 3) -> None:
        frames = kernel  # the kernel is a cube
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, frames * width, kernel, kernel), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width, 1, 1)

    for layer in layers:
        name, width, out = layer.name, layer.width, layer.out
        if layer.kind == "conv":
            conv(f"{name}.conv", width, out)
        elif layer.kind == "point":
            conv(name, width, out, 1)
        elif layer.kind == "norm":
            norm(name, width)
        elif layer.kind == "swish":
            shapes[f"{name}.beta"] = (width, 1, 1)
        elif layer.kind == "res":
            for i, channels in ((0, width), (3, out)):
                norm(f"{name}.fn.{i}", channels)
                shapes[f"{name}.fn.{i + 1}.beta"] = (channels, 1, 1)
                conv(f"{name}.fn.{i + 2}.conv", channels, out)
            if width != out:
                conv(f"{name}.residual_fn.0.conv", width, out, 1)
    return shapes


def decoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the decoder reads, the codes of all ids among them."""
    levels = config["levels"]
    return {CODEBOOK: (math.prod(levels), len(levels)), **tensor_shapes(decoder_layers(config))}


def past_shapes(config: Mapping[str, Any], height: int, width: int) -> list[tuple[int, int, int, int]]:
    """[2,C,H,W] of each past of ``decoder_next.onnx`` for one clip of ``height`` x ``width`` codes, in order."""
    shapes = []
    for layer in decoder_layers(config):
        if layer.kind == "space":
            height, width = height * layer.stride[1], width * layer.stride[2]
        channels = {"conv": [layer.width], "res": [layer.width, layer.out]}.get(layer.kind, [])
        shapes += [(FRAMES_BEFORE, each, height, width) for each in channels]
    return shapes
