"""How the parity gate runs graphs: sessions that hold the weights once, call after call, with a cache in place.

It does not use the runtime's own generation, on purpose: the tokens that it makes become the self-test of the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from par_export.errors import ExportError
from par_export.graphs.step import COMPATIBLE_STEP, padded_head_dim, step_graph
from par_export.graphs.writer import COMPATIBLE_OPSET, OPSET, WeightTable
from par_model.config import PARConfig
from par_model.ordering import LEARNABLE, TOKEN, Phase, input_kinds, phases
from par_runtime.backends.ort.sessions import (
    DEQUANTISE,
    LOG_SEVERITY,
    OPSET24_SINCE,
    explained,
    reason,
    version,
)
from par_runtime.system import give_back, utf8_name

SOME_GROUPS = 3  #: group calls that each graph runs, except for the main one, which makes whole images


@dataclass(frozen=True)
class GuidedRows:
    """The rows of a batch: row b is image b with its class; after these comes a row without class per guided image."""

    guidance: np.ndarray  # [B] fp32; guided where greater than 1

    @property
    def of_row(self) -> np.ndarray:
        """The image of each row [R]."""
        return np.concatenate([np.arange(len(self.guidance)), np.flatnonzero(self.guidance > 1)])

    @property
    def uncond_row(self) -> np.ndarray:
        """The row without class of each image [B]; its only row where it is not guided."""
        rows = np.arange(len(self.guidance))
        guided = self.guidance > 1
        rows[guided] = len(rows) + np.arange(guided.sum())
        return rows

    def labels(self, labels: np.ndarray, no_class: int) -> np.ndarray:
        """The label of each row [R], from the images' ``labels`` [B]; ``no_class`` for rows without class."""
        return np.concatenate([labels, np.full(int((self.guidance > 1).sum()), no_class)])

    def guided(self, logits: np.ndarray) -> np.ndarray:
        """The guided logits [B,N,V], from the rows' logits [R,N,V]."""
        scale = self.guidance[:, None, None]
        if not (self.guidance > 1).any():
            return logits
        uncond = logits[self.uncond_row]
        return np.asarray(uncond + (logits[: len(scale)] - uncond) * scale)


