"""The blocks of the tokenizer's graphs: residual block, attention, up and down. Mirrors ``par_model.vq``."""

from __future__ import annotations

from typing import Any

import numpy as np

from par_export.graphs.writer import Graph
from par_model.config import VQConfig

PREFIX = "vq."
#: ONNX Runtime's CUDA provider has no InstanceNormalization of opset 22, as of 1.31: it would run on the CPU.
VQ_OPSET = 21


class Blocks:
    """The blocks of encoder and decoder over one graph; ``height`` and ``width`` are those of the current feature map.

    ``x`` is a value [B,c,height,width] everywhere, ``key`` the prefix of a block's weights.
    """

    def __init__(self, g: Graph, vq: VQConfig, compute: str) -> None:
        self.g, self.vq, self.compute = g, vq, compute
        self.height = self.width = 0

    def weight(self, key: str) -> str:
        """The tensor ``key`` of the tokenizer, in the dtype that the graph computes in."""
        return self.g.weight(PREFIX + key, self.compute)

    def channels(self, key: str) -> int:
        """The first dimension of the tensor ``key``."""
        assert self.g.weights is not None
        return self.g.weights.entries[PREFIX + key].shape[0]

    def conv(self, x: str, key: str, kernel: int = 3) -> str:
        """A convolution of stride 1 that keeps height and width."""
        return self._conv(x, key, kernel, pads=[kernel // 2] * 4)

    def _conv(self, x: str, key: str, kernel: int, **attributes: Any) -> str:
        weight, bias = self.weight(f"{key}.weight"), self.weight(f"{key}.bias")
        return self.g.op("Conv", x, weight, bias, kernel_shape=[kernel] * 2, **attributes)

    def swish(self, x: str) -> str:
        """``x * sigmoid(x)``."""
        return self.g.op("Mul", x, self.g.op("Sigmoid", x))

    def norm(self, x: str, key: str) -> str:
        """GroupNorm as instance norm over [B,G,-1], then gain and bias per channel."""
        g, groups, channels = self.g, self.vq.norm_groups, self.channels(f"{key}.weight")
        ones, zeros = (self._vector(name, value, groups) for name, value in (("ones", 1.0), ("zeros", 0.0)))
        y = g.op("Reshape", x, g.const([0, groups, -1]))
        y = g.op("InstanceNormalization", y, ones, zeros, epsilon=1e-6)
        y = g.op("Reshape", y, g.const([0, channels, self.height, self.width]))
        return g.op("Add", g.op("Mul", y, self.weight(f"{key}.weight")), self.weight(f"{key}.bias"))

    def _vector(self, name: str, value: float, length: int) -> str:
        array = np.full(length, value, np.float16 if self.compute == "float16" else np.float32)
        return self.g.table(f"{name}.{length}", array)

    def res(self, x: str, key: str) -> str:
        """A residual block; its shortcut is a 1x1 convolution where the number of channels changes."""
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
        """Every pixel twice in both directions, then a convolution."""
        scales = self.g.const([1.0, 1.0, 2.0, 2.0], "float32")
        x = self.g.op(
            "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        )
        self.height, self.width = 2 * self.height, 2 * self.width
        return self.conv(x, key)

    def downsample(self, x: str, key: str) -> str:
        """Pad below and right by one, then a convolution of stride 2."""
        self.height, self.width = self.height // 2, self.width // 2
        return self._conv(x, key, 3, pads=[0, 0, 1, 1], strides=[2, 2])
