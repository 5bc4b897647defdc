"""Checkpoint files: every published form loads, every other file is refused with a reason, nothing is ever run."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import golden_weights
from par_model.checkpoint import Checkpoint, CheckpointError, open_checkpoint, par_config, vq_config
from par_model.config import PARConfig, VQConfig, named
from par_model.transformer import PAR
from par_model.vq import VQModel

SMALL = PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=20, n_classes=3, grid=(1, 4, 4), group_size=4)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return dict(golden_weights(PAR(SMALL)).state_dict())


def save(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "c.pt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("key", [None, "model", "module", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_published_forms(tmp_path: Path, state: dict[str, torch.Tensor], key: str | None, dtype: torch.dtype) -> None:
    weights = {k: v.to(dtype) for k, v in state.items()}
    content = weights if key is None else {key: weights, "ema": {}, "args": argparse.Namespace(lr=1), "steps": 3}
    checkpoint = open_checkpoint(save(tmp_path, content))
    assert par_config(checkpoint, heads=2, grid=(1, 4, 4)) == SMALL
    assert checkpoint.tensor("norm.weight").dtype == dtype


def test_model_comes_before_module_and_ema_never(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    checkpoint = open_checkpoint(save(tmp_path, {"ema": other, "module": other, "model": state}))
    assert (checkpoint.tensor("norm.weight") == state["norm.weight"]).all()


def test_buffers_of_old_files_are_dropped(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    extra = {"freqs_cis": torch.zeros(3), "layers.1.attention.kv_cache.k_cache": torch.zeros(2)}
    checkpoint = open_checkpoint(save(tmp_path, state | extra))
    par_config(checkpoint, heads=2, grid=(1, 4, 4))


def test_an_unknown_key_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(save(tmp_path, state | {"layers.0.attention.bias": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"1 unknown \(layers\.0\.attention\.bias\)"):
        par_config(checkpoint, heads=2, grid=(1, 4, 4))


def test_a_missing_key_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    incomplete = {k: v for k, v in state.items() if k != "layers.1.attention.wo.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing \(layers\.1\.attention\.wo\.weight\)"):
        par_config(open_checkpoint(save(tmp_path, incomplete)), heads=2, grid=(1, 4, 4))


def test_a_wrong_shape_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    wrong = state | {"norm.weight": torch.zeros(31)}
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(31,\); expected \(32,\)"):
        par_config(open_checkpoint(save(tmp_path, wrong)), heads=2, grid=(1, 4, 4))


def test_heads_and_grid_are_needed_where_shapes_do_not_show_them(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    checkpoint = open_checkpoint(save(tmp_path, state))
    with pytest.raises(CheckpointError, match="give --heads"):
        par_config(checkpoint)
    with pytest.raises(CheckpointError, match="give --grid"):
        par_config(checkpoint, heads=2)
    with pytest.raises(CheckpointError, match="does not split into 2x2"):
        par_config(checkpoint, heads=2, grid=(1, 5, 4))


def test_a_file_of_parvis_train_needs_no_options(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = save(tmp_path, {"model": state, "config": asdict(SMALL) | {"kind": "par"}, "class_names": ["a", "b", "c"]})
    checkpoint = open_checkpoint(path)
    assert par_config(checkpoint) == SMALL
    assert checkpoint.class_names == ["a", "b", "c"]


@pytest.mark.parametrize("size", ["B", "3B"])
def test_named_sizes_need_no_options(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        tensors = PAR(named(size)).state_dict()
    assert par_config(Checkpoint(Path("c.pt"), tensors)) == named(size)


def test_a_model_for_a_tokenizer_and_the_reverse_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    tokenizer = VQModel(
        VQConfig(codebook_size=16, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32)
    )
    with pytest.raises(CheckpointError, match="this is an image tokenizer: give it as --tokenizer"):
        par_config(open_checkpoint(save(tmp_path, tokenizer.state_dict())))
    with pytest.raises(CheckpointError, match="this is a PAR model: give it as --checkpoint"):
        vq_config(open_checkpoint(save(tmp_path, state)))


@pytest.mark.parametrize(
    "config",
    [
        VQConfig(codebook_size=16, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32),
        VQConfig(
            codebook_size=24, codebook_dim=4, channels=32, channel_multipliers=(1, 1, 2, 3), res_blocks=2, z_channels=48
        ),
    ],
)
def test_tokenizer_config_is_read_from_shapes(tmp_path: Path, config: VQConfig) -> None:
    assert vq_config(open_checkpoint(save(tmp_path, VQModel(config).state_dict()))) == config


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"codebook_l2_norm": False}, "codebook_l2_norm False; parvis runs tokenizers with normalised codes only"),
        ({"codebook_size": 16384}, "its args say codebook_size 16384, the weights have 16"),
        ({"codebook_embed_dim": 256}, "its args say codebook_embed_dim 256, the weights have 8"),
    ],
)
def test_arguments_of_another_tokenizer_are_refused(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    config = VQConfig(codebook_size=16, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32)
    good = {"codebook_size": 16, "codebook_embed_dim": 8, "codebook_l2_norm": True, "vq_model": "VQ-16"}
    content = {"model": VQModel(config).state_dict(), "args": argparse.Namespace(**good)}
    assert vq_config(open_checkpoint(save(tmp_path, content))) == config
    content["args"] = argparse.Namespace(**(good | args))
    with pytest.raises(CheckpointError, match=message):
        vq_config(open_checkpoint(save(tmp_path, content)))


class Evil:
    """An object whose unpickling would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_is_never_run(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    victim = tmp_path / "victim"
    path = save(tmp_path, {"model": state, "extra": Evil(str(victim))})
    with pytest.raises(CheckpointError, match=r"holds something other than tensors.*it was not run"):
        open_checkpoint(path)
    assert not victim.exists()


def test_a_truncated_file_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = save(tmp_path, state)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="may be truncated"):
        open_checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "none.pt")
    (tmp_path / "c.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="not a readable PyTorch checkpoint"):
        open_checkpoint(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="holds a list; expected a dict of tensors"):
        open_checkpoint(save(tmp_path, [1, 2]))
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        open_checkpoint(save(tmp_path, {"steps": 3}))
