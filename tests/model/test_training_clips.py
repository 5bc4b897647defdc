"""The trainers over clips: from raw clips to a video tokenizer, codes and a model; resumed runs end as whole ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from recipe_scripts import scripts

from par_model.checkpoint import open_checkpoint, par_config, video_config
from par_model.training import video as video_training
from par_model.training.cli import encode as encode_codes
from par_model.training.cli import transformer as train
from par_model.training.cli import video_tokenizer as train_video
from par_model.training.clips import ClipFolder
from par_model.training.device import autocast
from par_model.training.files import InputError
from par_model.training.run import load_video_tokenizer

pytestmark = pytest.mark.usefixtures("without_gpu")

SMALL = [
    "--levels",
    "4",
    "3",
    "--widths",
    "4",
    "8",
    "--time-strides",
    "2",
    "--last-blocks",
    "1",
    "--norm-groups",
    "2",
    "--batch",
    "4",
    "--report",
    "2",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips of 3 frames of 8x8, grey, in 2 classes: a bright column that moves right, or left."""
    folder = tmp_path_factory.mktemp("clips")
    labels = np.arange(12, dtype=np.uint8) % 2
    pixels = np.zeros((12, 3, 8, 8, 1), np.uint8)
    for i, label in enumerate(labels):
        for t in range(3):
            pixels[i, t, :, 3 + (t if label == 0 else -t)] = 200
    write(folder, pixels, labels)
    return folder


def write(folder: Path, pixels: np.ndarray, labels: np.ndarray, **changed: object) -> None:
    folder.mkdir(exist_ok=True)
    pixels.tofile(folder / "clips.u8")
    labels.tofile(folder / "labels.u8")
    count, frames, size, _, channels = pixels.shape
    meta = {"count": count, "frames": frames, "size": size, "channels": channels, "class_names": ["right", "left"]}
    (folder / "meta.json").write_text(json.dumps(meta | changed))


def test_from_clips_to_a_trained_model(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["--data", str(clips), "--val", str(clips), *SMALL, "--steps", "4"]
    assert train_video.main([*base, "--run", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "sheet.png").stat().st_size > 0
    real = video_training.Run

    class Stopping(real):  # type: ignore[misc, valid-type]
        def log(self, **row: object) -> None:
            super().log(**row)
            self.should_stop = row["step"] == 2

    with monkeypatch.context() as patch:  # stopped after two steps, as Ctrl-C does it
        patch.setattr(video_training, "Run", Stopping)
        train_video.main([*base, "--run", str(tmp_path / "b")])
    assert not (tmp_path / "b" / "model.pt").exists()
    assert train_video.main([*base, "--run", str(tmp_path / "b"), "--resume"]) == 0
    whole, resumed = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["live"] for run in "ab")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    file = tmp_path / "a" / "model.pt"
    config = video_config(open_checkpoint(file))
    assert (config.levels, config.widths, config.norm_groups) == ((4, 3), (4, 8), 2)
    codes = tmp_path / "codes.npz"
    assert encode_codes.main(["--data", str(clips), "--tokenizer", str(file), "--out", str(codes)]) == 0
    with np.load(codes) as saved:
        assert saved["codes"].shape == (12, 2, 4, 4)
        with torch.no_grad(), autocast(torch.device("cpu")):
            model = load_video_tokenizer(file).eval()
            features = model.features(ClipFolder.open(clips).batch(np.arange(12)))
            assert (model.quantizers.ids(features.float()).numpy() == saved["codes"]).all()
    model_options = ["--codes", str(codes), "--val", str(codes), "--vocab", "12", "--tokenizer", str(file)]
    model_options += [
        "--dim",
        "24",
        "--layers",
        "1",
        "--heads",
        "2",
        "--batch",
        "4",
        "--steps",
        "2",
        "--report",
        "2",
        "--sheet",
        "2",
        "--dropout",
        "0",
    ]
    assert train.main([*model_options, "--run", str(tmp_path / "n4")]) == 0
    assert (tmp_path / "n4" / "sheet-000002.png").stat().st_size > 0
    n4 = open_checkpoint(tmp_path / "n4" / "model.pt")
    assert par_config(n4).grid == (2, 4, 4)
    # Another n begins with the same weights, but for its learnable tokens.
    n1 = [
        *model_options,
        "--group-size",
        "1",
        "--init",
        str(tmp_path / "n4" / "model.pt"),
        "--run",
        str(tmp_path / "n1"),
    ]
    assert train.main([*n1, "--lr", "1e-12"]) == 0
    begun = open_checkpoint(tmp_path / "n1" / "model.pt")
    assert par_config(begun).group_size == 1
    assert torch.allclose(begun.tensor("norm.weight"), n4.tensor("norm.weight"), atol=1e-4)
    other = [*model_options, "--init", str(tmp_path / "n4" / "model.pt"), "--run", str(tmp_path / "other")]
    other[other.index("--dim") + 1] = "32"
    assert train.main(other) == 2


def test_clips_that_are_none(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_waiting: None) -> None:
    pixels, labels = np.zeros((2, 3, 8, 8, 1), np.uint8), np.zeros(2, np.uint8)
    cases = {
        "longer": (pixels, labels, {"count": 3}, "not the raw form of clips"),
        "channels": (pixels.repeat(2, -1), labels, {}, "clips of 2 channels; expected 3"),
        "labels": (pixels, labels[:1], {}, "2 clips, 1 labels"),
        "class": (pixels, labels + 2, {}, "labels up to 2 and 2 class names"),
    }
    for name, (of_case, its_labels, changed, message) in cases.items():
        write(tmp_path / name, of_case, its_labels, **changed)
        with pytest.raises(InputError, match=message):
            ClipFolder.open(tmp_path / name)
    with pytest.raises(InputError, match="no such folder"):
        ClipFolder.open(tmp_path / "missing")
    for name in ("clips.u8", "labels.u8", "meta.json"):
        write(tmp_path / f"pipe {name}", pixels, labels)
        (tmp_path / f"pipe {name}" / name).unlink()
        os.mkfifo(tmp_path / f"pipe {name}" / name)
        with pytest.raises(InputError, match=f"{name}: is a pipe or a device; expected a file"):
            ClipFolder.open(tmp_path / f"pipe {name}")
    write(tmp_path / "even", np.zeros((2, 4, 8, 8, 1), np.uint8), labels)
    even = ["--data", str(tmp_path / "even"), "--val", str(clips), "--run", str(tmp_path / "run"), *SMALL]
    assert train_video.main(even) == 2
    assert "clips of 4 frames of 8x8 pixels; expected one frame more than a multiple of 2" in capsys.readouterr().err


def test_a_garment_bounces() -> None:
    """The recipe's clips: a garment stays whole inside its frame, and moves at its speed between bounces."""
    with scripts("clips") as (recipe,):
        bounce(recipe)


def bounce(recipe: ModuleType) -> None:
    garment = np.full((recipe.GARMENT, recipe.GARMENT), 200.0, np.float32)
    for i in range(20):
        frames, step = recipe.clip(garment, (1, i))
        assert frames.shape == (17, 32, 32)
        assert recipe.SLOWEST <= np.hypot(*step) <= recipe.FASTEST
        mass = frames.astype(np.float64).sum((1, 2))
        assert np.allclose(mass, garment.sum(), rtol=0.01)  # nothing leaves the frame
        rows = (frames.sum(2) * np.arange(32)).sum(1) / mass
        moved = np.abs(np.diff(rows))
        assert (moved < abs(step[0]) + 0.1).all()
        assert (np.abs(moved - abs(step[0])) < 0.1).sum() >= 10  # the others are bounces
