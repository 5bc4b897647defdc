"""A small ONNX graph writer: nodes by name, weights in one shared external file, streamed.

Written by hand rather than traced: the step network needs operators (``TensorScatter``, ``Attention`` with a
cache, ``RotaryEmbedding``) in exactly the form that engines fuse, and a 3B model must never be in memory whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from par_runtime.bundle import WEIGHTS, Stored
from par_runtime.checked import shown
from par_runtime.dtypes import STORAGE
from par_runtime.errors import BundleError
from par_runtime.manifest import STORED_BYTES
from par_runtime.quantised import MOST_CODE, SCALE

OPSET = 24
COMPATIBLE_OPSET = 23  #: what ONNX Runtime 1.23 runs, the last release for Python 3.10
IR_VERSION = 11

QUANTISED = tuple(MOST_CODE)  #: dtypes of weights that have scales beside them, under their name + SCALE
#: dtype -> ONNX's number of it. ONNX writes the names in capitals, and float32 as FLOAT.
ONNX_DTYPE: dict[str, int] = {
    dtype: TensorProto.DataType.Value("FLOAT" if dtype == "float32" else dtype.upper())
    for dtype in (*STORAGE, *QUANTISED, "int64", "int32", "uint8", "bool")
}


@dataclass
class WeightTable:
    """Where each tensor of a weights file lies; written by ``weights.WeightsWriter``, or read back from a graph."""

    entries: dict[str, Stored]
    #: Matrices whose rows hold the gain of the norm before them, times 2**-exponent: name -> exponent.
    folded: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> WeightTable:
        """The tensors of the weights file that the graph at ``path`` refers to, each inside the file beside it.

        Raises BundleError where the graph cannot be read or refers to anything else: builders map these places.
        """
        try:
            graph = onnx.load(path, load_external_data=False).graph
            size = (path.parent / WEIGHTS).stat().st_size
            entries = {
                tensor.name: _stored(tensor, size)
                for tensor in graph.initializer
                if tensor.data_location == TensorProto.EXTERNAL
            }
            _check_scales(entries)
        except (DecodeError, ValueError, KeyError, OSError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise BundleError(f"{path}: {shown(lines[0], 300)[1:-1]}; export the bundle again") from error
        return WeightTable(entries)


def _stored(tensor: TensorProto, size: int) -> Stored:
    """Where a tensor lies in a weights file of ``size`` bytes. Raises ValueError where it is not inside, KeyError."""
    at = {item.key: item.value for item in tensor.external_data}
    dtype = {code: name for name, code in ONNX_DTYPE.items()}.get(tensor.data_type, "")
    shape, name = tuple(tensor.dims), shown(tensor.name, 60)
    if at.get("location") != WEIGHTS:
        raise ValueError(f"tensor {name} is in the file {shown(at.get('location'))}; expected {WEIGHTS}")
    if dtype not in STORED_BYTES:
        raise ValueError(f"tensor {name} has ONNX's dtype {tensor.data_type}; expected {', '.join(STORED_BYTES)}")
    if any(side < 1 for side in shape):
        raise ValueError(f"tensor {name} has the shape {shown(shape)}; expected sides of 1 or more")
    if not all(re.fullmatch("[0-9]{1,18}", at.get(key, "")) for key in ("offset", "length")):
        raise ValueError(f"tensor {name} has no place in {WEIGHTS}")
    offset, length = int(at["offset"]), int(at["length"])
    if length != math.ceil(math.prod(shape) * STORED_BYTES[dtype]) or offset + length > size:
        raise ValueError(
            f"tensor {name} of {length} bytes at {offset} does not fit its shape, or {WEIGHTS} ({size} bytes)"
        )
    return Stored(dtype, shape, offset, length)


def _check_scales(entries: Mapping[str, Stored]) -> None:
    """Raise ValueError where a quantised tensor has no scales for whole groups of its rows."""
    for name, at in entries.items():
        if at.dtype not in MOST_CODE:
            continue
        scales = entries.get(name + SCALE)
        if scales is None or scales.dtype not in STORAGE:
            raise ValueError(f"tensor {shown(name, 60)} is {at.dtype}, without scales of {', '.join(STORAGE)}")
        if (
            len(at.shape) != 2
            or len(scales.shape) != 2
            or scales.shape[1] != at.shape[1]
            or at.shape[0] % scales.shape[0]
        ):
            raise ValueError(f"tensor {shown(name, 60)} of shape {shown(at.shape)} has scales of {shown(scales.shape)}")


class Graph:
    """One ONNX graph under construction. Values are their names; ``op`` adds a node and returns its output."""

    def __init__(self, name: str, weights: WeightTable | None, opset: int = OPSET) -> None:
        self.name, self.weights, self.opset = name, weights, opset
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._counter = 0

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Add an input of the graph; ``shape`` holds sizes, and letters for symbolic ones. Returns ``name``."""
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_DTYPE[dtype], list(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Make the value ``name`` an output of the graph."""
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_DTYPE[dtype], list(shape)))

    def op(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, called ``name`` if given."""
        return self.ops(op_type, *inputs, names=[name or self._new_name(op_type)], **attributes)[0]

    def ops(
        self, op_type: str, *inputs: str, names: Sequence[str] = (), count: int = 0, **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs: ``names``, or ``count`` new ones."""
        outputs = list(names) or [self._new_name(op_type) for _ in range(count)]
        self.nodes.append(
            helper.make_node(op_type, list(inputs), outputs, name=f"{op_type}:{outputs[0]}", **attributes)
        )
        return outputs

    def const(self, value: Any, dtype: str = "int64") -> str:
        """A constant of at most 8 numbers, stored once per value. Raises ValueError for more."""
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
        """A tensor of the weights file, cast to the dtype ``compute`` where it is stored in another one.

        A runtime does the cast once, when it loads the graph.
        """
        assert self.weights is not None
        stored = self.weights.entries[name]
        if name not in self.initializers:
            tensor = TensorProto(name=name, data_type=ONNX_DTYPE[stored.dtype], dims=stored.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS), ("offset", stored.offset), ("length", stored.length)):
                tensor.external_data.add(key=key, value=str(value))
            self.initializers[name] = tensor
        if stored.dtype == compute:
            return name
        if stored.dtype in QUANTISED:
            return self._dequantised(name, stored, compute)
        return self.op("Cast", name, to=ONNX_DTYPE[compute])

    def _dequantised(self, name: str, stored: Stored, compute: str) -> str:
        """A quantised matrix (in, out) times its scales [blocks, out], each for a block of rows."""
        assert self.weights is not None
        block = stored.shape[0] // self.weights.entries[name + SCALE].shape[0]
        return self.op("DequantizeLinear", name, self.weight(name + SCALE, compute), axis=0, block_size=block)

    def subgraph(self, name: str) -> Graph:
        """A branch body; it sees this graph's values by name. Its constants are its own."""
        return Graph(f"{self.name}.{name}", self.weights, self.opset)

    def proto(self) -> onnx.GraphProto:
        """The graph as ONNX's own message; a branch body of an ``If`` is one."""
        return helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.initializers.values()))

    def model(self) -> onnx.ModelProto:
        """The graph as a whole model, with its opset."""
        return helper.make_model(
            self.proto(),
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=IR_VERSION,
            producer_name="parvis",
        )

    def save(self, path: Path) -> None:
        """Write the model to ``path``; its weights stay in the weights file. Raises OSError."""
        path.write_bytes(self.model().SerializeToString())

    def _new_name(self, op_type: str) -> str:
        self._counter += 1
        return f"{self.name}/{op_type}.{self._counter}"
