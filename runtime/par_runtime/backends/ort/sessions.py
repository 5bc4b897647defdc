"""Sessions of ONNX Runtime on a CPU, and its errors as errors of Python. For the step, the decoder and the encoder."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from par_runtime.backends.base import IMAGE_INPUTS, tensors
from par_runtime.backends.ort.huge_pages import new_memory_on_huge_pages
from par_runtime.bundle import WEIGHTS, Bundle
from par_runtime.checked import shown
from par_runtime.dtypes import BYTES
from par_runtime.errors import BundleError
from par_runtime.forks import Calls, keep_forever, no_fork, tell_of_forks
from par_runtime.loaded import LoadedFiles
from par_runtime.loaded import check_memory as check_memory
from par_runtime.manifest_video import FIRST, NEXT
from par_runtime.reading import REMEDIES
from par_runtime.system import available_cores, utf8_name
from par_runtime.video_shapes import past_shapes

#: The first release with every operator of opset 24 that ``step.onnx`` uses; before, ``step_opset23.onnx`` runs.
OPSET24_SINCE = (1, 25)
#: ONNX Runtime's log is silent: failures are raised, and the log would print them too, at any length. 2: warnings.
LOG_SEVERITY = 4
#: name -> (dtype, shape) of inputs or outputs; letters are sizes that change from call to call.
Interface = dict[str, tuple[str, tuple[int | str, ...]]]
OPEN_FILES = Path("/proc/self/fd")
QUOTES = "'\""
SPINNING = "session.intra_op.allow_spinning"
#: "1": threads stop waiting for work in a loop when the last call has returned.
SPINNING_STOPS = "session.force_spinning_stop"
ASSIGNMENT = "session.record_ep_graph_assignment_info"
#: How products of quantised weights (``MatMulNBits``) are computed: "1" in fp32, "4" over activations rounded to int8,
#: which is ONNX Runtime's own default.
QUANTISED_ACCURACY = "session.qdq_matmulnbits_accuracy_level"
#: "1": quantised weights become fp32 when the session is made, as those in half precision do.
DEQUANTISE = "session.disable_quant_qdq"
#: The first release that fuses products of int8 weights; before, each call dequantises all of them.
INT8_FUSED_SINCE = (1, 25)
#: What ONNX Runtime says of a limit of the system -> what to do.
LIMITS = {os.strerror(number): remedy for number, remedy in REMEDIES.items()} | {
    "pthread_create failed": "no more threads may be started: raise their limit (ulimit -u), or take one thread",
}
#: How ONNX Runtime's allocators report that memory is missing (the last one: CUDA's).
NO_MEMORY = ("allocate memory", "bad_alloc", "out of memory")


def version() -> tuple[int, ...]:
    """(1, 32) for ONNX Runtime 1.32.0."""
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def session_options(threads: int | None) -> ort.SessionOptions:
    """Options of a session with ``threads`` of the CPU; default: all cores that this process may use."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = LOG_SEVERITY
    return options


def decoder_options(threads: int | None) -> ort.SessionOptions:
    """Options of the session of a decoder: nothing follows its call, so its threads leave the cores at once."""
    options = session_options(threads)
    options.add_session_config_entry(SPINNING, "1")
    options.add_session_config_entry(SPINNING_STOPS, "1")
    return options


def fuses(bundle: Bundle, arithmetic: str) -> bool:
    """Whether the step multiplies with quantised weights as they are stored, fused to ``MatMulNBits``.

    ONNX Runtime has kernels in fp32 for int4 only. Without one it dequantises a matrix in every product, which takes
    ten times as long as reading it in fp32, so int8 stays int8 only in front of activations in int8.
    """
    return bundle.quantised == "int4" or (
        bundle.quantised == "int8" and arithmetic == "int8" and version() >= INT8_FUSED_SINCE
    )


