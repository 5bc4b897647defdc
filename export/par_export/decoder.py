"""The decoder graph: tokens [B,N] in sequence order to uint8 images [B,H,W,3]. Mirrors ``par_model.vq.Decoder``.

Un-permuting the tokens is part of the graph, so nothing outside can forget it. The codebook is L2-normalised
once, at export.
"""

from __future__ import annotations

import numpy as np

from par_export.graph import ONNX_TYPE, Graph, WeightTable
from par_model.config import PARConfig, VQConfig
from par_model.ordering import token_order

PREFIX = "vq."
#: ONNX Runtime's CUDA provider has no InstanceNormalization of opset 22, as of 1.31: it would run on the CPU.
DECODER_OPSET = 21


def decoder_graph(config: PARConfig, vq: VQConfig, weights: WeightTable, compute: str = "float32") -> Graph:
    """The graph: input tokens [B,N] int64, output images [B,H,W,3] uint8 = trunc(clamp(127.5 x + 128, 0, 255))."""
    _, h, w = config.grid
    b = _Decoder(Graph("decoder", weights, DECODER_OPSET), vq, compute)
    g = b.g
    tokens = g.input("tokens", "int64", ["B", config.n_tokens])
    place = np.empty(config.n_tokens, dtype=np.int64)
    place[token_order(config)] = np.arange(config.n_tokens)
    raster = g.op("Gather", tokens, g.table("place", place), axis=1)  # [B,N], raster order
    codes = g.op("Gather", g.weight(PREFIX + "codebook", compute), raster)  # [B,N,c]
    codes = g.op("Transpose", codes, perm=[0, 2, 1])
    x = g.op("Reshape", codes, g.const([0, vq.codebook_dim, h, w]))
    b.height, b.width = h, w
    x = b.conv(x, "post_quant_conv", kernel=1)
    x = b.conv(x, "decoder.conv_in")
    x = b.res(x, "decoder.mid.0")
    x = b.attention(x, "decoder.mid.1")
    x = b.res(x, "decoder.mid.2")
    levels = len(vq.channel_multipliers)
    for level in range(levels):
        name = f"decoder.conv_blocks.{level}"
        for j in range(vq.res_blocks + 1):
            x = b.res(x, f"{name}.res.{j}")
            if level == 0:
                x = b.attention(x, f"{name}.attn.{j}")
        if level != levels - 1:
            x = b.upsample(x, f"{name}.upsample.conv")
    x = b.conv(b.swish(b.norm(x, "decoder.norm_out")), "decoder.conv_out")
    if compute != "float32":
        x = g.op("Cast", x, to=ONNX_TYPE["float32"])
    x = g.op("Add", g.op("Mul", x, g.const(127.5, "float32")), g.const(128.0, "float32"))
    x = g.op("Clip", x, g.const(0.0, "float32"), g.const(255.0, "float32"))
    # Engines know uint8 at their borders only, so the cast comes last; floor says how it is to round.
    x = g.op("Transpose", g.op("Floor", x), perm=[0, 2, 3, 1])
    g.op("Cast", x, to=ONNX_TYPE["uint8"], name="images")
    g.output("images", "uint8", ["B", b.height, b.width, 3])
    return g


class _Decoder:
    """The blocks of the decoder over one graph; knows the current height and width in pixels."""

    def __init__(self, g: Graph, vq: VQConfig, compute: str) -> None:
        self.g, self.vq, self.compute = g, vq, compute
        self.height = self.width = 0

    def w(self, key: str) -> str:
        return self.g.weight(PREFIX + key, self.compute)

    def channels(self, key: str) -> int:
        assert self.g.weights is not None
        return self.g.weights.entries[PREFIX + key].shape[0]

    def conv(self, x: str, key: str, kernel: int = 3) -> str:
        pad = kernel // 2
        return self.g.op(
            "Conv", x, self.w(f"{key}.weight"), self.w(f"{key}.bias"), kernel_shape=[kernel] * 2, pads=[pad] * 4
        )

    def swish(self, x: str) -> str:
        return self.g.op("Mul", x, self.g.op("Sigmoid", x))

    def norm(self, x: str, key: str) -> str:
        """GroupNorm as instance norm over [B,G,-1], then gain and bias per channel."""
        g, groups, channels = self.g, self.vq.norm_groups, self.channels(f"{key}.weight")
        ones, zeros = (self._vector(name, value, groups) for name, value in (("ones", 1.0), ("zeros", 0.0)))
        y = g.op("Reshape", x, g.const([0, groups, -1]))
        y = g.op("InstanceNormalization", y, ones, zeros, epsilon=1e-6)
        y = g.op("Reshape", y, g.const([0, channels, self.height, self.width]))
        return g.op("Add", g.op("Mul", y, self.w(f"{key}.weight")), self.w(f"{key}.bias"))

    def _vector(self, name: str, value: float, length: int) -> str:
        array = np.full(length, value, np.float16 if self.compute == "float16" else np.float32)
        return self.g.table(f"{name}.{length}", array)

    def res(self, x: str, key: str) -> str:
        y = self.conv(self.swish(self.norm(x, f"{key}.norm1")), f"{key}.conv1")
        y = self.conv(self.swish(self.norm(y, f"{key}.norm2")), f"{key}.conv2")
        assert self.g.weights is not None
        if f"{PREFIX}{key}.nin_shortcut.weight" in self.g.weights.entries:
            x = self.conv(x, f"{key}.nin_shortcut", kernel=1)
        return self.g.op("Add", x, y)

    def attention(self, x: str, key: str) -> str:
        """One head over all pixels, scale c^-0.5."""
        g, channels = self.g, self.channels(f"{key}.q.weight")
        y = self.norm(x, f"{key}.norm")
        shape = g.const([0, channels, self.height * self.width])
        q, k, v = (g.op("Reshape", self.conv(y, f"{key}.{name}", kernel=1), shape) for name in "qkv")  # [B,c,hw]
        scale = g.const(channels**-0.5, "float16" if self.compute == "float16" else "float32")
        scores = g.op("MatMul", g.op("Mul", g.op("Transpose", q, perm=[0, 2, 1]), scale), k)  # [B,hw,hw]
        weights = g.op("Transpose", g.op("Softmax", scores, axis=-1), perm=[0, 2, 1])
        y = g.op("Reshape", g.op("MatMul", v, weights), g.const([0, channels, self.height, self.width]))
        return g.op("Add", x, self.conv(y, f"{key}.proj_out", kernel=1))

    def upsample(self, x: str, key: str) -> str:
        scales = self.g.const([1.0, 1.0, 2.0, 2.0], "float32")
        x = self.g.op(
            "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        )
        self.height, self.width = 2 * self.height, 2 * self.width
        return self.conv(x, key)
