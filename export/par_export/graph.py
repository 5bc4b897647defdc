"""A small ONNX graph writer: nodes by name, weights in one shared external file, streamed.

Written by hand rather than traced: the step network needs operators (``TensorScatter``, ``Attention`` with a
cache, ``RotaryEmbedding``) in exactly the form that engines fuse, and a 3B model must never be in memory whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

OPSET = 24
COMPATIBLE_OPSET = 23  #: what ONNX Runtime 1.23 runs, the last release for Python 3.10
IR_VERSION = 11
WEIGHTS_FILE = "weights.data"
PAGE_BYTES = 4096  # large tensors start on a page, so that a runtime can map them in place
LARGE_BYTES = 64 * 1024
LINE_BYTES = 64  # small ones on a cache line

ONNX_TYPE = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
TORCH_TYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """One tensor of the weights file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class Weights:
    """The weights file of a bundle, written tensor by tensor; ``entries`` says where each one lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Stored] = {}
        self._file: BinaryIO = path.open("wb")

    def add(self, name: str, parts: Iterable[Tensor], dtype: str) -> None:
        """Append ``parts``, concatenated along their first axis, as tensor ``name``; each part is freed when written."""
        if name in self.entries:
            raise ValueError(f"weight {name!r} was already written")
        start, offset = self._file.tell(), -1
        shape: tuple[int, ...] = ()
        for part in parts:
            if offset < 0:
                align = PAGE_BYTES if part.numel() * part.element_size() >= LARGE_BYTES else LINE_BYTES
                offset = -(-start // align) * align
                self._file.write(b"\0" * (offset - start))
            # Contiguous bytes of any dtype, bf16 included, which numpy does not know.
            part = part.detach().to(TORCH_TYPE[dtype]).contiguous()
            self._file.write(part.view(-1).view(torch.uint8).numpy().data)
            shape = (part.shape[0] + (shape[0] if shape else 0), *part.shape[1:])
        self.entries[name] = Stored(dtype, shape, offset, self._file.tell() - offset)

    def close(self) -> None:
        self._file.close()


class Graph:
    """One ONNX graph under construction. Values are their names; ``op`` adds a node and returns its output."""

    def __init__(self, name: str, weights: Weights | None, opset: int = OPSET) -> None:
        self.name, self.weights, self.opset = name, weights, opset
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._counter = 0

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape)))

    def op(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, called ``name`` if given."""
        return self.ops(op_type, *inputs, names=[name or self._fresh(op_type)], **attributes)[0]

    def ops(
        self, op_type: str, *inputs: str, names: Sequence[str] = (), count: int = 0, **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs: ``names``, or ``count`` fresh ones."""
        outputs = list(names) or [self._fresh(op_type) for _ in range(count)]
        self.nodes.append(
            helper.make_node(op_type, list(inputs), outputs, name=f"{op_type}:{outputs[0]}", **attributes)
        )
        return outputs

    def const(self, value: Any, dtype: str = "int64") -> str:
        """A small constant, stored once per value."""
        array = np.asarray(value, dtype=dtype)
        if array.size > 8:
            raise ValueError(f"a constant of {array.size} numbers belongs in the weights file or a table")
        name = (
            f"{self.name}/const.{dtype}.{'x'.join(map(str, array.shape))}.{'_'.join(str(v) for v in array.reshape(-1))}"
        )
        if name not in self.initializers:
            self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def table(self, name: str, array: np.ndarray) -> str:
        """An integer table kept in the graph file itself (an order, for instance)."""
        self.initializers[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def weight(self, name: str, compute: str) -> str:
        """A tensor of the weights file, cast to ``compute`` where it is stored otherwise (folded at load)."""
        assert self.weights is not None
        stored = self.weights.entries[name]
        if name not in self.initializers:
            tensor = TensorProto(name=name, data_type=ONNX_TYPE[stored.dtype], dims=stored.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS_FILE), ("offset", stored.offset), ("length", stored.length)):
                tensor.external_data.add(key=key, value=str(value))
            self.initializers[name] = tensor
        if stored.dtype == compute:
            return name
        return self.op("Cast", name, to=ONNX_TYPE[compute])

    def subgraph(self, name: str) -> Graph:
        """A branch body; it sees this graph's values by name. Its constants are its own."""
        return Graph(f"{self.name}.{name}", self.weights, self.opset)

    def proto(self) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.initializers.values()))

    def model(self) -> onnx.ModelProto:
        return helper.make_model(
            self.proto(),
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=IR_VERSION,
            producer_name="parvis",
        )

    def save(self, path: Path) -> None:
        path.write_bytes(self.model().SerializeToString())

    def _fresh(self, op_type: str) -> str:
        self._counter += 1
        return f"{self.name}/{op_type}.{self._counter}"
