"""The step network: q positions of R rows in, q tokens out, everything between in one graph.

One network, written by :func:`step_graph`, serves every phase of generation (``docs/design.md``, "One step network"):

``step.onnx``        q and S symbolic, computes in fp32: ONNX Runtime on a CPU, every phase, a growing cache window
``prefill.onnx``     q = 1        | S = N static, computes in the bundle's precision: what engines are built from,
``transition.onnx``  q = n        | in the :class:`Form` that needs the fewest kernels
``group.onnx``       q = n

Letters: R rows in flight, B images, q positions, S cache slots, V codes, d width, H heads, D' padded head size.
The table of inputs and outputs is :func:`io_table`; graph and manifest are made from the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from par_export.graphs.sampling import SamplingVariant, sample
from par_export.graphs.writer import ONNX_DTYPE, OPSET, Graph, WeightTable
from par_model.config import NORM_EPS, PARConfig

#: The step graph for ONNX Runtime releases without opset 24; the same function as "step".
COMPATIBLE_STEP = "step_opset23"
HEAD_MULTIPLE = 8  # fused attention kernels want head sizes that are a multiple of 8
GROUPED_UP_TO = 4  # with more queries the decode kernel may read K and V again for each; `parvis tune` measures it


def padded_head_dim(config: PARConfig) -> int:
    """D': D rounded up to a multiple of 8 (100 becomes 104)."""
    return -(-config.head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE


@dataclass(frozen=True)
class IO:
    """One input or output of a graph; shape entries are sizes or the letters above."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Form:
    """How the attention of a static graph is written; the function is the same.

    ``grouped``: the q queries of a head are q query heads on one KV head with sequence length 1, which engines run
    with their decode kernel. ``lengths``: the number of visible keys is given per row (opset 24's
    ``nonpad_kv_seqlen``), so that a kernel reads only these; otherwise a mask is made once per step. ``norm_after``: a
    norm is applied to the product that follows it, ``(x W) / rms(x)``, which needs its gain inside the matrix
    (``WeightTable.folded``); engines then fuse it into kernels that they need anyway.
    """

    grouped: bool
    lengths: bool
    norm_after: bool = False

    @staticmethod
    def of(query: int, opset: int = OPSET) -> Form:
        """The default form of a static graph of ``query`` positions."""
        return Form(grouped=1 < query <= GROUPED_UP_TO, lengths=opset >= OPSET)


def io_table(config: PARConfig, cache_dtype: str, query: int | None) -> tuple[list[IO], list[IO]]:
    """Inputs and outputs of a step graph: static, or with ``query`` None of symbolic q and S.

    Static graphs take ``length`` as int32, which is what engines count in (a cast would be one more kernel), and
    ``image`` [R], the image of each row, through which the tokens reach their rows.
    """
    q: int | str = query or "q"
    cache = ("R", config.n_heads, config.n_tokens if query else "S", padded_head_dim(config))
    inputs = [
        IO("ids", "int64", ("R", q)),
        IO("positions", "int64", ("R", q)),
        IO("write", "int64", ("R",)),
        IO("length", "int32" if query else "int64", ("R",)),
        *([IO("image", "int64", ("R",))] if query else []),
        IO("cond_row", "int64", ("B",)),
        IO("uncond_row", "int64", ("B",)),
        IO("uniform", "float32", ("B", q)),
        IO("guidance", "float32", ("B",)),
        IO("temperature", "float32", ("B",)),
        IO("top_k", "int64", ("B",)),
        IO("top_p", "float32", ("B",)),
    ]
    outputs = [IO("tokens", "int64", ("R", q))]
    for i in range(config.n_layers):
        for kind in "kv":
            inputs.append(IO(f"past_{kind}.{i}", cache_dtype, cache))
            outputs.append(IO(f"present_{kind}.{i}", cache_dtype, cache))
    outputs.append(IO("logits", "float32", ("B", q, config.vocab_size)))  # guided, before temperature
    return inputs, outputs


def step_graph(
    config: PARConfig,
    weights: WeightTable,
    *,
    name: str,
    compute: str,
    query: int | None,
    sampling: SamplingVariant,
    opset: int = OPSET,
    form: Form | None = None,
) -> Graph:
    """The step network as a graph; ``query`` None is the symbolic one, else static in ``form`` (default ``Form.of``).

    Opset 24 writes the cache with ``TensorScatter``, which engines know as a cache update. Opset 23, for ONNX
    Runtime releases without that operator, does the same with ``ScatterND``.
    """
    g = Graph(name, weights, opset)
    inputs, outputs = io_table(config, compute, query)
    for io in inputs:
        g.input(io.name, io.dtype, io.shape)
    size, heads = padded_head_dim(config), config.n_heads
    form = (form or Form.of(query, opset)) if query else Form(grouped=False, lengths=False)

    # Once per step: embeddings, rotary rows, what is visible.
    x = g.op("Gather", g.weight("embed", compute), "ids")  # [R,q,d]
    cos = g.op("Gather", g.weight("cos", compute), "positions")  # [R,q,D'/2]
    sin = g.op("Gather", g.weight("sin", compute), "positions")
    visible = (
        ["", "", "", g.op("Cast", "length", to=ONNX_DTYPE["int64"])]
        if form.lengths
        else [_mask(g, config, query, form)]
    )
    slot_index = None if opset >= OPSET else _slot_index(g, heads)

    for i in range(config.n_layers):
        layer = f"layers.{i}"
        qkv, scale = _normed_product(g, x, f"{layer}.attention_norm", f"{layer}.wqkv", compute, form)  # [R,q,3HD']
        qk, v = g.ops("Split", qkv, g.const([2 * heads * size, heads * size]), count=2, axis=-1)
        qk, v = (_scaled(g, part, scale, compute) for part in (qk, v))
        # q and k turn by the same angles: one rotation of 2H heads.
        qk = g.op("RotaryEmbedding", qk, cos, sin, interleaved=1, num_heads=2 * heads)
        qk = g.op("Transpose", g.op("Reshape", qk, g.const([0, 0, 2 * heads, size])), perm=[0, 2, 1, 3])
        v = g.op("Transpose", g.op("Reshape", v, g.const([0, 0, heads, size])), perm=[0, 2, 1, 3])  # [R,H,q,D']
        q, k = g.ops("Split", qk, g.const([heads, heads]), count=2, axis=1)
        present = [
            g.op("TensorScatter", f"past_{kind}.{i}", value, "write", name=f"present_{kind}.{i}", axis=2)
            if slot_index is None
            else g.op("ScatterND", f"past_{kind}.{i}", slot_index, value, name=f"present_{kind}.{i}")
            for kind, value in (("k", k), ("v", v))
        ]
        if form.grouped:
            q = g.op("Reshape", q, g.const([0, heads * (query or 1), 1, size]))
        y = g.op("Attention", q, *present, *visible, scale=config.head_dim**-0.5)
        if form.grouped:
            y = g.op("Reshape", y, g.const([0, heads, query or 1, size]))
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.const([0, 0, heads * size]))
        x = g.op("Add", x, g.op("MatMul", y, g.weight(f"{layer}.wo", compute)))
        gates, scale = _normed_product(g, x, f"{layer}.ffn_norm", f"{layer}.w13", compute, form)
        w1, w3 = g.ops("Split", gates, count=2, axis=-1, num_outputs=2)
        w1, w3 = (_scaled(g, part, scale, compute) for part in (w1, w3))
        h = g.op("Mul", g.op("Mul", w1, g.op("Sigmoid", w1)), w3)
        x = g.op("Add", x, g.op("MatMul", h, g.weight(f"{layer}.w2", compute)))

    x = g.op("RMSNormalization", x, g.weight("norm", compute), axis=-1, epsilon=NORM_EPS)
    rows = g.op("MatMul", x, g.weight("output", compute))  # [R,q,V]
    if compute != "float32":
        rows = g.op("Cast", rows, to=ONNX_DTYPE["float32"])
    cond, uncond = g.op("Gather", rows, "cond_row"), g.op("Gather", rows, "uncond_row")  # [B,q,V]
    scale = g.op("Unsqueeze", "guidance", g.const([1, 2]))
    logits = g.op("Add", uncond, g.op("Mul", g.op("Sub", cond, uncond), scale), name="logits")
    if query:
        sample(g, logits, config.vocab_size, sampling, rows="image", name="tokens")  # [R,q]
    else:  # one sampled token feeds both rows of a guided image
        drawn = sample(g, logits, config.vocab_size, sampling)  # [B,q]
        empty = g.op("Mul", "ids", g.const(0))
        both = g.op("ScatterND", empty, g.op("Unsqueeze", "uncond_row", g.const([1])), drawn)
        g.op("ScatterND", both, g.op("Unsqueeze", "cond_row", g.const([1])), drawn, name="tokens")
    for io in outputs:
        g.output(io.name, io.dtype, io.shape)
    return g


def _normed_product(g: Graph, x: str, norm: str, matrix: str, compute: str, form: Form) -> tuple[str, str | None]:
    """RMSNorm of ``x`` [R,q,d] times a matrix; with ``norm_after`` also the factor [R,q,1] fp32 that is still to apply.

    The caller applies it to the parts after the split: there an engine computes it inside the kernel that follows.
    Applied to the product itself it would become a part of the product, with a kernel of its own for the sum of
    squares.
    """
    if not form.norm_after:
        h = g.op("RMSNormalization", x, g.weight(norm, compute), axis=-1, epsilon=NORM_EPS)
        return g.op("MatMul", h, g.weight(matrix, compute)), None
    assert g.weights is not None
    wide = g.op("Cast", x, to=ONNX_DTYPE["float32"])
    square = g.op("ReduceMean", g.op("Mul", wide, wide), g.const([-1]), keepdims=1)
    rms = g.op("Sqrt", g.op("Add", square, g.const(NORM_EPS, "float32")))
    factor = g.op("Div", g.const(2.0 ** g.weights.folded[matrix], "float32"), rms)
    return g.op("MatMul", x, g.weight(matrix, compute)), factor


def _scaled(g: Graph, part: str, factor: str | None, compute: str) -> str:
    """``part`` times ``factor`` in fp32, back in ``compute``."""
    if factor is None:
        return part
    return g.op("Cast", g.op("Mul", g.op("Cast", part, to=ONNX_DTYPE["float32"]), factor), to=ONNX_DTYPE[compute])


def _mask(g: Graph, config: PARConfig, query: int | None, form: Form) -> str:
    """Which cache slots each row sees: bool [R,1,1,S], or [R,1,q,S] where attention has q queries to a head."""
    if query:
        keys = g.table("slots", np.arange(config.n_tokens, dtype=np.int32))
    else:
        shape = g.op("Shape", "past_k.0", start=2, end=3)
        keys = g.op("Range", g.const(0), g.op("Squeeze", shape), g.const(1))  # [S]
    mask = g.op("Less", keys, g.op("Unsqueeze", "length", g.const([1, 2, 3])))
    if form.grouped or query == 1:
        return mask
    # ONNX Runtime wants one row per position, though all are equal.
    rows = g.op("Concat", g.const([1, 1]), g.op("Shape", "ids", start=1, end=2), g.const([1]), axis=0)
    return g.op("Expand", mask, rows)


def _slot_index(g: Graph, heads: int) -> str:
    """(row, head, slot) of every new key: [R,H,q,3], for ``ScatterND``."""
    count = g.op("Squeeze", g.op("Shape", "ids", start=0, end=1))
    query = g.op("Squeeze", g.op("Shape", "ids", start=1, end=2))
    row = g.op("Unsqueeze", g.op("Range", g.const(0), count, g.const(1)), g.const([1, 2]))  # [R,1,1]
    head = g.op("Unsqueeze", g.op("Range", g.const(0), g.const(heads), g.const(1)), g.const([0, 2]))  # [1,H,1]
    steps = g.op("Range", g.const(0), query, g.const(1))
    slot = g.op("Add", g.op("Unsqueeze", "write", g.const([1, 2])), steps)  # [R,1,q]
    zero = g.op("Mul", g.op("Add", g.op("Add", row, head), slot), g.const(0))  # [R,H,q]
    last = g.const([-1])
    return g.op("Concat", *(g.op("Unsqueeze", g.op("Add", part, zero), last) for part in (row, head, slot)), axis=-1)
