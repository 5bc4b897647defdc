"""The decoder of an image tokenizer as a list of layers, and the shapes of their tensors: both follow from its sizes.

Mirrors ``decoder.onnx``. The names are those of the tokenizer's checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

CODEBOOK = "codebook"  #: [codes, numbers of a code], normalised
BEHIND_CODES = "post_quant_conv"  #: the 1x1 convolution of codes


@dataclass(frozen=True)
class Layer:
    """A layer of the decoder: ``name`` begins the names of its tensors; ``width`` channels become ``out``."""

    kind: Literal["conv", "res", "attention", "upsample", "last"]
    name: str
    width: int
    out: int


def decoder_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """The layers behind the convolution of codes, in order. ``config``: of the manifest's tokenizer."""
    widths = [config["channels"] * multiplier for multiplier in reversed(config["channel_multipliers"])]
    width = widths[0]
    yield Layer("conv", "decoder.conv_in", config["z_channels"], width)
    yield Layer("res", "decoder.mid.0", width, width)
    yield Layer("attention", "decoder.mid.1", width, width)
    yield Layer("res", "decoder.mid.2", width, width)
    for level, out in enumerate(widths):
        block = f"decoder.conv_blocks.{level}"
        for i in range(config["res_blocks"] + 1):
            yield Layer("res", f"{block}.res.{i}", width, out)
            width = out
            if level == 0:
                yield Layer("attention", f"{block}.attn.{i}", width, width)
        if level + 1 < len(widths):
            yield Layer("upsample", f"{block}.upsample.conv", width, width)
    yield Layer("last", "decoder", width, 3)


def decoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the decoder reads. ``config``: of the manifest's tokenizer."""
    shapes: dict[str, tuple[int, ...]] = {CODEBOOK: (config["codebook_size"], config["codebook_dim"])}

    def conv(name: str, width: int, out: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, width, kernel, kernel), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width, 1, 1)

    conv(BEHIND_CODES, config["codebook_dim"], config["z_channels"], 1)
    for layer in decoder_layers(config):
        name, width, out = layer.name, layer.width, layer.out
        if layer.kind in ("conv", "upsample"):
            conv(name, width, out)
        elif layer.kind == "last":
            norm(f"{name}.norm_out", width)
            conv(f"{name}.conv_out", width, out)
        elif layer.kind == "attention":
            norm(f"{name}.norm", width)
            for part in ("q", "k", "v", "proj_out"):
                conv(f"{name}.{part}", width, width, 1)
        else:
            norm(f"{name}.norm1", width)
            conv(f"{name}.conv1", width, out)
            norm(f"{name}.norm2", out)
            conv(f"{name}.conv2", out, out)
            if width != out:
                conv(f"{name}.nin_shortcut", width, out, 1)
    return shapes
