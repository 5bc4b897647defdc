"""The exported graphs on ONNX Runtime against the golden files and against the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from conftest import GOLDEN, golden_config, golden_weights
from par_export.bundle import ExportRequest, export
from par_export.gate import runner
from par_export.gate.runner import run_step, session
from par_export.graphs.step import COMPATIBLE_STEP, padded_head_dim
from par_model.config import PARConfig, VQConfig
from par_model.generation import generate
from par_model.ordering import token_order
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_runtime import Bundle, Pipeline
from par_runtime.tokenizer import Tokenizer


@pytest.mark.parametrize(("name", "bundle"), [("par_n4_grid8", "fp32"), ("ar_n1_grid8", "n1")])
@pytest.mark.parametrize("graph", [None, COMPATIBLE_STEP])
def test_golden_logits_and_greedy_tokens(
    golden: dict[str, dict[str, Any]], bundles: dict[str, Path], name: str, bundle: str, graph: str | None
) -> None:
    g, config = golden[name], golden_config(golden[name])
    _, logits = run_step(
        bundles[bundle], config, g["labels"].astype(np.int64), 1.0, g["teacher_tokens"].astype(np.int64), graph
    )
    assert np.abs(logits - g["teacher_logits"]).max() < 1e-4
    tokens, _ = run_step(bundles[bundle], config, g["labels"].astype(np.int64), g["spec"]["cfg"], None, graph)
    assert (tokens == g["greedy_tokens"]).all()


@pytest.mark.parametrize(
    ("name", "bundle"), [("par_n4_grid8", "fp32"), ("ar_n1_grid8", "n1"), ("par_n4_grid8", "fp16")]
)
def test_the_runtime_gives_the_golden_tokens(
    golden: dict[str, dict[str, Any]], bundles: dict[str, Path], name: str, bundle: str
) -> None:
    g = golden[name]
    result = Pipeline.load(bundles[bundle], threads=1).generate(
        g["labels"].tolist(), guidance=g["spec"]["cfg"], greedy=True
    )
    assert (result.tokens == g["greedy_tokens"]).all()


CASES = {
    "n16 on 8x8": PARConfig(dim=64, n_layers=2, n_heads=4, vocab_size=100, n_classes=5, grid=(1, 8, 8), group_size=16),
    "head size 100": PARConfig(
        dim=200, n_layers=2, n_heads=2, vocab_size=100, n_classes=5, grid=(1, 8, 8), group_size=4
    ),
    "24x24": PARConfig(dim=64, n_layers=1, n_heads=1, vocab_size=100, n_classes=5, grid=(1, 24, 24), group_size=16),
    "not square": PARConfig(dim=32, n_layers=1, n_heads=2, vocab_size=100, n_classes=5, grid=(1, 4, 6), group_size=4),
    "video": PARConfig(dim=32, n_layers=1, n_heads=2, vocab_size=100, n_classes=5, grid=(2, 8, 8), group_size=4),
}


@pytest.mark.parametrize("name", CASES)
def test_other_models_through_export_and_runtime(tmp_path: Path, name: str) -> None:
    config = CASES[name]
    model = golden_weights(PAR(config))
    torch.save(model.state_dict(), tmp_path / "c.pt")
    out = export(
        ExportRequest(tmp_path / "c.pt", None, tmp_path / "b", heads=config.n_heads, grid=config.grid),
        say=lambda _: None,
    )
    pipeline = Pipeline.load(out, threads=1)
    assert pipeline.bundle.cache.head_dim == padded_head_dim(config) == {100: 104}.get(config.head_dim, config.head_dim)
    greedy = generate(model, [0, 3], guidance=1.5, greedy=True).numpy()
    assert (pipeline.generate([0, 3], guidance=1.5, greedy=True).tokens == greedy).all()
    settings: dict[str, Any] = {"guidance": 2.0, "temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 11}
    drawn = generate(model, [1, 2], **settings).numpy()
    assert (pipeline.generate([1, 2], **settings).tokens == drawn).mean() > 0.99  # near-ties may flip
    if config.grid[0] == 1:
        raster = pipeline.grid_tokens(drawn)
        assert (raster.reshape(2, -1)[:, token_order(config)] == drawn).all()


def test_sampled_tokens_are_the_oracles(golden: dict[str, dict[str, Any]], bundles: dict[str, Path]) -> None:
    config = golden_config(golden["par_n4_grid8"])
    model = golden_weights(PAR(config))
    settings: dict[str, Any] = {"guidance": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5}
    drawn = generate(model, list(range(10)), **settings).numpy()
    assert (
        Pipeline.load(bundles["fp32"], threads=1).generate(list(range(10)), **settings).tokens == drawn
    ).mean() > 0.99


def test_the_manifest_holds_the_rounding_error_of_half_precision(bundles: dict[str, Path]) -> None:
    for precision in ("fp16", "bf16"):
        parity = json.loads((bundles[precision] / "manifest.json").read_text())["parity"]
        assert 0 < parity["rounding"]["max_logit_error"] < 0.2
        assert (
            parity["phases"]["group"]["max_logit_error"] < 1e-4
        )  # the graph itself is exact: fp32 over rounded weights
    sizes = {p: (bundles[p] / "weights.data").stat().st_size for p in ("fp32", "fp16", "bf16")}
    assert sizes["fp16"] == sizes["bf16"] < 0.55 * sizes["fp32"]


def test_static_graphs_share_the_weights_and_have_static_shapes(bundles: dict[str, Path]) -> None:
    for name, query in (("prefill", 1), ("transition", 4), ("group", 4)):
        model = onnx.load(bundles["fp16"] / f"{name}.onnx", load_external_data=False)
        shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
        assert shapes["ids"] == ["R", query]
        assert shapes["past_k.0"] == ["R", 4, 64, 16]
        external = [t for t in model.graph.initializer if t.external_data]
        assert external
        assert {e.value for t in external for e in t.external_data if e.key == "location"} == {"weights.data"}
        types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
        assert types["past_k.0"] == onnx.TensorProto.FLOAT16
        assert {o.version for o in model.opset_import} == {24}
        assert sum(n.op_type == "TensorScatter" for n in model.graph.node) == 6


def test_the_decoder_brings_tokens_into_raster_order(
    bundles: dict[str, Path], small_vq: VQModel, golden: dict[str, dict[str, Any]]
) -> None:
    config = golden_config(golden["par_n4_grid8"])
    tokens = np.random.default_rng(3).integers(0, 512, (3, 64))
    raster = np.empty_like(tokens)
    raster[:, token_order(config)] = tokens
    with torch.no_grad():
        image = small_vq.decode(torch.from_numpy(raster.reshape(3, 8, 8)))
    wanted = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    got = Pipeline.load(bundles["fp32"], threads=1).decode(tokens)
    assert np.abs(got.astype(int) - wanted).max() <= 1
    assert got.std() > 10


@pytest.mark.slow
def test_vq16_decoder_gives_the_golden_image(tmp_path: Path) -> None:
    config = PARConfig(dim=32, n_layers=1, n_heads=2, vocab_size=16384, n_classes=2, grid=(1, 24, 24), group_size=4)
    torch.save(golden_weights(PAR(config)).state_dict(), tmp_path / "c.pt")
    torch.save(golden_weights(VQModel(VQConfig())).state_dict(), tmp_path / "v.pt")
    request = ExportRequest(tmp_path / "c.pt", tmp_path / "v.pt", tmp_path / "b", heads=2, grid=(1, 24, 24))
    out = export(request, say=lambda _: None)
    with np.load(GOLDEN / "vq16_grid24.npz") as g:
        tokens = g["tokens"][:1][:, token_order(config)]
        image = session(out / "decoder.onnx").run(["images"], {"tokens": tokens})[0][0]
        stride = 384 // g["image_strided"].shape[-1]
        wanted = np.clip(127.5 * g["image_strided"][0] + 128, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        assert np.abs(image[::stride, ::stride].astype(int) - wanted).max() <= 1
        with_kernels = Tokenizer(Bundle.open(out, verify="none")).decode(tokens)[0]
        assert np.abs(with_kernels[::stride, ::stride].astype(int) - wanted).max() <= 1
        assert np.abs(with_kernels.astype(int) - image).max() <= 1


def test_an_older_runtime_checks_the_same_graphs_in_opset_23(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "runnable_opset", lambda: 23)
    for precision in ("fp32", "fp16"):
        request = ExportRequest(
            checkpoints["par_n4_grid8"], None, tmp_path / precision, precision, heads=4, grid=(1, 8, 8)
        )
        manifest = json.loads((export(request, say=lambda _: None) / "manifest.json").read_text())
        assert manifest["parity"]["opset"] == 23
        assert manifest["parity"]["phases"]["group"]["static_argmax_agreement"] > 0.95
        assert manifest["graphs"]["group"]["opset"] == 24
