"""Heads and grid from the contents of a file: rotary tables, caches, arguments; contradictions; assumptions."""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from par_model.checkpoint import Checkpoint, CheckpointError, infer, open_checkpoint
from par_model.config import PARConfig, named
from par_model.shapes import without_weights
from par_model.transformer import PAR

State = dict[str, torch.Tensor]


@functools.cache
def shapes_of(config: PARConfig) -> State:
    return dict(without_weights(PAR, config).state_dict())


def state_of(config: PARConfig) -> State:
    return dict(shapes_of(config))


def config_of(n: int, side: int, dim: int = 32, heads: int = 2) -> PARConfig:
    return PARConfig(dim=dim, n_layers=2, n_heads=heads, vocab_size=20, n_classes=3, grid=(1, side, side), group_size=n)


def of(config: PARConfig, *, args: dict[str, Any] | None = None, left: dict[str, Any] | None = None) -> Checkpoint:
    return Checkpoint(Path("c.pt"), state_of(config), args=args or {}, left=left or {})


@pytest.mark.parametrize(
    "size", ["B", "L", *(pytest.param(size, marks=pytest.mark.slow) for size in ("XL", "XXL", "3B"))]
)
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


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_papers_video_model_needs_no_options(n: int) -> None:
    wanted = named("video", group_size=n)
    inferred = infer(of(wanted))
    assert inferred.config == wanted
    assert (wanted.grid, wanted.n_heads) == ((5, 16, 16), 24)
    assert inferred.heads_from == "size video, assumed: its widths are not published"
    assert inferred.grid_from == "assumed: 17 frames of 128x128, as published"
    with pytest.raises(CheckpointError, match="cannot be read from shapes; give --heads, and --grid"):
        infer(of(replace(wanted, vocab_size=16384)))  # not the published codes


def test_other_sizes_follow_from_tables_and_caches() -> None:
    wanted = config_of(4, 8, dim=400, heads=4)
    assert infer(of(wanted, left={"freqs_cis": (65, 50, 2)})).config == wanted
    cache = {"layers.0.attention.kv_cache.k_cache": (2, 4, 72, 100)}
    inferred = infer(of(wanted, args={"image_size": 128}, left=cache))
    assert inferred.config == wanted
    assert inferred.heads_from == "the file's layers.0.attention.kv_cache.k_cache (2, 4, 72, 100)"
    assert inferred.grid_from == "the file's args: image_size 128 / 16"


def test_sizes_of_the_published_code_that_have_no_name_here() -> None:
    config = PARConfig(dim=2560, n_layers=48, n_heads=40, vocab_size=20, n_classes=3, grid=(1, 24, 24))
    inferred = infer(of(config, args={"gpt_model": "GPT-XXXL", "image_size": 384}))
    assert inferred.config == config
    assert inferred.heads_from == "the file's args: gpt_model GPT-XXXL"
    with pytest.raises(
        CheckpointError, match=r"gpt_model GPT-1B \(width 2048, 22 layers\), the weights have width 2560"
    ):
        infer(of(config, args={"gpt_model": "GPT-1B"}), heads=40)


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


