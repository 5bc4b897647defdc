"""The step network: q positions of R rows in, q tokens out, everything between in one graph.

One network, written by :func:`step_graph`, is every phase of generation (design, "One step network"):

``step.onnx``        q and S symbolic, computes in fp32: ONNX Runtime on a CPU, any phase, a growing cache window
``prefill.onnx``     q = 1        | S = N static, computes in the bundle's precision: what engines are built from;
``transition.onnx``  q = n        | a static small q lets attention be written as grouped-query decoding
``group.onnx``       q = n

Letters: R rows in flight, B images, q positions, S cache slots, V codes, d width, H heads, D' padded head size.
The table of inputs and outputs is :func:`io_table`; graph and manifest are made from the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from par_export.graph import ONNX_TYPE, OPSET, Graph, Weights
from par_export.sampling import Variant, sample
from par_model.checkpoint import Checkpoint
from par_model.config import PARConfig
from par_model.ordering import rotary_table
from par_model.transformer import NORM_EPS

HEAD_MULTIPLE = 8  # fused attention kernels want head sizes that are a multiple of 8
FOLD_UP_TO = 4  # beyond, the decode kernel may re-read K and V for each query head; only a GPU can say


def padded_head_dim(config: PARConfig) -> int:
    """D': D rounded up to a multiple of 8 (100 becomes 104)."""
    return -(-config.head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE


@dataclass(frozen=True)
class IO:
    """One input or output of a graph; shape entries are sizes or the letters above."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def io_table(config: PARConfig, cache_dtype: str, query: int | None, slots: int | None) -> tuple[list[IO], list[IO]]:
    """Inputs and outputs of a step graph. ``query`` and ``slots`` None means symbolic q and S."""
    q: int | str = query or "q"
    cache = ("R", config.n_heads, slots or "S", padded_head_dim(config))
    inputs = [
        IO("ids", "int64", ("R", q)),
        IO("positions", "int64", ("R", q)),
        IO("write", "int64", ("R",)),
        IO("length", "int64", ("R",)),
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
    return inputs, outputs


def write_weights(weights: Weights, config: PARConfig, checkpoint: Checkpoint, dtype: str) -> None:
    """Stream the transformer into the weights file, one matrix at a time, in the layout the graphs read.

    ``embed`` [V + C + 1 + n - 1, d] is codes, classes, "no class", learnable tokens. Matrices are (in, out).
    Head sizes are padded with zero columns; q, k, v and the two gates are one matrix each.
    """
    heads, size, padded = config.n_heads, config.head_dim, padded_head_dim(config)
    get = checkpoint.tensor
    tables = ["tok_embeddings.weight", "cls_embedding.embedding_table.weight"]
    if config.group_size > 1:
        tables.append("spe_tok_embeddings.special_embeddings.weight")
    weights.add("embed", (get(key) for key in tables), dtype)
    cos, sin = rotary_table(config)
    pad = ((0, 0), (0, (padded - size) // 2))
    weights.add("cos", [torch.from_numpy(np.pad(cos, pad))], "float32")
    weights.add("sin", [torch.from_numpy(np.pad(sin, pad))], "float32")

    def pad_heads(w: torch.Tensor) -> torch.Tensor:  # [k*H*D, d] -> [k*H*D', d]
        if padded == size:
            return w
        w = w.view(-1, size, w.shape[1])
        return torch.nn.functional.pad(w, (0, 0, 0, padded - size)).view(-1, w.shape[2])

    store = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        for norm in ("attention_norm", "ffn_norm"):
            weights.add(f"{layer}.{norm}", [get(f"{layer}.{norm}.weight")], dtype)
        # Casting before the transpose keeps the copies small.
        wqkv = get(f"{layer}.attention.wqkv.weight").to(store)
        weights.add(f"{layer}.wqkv", [pad_heads(wqkv).T], dtype)
        wo = get(f"{layer}.attention.wo.weight").to(store)
        weights.add(f"{layer}.wo", [pad_heads(wo.T)], dtype)
        gates = [get(f"{layer}.feed_forward.{name}.weight").to(store) for name in ("w1", "w3")]
        weights.add(f"{layer}.w13", [torch.cat(gates).T], dtype)
        del gates
        weights.add(f"{layer}.w2", [get(f"{layer}.feed_forward.w2.weight").to(store).T], dtype)
    assert heads * size == config.dim
    weights.add("norm", [get("norm.weight")], dtype)
    weights.add("output", [get("output.weight").to(store).T], dtype)


def step_graph(
    config: PARConfig,
    weights: Weights,
    *,
    name: str,
    compute: str,
    query: int | None,
    sampling: Variant,
    verify: bool,
    opset: int = OPSET,
) -> Graph:
    """The step network as a graph; ``verify`` adds the output ``logits`` [B,q,V] (guided, before temperature).

    Opset 24 writes the cache with ``TensorScatter``, which engines know as a cache update. Opset 23, for ONNX
    Runtime releases without that operator, does the same with ``ScatterND``.
    """
    g = Graph(name, weights, opset)
    slots = config.n_tokens if query else None
    inputs, outputs = io_table(config, compute, query, slots)
    for io in inputs:
        g.input(io.name, io.dtype, io.shape)
    d, size, heads = config.dim, padded_head_dim(config), config.n_heads
    fold = query is not None and 1 < query <= FOLD_UP_TO

    # Once per step: embeddings, rotary rows, the mask.
    x = g.op("Gather", g.weight("embed", compute), "ids")  # [R,q,d]
    cos = g.op("Gather", g.weight("cos", compute), "positions")  # [R,q,D'/2]
    sin = g.op("Gather", g.weight("sin", compute), "positions")
    if slots:
        keys = g.table("slots", np.arange(slots, dtype=np.int64))
    else:
        shape = g.op("Shape", "past_k.0", start=2, end=3)
        keys = g.op("Range", g.const(0), g.op("Squeeze", shape), g.const(1))  # [S]
    mask = g.op("Less", keys, g.op("Unsqueeze", "length", g.const([1, 2, 3])))  # [R,1,1,S], true where visible
    if not fold and query != 1:  # ONNX Runtime wants one row per position, though all are equal
        rows = g.op("Concat", g.const([1, 1]), g.op("Shape", "ids", start=1, end=2), g.const([1]), axis=0)
        mask = g.op("Expand", mask, rows)  # [R,1,q,S]
    slot_index = None if opset >= OPSET else _slot_index(g, heads)

    for i in range(config.n_layers):
        layer = f"layers.{i}"
        h = g.op("RMSNormalization", x, g.weight(f"{layer}.attention_norm", compute), axis=-1, epsilon=NORM_EPS)
        qkv = g.op("MatMul", h, g.weight(f"{layer}.wqkv", compute))  # [R,q,3HD']
        qk, v = g.ops("Split", qkv, g.const([2 * heads * size, heads * size]), count=2, axis=-1)
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
        if fold:  # the q queries of a head as q query heads on one KV head, sequence length 1
            q = g.op("Reshape", q, g.const([0, heads * (query or 1), 1, size]))
        y = g.op("Attention", q, *present, mask, scale=config.head_dim**-0.5)
        if fold:
            y = g.op("Reshape", y, g.const([0, heads, query or 1, size]))
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.const([0, 0, heads * size]))
        x = g.op("Add", x, g.op("MatMul", y, g.weight(f"{layer}.wo", compute)))
        h = g.op("RMSNormalization", x, g.weight(f"{layer}.ffn_norm", compute), axis=-1, epsilon=NORM_EPS)
        gates = g.op("MatMul", h, g.weight(f"{layer}.w13", compute))
        w1, w3 = g.ops("Split", gates, count=2, axis=-1, num_outputs=2)
        h = g.op("Mul", g.op("Mul", w1, g.op("Sigmoid", w1)), w3)
        x = g.op("Add", x, g.op("MatMul", h, g.weight(f"{layer}.w2", compute)))

    x = g.op("RMSNormalization", x, g.weight("norm", compute), axis=-1, epsilon=NORM_EPS)
    rows = g.op("MatMul", x, g.weight("output", compute))  # [R,q,V]
    if compute != "float32":
        rows = g.op("Cast", rows, to=ONNX_TYPE["float32"])
    cond, uncond = g.op("Gather", rows, "cond_row"), g.op("Gather", rows, "uncond_row")  # [B,q,V]
    scale = g.op("Unsqueeze", "guidance", g.const([1, 2]))
    logits = g.op("Add", uncond, g.op("Mul", g.op("Sub", cond, uncond), scale), name="logits")
    drawn = sample(g, logits, config.vocab_size, sampling)  # [B,q]

    # One sampled token feeds both rows of a guided image.
    empty = g.op("Mul", "ids", g.const(0))
    both = g.op("ScatterND", empty, g.op("Unsqueeze", "uncond_row", g.const([1])), drawn)
    g.op("ScatterND", both, g.op("Unsqueeze", "cond_row", g.const([1])), drawn, name="tokens")
    for io in outputs:
        g.output(io.name, io.dtype, io.shape)
    if verify:
        g.output("logits", "float32", ("B", query or "q", config.vocab_size))
    assert d == config.dim
    return g


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
