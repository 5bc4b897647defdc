"""Every form of a static graph computes the same: on ONNX Runtime, teacher-forced, against the symbolic step graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from par_export.engines import weights as engine_weights
from par_export.engines.contents import step_config
from par_export.gate.runner import StepRunner, input_ids, run_step, runnable_opset, session
from par_export.graphs.step import Form, step_graph
from par_export.graphs.writer import COMPATIBLE_OPSET, OPSET, WeightTable
from par_model.config import PARConfig
from par_model.ordering import phases
from par_runtime.bundle import WEIGHTS, Bundle

FORMS = [
    Form(grouped, lengths, after) for grouped in (True, False) for lengths in (True, False) for after in (True, False)
]


def logits_of(
    bundle: Bundle, config: PARConfig, form: Form, compute: str, tmp_path: Path, teacher: np.ndarray
) -> np.ndarray:
    """Logits [1,N,V] of the static graphs in ``form``, a graph for each query length, over one cache."""
    stored = WeightTable.read(bundle.path / bundle.graphs["group"].file)
    opset = runnable_opset()
    if opset == COMPATIBLE_OPSET and form.lengths:
        pytest.skip("ONNX Runtime before 1.25 has no attention by lengths")
    out = np.zeros((1, config.n_tokens, config.vocab_size), np.float32)
    labels = np.array([3])
    caches = None
    with engine_weights.weights_in(bundle.path / WEIGHTS, stored, compute, tmp_path, fold=form.norm_after) as (
        table,
        _,
    ):
        data = tmp_path / ".weights"
        if not data.exists():
            data = bundle.path / WEIGHTS
        (tmp_path / WEIGHTS).write_bytes(data.read_bytes())
        for phase in phases(config):
            graph = step_graph(
                config,
                table,
                name=phase.name,
                compute=compute,
                query=phase.query,
                sampling="plain",
                opset=opset,
                form=Form(form.grouped and phase.query > 1, form.lengths, form.norm_after),
            )
            graph.save(tmp_path / f"{phase.name}.onnx")
            runner = StepRunner(session(tmp_path / f"{phase.name}.onnx"), config, 1)
            runner.caches = caches or runner.caches
            for i in range(phase.repeat):
                start = phase.start + i * phase.query
                ids = input_ids(config, labels, teacher, start, phase.query)
                out[:, start : start + phase.query] = runner(ids, start, 1, 1.0)[1]
            caches = runner.caches
    return out


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(k for k, v in vars(form).items() if v) or "plain")
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_every_form_computes_the_same(bundles: dict[str, Path], tmp_path: Path, form: Form, compute: str) -> None:
    bundle = Bundle.open(bundles["fp32"])
    config = step_config(bundle)
    teacher = np.random.default_rng(0).integers(0, config.vocab_size, (1, config.n_tokens))
    _, wanted = run_step(bundle.path, config, np.array([3]), 1.0, teacher)
    got = logits_of(bundle, config, form, compute, tmp_path, teacher)
    allowed = {"float32": 2e-5, "float16": 2e-2}[compute]
    assert np.abs(got - wanted).max() < allowed * np.abs(wanted).max()


def test_the_exponent_makes_overflow_impossible() -> None:
    """An input near fp16's largest number, in the direction of the longest column: the product still fits."""
    rng = np.random.default_rng(0)
    matrix, gain = rng.normal(size=(256, 64)).astype(np.float32), rng.uniform(0.5, 40, 256).astype(np.float32)
    inside, exponent = engine_weights.folded(matrix, gain, "float16")
    np.testing.assert_array_equal(inside, matrix * gain[:, None] * np.float32(2.0**-exponent))
    assert exponent > 0
    for column in inside.T:
        x = column / np.linalg.norm(column) * 16 * 6e4  # a root mean square of 60,000
        assert np.abs(x @ inside).max() <= 6.5e4
    assert engine_weights.folded(matrix, gain, "bfloat16")[1] == 0
    assert OPSET > COMPATIBLE_OPSET
