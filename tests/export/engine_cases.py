"""Fixtures of the engine tests, and step networks with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from par_export.engines import report as engine_report
from par_export.engines import weights as engine_weights
from par_export.engines.builder import BuildOutcome, Target, build_plan
from par_export.engines.network import ExpectedAttention
from par_export.engines.weights import MappedWeights
from par_export.graphs.step import Form, padded_head_dim, step_graph
from par_export.graphs.writer import SCALE, WeightTable
from par_model.config import PARConfig
from par_runtime.backends.tails import Tail
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Stored
from par_runtime.stopping import Waiting

SM80 = Target("SM80")
SMALL = PARConfig(dim=128, n_layers=2, n_heads=2, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=4)


@pytest.fixture(scope="module")
def trt() -> trt_module.TensorRT:
    return trt_module.load(trt_module.RTX)


@dataclass
class Case:
    """A step network with random weights."""

    config: PARConfig
    table: WeightTable
    file: Path

    def build(
        self,
        trt: trt_module.TensorRT,
        precision: str = "float16",
        query: int = 4,
        form: Form | None = None,
        images: tuple[int, ...] = (1,),
        attention: ExpectedAttention | None = None,
        sampling: Tail = "topk",
    ) -> tuple[BuildOutcome, list[engine_report.Kernels], bytes]:
        form = form or Form.of(query)
        graph = step_graph(
            self.config, self.table, name="step", compute=precision, query=query, sampling=sampling, form=form
        )
        wanted = attention or ExpectedAttention(self.config.n_layers, form.lengths, decomposable=precision == "float32")
        data, pieces = MappedWeights(self.file), list[bytes]()
        try:
            outcome = build_plan(
                trt,
                graph,
                data,
                SM80,
                images,
                lambda piece: pieces.append(bytes(piece)),
                attention=wanted,
                allow_tf32=False,
                signals=Waiting(),
            )
        finally:
            data.close()
        return outcome, engine_report.kernels(outcome.log, images, self.config.n_layers), b"".join(pieces)


def random_case(folder: Path, config: PARConfig = SMALL, dtype: str = "float16", quantised: str | None = None) -> Case:
    """Weights laid out as by ``par_export.weights``, without torch; matrices ``quantised`` to int8 or int4."""
    rng = np.random.default_rng(0)
    d, heads, size = config.dim, config.n_heads, padded_head_dim(config)
    wide = heads * size
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab_size + config.n_classes + config.group_size, d),
        "norm": (d,),
        "output": (d, config.vocab_size),
    }
    for i in range(config.n_layers):
        layer = f"layers.{i}."
        shapes |= {layer + "attention_norm": (d,), layer + "ffn_norm": (d,), layer + "wqkv": (d, 3 * wide)}
        shapes |= {layer + "wo": (wide, d), layer + "w13": (d, 2 * config.ffn_dim), layer + "w2": (config.ffn_dim, d)}
    entries: dict[str, Stored] = {}
    file = folder / "weights.data"
    with file.open("wb") as out:

        def add(name: str, raw: bytes, kind: str, shape: tuple[int, ...]) -> None:
            out.write(b"\0" * (-out.tell() % 64))
            entries[name] = Stored(kind, shape, out.tell(), len(raw))
            out.write(raw)

        for table in ("cos", "sin"):
            add(
                table,
                rng.random((config.n_tokens, size // 2), np.float32).tobytes(),
                "float32",
                (config.n_tokens, size // 2),
            )
        for name, shape in shapes.items():
            if quantised and len(shape) == 2 and name.startswith("layers"):
                per_byte = 2 if quantised == "int4" else 1
                add(name, rng.integers(0, 256, shape[0] * shape[1] // per_byte, np.uint8).tobytes(), quantised, shape)
                scales = (shape[0] // 64, shape[1])
                add(name + SCALE, np.full(scales, 0.002, engine_weights.NUMPY_DTYPE[dtype]).tobytes(), dtype, scales)
                continue
            values = rng.random(shape, np.float32) * 0.04 - 0.02
            add(name, values.astype(engine_weights.NUMPY_DTYPE[dtype]).tobytes(), dtype, shape)
    return Case(config, WeightTable(entries), file)
