"""The encoder graph: uint8 images [B,H,W,3] to tokens [B,N] in sequence order. Mirrors ``par_model.vq.Encoder``.

The decoder's counterpart: scaling to [-1,1], the nearest code and the permutation are part of the graph, so what it
returns is what ``decoder.onnx``, ``generate(keep=, tokens=)`` and ``score`` take.
"""

from __future__ import annotations

from par_export.graphs.vq import VQ_OPSET, Blocks
from par_export.graphs.writer import ONNX_DTYPE, Graph, WeightTable
from par_model.config import PARConfig, VQConfig
from par_model.ordering import token_order

SMALLEST_NORM = 1e-12  # of a vector that is normalised, as in PyTorch


def encoder_graph(config: PARConfig, vq: VQConfig, weights: WeightTable) -> Graph:
    """The graph: input images [B,H,W,3] uint8, output tokens [B,N] int64.

    It computes in fp32 over weights of any precision: half precision would change tokens whose two nearest codes are
    close, and the encoder runs only once per image.
    """
    _, h, w = config.grid
    b = Blocks(Graph("encoder", weights, VQ_OPSET), vq, "float32")
    g = b.g
    b.height, b.width = h * vq.downsampling, w * vq.downsampling
    images = g.input("images", "uint8", ["B", b.height, b.width, 3])
    x = g.op("Transpose", g.op("Cast", images, to=ONNX_DTYPE["float32"]), perm=[0, 3, 1, 2])
    x = g.op("Sub", g.op("Div", x, g.const(127.5, "float32")), g.const(1.0, "float32"))
    x = b.conv(x, "encoder.conv_in")
    last = len(vq.channel_multipliers) - 1
    for level in range(last + 1):
        name = f"encoder.conv_blocks.{level}"
        for j in range(vq.res_blocks):
            x = b.res(x, f"{name}.res.{j}")
            if level == last:
                x = b.attention(x, f"{name}.attn.{j}")
        if level != last:
            x = b.downsample(x, f"{name}.downsample.conv")
    x = b.res(x, "encoder.mid.0")
    x = b.attention(x, "encoder.mid.1")
    x = b.res(x, "encoder.mid.2")
    x = b.conv(b.swish(b.norm(x, "encoder.norm_out")), "encoder.conv_out")
    x = b.conv(x, "quant_conv", kernel=1)  # [B,c,h,w]
    x = g.op("Transpose", g.op("Reshape", x, g.const([0, vq.codebook_dim, h * w])), perm=[0, 2, 1])  # [B,N,c]
    # On the unit sphere the nearest code has the largest product. The stored codebook was normalised and then rounded;
    # it is normalised again, because longer codes would be preferred otherwise.
    codes = g.op("Transpose", _normalised(g, b.weight("codebook")), perm=[1, 0])
    nearest = g.op("ArgMax", g.op("MatMul", _normalised(g, x), codes), axis=-1, keepdims=0)  # [B,N], raster order
    g.op("Gather", nearest, g.table("order", token_order(config)), axis=1, name="tokens")
    g.output("tokens", "int64", ["B", config.n_tokens])
    return g


def _normalised(g: Graph, x: str) -> str:
    length = g.op("ReduceL2", x, g.const([-1]), keepdims=1)
    return g.op("Div", x, g.op("Max", length, g.const(SMALLEST_NORM, "float32")))