def set_arithmetic(options: ort.SessionOptions, bundle: Bundle, arithmetic: str) -> None:
    """Set how a session of the bundle's step multiplies: "int8" rounds activations, where weights are quantised."""
    if bundle.quantised is None:
        return
    if not fuses(bundle, arithmetic):
        options.add_session_config_entry(DEQUANTISE, "1")
    else:
        options.add_session_config_entry(QUANTISED_ACCURACY, "4" if arithmetic == "int8" else "1")


def open_session(files: LoadedFiles, name: str, options: ort.SessionOptions, **how: Any) -> ort.InferenceSession:
    """A session of the graph ``name``, as it was when the bundle was loaded. ``how``: as InferenceSession takes it.

    Raises BundleError where there is no such graph, or its weights were overwritten; what ONNX Runtime raises.
    """
    bundle, content = files.bundle, files.graph(name)
    if name not in bundle.graphs:
        raise BundleError(
            f"{bundle.path}: has no graph {name!r}, which onnxruntime {ort.__version__} needs; export the bundle again"
        )
    at = bundle.path / bundle.graphs[name].file
    if content is None:
        raise BundleError(f"{at}: missing; copy the bundle again or export it again")
    if name.startswith("step"):
        check_memory(bundle, bundle.files[WEIGHTS]["bytes"])
    path = files.path(name)
    in_utf8 = None if path is None else utf8_name(path)
    takes_content = hasattr(options, "add_external_initializers_from_files_in_memory")
    # ONNX Runtime 1.32 asks /proc on Linux where a file of weights really lies; a chroot may have none.
    if in_utf8 is not None and (not takes_content or sys.platform != "linux" or OPEN_FILES.is_dir()):
        return ort.InferenceSession(in_utf8, options, **how)
    if not takes_content:
        why, fix = "was moved or replaced after it was loaded", "load the bundle again"
        if path is not None:
            why, fix = "has a name that is not UTF-8", "rename its folder"
        raise BundleError(
            f"{at}: {why}, and onnxruntime {ort.__version__} opens files only by name; {fix}, or upgrade onnxruntime"
        )
    # Rare, because it takes more memory than a path: ONNX Runtime copies all weights of the graph.
    with files.weights() as weights:
        own = _copied(options)
        own.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
        session = ort.InferenceSession(content, own, **how)
        del own  # it points into the mapping
    return session


def _copied(options: ort.SessionOptions) -> ort.SessionOptions:
    """The same options, for one session."""
    own = ort.SessionOptions()
    own.intra_op_num_threads = options.intra_op_num_threads
    own.log_severity_level = options.log_severity_level
    for entry in (SPINNING, SPINNING_STOPS, ASSIGNMENT, QUANTISED_ACCURACY, DEQUANTISE):
        with suppress(RuntimeError):  # an entry that is not set
            own.add_session_config_entry(entry, options.get_session_config_entry(entry))
    return own


