"""What a trainer writes: a checkpoint before all else, so that a disk that fills up costs a picture and no steps."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from par_model.config import VQConfig
from par_model.system import EXPLAINED, explain, naming
from par_model.training.cli import encode
from par_model.training.cli import tokenizer as train_tokenizer
from par_model.training.cli import transformer as train
from par_model.training.cli import video_tokenizer as train_video
from par_model.training.files import InputError
from par_model.training.run import Run
from par_model.vq import VQModel
from par_runtime import system

pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture
def trainers(training_images: Path, tmp_path: Path) -> list[tuple[ModuleType, list[str]]]:
    """The trainers with the options of a run of one step, without --run."""
    clips = tmp_path / "clips"
    clips.mkdir()
    np.zeros((2, 3, 8, 8, 1), np.uint8).tofile(clips / "clips.u8")
    np.zeros(2, np.uint8).tofile(clips / "labels.u8")
    meta = '{"count": 2, "frames": 3, "size": 8, "channels": 1, "class_names": ["a"]}'
    (clips / "meta.json").write_text(meta)
    with (tmp_path / "codes.npz").open("wb") as file:
        np.savez(file, codes=np.zeros((4, 4, 4), np.uint16), labels=np.zeros(4, np.uint8), class_names=np.array(["a"]))
    config = VQConfig(16, 4, channels=8, channel_multipliers=(1, 2), res_blocks=1, z_channels=8, norm_groups=4)
    torch.save({"model": VQModel(config).state_dict(), "config": vars(config) | {"kind": "vq"}}, tmp_path / "vq.pt")
    images = ["--data", str(training_images), "--val", str(training_images)]
    codes = ["--codes", str(tmp_path / "codes.npz"), "--val", str(tmp_path / "codes.npz"), "--vocab", "16"]
    small = ["--codes", "16", "--channels", "8", "--multipliers", "1", "2", "--z-channels", "8", "--norm-groups", "4"]
    video = ["--levels", "4", "3", "--widths", "4", "8", "--time-strides", "2", "--norm-groups", "2"]
    once = ["--steps", "1", "--report", "1", "--batch", "2"]
    return [
        (train_tokenizer, [*images, *small, *once]),
        (train_video, ["--data", str(clips), "--val", str(clips), *video, *once]),
        (
            train,
            [*codes, "--dim", "16", "--layers", "1", "--heads", "2", "--tokenizer", str(tmp_path / "vq.pt"), *once],
        ),
    ]


def full(number: int, text: str | None = None) -> Callable[..., Any]:
    def fails(*_: object, **__: object) -> None:
        raise OSError(text) if text else OSError(number, os.strerror(number))

    return fails


def test_a_sheet_that_cannot_be_written_costs_no_steps(
    trainers: list[tuple[ModuleType, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i, (verb, options) in enumerate(trainers):
        run = tmp_path / f"run{i}"
        sheet = run / ("sheet-000001.png" if verb is train else "sheet.png")
        for fails, text in (
            (full(errno.ENOSPC), f"no space left on the disk of {sheet}; free some or choose another place"),
            (full(errno.EFBIG), f"{sheet} is larger than this system or its limit (ulimit -f) allows"),
            (full(0, "encoder error -2"), f"{sheet}: encoder error -2"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(Image.Image, "save", fails)
                assert verb.main([*options, "--run", str(run)]) == 2
            lines = capsys.readouterr().err.splitlines()
            assert lines[-1].startswith(f"parvis: error: {text}")
            assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 1
            assert torch.load(run / "model.pt", weights_only=True)["model"]
            assert not sheet.exists()
            (run / "checkpoint.pt").unlink()


def test_a_log_that_cannot_be_written_costs_no_steps(
    trainers: list[tuple[ModuleType, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Path.open

    def open_log(path: Path, mode: str = "r", **more: Any) -> Any:
        if path.name == "log.jsonl" and mode == "a":
            with real(path, mode) as file:
                file.write("half a li")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, **more)

    for i, (verb, options) in enumerate(trainers):
        run = tmp_path / f"run{i}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_log)
            assert verb.main([*options, "--run", str(run)]) == 2
        assert f"no space left on the disk of {run / 'log.jsonl'}; free some" in capsys.readouterr().err
        assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 1
        assert (run / "log.jsonl").read_bytes() == b""  # no half line


@pytest.mark.parametrize("name", ["log.jsonl", "sheet.png", "checkpoint.pt", "model.pt", "sheet-000001.png"])
def test_a_run_file_that_is_a_folder_is_found_before_the_first_step(
    trainers: list[tuple[ModuleType, list[str]]], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, (verb, options) in enumerate(trainers):
        run = tmp_path / f"run{i}"
        (run / name).mkdir(parents=True)
        assert verb.main([*options, "--run", str(run)]) == 2
        text = (
            f"parvis: error: {run / name}: is a folder; expected a file: take it away, or give another --run folder\n"
        )
        assert capsys.readouterr().err == text
        assert [path.name for path in run.iterdir()] == [name]


def test_a_folder_without_room_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", full(errno.EROFS))
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)) as caught, Run(tmp_path / "run"):
        pass
    assert caught.value.filename == str(tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    (tmp_path / "log.jsonl").write_text("before\n")
    with Run(tmp_path):
        assert (tmp_path / "log.jsonl").read_text() == "before\n"
        assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_errors_of_the_system_are_said_in_the_words_of_the_other_verbs() -> None:
    assert system._EXPLAINED == EXPLAINED
    for number in errno.errorcode:
        for name in ("a/b", "x" * 400, None):
            error = OSError(number, os.strerror(number), name)
            assert explain(error) == system.explain(error)
    assert explain(OSError("no number")) == system.explain(OSError("no number")) == "no number"


@pytest.mark.parametrize(("to", "how"), [("link", "in a circle"), ("nothing", "nowhere")])
def test_a_link_that_leads_to_no_folder_is_named(
    trainers: list[tuple[ModuleType, list[str]]],
    tmp_path: Path,
    to: str,
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    link = tmp_path / "link"
    link.symlink_to(to)
    for verb, options in trainers:
        assert verb.main([*options, "--run", str(link)]) == 2
        assert f"--run {link}: is a link that leads to no folder; expected a folder" in capsys.readouterr().err
        assert verb.main([*options, "--run", str(link / "run")]) == 2
        line = f"parvis: error: {link}: its links lead {how}; choose another place\n"
        assert capsys.readouterr().err == line
    data = trainers[0][1][:2]
    assert encode.main([*data, "--tokenizer", str(tmp_path / "vq.pt"), "--out", str(link / "a.npz")]) == 2
    assert capsys.readouterr().err == line


def test_the_verbs_say_how_to_mend_an_error_of_the_system(
    trainers: list[tuple[ModuleType, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    run, out = tmp_path / "file" / "run", tmp_path / ("x" * 300)
    for verb, options in trainers:
        assert verb.main([*options, "--run", str(run)]) == 2
        assert "is a file where a folder is expected; choose another place\n" in capsys.readouterr().err
    data = trainers[0][1][:2]
    assert encode.main([*data, "--tokenizer", str(tmp_path / "vq.pt"), "--out", str(out)]) == 2
    assert "xxx: the name is too long for this file system; give a shorter one\n" in capsys.readouterr().err


def test_a_name_is_put_into_an_error_without_a_number() -> None:
    with pytest.raises(OSError, match="encoder error") as caught, naming(Path("a/b.png")):
        raise OSError("encoder error -2")
    assert explain(caught.value) == "a/b.png: encoder error -2"
    with pytest.raises(InputError), naming(Path("a")):
        raise InputError("as it is")
