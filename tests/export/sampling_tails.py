"""A sampling tail as a graph of its own, for ONNX Runtime."""

from __future__ import annotations

import onnxruntime as ort

from par_export.gate.runner import runnable_opset
from par_export.graphs.sampling import SamplingVariant, sample
from par_export.graphs.writer import Graph


def session(vocab: int, variant: SamplingVariant, opset: int | None = None) -> ort.InferenceSession:
    """The tail ``variant`` of ``vocab`` codes: logits [B,q,V], uniform [B,q] and settings [B] give tokens [B,q]."""
    g = Graph("tail", None, opset or runnable_opset())
    logits = g.input("logits", "float32", ["B", "q", vocab])
    g.input("uniform", "float32", ["B", "q"])
    for name, dtype in (("temperature", "float32"), ("top_k", "int64"), ("top_p", "float32")):
        g.input(name, dtype, ["B"])
    g.op("Identity", sample(g, logits, vocab, variant), name="tokens")
    g.output("tokens", "int64", ["B", "q"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(g.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
