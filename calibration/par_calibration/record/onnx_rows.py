"""Rows of a call by ONNX Runtime: the inputs of the products of ``step.onnx`` become outputs of the graph too.

It serves where the C step cannot run. Plainer than the runtime's own backend: the cache has its full length from the
beginning, and each call gives a new one. Weights are held in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from par_runtime.backends.base import Batch
from par_runtime.backends.ort.sessions import OPSET24_SINCE, check_memory, explained, session_options, version
from par_runtime.bundle import WEIGHTS, Bundle, matrix_names
from par_runtime.dtypes import Float, Int
from par_runtime.errors import BundleError


class OnnxRows:
    """The step of a bundle on ONNX Runtime; :attr:`rows` are what its last call multiplied each matrix with."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Open the graph. Raises BundleError, MemoryError."""
        self.bundle = bundle
        self.name = f"onnxruntime-cpu {ort.__version__}"
        self.rows: dict[str, Float] = {}  #: name of a matrix -> [M,K], M = R*q, of the last call
        check_memory(bundle, bundle.files[WEIGHTS]["bytes"])
        graph = "step" if version() >= OPSET24_SINCE else "step_opset23"
        if graph not in bundle.graphs:
            raise BundleError(f"{bundle.path}: has no graph {graph!r}; export the bundle again")
        model = onnx.load(bundle.path / bundle.graphs[graph].file, load_external_data=False)
        self._inputs = product_inputs(model.graph)
        missing = next((name for name in matrix_names(bundle) if name not in self._inputs), None)
        if missing is not None:
            raise BundleError(f"{bundle.path}: its graph {graph!r} has no product with {missing}; export it again")
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in dict.fromkeys(self._inputs.values())
        )
        options = session_options(threads)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        try:
            self._session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:
            raise explained(error) from error
        self._caches: dict[str, Float] = {}

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        """Tokens [B,q] of one call, as ``backends.base.Backend.step``; for rows that are their own cache rows."""
        if not self._caches:
            shape = (batch.rows, self.bundle.cache.heads, self.bundle.n_tokens, self.bundle.cache.head_dim)
            self._caches = {name: np.zeros(shape, np.float32) for name in self.bundle.cache.inputs}
        query = ids.shape[1]
        wanted = dict.fromkeys(self._inputs.values())
        feeds: dict[str, Any] = {
            "ids": ids,
            "positions": write[:, None] + np.arange(query),
            "write": write,
            "length": write + query,
            "uniform": uniform,
            **batch.per_image(),
            **self._caches,
        }
        try:
            outputs = self._session.run(["tokens", *self.bundle.cache.outputs, *wanted], feeds)
        except Exception as error:
            raise explained(error) from error
        layers = len(self._caches)
        self._caches = dict(zip(self.bundle.cache.inputs, outputs[1 : 1 + layers], strict=True))
        found = dict(zip(wanted, outputs[1 + layers :], strict=True))
        self.rows = {name: found[tensor].reshape(-1, found[tensor].shape[-1]) for name, tensor in self._inputs.items()}
        drawn: Int = outputs[0][batch.cache_row[: batch.images]]
        return drawn

    def release(self) -> None:
        """Forget all keys: the next call begins an image."""
        self._caches = {}

    def close(self) -> None:
        """Free the session."""
        del self._session
        self._caches, self.rows = {}, {}


def product_inputs(graph: onnx.GraphProto) -> dict[str, str]:
    """Name of a matrix -> the tensor that ``graph`` multiplies it with."""
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    out = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            matrix = node.input[1]
            while matrix not in weights and matrix in made_by:  # through the cast of half precision
                matrix = made_by[matrix].input[0]
            if matrix in weights:
                out[matrix] = node.input[0]
    return out
