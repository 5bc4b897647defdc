"""ONNX Runtime on a CUDA GPU: the same graphs as on a CPU, every buffer on the device and bound once.

For machines with CUDA but no TensorRT. Calls are launched one by one by ONNX Runtime, in fp32, so this is the simple
way to a GPU, not the fast one. The inputs of a call are copied to the device, and its tokens are copied back.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends import cuda
from par_runtime.backends.base import IMAGE_INPUTS, MOST_IN_FLIGHT, TIE, BackendInfo, Batch, closed_error
from par_runtime.backends.cache_rows import CacheRows
from par_runtime.backends.ort import needing
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Float, Int
from par_runtime.errors import BundleError, CudaError, RequestError, how_to_install, pip_command
from par_runtime.forks import keep_forever, tell_of_forks
from par_runtime.loaded import LoadedFiles

with needing("device 'cuda-ort'", "onnxruntime-gpu", "onnxruntime-gpu"):
    import onnxruntime as ort

    from par_runtime.backends.ort import sessions
    from par_runtime.backends.ort.sessions import (
        ASSIGNMENT,
        DEQUANTISE,
        OPSET24_SINCE,
        explained,
        open_session,
        version,
        weight_bytes,
    )
    from par_runtime.system import available_cores

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
#: The first release whose CUDA provider takes all of ``step.onnx``: 1.25 and 1.26 leave Transpose, Reshape, Cast and
#: ReduceMax of opset 24 on the CPU (and Attention of opset 23 in 1.24). docs/install.md describes how to see that.
CUDA_SINCE = (1, 27)
#: The operators that ONNX Runtime leaves on the CPU on purpose: they compute shapes, which are on the CPU already. Any
#: other operator on the CPU would copy activations, or the cache, back and forth in every call.
SHAPES = ("Concat", "Gather", "Shape", "Size", "Slice", "Squeeze", "Unsqueeze")


def how_to_replace() -> str:
    """The command that puts ONNX Runtime with CUDA in the place of the one without: both wheels own the same files."""
    return f"{pip_command()} uninstall -y onnxruntime onnxruntime-gpu && {how_to_install('onnxruntime-gpu')}"


class OrtCudaBackend:
    """A bundle on ONNX Runtime's CUDA provider. See ``base.Backend`` for the calls.

    ``provider`` and ``kind`` ("cuda", "cpu": where the buffers are) let the same code run on a CPU, in the tests.
    """

    def __init__(
        self, bundle: Bundle, index: int = 0, threads: int | None = None, *, provider: str = CUDA, kind: str = "cuda"
    ) -> None:
        since = CUDA_SINCE if provider == CUDA else OPSET24_SINCE
        if provider not in ort.get_available_providers():
            raise RequestError(
                f"device 'cuda-ort' needs ONNX Runtime with CUDA, installed is onnxruntime {ort.__version__} with "
                f"{', '.join(ort.get_available_providers())}: {how_to_replace()}"
            )
        if version() < since:
            raise RequestError(
                f"device 'cuda-ort' needs onnxruntime-gpu {'.'.join(map(str, since))} or newer (it needs Python 3.11 "
                f"or newer), installed is {ort.__version__}: {pip_command()} install --upgrade onnxruntime-gpu, "
                "or use device 'cpu'"
            )
        if provider == CUDA and not cuda.has_driver():  # else the error would be about libraries that would not help
            raise RequestError(f"device 'cuda-ort': {cuda.NO_DRIVER}; device 'cpu' runs without a GPU")
        if bundle.cache.dtype != "float32":
            raise BundleError(
                f"{bundle.path}: cache of dtype {bundle.cache.dtype!r}; device 'cuda-ort' needs float32; export the "
                "bundle again"
            )
        self.bundle, self._kind, self._index, self._provider = bundle, kind, index, provider
        self.info = BackendInfo(
            runtime=f"onnxruntime-{kind}",
            version=ort.__version__,
            device=kind,
            computes="fp32",
            weight_bytes=weight_bytes(bundle),
            cache_bytes=4.0,
        )
        self.max_images = MOST_IN_FLIGHT
        self.tie = 10 * TIE  # sums in another order, and kernels that were not measured
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads or available_cores()
        self._options.log_severity_level = 4  # failures are raised; its warnings list every shape operator on the CPU
        self._options.add_session_config_entry(ASSIGNMENT, "1")
        # Quantised weights become fp32: which of their products the CUDA provider fuses, nobody has seen here.
        self._options.add_session_config_entry(DEQUANTISE, "1")
        self._files = LoadedFiles(bundle)
        self._closed = self._forked = False
        self._step: ort.InferenceSession | None = self._session("step")
        self._decoder: ort.InferenceSession | None = None
        self._keys = CacheRows(bundle.n_tokens)
        self._caches: list[ort.OrtValue] = []  # [R',H,N,D'] each, in the order of bundle.cache.inputs
        self._bound: dict[int, _Bound] = {}  # by q, of the current number of rows and images
        self._shape = (0, 0)  # that number
        tell_of_forks(self)

    def after_fork(self) -> None:
        keep_forever(self._step, self._decoder, list(self._caches), dict(self._bound))
        self._forked = True
        self.close()

    def _check_usable(self) -> None:
        if self._forked:
            raise CudaError(
                f"{self.bundle.path}: was loaded on a GPU by another process than this one, which was forked from it; "
                "load the pipeline in the process that uses it",
                "FORKED",
            )
        if self._closed:
            raise closed_error(self.bundle)

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        bound = self._prepare(batch, ids, write, uniform)
        _run(self._step, bound.binding)
        tokens: Int = bound.tokens.numpy()[batch.cache_row[: batch.images]]
        return tokens

    def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
        uniform = np.zeros((batch.images, ids.shape[1]), np.float32)
        bound = self._prepare(batch, ids, write, uniform)
        out = self._value(np.zeros((*uniform.shape, self.bundle.vocab_size), np.float32))
        self._bound.clear()  # before binding: whatever interrupts this call, no later one writes into memory of `out`
        bound.binding.bind_ortvalue_output("logits", out)
        _run(self._step, bound.binding)
        logits: Float = out.numpy().copy()  # a view of memory that goes with `out`
        return logits

    def release(self, cache_rows: Int | None = None) -> None:
        self._keys.release(cache_rows)

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        decoder = self.opened()["decoder"]
        whole = np.zeros((len(tokens), self.bundle.n_tokens), np.int64)  # earlier frames of a clip see no later ones
        whole[:, : tokens.shape[1]] = tokens
        images = sessions.run(decoder, "tokens", whole, _as_ours)
        if not self.bundle.video:
            return images
        return images[:, : self.bundle.frames_of(tokens.shape[1] // self.bundle.frame_tokens)]

    def opened(self) -> dict[str, ort.InferenceSession]:
        """The sessions of "step" and "decoder"; that of the decoder is opened now if it was not yet."""
        self._check_usable()
        assert self._step is not None
        if self._decoder is None:
            self._decoder = self._session("decoder")
        return {"step": self._step, "decoder": self._decoder}

    def close(self) -> None:
        self._closed = True
        self._step = self._decoder = None
        self._bound.clear()
        self._caches.clear()
        self._keys.release()
        self._shape = (0, 0)
        self._files.close()

    def _session(self, name: str) -> ort.InferenceSession:
        graph = self.bundle.graphs.get(name)
        if graph is None:
            raise BundleError(f"{self.bundle.path}: has no graph {name!r}; export the bundle again")
        path = self.bundle.path / graph.file
        # Shape arithmetic stays on the CPU provider, which ONNX Runtime wants named too. No TF32: a step waits for
        # weights, not for arithmetic, and the bundle's numbers are those of fp32.
        cuda = (CUDA, {"device_id": str(self._index), "use_tf32": "0"})
        providers: list[Any] = [cuda, CPU] if self._provider == CUDA else [self._provider]
        try:
            # Without enable_fallback=0, a failure of the GPU, also in a later run(), is printed and ends on the CPU.
            with _quiet(self._provider):
                session = open_session(self._files, name, self._options, providers=providers, enable_fallback=0)
        except BundleError:
            raise
        except Exception as error:
            reason = _reason(error)
            if isinstance(explained(error), MemoryError):
                raise MemoryError(reason) from error
            if reason.startswith(("Invalid device ID", "CUDA failure")):
                raise RequestError(
                    f"device 'cuda-ort:{self._index}' cannot be used: {reason}; give one that nvidia-smi lists"
                ) from error
            raise BundleError(f"{path}: onnxruntime {ort.__version__} cannot load it ({reason})") from error
        if session.get_providers()[0] != self._provider:
            raise BundleError(
                f"{path}: ONNX Runtime fell back to {session.get_providers()[0]}: {why_not_cuda()}. onnxruntime-gpu "
                f"{ort.__version__} needs a GPU with its driver, CUDA {getattr(ort, 'cuda_version', '') or '13'} and "
                "cuDNN 9: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        sessions.check_interface(session, self.bundle, name)
        misplaced = not_on_provider(session, self._provider)
        if misplaced and name == "step":
            raise BundleError(
                f"{path}: onnxruntime {ort.__version__} runs {', '.join(misplaced)} on the CPU, which would copy in "
                "every call: install a newer onnxruntime-gpu, or use device 'cuda' (TensorRT) or 'cpu'"
            )
        if misplaced:  # decoding runs once per batch, so it is only slower
            warnings.warn(
                f"{path}: onnxruntime {ort.__version__} runs {', '.join(misplaced)} on the CPU; decoding copies the "
                "image's activations back and forth",
                stacklevel=2,
            )
        return session

    def _value(self, array: NDArray[Any]) -> ort.OrtValue:
        try:
            return ort.OrtValue.ortvalue_from_numpy(array, self._kind, self._index)
        except Exception as error:
            raise _as_ours(error) from error

    def _prepare(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> _Bound:
        """The bound buffers of this call, filled with its inputs."""
        self._check_usable()
        query, run = ids.shape[1], max(batch.cache_rows, self._keys.count)
        self._reserve(run, batch.images)
        ids, write = self._keys.write(batch, ids, write, run)
        bound = self._bound.get(query)
        if bound is None:
            bound = self._bound[query] = _Bound(self, run, batch.images, query)
        bound.set_batch(batch)
        bound.put("ids", ids)
        bound.put("positions", write[:, None] + np.arange(query))
        bound.put("write", write)
        bound.put("length", write + query)
        bound.put("uniform", np.ascontiguousarray(uniform, np.float32))
        return bound

    def _reserve(self, rows: int, images: int) -> None:
        """Caches of exactly ``rows`` rows; the keys that are still needed stay."""
        if (rows, images) == self._shape:
            return
        layout, held = self.bundle.cache, self._keys.count
        self._bound.clear()
        self._shape = (0, 0)  # until every cache is there: an allocation may fail
        if not held and any(cache.shape()[0] != rows for cache in self._caches):
            self._caches.clear()  # before allocating, so that the old and the new are never held together
        for i in range(len(layout.inputs)):
            if i < len(self._caches) and self._caches[i].shape()[0] == rows:
                continue
            # Zeros: what is masked must be finite. Keys of an earlier batch are, and are masked until written.
            new = np.zeros((rows, layout.heads, self.bundle.n_tokens, layout.head_dim), np.float32)
            if i < len(self._caches):
                new[:held] = self._caches[i].numpy()[:held]
                self._caches[i] = self._value(new)
            else:
                self._caches.append(self._value(new))
        self._shape = (rows, images)


class _Bound:
    """Device buffers of one query length, bound once."""

    def __init__(self, backend: OrtCudaBackend, rows: int, images: int, query: int) -> None:
        layout = backend.bundle.cache
        self._values = {
            name: backend._value(np.zeros(shape, dtype))
            for name, dtype, shape in (
                ("ids", np.int64, (rows, query)),
                ("positions", np.int64, (rows, query)),
                ("write", np.int64, (rows,)),
                ("length", np.int64, (rows,)),
                ("uniform", np.float32, (images, query)),
                *((name, dtype, (images,)) for name, dtype in IMAGE_INPUTS.items()),
            )
        }
        self.tokens = backend._value(np.zeros((rows, query), np.int64))
        self._batch: Batch | None = None
        assert backend._step is not None
        self.binding = backend._step.io_binding()
        for name, value in self._values.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output("tokens", self.tokens)
        # One buffer as input and output: this is what makes the cache update in place.
        for past, present, cache in zip(layout.inputs, layout.outputs, backend._caches, strict=True):
            self.binding.bind_ortvalue_input(past, cache)
            self.binding.bind_ortvalue_output(present, cache)

    def set_batch(self, batch: Batch) -> None:
        """Copy the settings of ``batch`` to the device, unless they are there already."""
        if batch is not self._batch:
            self._batch = batch
            for name, values in batch.per_image().items():
                self.put(name, values)

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Copy ``array`` into the device buffer of an input."""
        self._values[name].update_inplace(np.ascontiguousarray(array))


