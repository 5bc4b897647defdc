"""Plans of step networks, built by TensorRT-RTX for an A100, on this machine without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import engine_cases
import pytest
from engine_cases import Case, random_case

from par_export.engines import builder
from par_export.engines import weights as engine_weights
from par_export.engines.network import ExpectedAttention
from par_export.errors import BuildError
from par_export.graphs import step
from par_export.graphs.step import Form
from par_export.graphs.writer import Graph
from par_model.config import PARConfig
from par_runtime.backends.trt import module as trt_module

trt = engine_cases.trt  # a fixture
pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'")


@pytest.mark.parametrize(
    "precision", ["float16", *(pytest.param(other, marks=pytest.mark.slow) for other in ("bfloat16", "float32"))]
)
def test_every_attention_layer_is_fused_and_every_cache_is_updated(
    trt: trt_module.TensorRT, tmp_path: Path, precision: str
) -> None:
    outcome, counted, plan = random_case(tmp_path, dtype=precision).build(trt, precision, images=(1, 3))
    assert len(plan) > 100_000
    assert outcome.layers["ATTENTION_INPUT"] == 2
    assert outcome.layers["KV_CACHE_UPDATE"] == 4
    assert outcome.layers["ROTARY_EMBEDDING"] == 2
    assert [k.images for k in counted] == [1, 3]
    if precision != "float32":
        assert all(k.attention == 2 for k in counted)


@pytest.mark.parametrize(
    ("dim", "heads"),
    [pytest.param(128, 2, marks=pytest.mark.slow), (200, 2), pytest.param(256, 2, marks=pytest.mark.slow)],
    ids=["64", "100 padded", "128"],
)
def test_head_sizes(trt: trt_module.TensorRT, tmp_path: Path, dim: int, heads: int) -> None:
    config = PARConfig(dim=dim, n_layers=2, n_heads=heads, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=4)
    for query in (1, 4):
        _, counted, _ = random_case(tmp_path, config).build(trt, query=query)
        assert counted[0].attention == 2


@pytest.mark.parametrize("quantised", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_quantised_weights_stay_small(trt: trt_module.TensorRT, tmp_path: Path, quantised: str) -> None:
    config = PARConfig(dim=512, n_layers=2, n_heads=8, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=4)
    (tmp_path / "half").mkdir()
    whole, (half,), half_plan = random_case(tmp_path / "half", config).build(trt)
    outcome, (kernels,), plan = random_case(tmp_path, config, quantised=quantised).build(trt)
    assert kernels.attention == 2
    # Scales by block are applied inside the product for int4; int8 is unpacked by a kernel of its own for each matrix.
    assert (half.unpack, kernels.unpack) == (0, {"int8": 4 * config.n_layers, "int4": 0}[quantised])
    assert kernels.total == half.total + kernels.unpack
    factor = {"int8": 0.65, "int4": 0.45}[quantised]
    assert outcome.memory["weights_bytes"] < factor * whole.memory["weights_bytes"]
    assert len(plan) < 0.8 * len(half_plan)


@pytest.mark.slow
def test_kernels_of_par_l(trt: trt_module.TensorRT, tmp_path: Path) -> None:
    """The launch cost of a step, counted: at most 10 kernels a layer and 11 around them, at q = 1 and q = 4."""
    config = PARConfig(dim=1024, n_layers=2, n_heads=16)  # PAR-L, two of its layers
    case = random_case(tmp_path, config)
    for query, per_layer in ((1, 9), (4, 10)):
        _, (kernels,), _ = case.build(trt, query=query)
        print(f"q = {query}: {kernels.total} kernels, {kernels.per_layer} per layer, {kernels.around} around")
        assert kernels.per_layer is not None
        assert kernels.around is not None
        assert kernels.per_layer <= per_layer
        assert kernels.around <= 11


@pytest.mark.slow
def test_a_norm_after_the_product_saves_a_kernel_per_layer(trt: trt_module.TensorRT, tmp_path: Path) -> None:
    case = random_case(tmp_path, PARConfig(dim=1024, n_layers=3, n_heads=16))
    stored = case.table
    with engine_weights.weights_in(case.file, stored, "float16", tmp_path, fold=True) as (table, _):
        shutil.copyfile(tmp_path / ".weights", tmp_path / "folded.data")
    case = Case(case.config, table, tmp_path / "folded.data")
    for query, per_layer in ((1, 8), (4, 9)):
        _, (kernels,), _ = case.build(trt, query=query, form=Form(query > 1, lengths=True, norm_after=True))
        assert kernels.per_layer == per_layer
        assert kernels.around is not None
        assert kernels.around <= 11
        assert kernels.attention == 3


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_form_is_fused_at_16_queries(
    trt: trt_module.TensorRT, tmp_path: Path, grouped: bool, lengths: bool
) -> None:
    config = PARConfig(dim=128, n_layers=2, n_heads=2, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=16)
    _, (kernels,), _ = random_case(tmp_path, config).build(trt, query=16, form=Form(grouped, lengths))
    assert kernels.attention == 2
    assert any(("gemv_mha" if grouped else "gemm_mha") in name for name in kernels.names)


# -- networks that must be refused -------------------------------------------------------------------------------------


def test_attention_that_sees_unwritten_keys_is_refused(trt: trt_module.TensorRT, tmp_path: Path) -> None:
    case = random_case(tmp_path)
    with pytest.raises(BuildError, match=r"attention layer 'Attention:.*' has neither a mask nor lengths"):
        case.build(
            trt,
            form=Form(grouped=True, lengths=True),
            attention=ExpectedAttention(2, lengths=False, decomposable=False),
        )


def test_attention_without_its_mask_is_refused(
    trt: trt_module.TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_mask", lambda *_: "")
    with pytest.raises(BuildError, match="has neither a mask nor lengths"):
        random_case(tmp_path).build(trt, form=Form(grouped=True, lengths=False))


def test_a_cache_that_is_copied_is_refused(
    trt: trt_module.TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Graph.op

    def op(self: Graph, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        if op_type == "TensorScatter" and name == "present_v.1":
            return real(self, "Identity", real(self, op_type, *inputs, **attributes), name=name)
        return real(self, op_type, *inputs, name=name, **attributes)

    monkeypatch.setattr(Graph, "op", op)
    with pytest.raises(BuildError, match=r"cache 'past_v.1' is not updated in place: its output 'present_v.1'"):
        random_case(tmp_path).build(trt)


def test_a_head_size_without_kernel_is_refused_by_name(
    trt: trt_module.TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "padded_head_dim", lambda config: config.head_dim)  # 100, not padded to 104
    monkeypatch.setattr(engine_cases, "padded_head_dim", lambda config: config.head_dim)
    config = PARConfig(dim=200, n_layers=2, n_heads=2, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=4)
    with pytest.raises(BuildError, match=r"no fused attention kernel for layer '.*' with head size 100"):
        random_case(tmp_path, config).build(trt)


def test_an_input_that_the_parser_ignores_is_refused(
    trt: trt_module.TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builder.make_logger

    def log(trt: trt_module.TensorRT) -> Any:
        made = real(trt)
        made.warnings.append("ModelImporter: Unused Input: group/mask")
        return made

    monkeypatch.setattr(builder, "make_logger", log)
    with pytest.raises(BuildError, match=r"ignores an input of step: .*Unused Input: group/mask"):
        random_case(tmp_path).build(trt)


def test_missing_attention_layers_are_refused(trt: trt_module.TensorRT, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="2 of 3 attention layers were recognised"):
        random_case(tmp_path).build(trt, attention=ExpectedAttention(3, lengths=True, decomposable=False))
