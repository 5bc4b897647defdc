"""A graph as a TensorRT network: parsed without copying its weights, and checked before it is built.

What is checked here cannot be seen in the finished plan: that every attention layer can be fused and sees only what it
may see, that every cache is updated in place, that the parser ignored nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from par_export.engines.weights import MappedWeights
from par_export.errors import BuildError
from par_export.graphs.writer import Graph
from par_runtime.backends.trt.module import TensorRT

#: Inputs whose first dimension is rows (two per image); all other dynamic dimensions are images.
ROW_INPUTS = ("ids", "positions", "write", "length", "image")


@dataclass(frozen=True)
class ExpectedAttention:
    """The attention that the step network must contain, from the bundle; the parsed network is checked against it."""

    layers: int
    lengths: bool  #: the visible keys are a count per row, otherwise a mask
    decomposable: bool  #: allow attention that is not fused: fp32 has no fused kernel; such a plan is for checking only


def parse(trt: TensorRT, parser: Any, graph: Graph, data: MappedWeights, log: Any) -> bytes:
    """Parse ``graph`` with its weights at their addresses in ``data``; ``log`` is that of :func:`builder.make_logger`.

    Returns the bytes that must live as long as the network. Raises BuildError.
    """
    model = graph.model()
    serialized: bytes = model.SerializeToString()
    ok = parser.load_model_proto(serialized)
    for tensor in model.graph.initializer:
        if ok and tensor.data_location == onnx.TensorProto.EXTERNAL:
            at = {item.key: int(item.value) for item in tensor.external_data if item.key != "location"}
            ok = parser.load_initializer(tensor.name, data.address + at["offset"], at["length"])
    ok = ok and parser.parse_model_proto()
    errors = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
    if not ok or errors:
        raise BuildError(f"{trt.name} {trt.version} cannot parse {graph.name}: {first_lines(errors or log.errors)}")
    for warning in log.warnings:
        if "unused input" in warning.lower():
            raise BuildError(
                f"{trt.name} {trt.version} ignores an input of {graph.name}: {warning}; the results would be wrong"
            )
    return serialized


def check_step(trt: TensorRT, network: Any, wanted: ExpectedAttention) -> None:
    """Check and complete the parsed step network: fused attention, visible keys, caches in place. Raises BuildError."""
    module = trt.module
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    attentions = 0
    updated = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            attentions += 1
            masked = layer.num_inputs > 3 and layer.get_input(3) is not None
            layer.__class__ = module.IAttentionInputLayer
            layer.attention.decomposable = wanted.decomposable
            if wanted.lengths:
                # The parser drops ONNX's nonpad_kv_seqlen without a warning; attention would read unwritten keys.
                layer.attention.key_value_lengths = inputs["length"]
                visible = layer.attention.key_value_lengths is not None
            else:
                visible = masked
            if not visible:
                raise BuildError(
                    f"attention layer {layer.name!r} has neither a mask nor lengths, so it would see unwritten keys; "
                    "export the bundle again"
                )
        elif layer.type == module.LayerType.KV_CACHE_UPDATE:
            updated[layer.get_input(0).name] = layer.get_output(0)
    if attentions != wanted.layers:
        raise BuildError(
            f"{attentions} of {wanted.layers} attention layers were recognised by {trt.name} {trt.version}; "
            "export the bundle again, or use the version of docs/install.md"
        )
    for name in inputs:
        if name.startswith("past_"):
            present = name.replace("past_", "present_")
            output = updated.get(name)
            if output is None or output.name != present or not output.is_network_output:
                raise BuildError(
                    f"cache {name!r} is not updated in place: its output {present!r} is not one KV_CACHE_UPDATE of it; "
                    "export the bundle again"
                )


def profile_shape(name: str, shape: tuple[int, ...], images: int) -> tuple[int, ...]:
    """The shape of the input ``name`` in the profile of ``images`` guided images: its dynamic dimensions filled in."""
    rows = name in ROW_INPUTS or name.startswith("past_")
    return tuple((2 * images if rows else images) if n == -1 else n for n in shape)


def first_lines(errors: Sequence[str]) -> str:
    """The first lines of TensorRT's error messages, as one line."""
    lines = [line.strip() for error in errors for line in error.splitlines() if line.strip()]
    return " ".join(lines[:3])[:600] or "no reason was given"
