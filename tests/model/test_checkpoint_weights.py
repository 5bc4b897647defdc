"""Trained and averaged weights in one file, and keys under the name of a module around the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import golden_weights
from par_model.checkpoint import CheckpointError, Kind, open_checkpoint, par_config
from par_model.config import PARConfig, VQConfig
from par_model.transformer import PAR
from par_model.vq import VQModel

SMALL = PARConfig(dim=32, n_layers=1, n_heads=2, vocab_size=20, n_classes=3, grid=(1, 4, 4), group_size=4)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return dict(golden_weights(PAR(SMALL)).state_dict())


@pytest.fixture(scope="module")
def tokenizer() -> State:
    config = VQConfig(codebook_size=20, channels=8, channel_multipliers=(1,), res_blocks=1, z_channels=8, norm_groups=4)
    return dict(golden_weights(VQModel(config)).state_dict())


def averaged(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


def taken(path: Path, content: Any, state: State, weights: Kind | None = None) -> tuple[Kind, tuple[str, ...]]:
    """Which weights are read from a file of ``content``: compared with ``state`` and its average, released too."""
    torch.save(content, path)
    checkpoint = open_checkpoint(path, weights)
    assert set(checkpoint.tensors) == set(state)
    for _ in range(2):
        kind: Kind = "model" if torch.equal(checkpoint.tensor("norm.weight"), state["norm.weight"]) else "ema"
        wanted = state if kind == "model" else averaged(state)
        assert all(torch.equal(checkpoint.tensor(key), value) for key, value in wanted.items())
        checkpoint.release()
    return kind, checkpoint.notes


@pytest.mark.parametrize("model", ["model", "module", "state_dict", "model_state_dict", "net", "params"])
@pytest.mark.parametrize("ema", ["ema", "model_ema", "ema_state_dict", "state_dict_ema"])
def test_a_transformer_is_taken_as_trained_unless_the_average_is_asked_for(
    tmp_path: Path, state: State, model: str, ema: str
) -> None:
    content = {model: state, ema: averaged(state), "optimizer": {}, "steps": 3}
    kind, notes = taken(tmp_path / "c.pt", content, state)
    assert kind == "model"
    assert notes == (f"weights under {model!r}; the file also holds some under {ema!r} (--weights ema)",)
    kind, notes = taken(tmp_path / "c.pt", content, state, "ema")
    assert kind == "ema"
    assert notes == (f"weights under {ema!r}; the file also holds some under {model!r} (--weights model)",)
    assert taken(tmp_path / "c.pt", content, state, "model")[0] == "model"
    kind, notes = taken(tmp_path / "c.pt", {ema: averaged(state), "optimizer": {}}, state)
    assert kind == "ema"
    assert notes == (f"weights under {ema!r}, averaged ones: the file holds no others",)


def test_a_tokenizer_is_taken_averaged_where_there_is_an_average(tmp_path: Path, tokenizer: State) -> None:
    key = "encoder.conv_in.weight"

    def read(content: Any, weights: Kind | None = None) -> float:
        torch.save(content, tmp_path / "v.pt")
        return float((open_checkpoint(tmp_path / "v.pt", weights).tensor(key) - tokenizer[key]).mean().round())

    both = {"model": tokenizer, "ema": averaged(tokenizer), "discriminator": {}}
    assert [read(both), read(both, "model"), read(both, "ema"), read({"model": tokenizer})] == [1, 0, 1, 0]
    # torch_ema's average is a list without names: it cannot be read, and the trained weights can.
    assert read({"model": tokenizer, "ema": {"decay": 0.999, "shadow_params": [torch.zeros(1)]}}) == 0


def test_weights_that_a_file_does_not_hold(tmp_path: Path, state: State) -> None:
    for content, weights, message in (
        (state, "ema", r"holds no averaged weights \(ema\), only those at the top of the file; give --weights model"),
        ({"model": state}, "ema", r"holds no averaged weights \(ema\), only those under 'model'; give --weights model"),
        ({"ema": state}, "model", r"no weights other than averaged ones, only those under 'ema'; give --weights ema"),
    ):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "c.pt", weights)  # type: ignore[arg-type]
    assert taken(tmp_path / "c.pt", state, state, "model") == ("model", ())


@pytest.mark.parametrize("prefix", ["model.", "gpt.", "model._orig_mod.", "net.transformer."])
def test_keys_under_the_name_of_a_module(tmp_path: Path, state: State, prefix: str) -> None:
    lightning = {
        "epoch": 3,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": {prefix + key: value for key, value in state.items()},
        "hyper_parameters": {"lr": 1e-4},
    }
    shown = prefix.replace("_orig_mod.", "")
    kind, notes = taken(tmp_path / "c.ckpt", lightning, state)
    assert (kind, notes) == ("model", (f"weights under 'state_dict' whose keys begin with {shown!r}",))
    checkpoint = open_checkpoint(tmp_path / "c.ckpt")
    assert par_config(checkpoint, heads=2, grid=(1, 4, 4)) == SMALL
    two = {"state_dict": lightning["state_dict"] | {f"ema_model.{key}": v for key, v in averaged(state).items()}}
    assert taken(tmp_path / "c.ckpt", two, state)[0] == "model"
    assert taken(tmp_path / "c.ckpt", two, state, "ema")[0] == "ema"
    counted = {"model": {"n_averaged": torch.tensor(5)} | {f"module.{key}": value for key, value in state.items()}}
    assert taken(tmp_path / "c.pt", counted, state) == ("model", ())  # torch.optim.swa_utils.AveragedModel


def test_modules_that_hold_more_than_a_model(tmp_path: Path, state: State, tokenizer: State) -> None:
    under = {f"gpt.{key}": value for key, value in state.items()}
    for more, message in (
        ({"loss.logvar": torch.zeros(1)}, r"holds 1 tensors \(loss.logvar\) beside those whose keys begin with 'gpt.'"),
        ({f"vq.{key}": value for key, value in tokenizer.items()}, "more than one model, with keys that begin with"),
        ({f"old.{key}": value for key, value in state.items()}, "more than one model, with keys that begin with"),
    ):
        torch.save({"state_dict": under | more}, tmp_path / "c.ckpt")
        with pytest.raises(CheckpointError, match=message) as error:
            open_checkpoint(tmp_path / "c.ckpt")
        assert "torch.save({k.removeprefix('gpt.'): v for k, v in state_dict.items()" in str(error.value)
