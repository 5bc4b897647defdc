"""Heads and grid from the contents of a file: rotary tables, caches, arguments; contradictions; assumptions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from par_model.checkpoint import Checkpoint, CheckpointError, infer, open_checkpoint
from par_model.config import PARConfig, named
from par_model.transformer import PAR

State = dict[str, torch.Tensor]


def state_of(config: PARConfig) -> State:
    with torch.device("meta"):
        return dict(PAR(config).state_dict())


def config_of(n: int, side: int, dim: int = 32, heads: int = 2) -> PARConfig:
    return PARConfig(dim=dim, n_layers=2, n_heads=heads, vocab_size=20, n_classes=3, grid=(1, side, side), group_size=n)


def of(config: PARConfig, *, args: dict[str, Any] | None = None, left: dict[str, Any] | None = None) -> Checkpoint:
    return Checkpoint(Path("c.pt"), state_of(config), args=args or {}, left=left or {})


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize(("pixels", "side"), [(256, 16), (384, 24)])
def test_published_sizes_at_both_resolutions(size: str, n: int, pixels: int, side: int) -> None:
    wanted = named(size, group_size=n, grid=(1, side, side))
    args = {"gpt_model": f"GPT-{size}", "image_size": pixels, "downsample_size": 16, "vocab_size": 16384}
    inferred = infer(of(wanted, args=args | {"num_classes": 1000}))
    assert inferred.config == wanted
    assert inferred.heads_from == f"the file's args: gpt_model GPT-{size}"
    assert inferred.grid_from == f"the file's args: image_size {pixels} / 16"
    for rows in {side * side + 1, side * side + n}:
        inferred = infer(of(wanted, left={"freqs_cis": (rows, wanted.head_dim // 2, 2)}))
        assert inferred.config == wanted
        assert inferred.grid_from == f"the file's freqs_cis ({rows}, {wanted.head_dim // 2}, 2)"
    assert infer(of(wanted), grid=(1, side, side)).config == wanted
    inferred = infer(of(wanted))
    assert inferred.config.grid == (1, 24, 24)
    assert inferred.grid_from == "assumed: 384 px; --grid 16 for 256 px"
    assert inferred.heads_from == f"size {size}"


def test_other_sizes_follow_from_tables_and_caches() -> None:
    wanted = config_of(4, 8, dim=400, heads=4)
    assert infer(of(wanted, left={"freqs_cis": (65, 50, 2)})).config == wanted
    cache = {"layers.0.attention.kv_cache.k_cache": (2, 4, 72, 100)}
    inferred = infer(of(wanted, args={"image_size": 128}, left=cache))
    assert inferred.config == wanted
    assert inferred.heads_from == "the file's layers.0.attention.kv_cache.k_cache (2, 4, 72, 100)"
    assert inferred.grid_from == "the file's args: image_size 128 / 16"


def test_options_override_the_file() -> None:
    small = config_of(4, 8)
    checkpoint = of(small, args={"image_size": 256}, left={"freqs_cis": (65, 8, 2)})
    with pytest.raises(
        CheckpointError,
        match=r"contradicts itself: grid 1x8x8 by the file's freqs_cis \(65, 8, 2\), 1x16x16 by the file's args: "
        r"image_size 256 / 16; give --grid to settle it",
    ):
        infer(checkpoint)
    inferred = infer(checkpoint, heads=4, grid=(1, 4, 4))
    assert inferred.config == config_of(4, 4, heads=4)
    assert (inferred.heads_from, inferred.grid_from) == ("--heads", "--grid")


@pytest.mark.parametrize(
    ("args", "left", "message"),
    [
        (
            {"gpt_model": "GPT-L"},
            {},
            r"gpt_model GPT-L \(width 1024, 24 layers\), the weights have width 32 and 2 layers",
        ),
        ({"vocab_size": 16384}, {}, r"vocab_size 16384, the weights have 20 codes"),
        ({"num_classes": 4}, {}, r"num_classes 4, the weights have 3 classes and one row for no class"),
        (
            {},
            {"freqs_cis": (65, 9, 2)},
            r"freqs_cis \(65, 9, 2\) is for heads of 18, which the width 32 is no multiple",
        ),
        (
            {},
            {"freqs_cis": (65, 8, 2), "layers.0.attention.kv_cache.k_cache": (2, 4, 72, 8)},
            r"contradicts itself: heads 2 by .*, 4 by .*; give --heads",
        ),
        ({"image_size": 240}, {"freqs_cis": (226, 8, 2)}, "a grid of 15x15 does not split into 2x2 equal regions"),
        ({"image_size": 2**40}, {"freqs_cis": (2, 8, 2)}, "has more than 65536 tokens; give another --grid"),
    ],
)
def test_contradictions_are_one_error(args: dict[str, Any], left: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        infer(of(config_of(4, 8), args=args, left={"layers.1.attention.kv_cache.k_cache": (2, 2, 72, 16)} | left))


def test_unusable_values_are_ignored() -> None:
    for args in (
        {"image_size": "256"},
        {"image_size": None},
        {"image_size": True},
        {"image_size": -1},
        {"gpt_model": 3},
    ):
        assert infer(of(config_of(4, 8), args=args), heads=2, grid=(1, 8, 8)).config == config_of(4, 8)
    with pytest.raises(CheckpointError, match="give --grid"):
        infer(of(config_of(4, 8), left={"freqs_cis": (100, 8, 2)}))  # heads follow, no square of tokens does
    with pytest.raises(CheckpointError, match="give --heads"):
        infer(of(config_of(4, 8), left={"freqs_cis": (3,)}))


@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_arguments_are_read_from_the_file(tmp_path: Path, kind: type) -> None:
    config = config_of(1, 8)
    weights = {key: torch.zeros(tensor.shape) for key, tensor in state_of(config).items()}
    left = {"freqs_cis": torch.zeros(65, 8, 2), "layers.0.attention.kv_cache.k_cache": torch.zeros(2, 2, 72, 16)}
    content = {"model": {f"module.{k}": v for k, v in (weights | left).items()}, "args": kind(image_size=128)}
    torch.save(content, tmp_path / "c.pt")
    checkpoint = open_checkpoint(tmp_path / "c.pt")
    assert checkpoint.args == {"image_size": 128}
    assert checkpoint.left == {key: tuple(value.shape) for key, value in left.items()}
    assert infer(checkpoint).config == config


def test_the_config_of_a_run_is_checked(tmp_path: Path) -> None:
    weights = {key: torch.zeros(tensor.shape) for key, tensor in state_of(config_of(4, 8)).items()}
    good = {"n_heads": 2, "grid": (1, 8, 8), "order": "raster"}
    for wrong, message in (
        ({"n_heads": "2"}, "its config says n_heads='2'; expected a whole number"),
        ({"n_heads": True}, "its config says n_heads=True"),
        ({"grid": 5}, "its config says grid=5; expected three whole numbers"),
        ({"grid": (1, 2**20, 2**20)}, "has more than 65536 tokens"),
        ({"order": "zigzag"}, "its config says order='zigzag'; expected one of"),
        ({"causal_groups": 1}, "its config says causal_groups=1; expected one of"),
    ):
        torch.save({"model": weights, "config": good | wrong}, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match=message):
            infer(open_checkpoint(tmp_path / "c.pt"))
    torch.save({"model": weights, "config": good, "class_names": [1, 2, 3]}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="its class_names are not a list of names"):
        open_checkpoint(tmp_path / "c.pt")
    torch.save({"model": weights, "config": good, "rng": torch.get_rng_state()}, tmp_path / "c.pt")
    assert infer(open_checkpoint(tmp_path / "c.pt")).config.order == "raster"