def not_on_provider(session: ort.InferenceSession, provider: str) -> list[str]:
    """The operators of a session that another provider than ``provider`` runs, except those of :data:`SHAPES`."""
    return sorted(
        {
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != provider
            for node in part.get_nodes()
            if node.op_type not in SHAPES
        }
    )


def why_not_cuda() -> str:
    """Why ONNX Runtime's CUDA provider cannot be loaded: the dynamic loader's error. ONNX Runtime only logs it."""
    folder = Path(ort.__file__).parent / "capi"
    try:
        for name in ("shared", "cuda"):
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"), ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return "it gave no reason"


@contextlib.contextmanager
def _quiet(provider: str) -> Iterator[None]:
    """Load CUDA's libraries from where pip installs them; and silence the log: failures are raised.

    The provider itself does not look there: without ``preload_dlls`` it loads the wheels of
    ``onnxruntime-gpu[cuda,cudnn]`` only if torch was imported before. ``preload_dlls`` looks beside ONNX Runtime alone,
    which may lie in another folder of the path than these wheels (``pip install --target``, an environment on top of
    one with PyTorch).
    """
    if provider != CUDA:
        yield
        return
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
            for folder in nvidia_folders():
                ort.preload_dlls(msvc=False, directory=str(folder))
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def nvidia_folders() -> list[Path]:
    """The folders with libraries of NVIDIA's wheels, wherever Python finds these, but for those beside ONNX Runtime."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    beside = Path(ort.__file__).resolve().parents[1]
    others = [Path(place) for place in places if Path(place).resolve().parent != beside]
    return [folder for place in others for folder in sorted(place.glob("*/lib")) if folder.is_dir()]


def _run(session: ort.InferenceSession | None, binding: ort.IOBinding) -> None:
    assert session is not None
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise _as_ours(error) from error


def _as_ours(error: Exception) -> Exception:
    """A failure on the GPU as MemoryError or CudaError, which callers of a backend handle."""
    reason = _reason(error)
    if isinstance(explained(error), MemoryError):
        return MemoryError(reason)
    return CudaError(f"onnxruntime {ort.__version__} failed: {reason}")


def _reason(error: Exception) -> str:
    """The part of ONNX Runtime's error that a user can act on, without the source lines and host names around it."""
    text = str(error).strip()
    reason = re.search(r"Invalid device ID[^.\n]*|CUDA failure [^;\n]*|Failed to allocate memory[^\n]*", text)
    return sessions.reason(Exception(reason.group().strip()) if reason else error)
