"""One call after another on a step graph: sessions that hold the weights once, static rows, a cache in place.

What the parity gate (``verify.py``) runs graphs with, kept apart from the runtime, which is not to judge itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from par_export.graphs.step import padded_head_dim
from par_model.config import PARConfig
from par_model.ordering import LEARNABLE, TOKEN, input_kinds


@dataclass(frozen=True)
class Images:
    """Which rows a batch has: row b is image b with its class; behind them a row without class per guided image."""

    guidance: np.ndarray  # [B] fp32; guided where greater than 1

    @property
    def of_row(self) -> np.ndarray:
        """[R], the image of each row."""
        return np.concatenate([np.arange(len(self.guidance)), np.flatnonzero(self.guidance > 1)])

    @property
    def uncond_row(self) -> np.ndarray:
        """[B], the row without class of each image; its only row where it is not guided."""
        rows = np.arange(len(self.guidance))
        guided = self.guidance > 1
        rows[guided] = len(rows) + np.arange(guided.sum())
        return rows

    def labels(self, labels: np.ndarray, no_class: int) -> np.ndarray:
        """[R], of the images' ``labels`` [B]."""
        return np.concatenate([labels, np.full(int((self.guidance > 1).sum()), no_class)])

    def guided(self, logits: np.ndarray) -> np.ndarray:
        """Logits [B,N,V] of the rows' [R,N,V]."""
        scale = self.guidance[:, None, None]
        if not (self.guidance > 1).any():
            return logits
        uncond = logits[self.uncond_row]
        return np.asarray(uncond + (logits[: len(scale)] - uncond) * scale)


@dataclass
class Driver:
    """The smallest possible runner of a step graph: numpy in and out, one cache that is input and output."""

    session: ort.InferenceSession
    config: PARConfig
    rows: int

    def __post_init__(self) -> None:
        c = self.config
        kinds = {i.name: i for i in self.session.get_inputs()}
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[kinds["past_k.0"].type]
        self._static = "image" in kinds  # static graphs differ in two inputs, see step.io_table
        self._length_dtype = np.int32 if self._static else np.int64
        shape = (self.rows, c.n_heads, c.n_tokens, padded_head_dim(c))
        self.caches = {name: np.zeros(shape, dtype) for name in kinds if name.startswith("past_")}

    def __call__(
        self, ids: np.ndarray, start: int, images: int, guidance: float | np.ndarray, greedy: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """One call: ``ids`` [R,q] at positions start.. ; returns tokens [R,q] and logits [B,q,V].

        ``guidance``: of all images, or [B]. Rows are those of ``Images``.
        """
        rows, query = ids.shape
        who = Images(np.broadcast_to(np.asarray(guidance, np.float32), images))
        feed: dict[str, np.ndarray] = {
            "ids": ids,
            "positions": np.tile(np.arange(start, start + query), (rows, 1)),
            "write": np.full(rows, start),
            "length": np.full(rows, start + query, self._length_dtype),
            "image": who.of_row,
            "cond_row": np.arange(images),
            "uncond_row": who.uncond_row,
            "uniform": np.zeros((images, query), np.float32),
            "guidance": np.ascontiguousarray(who.guidance),
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
    """Ids [R,q] of the embedding table at input positions start.. for ``labels`` [R] and ``tokens`` [R,N]."""
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


def session(path: Path, pack: bool = False) -> ort.InferenceSession:
    """A CPU session of the graph at ``path``. Weights in fp32 are mapped; ``pack`` holds them in the layout of the products.

    Weights in half precision are held in fp32 in any case: ONNX Runtime casts one after another when the session is
    made. (Leaving the casts in the graph takes more: it plans memory for all of their results at once.)
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not pack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