def open_cpu_session(
    files: LoadedFiles, name: str, options: ort.SessionOptions, huge_pages: bool = False
) -> ort.InferenceSession:
    """:func:`open_session` on the CPU, on ``huge_pages`` where the system gives them; every error of ONNX Runtime's is
    a BundleError.
    """
    try:
        with no_fork(), new_memory_on_huge_pages() if huge_pages else nullcontext():
            session = open_session(files, name, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except BundleError:
        raise
    except Exception as error:
        if isinstance(explained(error), MemoryError):
            raise MemoryError(reason(error)) from error
        limit = next((fix for words, fix in LIMITS.items() if words in str(error)), "")
        raise BundleError(
            f"{files.bundle.path / files.bundle.graphs[name].file}: onnxruntime {ort.__version__} cannot load it "
            f"({reason(error)}); {limit or 'export the bundle again'}"
        ) from error
    check_interface(session, files.bundle, name)
    return session


def expected_interface(bundle: Bundle, name: str) -> tuple[Interface, Interface]:
    """Inputs and outputs of the bundle's graph ``name``, as a session of it must have them: the dynamic step graphs,
    decoders and the encoder.
    """
    image, tokens = tuple(tensors(bundle, 0)[key] for key in ("images", "tokens"))
    if name in (FIRST, NEXT):
        return _of_a_latent_frame(bundle, name)
    if name.startswith("decoder"):
        return {"tokens": ("int64", tokens)}, {"images": ("uint8", image)}
    if name == "encoder":
        return {"images": ("uint8", image)}, {"tokens": ("int64", tokens)}
    inputs: Interface = dict.fromkeys(("ids", "positions"), ("int64", ("R", "q")))
    inputs |= dict.fromkeys(("write", "length"), ("int64", ("R",)))
    inputs |= {key: (np.dtype(dtype).name, ("B",)) for key, dtype in IMAGE_INPUTS.items()}
    inputs["uniform"] = ("float32", ("B", "q"))
    layout = bundle.cache
    cache = (layout.dtype, ("R", layout.heads, "S", layout.head_dim))
    outputs: Interface = {"tokens": ("int64", ("R", "q")), "logits": ("float32", ("B", "q", bundle.vocab_size))}
    return inputs | dict.fromkeys(layout.inputs, cache), outputs | dict.fromkeys(layout.outputs, cache)


def _of_a_latent_frame(bundle: Bundle, name: str) -> tuple[Interface, Interface]:
    """Inputs and outputs of the decoder of the first latent frame, or of each other one."""
    frames = 1 if name == FIRST else bundle.time_downsampling
    shapes = past_shapes(bundle.tokenizer or {}, *bundle.grid[1:])
    pasts, presents = (
        {f"{side}.{i}": ("float32", ("B", *shape)) for i, shape in enumerate(shapes)} for side in ("past", "present")
    )
    inputs: Interface = {"tokens": ("int64", ("B", bundle.frame_tokens))}
    outputs: Interface = {"images": ("uint8", ("B", frames, *(bundle.image_size or (0, 0)), 3))}
    return inputs | (pasts if name == NEXT else {}), outputs | presents


def check_interface(session: ort.InferenceSession, bundle: Bundle, name: str) -> None:
    """Raise BundleError where the inputs and outputs of a session are not those that follow from the manifest.

    Buffers are bound by address in these shapes, so a graph of another model must not get that far.
    """
    for side, wanted, given in zip(
        ("input", "output"),
        expected_interface(bundle, name),
        (session.get_inputs(), session.get_outputs()),
        strict=True,
    ):
        found = {tensor.name: (_dtype(tensor.type), tuple(tensor.shape)) for tensor in given}
        for tensor in sorted(wanted.keys() | found.keys()):
            have, want = found.get(tensor), wanted.get(tensor)
            if have is None or want is None or not _agree(have, want):
                raise BundleError(
                    f"{bundle.path / bundle.graphs[name].file}: its {side} {shown(tensor)} is {_described(have)}; the "
                    f"manifest's model needs {_described(want)}; export the bundle again"
                )


def _agree(have: tuple[str, tuple[Any, ...]], want: tuple[str, tuple[int | str, ...]]) -> bool:
    """Whether dtype, rank and every fixed size are equal; letters stand for any size, and must stay symbolic."""
    return (
        have[0] == want[0]
        and len(have[1]) == len(want[1])
        and all(h == w if isinstance(w, int) else not isinstance(h, int) for h, w in zip(have[1], want[1], strict=True))
    )


def _described(tensor: tuple[str, tuple[Any, ...]] | None) -> str:
    if tensor is None:
        return "none"
    return f"{shown(tensor[0])[1:-1]}[{','.join(shown(size, 20).strip(QUOTES) for size in tensor[1][:8])}]"


def _dtype(text: str) -> str:
    """ "float32" for ONNX Runtime's "tensor(float)"; also names of what is no tensor."""
    inner = text.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(inner, inner)


def lost_in_fork(options: ort.SessionOptions) -> bool:
    """Whether sessions with these options have threads, which do not exist in a forked process."""
    return int(options.intra_op_num_threads) != 1


class LazySession:
    """The session of a decoder or encoder on the CPU: opened at its first use, and once more in a forked process."""

    def __init__(self, files: LoadedFiles, name: str, options: ort.SessionOptions, huge_pages: bool = False) -> None:
        self._files, self._name, self._options, self._huge_pages = files, name, options, huge_pages
        self._session: ort.InferenceSession | None = None
        self._calls = Calls()
        tell_of_forks(self)

    def run(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """The only output for the only input ``name``. Raises BundleError, MemoryError."""
        session = self._opened()
        with self._calls:
            return run(session, name, values)

    def run_values(self, inputs: Mapping[str, ort.OrtValue]) -> list[ort.OrtValue]:
        """All outputs for ``inputs``, whose first dimension is B, by name. Raises BundleError, MemoryError."""
        session = self._opened()
        with self._calls:
            return run_values(session, inputs)

    def _opened(self) -> ort.InferenceSession:
        """The session, opened where there is none."""
        session = self._session
        if session is None:
            session = self._session = open_cpu_session(self._files, self._name, self._options, self._huge_pages)
        self._files.check()
        return session

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def after_fork(self) -> None:
        if (self._calls.lost_in_fork() or lost_in_fork(self._options)) and self._session is not None:
            keep_forever(self._session)
            self._session = None


def weight_bytes(bundle: Bundle, arithmetic: str = "fp32") -> float:
    """Bytes of one weight as a call reads it, on average: all but codes that are fused are widened to fp32 when the
    session is made.
    """
    return bundle.bytes_read(BYTES["fp32"]) if fuses(bundle, arithmetic) else BYTES["fp32"]


def run(
    session: ort.InferenceSession,
    name: str,
    values: NDArray[Any],
    explain: Callable[[Exception], Exception] | None = None,
) -> NDArray[Any]:
    """The only output of a decoder or encoder for its only input ``name``.

    ``explain`` (default: :func:`explained`) turns an error of ONNX Runtime's into the one that is raised.
    """
    try:
        out: NDArray[Any] = session.run(None, {name: np.ascontiguousarray(values)})[0]
    except Exception as error:
        raise (explain or explained)(error) from error
    _check_shape(session.get_outputs()[0], list(out.shape), len(values))
    return out


def run_values(session: ort.InferenceSession, inputs: Mapping[str, ort.OrtValue]) -> list[ort.OrtValue]:
    """All outputs of a graph for ``inputs``, by name, whose first dimension is B. Raises BundleError, MemoryError."""
    declared = session.get_outputs()
    try:
        out = session.run_with_ort_values([output.name for output in declared], dict(inputs))
    except Exception as error:
        raise explained(error) from error
    batch = next(iter(inputs.values())).shape()[0]
    for value, output in zip(out, declared, strict=True):
        _check_shape(output, list(value.shape()), batch)
    values: list[ort.OrtValue] = out
    return values


def _check_shape(declared: Any, shape: list[int], batch: int) -> None:
    """Raise BundleError for a ``shape`` that is not the ``declared`` one, which was compared with the manifest."""
    wanted = [batch, *declared.shape[1:]]
    if shape != wanted:  # ONNX Runtime only warns
        raise BundleError(
            f"the graph's output {shown(declared.name)} has shape {shown(shape)}, expected {wanted}; export the bundle "
            "again"
        )


def explained(error: Exception) -> Exception:
    """``error`` of ONNX Runtime as MemoryError where memory is missing; else as BundleError, since the inputs of a
    call are checked before it.
    """
    if any(words in str(error) for words in NO_MEMORY):
        return MemoryError(reason(error))
    return BundleError(
        f"onnxruntime {ort.__version__} cannot run a graph of the bundle ({reason(error)}); copy the bundle again or "
        "export it again"
    )


def reason(error: Exception) -> str:
    """What an error of ONNX Runtime says: the innermost of its messages, at most 300 characters that can be printed."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return shown(re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", line)[-1], 300)[1:-1]
