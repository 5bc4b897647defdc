"""The decoder graph: tokens [B,N] in sequence order to uint8 images [B,H,W,3]. Mirrors ``par_model.vq.Decoder``.

Un-permuting the tokens is part of the graph, so nothing outside can forget it. The codebook is L2-normalised
once, at export.
"""

from __future__ import annotations

import numpy as np

from par_export.graphs.vq import PREFIX, VQ_OPSET, Blocks
from par_export.graphs.writer import ONNX_DTYPE, Graph, WeightTable
from par_model.config import PARConfig, VQConfig
from par_model.ordering import token_order

HALF_DECODER = "decoder_fp16"  #: the decoder graph that computes in fp16


def decoder_graph(config: PARConfig, vq: VQConfig, weights: WeightTable, compute: str = "float32") -> Graph:
    """The graph: input tokens [B,N] int64, output images [B,H,W,3] uint8 = trunc(clamp(127.5 x + 128, 0, 255))."""
    _, h, w = config.grid
    b = Blocks(Graph("decoder", weights, VQ_OPSET), vq, compute)
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
        x = g.op("Cast", x, to=ONNX_DTYPE["float32"])
    x = g.op("Add", g.op("Mul", x, g.const(127.5, "float32")), g.const(128.0, "float32"))
    x = g.op("Clip", x, g.const(0.0, "float32"), g.const(255.0, "float32"))
    # Engines have uint8 only as inputs and outputs, so the cast comes last; Floor fixes how it rounds.
    x = g.op("Transpose", g.op("Floor", x), perm=[0, 2, 3, 1])
    g.op("Cast", x, to=ONNX_DTYPE["uint8"], name="images")
    g.output("images", "uint8", ["B", b.height, b.width, 3])
    return g
