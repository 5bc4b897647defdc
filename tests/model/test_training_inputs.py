"""No output of a trainer replaces one of its inputs, or mixes into one."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from par_model.config import VQConfig
from par_model.training.cli import encode
from par_model.training.cli import tokenizer as train_tokenizer
from par_model.training.cli import transformer as train
from par_model.training.cli import video_tokenizer as train_video
from par_model.training.files import InputError, keep_inputs
from par_model.vq import VQModel

pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is the current one too, with weights, codes, and the folder of a run."""
    config = VQConfig(16, 4, channels=8, channel_multipliers=(1, 1), res_blocks=1, z_channels=8, norm_groups=4)
    content = {"model": VQModel(config).state_dict(), "config": asdict(config) | {"kind": "vq"}}
    (tmp_path / "run").mkdir()
    for name in ("vq.pt", "run/model.pt", "run/checkpoint.pt"):
        torch.save(content, tmp_path / name)
    codes, names = np.zeros((4, 4, 4), np.uint16), np.array(["a"])
    for name in ("codes.npz", "run/log.jsonl"):
        with (tmp_path / name).open("wb") as file:
            np.savez(file, codes=codes, labels=np.zeros(4, np.uint8), class_names=names)
    (tmp_path / "link.pt").symlink_to("vq.pt")
    os.link(tmp_path / "vq.pt", tmp_path / "same.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


CODES = ["--codes", "codes.npz", "--val", "codes.npz", "--vocab", "16"]


@pytest.mark.parametrize(
    ("verb", "arguments", "text"),
    [
        (encode, "--data IMAGES --tokenizer vq.pt --out vq.pt", "--out vq.pt: would write vq.pt, which is --tokenizer"),
        (encode, "--data IMAGES --tokenizer vq.pt --out ./run/../vq.pt", "which is --tokenizer vq.pt"),
        (encode, "--data IMAGES --tokenizer vq.pt --out link.pt", "which is --tokenizer vq.pt"),
        (encode, "--data IMAGES --tokenizer vq.pt --out same.pt", "which is --tokenizer vq.pt"),
        (encode, "--data IMAGES --tokenizer run/model.pt --out IMAGES/images.u8", "in the folder of --data"),
        (encode, "--data IMAGES --tokenizer run --out run/model.pt", "in the folder of --tokenizer run"),
        (train_tokenizer, "--data IMAGES --val IMAGES --run IMAGES", "in the folder of --data"),
        (train_tokenizer, "--data IMAGES --val IMAGES --run IMAGES/deep/run", "in the folder of --data"),
        (
            train_tokenizer,
            "--data IMAGES --val IMAGES --run run --encoder-for run/model.pt",
            "--run run: would write run/model.pt, which is --encoder-for run/model.pt",
        ),
        (
            train_tokenizer,
            "--data IMAGES --val IMAGES --run run --init run/model.pt",
            "--run run: would write run/model.pt, which is --init run/model.pt",
        ),
        (train, "CODES --run run --init run/model.pt", "which is --init run/model.pt"),
        (train, "CODES --run run --init run/model.pt --resume", "which is --init run/model.pt"),
        (train, "CODES --run run --tokenizer run/checkpoint.pt", "which is --tokenizer run/checkpoint.pt"),
        (train, "CODES --run run --tokenizer run", "in the folder of --tokenizer run"),
        (train, "--codes run/log.jsonl --val codes.npz --vocab 16 --run run", "which is --codes run/log.jsonl"),
        (train, "CODES --run vq.pt", "--run vq.pt: is a file; expected a folder"),
        (train_tokenizer, "--data IMAGES --val IMAGES --run vq.pt", "--run vq.pt: is a file; expected a folder"),
    ],
)
def test_an_output_that_is_an_input_is_refused(
    given: Path,
    training_images: Path,
    verb: ModuleType,
    arguments: str,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(given) | contents(training_images)
    words = arguments.replace("CODES", " ".join(CODES)).split()
    assert verb.main([word.replace("IMAGES", str(training_images)) for word in words]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert contents(given) | contents(training_images) == before


def test_a_run_of_clips_does_not_lie_in_the_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.zeros((2, 3, 8, 8, 1), np.uint8).tofile(tmp_path / "clips.u8")
    np.zeros(2, np.uint8).tofile(tmp_path / "labels.u8")
    meta = '{"count": 2, "frames": 3, "size": 8, "channels": 1, "class_names": ["a"]}'
    (tmp_path / "meta.json").write_text(meta)
    small = ["--levels", "4", "3", "--widths", "4", "8", "--time-strides", "2", "--norm-groups", "2"]
    clips = ["--data", str(tmp_path), "--val", str(tmp_path), *small]
    assert train_video.main([*clips, "--run", str(tmp_path / "run")]) == 2
    assert "in the folder of --data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("labels", np.array([0.9, 0.2]), "labels of shape (2,) and type float64; expected whole numbers"),
        ("labels", np.array(["0", "1"]), "labels of shape (2,) and type <U1; expected whole numbers"),
        ("labels", np.array([True, False]), "labels of shape (2,) and type bool; expected whole numbers"),
        ("labels", np.array([0, 2**64 - 1], np.uint64), "has labels 0..18446744073709551615 and 2 class names"),
        ("labels", np.array([0, -1]), "has labels -1..0 and 2 class names"),
        ("class_names", np.array([1, 2]), "has class_names of shape (2,) and type int64; expected texts"),
        ("class_names", np.array([b"a", b"b"]), "has class_names of shape (2,) and type |S1; expected texts"),
        ("class_names", np.array([["a", "b"]]), "has class_names of shape (1, 2) and type <U1; expected texts"),
        ("class_names", np.array("ab"), "has class_names of shape () and type <U2; expected texts"),
    ],
)
def test_codes_with_labels_or_names_of_another_type_are_refused(
    given: Path, entry: str, value: np.ndarray, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"codes": np.zeros((2, 4, 4), np.uint16), "labels": np.array([0, 1]), "class_names": np.array(["a", "b"])}
    np.savez(given / "bad.npz", **(content | {entry: value}))
    codes = ["--codes", "bad.npz", "--val", "bad.npz", "--vocab", "16", "--run", "new"]
    assert train.main(codes) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("parvis: error: bad.npz: has ")
    assert error.endswith("; encode the images again\n")
    assert not (given / "new").exists()


def test_an_empty_device_is_said(given: Path, training_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ["--data", str(training_images), "--val", str(training_images), "--run", "new"]
    assert train_tokenizer.main([*images, "--device", ""]) == 2
    assert "parvis: error: --device with an empty text: expected auto, cpu" in capsys.readouterr().err


def test_outputs_beside_inputs_are_allowed(given: Path, training_images: Path) -> None:
    keep_inputs("--out", [given / "run/codes.npz"], tokenizer=given / "run/model.pt")
    keep_inputs("--out", [given / "run/codes.npz"], tokenizer=given / "run")  # no weights are mixed with it
    keep_inputs("--run", [given / "run/deeper/model.pt"], tokenizer=given / "run", init=None)
    keep_inputs("--out", [training_images.parent / "codes.npz"], data=training_images)
    (given / "shards").mkdir()
    (given / "shards/a-00001-of-00002.safetensors").touch()
    index = given / "shards/a.safetensors.index.json"
    with pytest.raises(InputError, match="in the folder of --tokenizer"):
        keep_inputs("--out", [given / "shards/a-00001-of-00002.safetensors"], tokenizer=index)