@pytest.mark.parametrize("under", ["model_args", "config", "hyper_parameters"])
def test_the_numbers_of_a_model_under_other_names(tmp_path: Path, under: str) -> None:
    config = config_of(4, 8)
    weights = {key: torch.zeros(tensor.shape) for key, tensor in state_of(config).items()}
    numbers = {"hidden_size": 32, "num_attention_heads": 2, "block_size": 64, "lr": 1e-4, "grid": "8x8"}
    numbers |= {} if under != "config" else {"grid": [1, 8, 8]}
    torch.save({"state_dict": weights, under: numbers}, tmp_path / "c.pt")
    inferred = infer(open_checkpoint(tmp_path / "c.pt"))
    assert inferred.config == config
    assert inferred.heads_from == f"the file's {under}: n_head"
    torch.save({"state_dict": weights, under: numbers | {"hidden_size": 64}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=f"its {under} say dim 64, the weights have 32 as width"):
        infer(open_checkpoint(tmp_path / "c.pt"))


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


# --- what no shape shows: the arguments against the weights ------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"spe_token_num": 3, "ar_token_num": 16},
            r"spe_token_num 3 and ar_token_num 16, which contradict each other: .*: train with --spe-token-num 15 or "
            r"--ar-token-num 4",
        ),
        ({"spe_token_num": 15, "ar_token_num": 16}, "spe_token_num 15, the weights hold 3 learnable tokens, so "),
        ({"ar_token_num": 16}, "ar_token_num 16, the weights hold 3 learnable tokens, so ar_token_num 4"),
        ({"spe_token_num": 0, "ar_token_num": 1}, "spe_token_num 0, the weights hold 3 learnable tokens"),
        ({"gpt_type": "t2i"}, "a text-to-image model"),
        ({"cls_token_num": 120}, "cls_token_num 120; parvis runs models with cls_token_num 1 only"),
        ({"rope_base": 500000}, "rope_base 500000; parvis runs models with rope_base 10000 only"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06; parvis runs models with norm_eps 1e-05 only"),
        ({"num_classes": 4}, "a training without class dropout .* has no such row"),
    ],
)
def test_forms_that_are_not_run_are_refused_whatever_the_options(
    tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    config = config_of(4, 8)
    with pytest.raises(CheckpointError, match=message):
        infer(of(config, args=args), heads=2, grid=(1, 8, 8))
    (tmp_path / "config.json").write_text(json.dumps(args))  # and where config.json says so
    with pytest.raises(CheckpointError, match=message):
        infer(Checkpoint(tmp_path / "c.pt", state_of(config)), heads=2, grid=(1, 8, 8))
    good = {"spe_token_num": 3, "ar_token_num": 4, "gpt_type": "c2i", "cls_token_num": 1, "rope_base": 10000}
    assert infer(of(config, args=good), heads=2, grid=(1, 8, 8)).warnings == ()


def test_the_callers_options_win_over_arguments_with_a_warning() -> None:
    config = config_of(4, 8)
    args = {"gpt_model": "GPT-L", "vocab_size": 16384, "image_size": 256, "downsample_size": 16}
    with pytest.raises(CheckpointError, match=r"gpt_model GPT-L .* or --heads and --grid, which then count instead"):
        infer(of(config, args=args), heads=2)
    inferred = infer(of(config, args=args), heads=2, grid=(1, 8, 8))
    assert inferred.config == config
    first, second = inferred.warnings
    assert first.startswith("its args say gpt_model GPT-L (width 1024, 24 layers), the weights have width 32 and 2")
    assert second == "grid 1x8x8 by --grid, which is used, but 1x16x16 by the file's args: image_size 256 / 16"
    wrong = {"freqs_cis": (65, 9, 2)}
    (warning,) = infer(of(config, left=wrong), heads=2, grid=(1, 8, 8)).warnings
    assert warning.startswith("--heads is used although its freqs_cis (65, 9, 2) is for heads of 18")


# --- config.json beside the file, and the file's name -------------------------------------------------------------


def beside(folder: Path, values: Any, name: str = "c.pt", config: PARConfig | None = None, **more: Any) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return Checkpoint(folder / name, state_of(config or named("B", vocab_size=20, n_classes=3, group_size=1)), **more)


def test_config_json_beside_the_file(tmp_path: Path) -> None:
    published = {"dim": 768, "n_layer": 12, "n_head": 12, "block_size": 256, "vocab_size": 20, "num_classes": 3}
    for values in (published, {"config": published}, {"num_attention_heads": 12, "image_size": 256}):
        inferred = infer(beside(tmp_path, values))
        assert inferred.config.grid == (1, 16, 16)
        assert inferred.heads_from == "config.json beside the file"
        assert inferred.grid_from.startswith("config.json beside the file: ")
        assert inferred.warnings == ()
    assert infer(beside(tmp_path, {"grid": [8, 4]})).config.grid == (1, 8, 4)
    assert infer(beside(tmp_path, {"n_head": 6})).config.n_heads == 6
    assert infer(beside(tmp_path, {"image_size": 256}), pixels_per_token=8).config.grid == (1, 32, 32)
    # A PAR model's block may count its learnable tokens.
    sixteen = named("B", vocab_size=20, n_classes=3, group_size=16)
    assert infer(beside(tmp_path, {"block_size": 256 + 15}, config=sixteen)).config.grid == (1, 16, 16)


def test_the_order_of_trust(tmp_path: Path) -> None:
    """Options, then the file, then config.json, then the file's name, then what is assumed."""
    values = {"block_size": 256, "n_head": 6}
    inferred = infer(beside(tmp_path, values, "c2i_B_384.pt"))
    assert (inferred.config.grid, inferred.config.n_heads) == ((1, 16, 16), 6)
    assert inferred.warnings == (
        "grid 1x16x16 by config.json beside the file: block_size 256, which is used, but 1x24x24 by the name "
        "c2i_B_384.pt: 384 px / 16",
    )
    strong = {"freqs_cis": (145, 32, 2)}
    inferred = infer(beside(tmp_path, values, "c2i_B_384.pt", left=strong))
    assert (inferred.config.grid, inferred.config.n_heads) == ((1, 12, 12), 12)
    assert [warning.split(" by ")[0] for warning in inferred.warnings] == ["heads 12", "grid 1x12x12"]
    inferred = infer(beside(tmp_path, values, "c2i_B_384.pt", left=strong), grid=(1, 8, 8), heads=3)
    assert (inferred.config.grid, inferred.config.n_heads) == ((1, 8, 8), 3)
    other = infer(beside(tmp_path, {"dim": 1024, "n_head": 16, "block_size": 256}))
    assert other.config.grid == (1, 24, 24)  # a config.json of another model is not used
    assert other.warnings == (
        "config.json beside the file is of another model, and not used: dim 1024, the weights have 768 as width",
    )


@pytest.mark.parametrize(
    ("name", "down", "side"),
    [
        ("c2i_B_256.pt", 16, 16),
        ("c2i_B_256.pt", 8, 32),
        ("c2i_B_384.safetensors", 16, 24),
        ("PAR-B-4x-512px.pt", 16, 32),
        ("par_256x256.pt", None, 16),
        ("c2i_B_256/model.safetensors", 16, 16),
        ("c2i_B_256/c.pt", 16, 24),
        ("B_256_384.pt", 16, 24),
        ("0000256.pt", 16, 24),
        ("epoch_256.pt", 16, 24),
        ("PAR-B-4x.pt", 16, 24),
    ],
)
def test_pixels_in_the_name_of_the_file(name: str, down: int | None, side: int) -> None:
    checkpoint = Checkpoint(Path(name), state_of(named("B", vocab_size=20, n_classes=3, group_size=1)))
    inferred = infer(checkpoint, pixels_per_token=down)
    assert inferred.config.grid == (1, side, side)
    assert ("assumed: 384 px" in inferred.grid_from) == ((side == 24 and "384" not in name) or name == "B_256_384.pt")


def test_nothing_is_assumed_of_another_tokenizer() -> None:
    """384 px are 24x24 tokens of the published tokenizer; of one with 8 pixels per token they would be 48x48."""
    checkpoint = Checkpoint(Path("PAR-B-4x.pt"), state_of(named("B", vocab_size=20, n_classes=3)))
    with pytest.raises(CheckpointError, match=r"give --grid \(48 for 384 px, 32 for 256 px\)"):
        infer(checkpoint, pixels_per_token=8)
    assert infer(checkpoint, pixels_per_token=16).config.grid == (1, 24, 24)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": ' * 5000,
        "[1]",
        '{"n_head": 1' + "0" * 5000 + "}",
        "\x00",
        "{'n_head': 4}",
        "version https",
    ],
)
def test_a_config_json_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: .*expected a JSON object .*; mend it or move") as error:
        infer(beside(tmp_path, text))
    assert len(str(error.value)) < 600


def test_values_of_config_json_that_are_no_numbers(tmp_path: Path) -> None:
    for values in (
        {"n_head": "12", "block_size": [256], "grid": "16", "image_size": -1, "dim": None, "rope_base": {}},
        {"n_head": True, "grid": [16, 16, 16, 16], "block_size": 2.5, "ar_token_num": "4"},
    ):
        assert infer(beside(tmp_path, values)).config == named("B", vocab_size=20, n_classes=3, group_size=1)
    inferred = infer(beside(tmp_path, {"block_size": 300}))
    assert inferred.warnings == (
        "config.json beside the file: block_size 300 is no square grid for n = 1; it is not used",
    )
