"""The graphs of the video tokenizer: tokens to clips, whole or by latent frame, and clips to tokens.

Mirrors ``par_model.video``. Un-permuting the tokens is part of the graphs, so nothing outside can forget it.

=================== ============================================ ==============================================
decoder             tokens [B,N]                                 images uint8 [B,T,H,W,3]
decoder_first       tokens [B,h*w] of latent frame 0             images [B,1,H,W,3], present.0, present.1, ...
decoder_next        tokens [B,h*w] of the next, past.0, ...      images [B,time,H,W,3], present.0, present.1, ...
encoder             images [B,T,H,W,3]                           tokens [B,N]
=================== ============================================ ==============================================

``present.i`` is what convolution i needs of the frames so far: the last two that it was given, [B,2,C,H,W] fp32 in the
resolution of its layer. It is ``past.i`` of the next latent frame.

Frames lie beside each other as images do, [B*K,C,H,W]. A causal convolution over three frames is one of images, over
the channels of a frame and the two before it: ONNX Runtime and TensorRT have better kernels for it. In front of the
first frame all three are equal, so there the weights are added up first, by whoever loads the graph.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

import numpy as np

from par_export.graphs.vq import PREFIX, VQ_OPSET
from par_export.graphs.writer import ONNX_DTYPE, Graph, WeightTable
from par_model.config import FSQ_BOUND_EPS, PARConfig, VideoTokenizerConfig
from par_model.ordering import token_order
from par_runtime.manifest_video import FIRST, NEXT
from par_runtime.video_shapes import CODEBOOK, FRAMES_BEFORE, Layer, decoder_layers, encoder_layers, past_shapes

NORM_EPS = 1e-5
SIDES = (0, 0, 1, 1, 0, 0, 1, 1)  #: one pixel on each side of an image [B,C,H,W]
#: What comes before the frames of a graph: nothing, the frames of ``past.i``, or nothing and there is one frame only.
Mode = Literal["whole", "next", "first"]


def decoder_graph(
    config: PARConfig, tokenizer: VideoTokenizerConfig, weights: WeightTable, compute: str = "float32"
) -> Graph:
    """The graph of all latent frames at once; ``images`` is floor(255 * clamp(x, 0, 1) + 0.5)."""
    return _decoder("decoder", config, tokenizer, weights, "whole" if config.grid[0] > 1 else "first", compute)


def first_graph(config: PARConfig, tokenizer: VideoTokenizerConfig, weights: WeightTable) -> Graph:
    """The graph of the first latent frame."""
    return _decoder(FIRST, config, tokenizer, weights, "first")


def next_graph(config: PARConfig, tokenizer: VideoTokenizerConfig, weights: WeightTable) -> Graph:
    """The graph of each other latent frame."""
    return _decoder(NEXT, config, tokenizer, weights, "next")


def encoder_graph(config: PARConfig, tokenizer: VideoTokenizerConfig, weights: WeightTable) -> Graph:
    """The graph of the encoder. It computes in fp32 over weights of any precision, as that of images does."""
    b = _Blocks(Graph("encoder", weights, VQ_OPSET), tokenizer, "whole", "float32")
    g, (t, h, w), side = b.g, config.grid, tokenizer.downsampling[1]
    b.frames, b.height, b.width = tokenizer.frames(t), h * side, w * side
    images = g.input("images", "uint8", ["B", b.frames, b.height, b.width, 3])
    x = g.op("Transpose", g.op("Cast", images, to=ONNX_DTYPE["float32"]), perm=[0, 1, 4, 2, 3])
    x = b.flat(g.op("Div", x, g.const(255.0, "float32")), 3)
    for layer in encoder_layers(asdict(tokenizer)):
        x = b.layer(x, layer)
    # Bounded, rounded to levels, and the digits of an id: as par_model.video.FSQ.
    levels = np.array(tokenizer.levels)
    half = (levels - 1) * (1 - FSQ_BOUND_EPS) / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    numbers = {"shift": np.tan(offset / half), "half": half, "offset": offset}
    tables = {name: g.table(name, v.reshape(-1, 1, 1).astype(np.float32)) for name, v in numbers.items()}
    x = g.op("Tanh", g.op("Add", x, tables["shift"]))
    x = g.op("Sub", g.op("Mul", x, tables["half"]), tables["offset"])
    digits = g.op("Cast", g.op("Round", x), to=ONNX_DTYPE["int64"])
    digits = g.op("Add", digits, g.table("lowest", (levels // 2).reshape(-1, 1, 1)))
    basis = np.cumprod([1, *tokenizer.levels[:-1]]).reshape(-1, 1, 1)
    ids = g.op("ReduceSum", g.op("Mul", digits, g.table("basis", basis)), g.const([1]), keepdims=0)  # [B*t,h,w]
    raster = g.op("Reshape", ids, g.const([-1, config.n_tokens]))
    g.op("Gather", raster, g.table("order", token_order(config)), axis=1, name="tokens")
    g.output("tokens", "int64", ["B", config.n_tokens])
    return g


def _decoder(
    name: str,
    config: PARConfig,
    tokenizer: VideoTokenizerConfig,
    weights: WeightTable,
    mode: Mode,
    compute: str = "float32",
) -> Graph:
    b = _Blocks(Graph(name, weights, VQ_OPSET), tokenizer, mode, compute)
    g, (t, h, w) = b.g, config.grid
    b.frames, b.height, b.width = t if mode == "whole" else 1, h, w
    count = b.frames * h * w
    tokens = g.input("tokens", "int64", ["B", count])
    if mode == "next":
        for i, shape in enumerate(past_shapes(asdict(tokenizer), h, w)):
            g.input(f"past.{i}", "float32", ["B", *shape])
    b.stateful = name != "decoder"
    place = np.empty(count, dtype=np.int64)
    place[token_order(config)[:count]] = np.arange(count)  # a latent frame's tokens come before the next one's
    raster = g.op("Gather", tokens, g.table("place", place), axis=1)
    codes = g.op("Gather", g.weight(PREFIX + CODEBOOK, compute), raster)  # [B,K*h*w,c]
    width = len(tokenizer.levels)
    codes = g.op("Reshape", codes, g.const([-1, h, w, width]))
    x = g.op("Transpose", codes, perm=[0, 3, 1, 2])  # [B*K,c,h,w]
    for layer in decoder_layers(asdict(tokenizer)):
        x = b.layer(x, layer)
    if compute != "float32":
        x = g.op("Cast", x, to=ONNX_DTYPE["float32"])
    zero, half, most = (g.const(value, "float32") for value in (0.0, 0.5, 255.0))
    x = g.op("Add", g.op("Mul", g.op("Clip", x, zero, g.const(1.0, "float32")), most), half)
    # Engines have uint8 only as inputs and outputs, so the cast comes last; Floor fixes how it rounds.
    x = g.op("Transpose", b.clips(g.op("Floor", x), 3), perm=[0, 1, 3, 4, 2])
    g.op("Cast", x, to=ONNX_DTYPE["uint8"], name="images")
    g.output("images", "uint8", ["B", b.frames, b.height, b.width, 3])
    for i, kept in enumerate(b.presents):
        g.output(f"present.{i}", "float32", ["B", *kept])
    return g


class _Blocks:
    """The layers over one graph; ``frames``, ``height`` and ``width`` are those of a clip in the current feature map.

    ``x`` is a value [B*frames,C,height,width] everywhere.
    """

    def __init__(self, g: Graph, tokenizer: VideoTokenizerConfig, mode: Mode, compute: str) -> None:
        self.g, self.tokenizer, self.mode, self.compute = g, tokenizer, mode, compute
        self.frames = self.height = self.width = 0
        self.stateful = False  #: whether presents are outputs
        self.presents: list[tuple[int, ...]] = []  #: their shapes, without B

    def weight(self, key: str) -> str:
        """The tensor ``key`` of the tokenizer, in the dtype that the graph computes in."""
        return self.g.weight(PREFIX + key, self.compute)

    def flat(self, clips: str, channels: int) -> str:
        """Clips [B,frames,C,height,width] as frames."""
        return self.g.op("Reshape", clips, self.g.const([-1, channels, self.height, self.width]))

    def clips(self, x: str, channels: int) -> str:
        """Frames as clips [B,frames,C,height,width]."""
        return self.g.op("Reshape", x, self.g.const([-1, self.frames, channels, self.height, self.width]))

    def layer(self, x: str, layer: Layer) -> str:
        """Apply ``layer``."""
        name, width, out = layer.name, layer.width, layer.out
        if layer.kind == "conv":
            return self.conv(x, f"{name}.conv", width, out, layer.stride)
        if layer.kind == "res":
            y = self.conv(self._norm_swish(x, f"{name}.fn", 0, width), f"{name}.fn.2.conv", width, out)
            y = self.conv(self._norm_swish(y, f"{name}.fn", 3, out), f"{name}.fn.5.conv", out, out)
            return self.g.op("Add", y, x if width == out else self.point(x, f"{name}.residual_fn.0.conv"))
        if layer.kind == "space":
            return self.to_space(x, layer)
        if layer.kind == "norm":
            return self.norm(x, name, width)
        return self.swish(x, name) if layer.kind == "swish" else self.point(x, name)

    def _norm_swish(self, x: str, name: str, first: int, width: int) -> str:
        return self.swish(self.norm(x, f"{name}.{first}", width), f"{name}.{first + 1}")

    def norm(self, x: str, key: str, width: int) -> str:
        """GroupNorm of each frame, as instance norm over [B*frames,G,-1], then gain and bias per channel."""
        g, groups = self.g, self.tokenizer.norm_groups
        dtype = np.float16 if self.compute == "float16" else np.float32
        ones, zeros = (
            g.table(f"{name}.{groups}", np.full(groups, v, dtype)) for name, v in (("ones", 1), ("zeros", 0))
        )
        y = g.op("Reshape", x, g.const([0, groups, -1]))
        y = g.op("InstanceNormalization", y, ones, zeros, epsilon=NORM_EPS)
        y = g.op("Reshape", y, g.const([0, width, self.height, self.width]))
        return g.op("Add", g.op("Mul", y, self.weight(f"{key}.weight")), self.weight(f"{key}.bias"))

    def swish(self, x: str, key: str) -> str:
        """``x * sigmoid(beta * x)``."""
        return self.g.op("Mul", x, self.g.op("Sigmoid", self.g.op("Mul", x, self.weight(f"{key}.beta"))))

    def point(self, x: str, key: str) -> str:
        """A convolution of one pixel of one frame."""
        return self.g.op("Conv", x, self.weight(f"{key}.weight"), self.weight(f"{key}.bias"), kernel_shape=[1, 1])

    def conv(self, x: str, key: str, width: int, out: int, stride: tuple[int, int, int] = (1, 1, 1)) -> str:
        """A causal convolution; beyond the edges it sees the edge's values."""
        g = self.g
        weight, bias = self.weight(f"{key}.weight"), self.weight(f"{key}.bias")
        if self.mode == "first":  # one frame, and the same before it
            weight = g.op("Reshape", weight, g.const([out, 3, width, 3, 3]))
            weight = g.op("ReduceSum", weight, g.const([1]), keepdims=0)
            self._present(g.op("Concat", *[self.clips(x, width)] * FRAMES_BEFORE, axis=1), width)
            x = g.op("Pad", x, g.const(SIDES), mode="edge")
        else:
            x = self.clips(x, width)
            if self.mode == "next":
                before = [f"past.{len(self.presents)}"]
            else:
                before = [g.op("Slice", x, g.const([0]), g.const([1]), g.const([1]))] * FRAMES_BEFORE
            x = g.op("Concat", *before, x, axis=1)  # [B,frames + 2,C,height,width]
            end = self.frames + FRAMES_BEFORE
            self._present(g.op("Slice", x, g.const([self.frames]), g.const([end]), g.const([1])), width)
            x = self._beside(x, width, stride[0])
        self.frames = (self.frames - 1) // stride[0] + 1
        self.height, self.width = self.height // stride[1], self.width // stride[2]
        return g.op("Conv", x, weight, bias, kernel_shape=[3, 3], strides=list(stride[1:]))

    def _beside(self, x: str, width: int, stride: int) -> str:
        """Each frame beside the two before it, [B*K,3C,height + 2,width + 2], from [B,frames + 2,C,height,width]."""
        g, two = self.g, [self.height + 2, self.width + 2]
        x = g.op("Pad", self.flat(x, width), g.const(SIDES), mode="edge")
        x = g.op("Reshape", x, g.const([-1, self.frames + FRAMES_BEFORE, width, *two]))
        parts = []
        for i in range(FRAMES_BEFORE + 1):
            part = g.op("Slice", x, g.const([i]), g.const([i + self.frames]), g.const([1]), g.const([stride]))
            parts.append(g.op("Reshape", part, g.const([-1, width, *two])))
        return g.op("Concat", *parts, axis=1)

    def _present(self, value: str, width: int) -> None:
        """Keep ``value`` [B,2,C,height,width] for the next latent frame."""
        if self.stateful:
            self.g.op("Identity", value, name=f"present.{len(self.presents)}")
            self.presents.append((FRAMES_BEFORE, width, self.height, self.width))

    def to_space(self, x: str, layer: Layer) -> str:
        """Channels become frames and pixels: ``par_model.video.DepthToSpace``."""
        g, (time, rows, _) = self.g, layer.stride
        if time > 1:  # the frame is the slowest of what channels count
            x = g.op("Reshape", x, g.const([-1, layer.width // time, self.height, self.width]))
        x = g.op("DepthToSpace", x, blocksize=rows, mode="DCR")
        self.frames, self.height, self.width = self.frames * time, self.height * rows, self.width * layer.stride[2]
        if time > 1 and self.mode != "next":  # the first frame is not doubled
            first = g.const([time - 1])
            x = g.op("Slice", self.clips(x, layer.out), first, g.const([self.frames]), g.const([1]))
            self.frames -= time - 1
            x = self.flat(x, layer.out)
        return x