@dataclass
class StepRunner:
    """Runs a step graph call by call, in the simplest way: numpy arrays in and out, one cache as input and output."""

    session: ort.InferenceSession
    config: PARConfig
    rows: int

    def __post_init__(self) -> None:
        c = self.config
        kinds = {i.name: i for i in self.session.get_inputs()}
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[kinds["past_k.0"].type]
        self._static = "image" in kinds  # static graphs have two other inputs, see step.io_table
        self._length_dtype = np.int32 if self._static else np.int64
        shape = (self.rows, c.n_heads, c.n_tokens, padded_head_dim(c))
        self.caches = {name: np.zeros(shape, dtype) for name in kinds if name.startswith("past_")}

    def __call__(
        self, ids: np.ndarray, start: int, images: int, guidance: float | np.ndarray, greedy: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run one call: ``ids`` [R,q] at positions from ``start`` on. Returns tokens [R,q] and logits [B,q,V].

        ``guidance`` is one number for all images, or [B]. The rows are those of :class:`GuidedRows`.
        """
        rows, query = ids.shape
        batch = GuidedRows(np.broadcast_to(np.asarray(guidance, np.float32), images))
        feed: dict[str, np.ndarray] = {
            "ids": ids,
            "positions": np.tile(np.arange(start, start + query), (rows, 1)),
            "write": np.full(rows, start),
            "length": np.full(rows, start + query, self._length_dtype),
            "image": batch.of_row,
            "cond_row": np.arange(images),
            "uncond_row": batch.uncond_row,
            "uniform": np.zeros((images, query), np.float32),
            "guidance": np.ascontiguousarray(batch.guidance),
            "temperature": np.ones(images, np.float32),
            "top_k": np.full(images, 1 if greedy else 0),
            "top_p": np.ones(images, np.float32),
        }
        if not self._static:
            del feed["image"]
        binding = self.session.io_binding()
        for name, array in (feed | self.caches).items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in self.caches.items():
            present = name.replace("past_", "present_")
            binding.bind_output(present, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output("tokens")
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        tokens, logits = (value.numpy() for value in binding.get_outputs()[-2:])
        return tokens, logits


def input_ids(config: PARConfig, labels: np.ndarray, tokens: np.ndarray, start: int, query: int) -> np.ndarray:
    """Ids [R,q] of the embedding table at the input positions from ``start`` on; ``labels`` [R], ``tokens`` [R,N]."""
    kind, index = input_kinds(config)
    columns = []
    for p in range(start, start + query):
        if kind[p] == TOKEN:
            columns.append(tokens[:, index[p]])
        elif kind[p] == LEARNABLE:
            columns.append(np.full(len(labels), config.vocab_size + config.n_classes + 1 + index[p]))
        else:
            columns.append(config.vocab_size + labels)
    return np.stack(columns, 1).astype(np.int64)


def session(path: Path, pack: bool = False, keep: bool = True) -> ort.InferenceSession:
    """A CPU session of the graph at ``path``. Weights in fp32 are mapped; ``pack`` copies them into packed matrices.

    Without ``keep`` memory goes back to the system as soon as a node is done with it: for graphs of large tensors, of
    which ONNX Runtime's own allocator keeps several times what it needs.

    Weights in half precision and quantised ones are held in fp32 in both cases: ONNX Runtime casts one after another
    when the session is made. (With the casts left in the graph it takes more memory, because it plans for all of their
    results at once.)
    Raises ExportError where ONNX Runtime cannot load it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.add_session_config_entry(DEQUANTISE, "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = keep
    if not pack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        # Without its fallback, which prints and tries the same again.
        return ort.InferenceSession(
            utf8_name(path) or path, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        if isinstance(explained(error), MemoryError):
            raise MemoryError(reason(error)) from error
        raise ExportError(
            f"the bundle cannot be checked, so nothing was written: onnxruntime {ort.__version__} cannot load its "
            f"{path.name} ({reason(error)})"
        ) from error


def run_step(
    folder: Path,
    config: PARConfig,
    labels: np.ndarray,
    guidance: float | np.ndarray,
    teacher: np.ndarray | None,
    name: str | None = None,
    groups: int | None = None,
    pack: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Run all calls of images with ``labels`` [B] on the step graph ``name`` (default: the newest that runs here).

    Returns tokens [B,N] and logits [B,N,V]. Tokens are greedy, except where ``teacher`` [B,N] is not negative: there it
    is fed instead. ``guidance`` is one number for all images, or [B]. ``groups`` stops after so many group calls; later
    tokens and logits are zero. ``pack`` is that of :func:`session`.
    """
    name = name or ("step" if runnable_opset() == OPSET else COMPATIBLE_STEP)
    images = len(labels)
    batch = GuidedRows(np.broadcast_to(np.asarray(guidance, np.float32), images))
    rows = batch.labels(labels, config.n_classes)
    runner = StepRunner(session(folder / f"{name}.onnx", pack), config, len(rows))
    fed = np.full((len(rows), config.n_tokens), -1, np.int64) if teacher is None else teacher[batch.of_row]
    tokens = np.maximum(fed, 0)
    logits = np.zeros((images, config.n_tokens, config.vocab_size), np.float32)
    for phase in phases(config):
        for i in range(calls_up_to(phase, groups)):
            start = phase.start + i * phase.query
            positions = slice(start, start + phase.query)
            ids = input_ids(config, rows, tokens, start, phase.query)
            drawn, logits[:, positions] = runner(ids, start, images, batch.guidance)
            tokens[:, positions] = np.where(fed[:, positions] < 0, drawn, fed[:, positions])
    del runner
    give_back()
    return tokens[:images], logits


def runnable_opset() -> int:
    """The opset of the step graph that this ONNX Runtime runs: 24, or 23 for older releases."""
    return OPSET if version() >= OPSET24_SINCE else COMPATIBLE_OPSET


@dataclass(frozen=True)
class StandIn:
    """How to write the static graphs again over the same weights, where ONNX Runtime cannot run the bundle's files."""

    weights: WeightTable
    compute: str
    opset: int


def calls_up_to(phase: Phase, groups: int | None) -> int:
    """How many calls of ``phase`` are run where at most ``groups`` group calls are (None: all)."""
    return phase.repeat if groups is None or phase.name != "group" else min(phase.repeat, groups)


def run_static(
    folder: Path,
    config: PARConfig,
    label: int,
    teacher: np.ndarray,
    stand_in: StandIn | None,
) -> dict[str, np.ndarray]:
    """Run the static graphs on ``teacher`` [1,N] and the class ``label``; returns phase -> logits [1,M,V].

    Of the group phase only the first ``SOME_GROUPS`` calls are run. ``stand_in`` writes the graphs again first.
    """
    labels = np.array([label])
    out: dict[str, np.ndarray] = {}
    runner: StepRunner | None = None
    file = ""
    for phase in phases(config):
        if not phase.repeat:
            continue
        wanted = "prefill" if phase.name == "sequential" else phase.name
        if wanted != file:
            file = wanted
            path = folder / f"{file}.onnx"
            if stand_in is not None:
                path = folder / f".gate-{file}.onnx"
                graph = step_graph(
                    config,
                    stand_in.weights,
                    name=file,
                    compute=stand_in.compute,
                    query=phase.query,
                    sampling="plain",
                    opset=stand_in.opset,
                )
                graph.save(path)
            caches = runner.caches if runner else None
            runner = None  # before the next session is made: each holds the weights
            give_back()
            runner = StepRunner(session(path), config, 1)
            runner.caches = caches or runner.caches
        assert runner is not None
        parts = []
        for i in range(calls_up_to(phase, SOME_GROUPS)):
            start = phase.start + i * phase.query
            parts.append(runner(input_ids(config, labels, teacher, start, phase.query), start, 1, 1.0)[1])
        out[phase.name] = np.concatenate(parts, 1)
    del runner
    give_back()
    return out
