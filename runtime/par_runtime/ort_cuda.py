"""ONNX Runtime on a CUDA GPU: the same graphs as on a CPU, every buffer on the device and bound once.

For machines with CUDA but no TensorRT. Calls are launched one by one by ONNX Runtime, in fp32, so this is the simple
way to a GPU, not the fast one. Inputs of a call are copied into their device buffers, tokens come back after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from par_runtime.backend import Batch, Float, Int
from par_runtime.bundle import Bundle, BundleError
from par_runtime.ort import MOST_IMAGES, OPSET24_SINCE, TIE, available_cores, explained
from par_runtime.request import RequestError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
#: Operators that hold a model's work: one of these on the CPU would copy the cache back and forth in every call.
HEAVY = ("MatMul", "Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization", "Conv")
ASSIGNMENT = "session.record_ep_graph_assignment_info"


class OrtCudaBackend:
    """A bundle on ONNX Runtime's CUDA provider. See ``backend.Backend`` for the calls.

    ``provider`` and ``kind`` ("cuda", "cpu": where the buffers are) let the same code run on a CPU, in the tests.
    """

    def __init__(
        self, bundle: Bundle, index: int = 0, threads: int | None = None, *, provider: str = CUDA, kind: str = "cuda"
    ) -> None:
        version = tuple(int(part) for part in ort.__version__.split(".")[:2])
        if provider not in ort.get_available_providers():
            raise RequestError(
                f"device 'cuda-ort' needs ONNX Runtime with CUDA, installed is onnxruntime {ort.__version__} with "
                f"{', '.join(ort.get_available_providers())}: pip uninstall onnxruntime && pip install 'parvis[onnxruntime-gpu]'"
            )
        if version < OPSET24_SINCE:
            raise RequestError(
                f"device 'cuda-ort' needs onnxruntime-gpu {'.'.join(map(str, OPSET24_SINCE))} or newer (Python 3.11 or "
                f"newer), installed is {ort.__version__}"
            )
        self.bundle, self._kind, self._index, self._provider = bundle, kind, index, provider
        self.name = f"onnxruntime-{kind} {ort.__version__}"
        self.max_images = MOST_IMAGES
        self.tie = 10 * TIE  # TF32 and other orders of summation
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads or available_cores()
        self._options.log_severity_level = 3  # it warns of every shape computation that it leaves on the CPU
        self._options.add_session_config_entry(ASSIGNMENT, "1")
        self._step = self._session("step")
        self._decoder: ort.InferenceSession | None = None
        self._caches: list[ort.OrtValue] = []
        self._shape = (0, 0)
        self._batch: Batch | None = None
        self._calls: dict[int, _Call] = {}

    def start(self, batch: Batch) -> None:
        if (batch.rows, batch.images) != self._shape:
            layout = self.bundle.cache
            self._calls.clear()
            self._caches.clear()  # before allocating, so that the old and the new are never held together
            shape = (batch.rows, layout.heads, self.bundle.n_tokens, layout.head_dim)
            # Zeros: what is masked must be finite. Keys of an earlier batch are, and are masked until written.
            self._caches = [self._value(np.zeros(shape, np.float32)) for _ in layout.inputs]
            self._shape = (batch.rows, batch.images)
        self._batch = batch
        for call in self._calls.values():
            call.set_batch(batch)

    def step(self, ids: Int, write: int, uniform: Float) -> Int:
        call = self._call(ids, write, uniform)
        _run(self._step, call.binding)
        tokens: Int = call.tokens.numpy()
        return tokens

    def logits(self, ids: Int, write: int) -> Float:
        assert self._batch is not None
        uniform = np.zeros((self._batch.images, ids.shape[1]), np.float32)
        call = self._call(ids, write, uniform)
        out = self._value(np.zeros((*uniform.shape, self.bundle.vocab_size), np.float32))
        call.binding.bind_ortvalue_output("logits", out)
        _run(self._step, call.binding)
        self._calls.clear()  # the binding now writes logits that nobody owns
        logits: Float = out.numpy().copy()  # a view of memory that goes with `out`
        return logits

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        if self._decoder is None:
            self._decoder = self._session("decoder")
        try:
            images: NDArray[np.uint8] = self._decoder.run(["images"], {"tokens": np.ascontiguousarray(tokens)})[0]
        except Exception as error:
            raise explained(error) from error
        return images

    def whole(self, batch: Batch, class_ids: Int, noise: Float, decode: bool) -> None:
        return None  # every call is run by the pipeline

    def close(self) -> None:
        self._calls.clear()
        self._caches.clear()
        self._shape = (0, 0)

    def _session(self, name: str) -> ort.InferenceSession:
        path = self.bundle.path / self.bundle.graphs[name].file
        # Shape computations stay on the CPU provider, which ONNX Runtime wants named too.
        providers: list[Any] = [(CUDA, {"device_id": self._index}), CPU] if self._provider == CUDA else [self._provider]
        try:
            session = ort.InferenceSession(str(path), self._options, providers=providers)
        except Exception as error:
            raise BundleError(f"{path}: onnxruntime {ort.__version__} cannot load it ({_first_line(error)})") from error
        if session.get_providers()[0] != self._provider:
            raise BundleError(
                f"{path}: ONNX Runtime fell back to {session.get_providers()[0]} without an error: is there a GPU {self._index}, "
                f"and the CUDA and cuDNN that onnxruntime-gpu {ort.__version__} wants? (pip install 'onnxruntime-gpu[cuda,cudnn]')"
            )
        strays = elsewhere(session, self._provider)
        if strays:
            raise BundleError(
                f"{path}: onnxruntime {ort.__version__} runs {', '.join(strays)} on the CPU, which would copy the cache in every "
                "call: install a newer onnxruntime-gpu, or use device 'cuda' (TensorRT)"
            )
        return session

    def _value(self, array: NDArray[Any]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, self._kind, self._index)

    def _call(self, ids: Int, write: int, uniform: Float) -> _Call:
        assert self._batch is not None, "start() comes before step()"
        query = ids.shape[1]
        call = self._calls.get(query)
        if call is None:
            call = self._calls[query] = _Call(self, self._batch, query)
        rows = self._batch.rows
        call.put("ids", np.ascontiguousarray(ids, np.int64))
        call.put("positions", np.tile(np.arange(write, write + query), (rows, 1)))
        call.put("write", np.full(rows, write, np.int64))
        call.put("length", np.full(rows, write + query, np.int64))
        call.put("uniform", np.ascontiguousarray(uniform, np.float32))
        return call


class _Call:
    """Device buffers of one query length, bound once."""

    def __init__(self, backend: OrtCudaBackend, batch: Batch, query: int) -> None:
        rows, images, layout = batch.rows, batch.images, backend.bundle.cache
        self._values = {
            name: backend._value(np.zeros(shape, dtype))
            for name, dtype, shape in (
                ("ids", np.int64, (rows, query)),
                ("positions", np.int64, (rows, query)),
                ("write", np.int64, (rows,)),
                ("length", np.int64, (rows,)),
                ("uniform", np.float32, (images, query)),
                ("cond_row", np.int64, (images,)),
                ("uncond_row", np.int64, (images,)),
                ("guidance", np.float32, (images,)),
                ("temperature", np.float32, (images,)),
                ("top_k", np.int64, (images,)),
                ("top_p", np.float32, (images,)),
            )
        }
        self.tokens = backend._value(np.zeros((rows, query), np.int64))
        self.put("cond_row", np.arange(images))
        self.set_batch(batch)
        self.binding = backend._step.io_binding()
        for name, value in self._values.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output("tokens", self.tokens)
        # One buffer as input and output: this is what makes the cache update in place.
        for past, present, cache in zip(layout.inputs, layout.outputs, backend._caches, strict=True):
            self.binding.bind_ortvalue_input(past, cache)
            self.binding.bind_ortvalue_output(present, cache)

    def set_batch(self, batch: Batch) -> None:
        for name in ("uncond_row", "guidance", "temperature", "top_k", "top_p"):
            self.put(name, getattr(batch, name))

    def put(self, name: str, array: NDArray[Any]) -> None:
        self._values[name].update_inplace(array)


def elsewhere(session: ort.InferenceSession, provider: str) -> list[str]:
    """The heavy operators of a session that another provider than ``provider`` runs."""
    return sorted(
        {
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != provider
            for node in part.get_nodes()
            if node.op_type in HEAVY
        }
    )


def load(bundle: Bundle, index: int = 0, threads: int | None = None) -> OrtCudaBackend:
    """The CUDA backend of ``bundle`` on GPU ``index``. Raises RequestError, BundleError."""
    return OrtCudaBackend(bundle, index, threads)


def _run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise explained(error) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
