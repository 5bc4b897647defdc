"""The reference of a GPU's report: a bundle on PyTorch, as a backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from par_export.card.reference import reference
from par_runtime import verify
from par_runtime.backends.base import Batch
from par_runtime.bundle import Bundle
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings

DEMO = Path(__file__).parents[3] / "models" / "demo"


@pytest.mark.parametrize("name", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_it_is_the_cpus_backend_in_another_implementation(tiny: Path, name: str) -> None:
    path = tiny if name == "tiny" else DEMO
    torch = reference(Bundle.open(path))
    torch.selftest()
    cpu = Pipeline.load(path, "cpu-ort", selftest=False)
    settings = [Settings(guidance=2.0), Settings(top_k=20), Settings(guidance=3.0, top_p=0.9)]
    report = verify.run(cpu, torch, verify.Trial([1, 0, 2], settings, [1, 2, 3], 3), groups=2)
    assert report.floors_of == "fp32"
    assert report.passed, verify.table(report)
    torch.close()
    cpu.close()


@pytest.mark.slow
def test_heads_of_a_size_that_graphs_pad(bundles: dict[str, Path]) -> None:
    """The golden models have heads of 8; the padding that 100 needs is taken off again."""
    from par_export.restored import read_weights, restored_model

    for name in ("fp16", "n1", "n16"):
        bundle = Bundle.open(bundles[name])
        reference(bundle).selftest()
    import torch

    model = restored_model(bundle, read_weights(bundle), torch.float64, torch.device("cpu"))
    assert model.output.weight.dtype == torch.float64
    assert model.layers[0].attention.wqkv.weight.shape == (3 * model.config.dim, model.config.dim)


def test_what_it_does_not_take_is_refused(tiny: Path, bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(tiny)
    pipeline = reference(bundle)
    one = np.ones(2, np.float32)
    batch = Batch(2, np.arange(2), one, one, np.zeros(2, np.int64), one)
    with pytest.raises(RequestError, match="several positions"):
        pipeline.backend.logits(batch, np.zeros((2, 1), np.int64), np.array([0, 3]))
    with pytest.raises(ValueError, match=r"expected positions 0\.\.63"):
        pipeline.backend.logits(batch, np.zeros((2, 4), np.int64), np.array([62, 62]))
    with pytest.raises(RequestError, match="ends at tokens"):
        reference(Bundle.open(bundles["n1"])).backend.decode(np.zeros((1, 64), np.int64))
