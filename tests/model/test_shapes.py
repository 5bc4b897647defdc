"""Modules without numbers: the shapes of real ones, and nothing loaded for numbers that are not drawn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from conftest import golden_config
from par_model.config import VideoTokenizerConfig, VQConfig
from par_model.shapes import without_weights
from par_model.transformer import PAR
from par_model.video import VideoTokenizer
from par_model.vq import VQModel

MODULES = [
    (VQModel, VQConfig(16, channels=8, channel_multipliers=(1,), res_blocks=1, z_channels=8, norm_groups=4)),
    (VideoTokenizer, VideoTokenizerConfig(widths=(8,), strides=(), res_blocks=1, last_blocks=1, norm_groups=4)),
]


def check(make: Any, config: Any) -> None:
    real = make(config).state_dict()
    model = without_weights(make, config)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in real.items()
    }
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("make", "config"), MODULES, ids=lambda value: getattr(value, "__name__", ""))
def test_shapes_are_those_of_a_real_module(make: Any, config: Any) -> None:
    check(make, config)


def test_shapes_of_a_transformer(golden: dict[str, dict[str, Any]]) -> None:
    check(PAR, golden_config(golden["par_n4_grid8"]))


def test_weights_are_drawn_again_afterwards() -> None:
    assert without_weights(lambda size: nn.Linear(size, size), 2).weight.is_meta
    assert nn.Linear(64, 64).weight.std() > 0


@pytest.mark.parametrize(
    "code",
    [
        "from par_model.checkpoint import open_checkpoint as o, par_config, vq_config\n"
        "par_config(o(sys.argv[1]), grid=(1, 8, 8), heads=4), vq_config(o(sys.argv[2]))",
        pytest.param(
            "from par_model.baseline import Baseline\nBaseline(sys.argv[3], device='cpu').run(1, 2.0)",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["checkpoints", "eager baseline"],
)
def test_pytorchs_compiler_is_not_loaded_for(code: str, checkpoints: dict[str, Path], bundles: dict[str, Path]) -> None:
    """It takes longer than they do."""
    modules = "('torch._dynamo', 'torch.fx.experimental.symbolic_shapes')"
    code = f"import sys\n{code}\nassert not [name for name in {modules} if name in sys.modules]"
    files = [str(checkpoints[name]) for name in ("par_n4_grid8", "vq")] + [str(bundles["fp32"])]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, *files], check=True, env=os.environ | path)
