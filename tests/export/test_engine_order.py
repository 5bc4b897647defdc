"""The graphs that a build makes have the order of their bundle, also where that order is an ablation of the paper."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from conftest import golden_weights
from par_export import bundle as exporter
from par_export.engines.contents import step_config, tokenizer_config
from par_export.graphs.decoder import decoder_graph
from par_export.graphs.writer import WeightTable
from par_model import PAR, PARConfig, VQConfig, VQModel
from par_runtime.bundle import Bundle, seal
from par_runtime.errors import BundleError

VQ = VQConfig(
    codebook_size=16, codebook_dim=4, channels=8, channel_multipliers=(1,), res_blocks=1, z_channels=8, norm_groups=4
)


def tables(file: Path) -> dict[str, list[Any]]:
    """Name -> values of every table of integers that the graph itself holds, the order of the tokens among them."""
    return {
        tensor.name: numpy_helper.to_array(tensor).tolist()
        for tensor in onnx.load(file, load_external_data=False).graph.initializer
        if tensor.data_location != TensorProto.EXTERNAL and tensor.data_type == TensorProto.INT64
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"order": "raster"}, {"sequential_initial": False}, {"order": "raster", "sequential_initial": False}],
    ids=str,
)
def test_the_decoder_of_an_engine_un_permutes_as_the_bundles_decoder_does(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = PARConfig(dim=32, n_layers=1, n_heads=2, vocab_size=16, n_classes=3, grid=(1, 4, 4), **changes)
    for name, model in (("model.pt", PAR(config)), ("vq.pt", VQModel(VQ))):
        content = {"model": golden_weights(model).state_dict(), "config": asdict(model.config)}
        torch.save(content, tmp_path / name)
    request = exporter.ExportRequest(tmp_path / "model.pt", tmp_path / "vq.pt", tmp_path / "bundle", encoder=False)
    path = exporter.export(request, say=lambda _: None)
    bundle = Bundle.open(path)
    assert step_config(bundle) == config
    stored = WeightTable.read(path / bundle.graphs["decoder"].file)
    decoder_graph(step_config(bundle), tokenizer_config(bundle), stored).save(tmp_path / "engine.onnx")
    ours, wanted = tables(tmp_path / "engine.onnx"), tables(path / bundle.graphs["decoder"].file)
    assert ours == wanted
    place = np.empty(16, np.int64)
    place[np.array(bundle.order)] = np.arange(16)
    assert place.tolist() in wanted.values()


def test_a_bundle_in_an_order_that_no_model_has_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    file = tmp_path / "tiny" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["order"][5:7] = reversed(manifest["order"][5:7])
    file.write_text(json.dumps(seal({key: value for key, value in manifest.items() if key != "hash"})))
    bundle = Bundle.open(tmp_path / "tiny")
    with pytest.raises(BundleError, match=r"tiny: order is none of distant, raster .*; export the bundle again"):
        step_config(bundle)
