"""``--resume`` with a damaged checkpoint, or with other options than the run began with: one line, nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from par_model.training.cli import tokenizer as train_tokenizer
from par_model.training.cli import transformer as train
from par_model.training.cli import video_tokenizer as train_video
from par_model.training.files import InputError, alone_in
from par_model.training.run import Run

pytestmark = pytest.mark.usefixtures("without_gpu")

ONCE = ["--steps", "1", "--report", "1", "--batch", "2"]
VERBS = {"tokenizer": train_tokenizer, "video": train_video, "model": train, "muon": train, "encoder": train_tokenizer}


@pytest.fixture(scope="module")
def made(training_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The options of one run of each trainer, which are in folders of these names beside each other."""
    folder = tmp_path_factory.mktemp("runs")
    clips = folder / "clips"
    clips.mkdir()
    np.zeros((2, 3, 8, 8, 1), np.uint8).tofile(clips / "clips.u8")
    np.zeros(2, np.uint8).tofile(clips / "labels.u8")
    meta = '{"count": 2, "frames": 3, "size": 8, "channels": 1, "class_names": ["a"]}'
    (clips / "meta.json").write_text(meta)
    with (folder / "codes.npz").open("wb") as file:
        np.savez(file, codes=np.zeros((4, 4, 4), np.uint16), labels=np.zeros(4, np.uint8), class_names=np.array(["a"]))
    images = ["--data", str(training_images), "--val", str(training_images)]
    codes = ["--codes", str(folder / "codes.npz"), "--val", str(folder / "codes.npz"), "--vocab", "16"]
    small = ["--codes", "16", "--channels", "8", "--multipliers", "1", "2", "--z-channels", "8", "--norm-groups", "4"]
    model = [*codes, *["--dim", "16", "--layers", "1", "--heads", "2"]]
    runs = {
        "tokenizer": [*images, *small],
        "video": [
            *["--data", str(clips), "--val", str(clips)],
            *["--levels", "4", "3", "--widths", "4", "8", "--time-strides", "2", "--norm-groups", "2"],
        ],
        "model": model,
        "muon": [*model, "--optimizer", "muon"],
        "encoder": [*images, "--encoder-for", str(folder / "tokenizer" / "model.pt")],
    }
    for name, options in runs.items():
        options += [*ONCE, "--run", str(folder / name)]
        assert VERBS[name].main(options) == 0
        assert VERBS[name].main([*options, "--resume"]) == 0
    return runs


def refused(
    verb: ModuleType, options: list[str], run: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert verb.main([*options, "--run", str(run), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("parvis: error: --resume: ")
    assert all(text in error for text in texts), error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("name", ["tokenizer", "video", "model"])
def test_a_damaged_checkpoint_is_one_line_and_kept(
    made: dict[str, list[str]], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_waiting: None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(made[name][-1], run)
    file = run / "checkpoint.pt"
    whole = file.read_bytes()
    for content, text in (
        (b"", "is empty"),
        (whole[:100], "not a readable PyTorch checkpoint"),
        (whole[: len(whole) // 2], "not a readable PyTorch checkpoint"),
        (whole[:-1], "not a readable PyTorch checkpoint"),
        (b"garbage" * 1000, "is text, not a checkpoint"),
    ):
        file.write_bytes(content)
        again = "without a whole copy of it, begin again in another --run folder"
        refused(VERBS[name], made[name], run, [f"--resume: {file}: ", text, again], capsys)
    content = torch.load(Path(made[name][-1]) / "checkpoint.pt", weights_only=True)
    for value, text in (
        ([1, 2], "holds no run of a training"),
        ({"model": content["model"], "config": content["config"]}, "holds no run of a training"),
        ({"a": 1}, "holds no run of a training"),
        ({key: content[key] for key in content if key != "step"}, "does not fit this training (KeyError: 'step')"),
        (content | {"live": {}}, "does not fit this training (RuntimeError"),
        (content | {"model": {}}, "does not fit this training (KeyError"),
    ):
        torch.save(value, file)
        refused(VERBS[name], made[name], run, [str(file), text, "nothing was changed"], capsys)
    file.unlink()
    os.mkfifo(file)
    assert VERBS[name].main([*made[name], "--run", str(run), "--resume"]) == 2
    assert f"{file}: is a pipe, not a file" in capsys.readouterr().err
    file.unlink()
    file.write_bytes(whole)
    assert VERBS[name].main([*made[name], "--run", str(run), "--resume", "--steps", "2"]) == 0


def test_numbers_that_no_training_writes_are_one_line(
    made: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step below 0, a code counted NaN times, a momentum of another shape: whatever reads it would fail, or go on."""
    run = tmp_path / "run"
    nan, wide = torch.full((16,), torch.nan), torch.ones(3, 3, 3)

    def check(name: str, value: dict[str, Any], text: str) -> None:
        torch.save(value, run / "checkpoint.pt")
        refused(VERBS[name], made[name], run, [str(run / "checkpoint.pt"), text, "nothing was changed"], capsys)

    for name, content in {n: torch.load(Path(made[n][-1]) / "checkpoint.pt", weights_only=True) for n in VERBS}.items():
        shutil.copytree(made[name][-1], run)
        expected = "expected 0 to 1000000000000000: without a whole copy of it, begin again in another --run folder"
        for step, given in ((-1, "-1"), ("3", "'3'"), (2.7, "2.7"), (True, "True"), (10**16, "1" + "0" * 16)):
            check(name, content | {"step": step}, f"its step is {given}; {expected}")
        check(name, content | {"step": torch.tensor(1)}, f"its step is tensor(1); {expected}")
        for seconds in ("x", -1.0, float("nan"), True):
            check(name, content | {"seconds": seconds}, "its seconds are")
        optimizers = [content["optimizer"]] if "optimizer" in content else content["optimizers"]
        for i, optimizer in enumerate(optimizers):
            kept = "exp_avg" if "exp_avg" in optimizer["state"][0] else "momentum_buffer"
            for value, text in (
                (5.0, "(TypeError: 5.0 in place of a tensor)"),
                (wide, "(ValueError: a tensor of shape (3, 3, 3), not ("),
                (None, f"(KeyError: '{kept}')"),
                (optimizer["state"][0][kept] * torch.inf, f"state.0.{kept} holds a number that is not finite"),
            ):
                first = {key: each for key, each in optimizer["state"][0].items() if key != kept}
                changed = optimizer | {
                    "state": optimizer["state"] | {0: first | ({} if value is None else {kept: value})}
                }
                new = [changed if j == i else each for j, each in enumerate(optimizers)]
                check(name, content | ({"optimizer": new[0]} if "optimizer" in content else {"optimizers": new}), text)
        key = next(iter(content["model"]))
        for part in ("live", "model"):
            bad = content[part] | {key: torch.full_like(content[part][key], torch.nan)}
            check(name, content | {part: bad}, f"{part}.{key} holds a number that is not finite (NaN or infinite)")
        check(name, content | {"model": content["model"] | {key: torch.tensor(1.0)}}, "a tensor of shape (), not (")
        if "usage" in content:
            for usage, text in (
                (nan, "usage holds a number that is not finite"),
                (wide, "(ValueError: a tensor of shape (3, 3, 3), not (16,))"),
                (torch.tensor(1.0), "(ValueError: a tensor of shape (), not (16,))"),
                ([1, 2], "(TypeError: [1, 2] in place of a tensor)"),
            ):
                check(name, content | {"usage": usage}, text)
        shutil.rmtree(run)


def test_settings_of_a_saved_optimizer_are_not_taken(made: dict[str, list[str]], tmp_path: Path) -> None:
    """They are those of the options, or constants: those of a damaged checkpoint would fail at the first update."""
    shutil.copytree(made["model"][-1], tmp_path / "run")
    content = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    for group in content["optimizers"][0]["param_groups"]:
        group["betas"] = "none"
    torch.save(content, tmp_path / "run/checkpoint.pt")
    assert train.main([*made["model"], "--run", str(tmp_path / "run"), "--resume", "--steps", "2"]) == 0
    content = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert content["optimizers"][0]["param_groups"][0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("name", "more", "was", "now"),
    [
        ("tokenizer", "--channels 16", "--channels 8", "--channels 16"),
        ("tokenizer", "--codes 32", "--codes 16", "--codes 32"),
        ("tokenizer", "--multipliers 1 1", "--multipliers 1 2", "--multipliers 1 1"),
        ("tokenizer", "--multipliers 1 2 2", "--multipliers 1 2;", "--multipliers 1 2 2;"),
        ("tokenizer", "--z-channels 16 --res-blocks 2", "--res-blocks 1, --z-channels 8", "--res-blocks 2, --z-chan"),
        ("tokenizer", "--norm-groups 2", "--norm-groups 4", "--norm-groups 2"),
        ("tokenizer", "--encoder-for RUNS/tokenizer/model.pt", "without --encoder-for", "given now: with"),
        ("encoder", "", "with --encoder-for", "given now: without"),
        ("video", "--levels 4 5", "--levels 4 3", "--levels 4 5"),
        ("video", "--widths 4 4", "--widths 4 8", "--widths 4 4"),
        ("video", "--time-strides 1", "--time-strides 2", "--time-strides 1"),
        ("model", "--dim 32", "--dim 16", "--dim 32"),
        ("model", "--layers 2", "--layers 1", "--layers 2"),
        ("model", "--heads 1", "--heads 2", "--heads 1"),
        ("model", "--group-size 1", "--group-size 4", "--group-size 1"),
        ("model", "--vocab 20", "--vocab 16", "--vocab 20"),
        ("model", "--optimizer muon", "--optimizer adamw", "--optimizer muon"),
        ("muon", "--optimizer adamw", "--optimizer muon", "--optimizer adamw"),
    ],
)
def test_other_options_than_the_run_began_with_are_one_line(
    made: dict[str, list[str]], name: str, more: str, was: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(made[name][-1])
    options = [*made["tokenizer" if name == "encoder" else name], *more.replace("RUNS", str(run.parent)).split()]
    if "--encoder-for" in more:  # a copy: weights inside the folder of the run are refused before
        shutil.copy(run / "model.pt", run.parent / "given.pt")
        options[-1] = str(run.parent / "given.pt")
    texts = [f"the run in {run} was trained with", was, now, "give the same options, or another --run folder"]
    refused(VERBS[name], options, run, texts[1:] if "encoder" in was else texts, capsys)


def test_a_run_of_another_trainer_is_one_line(made: dict[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    verbs = {"tokenizer": "train-tokenizer", "video": "train-video-tokenizer", "model": "train"}
    for name, verb in verbs.items():
        for other, of in verbs.items():
            if name != other:
                text = f"is a run of parvis {of}, not of parvis {verb};"
                refused(VERBS[name], made[name], Path(made[other][-1]), [text], capsys)


@pytest.mark.parametrize("name", VERBS)
def test_two_trainings_in_one_folder_are_refused(
    made: dict[str, list[str]], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    run = tmp_path / "run"
    with alone_in("--run", run):
        assert VERBS[name].main([*made[name], "--run", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"parvis: error: --run {run}: another process writes into it now; wait until that one has ended, or give "
        "another folder\n"
    )
    assert not run.exists()  # nothing was written into it
    with Run(run), pytest.raises(InputError, match="another process"), Run(run):
        pass
    with Run(run):  # it is free again
        pass


def test_the_lock_of_a_killed_process_ends_with_it(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    program = (
        "import sys, time; from pathlib import Path; from par_model.training.files import alone_in\n"
        "with alone_in('--run', Path(sys.argv[1])):\n    print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(InputError, match="another process"), alone_in("--run", tmp_path):
            pass
        process.kill()
    with alone_in("--run", tmp_path):
        pass


def test_a_folder_that_its_last_process_removes_is_not_had_by_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed between the opening and the lock: that would be the lock of a folder that nobody sees."""
    fcntl = pytest.importorskip("fcntl")
    run, real = tmp_path / "run", fcntl.flock

    def flock(*given: int) -> None:
        run.rmdir()
        real(*given)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="another process"), alone_in("--run", run):
        pass
    monkeypatch.undo()
    with alone_in("--run", run):
        assert run.is_dir()


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    for failure in (InputError("bad"), None):
        with suppress(InputError), alone_in("--run", tmp_path / "new" / "run"):
            assert (tmp_path / "new" / "run").is_dir()
            if failure is not None:
                raise failure
        assert not list(tmp_path.iterdir())
    with alone_in("--run", tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "log.jsonl").touch()
    assert (tmp_path / "new" / "run" / "log.jsonl").exists()


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    text = r"log\.jsonl: is a pipe or a device; expected a file"
    with pytest.raises(InputError, match=text):
        Run(tmp_path).log(step=0)
    with pytest.raises(InputError, match=text), Run(tmp_path):  # before any step
        pass


def test_a_file_system_without_locks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS does of a folder

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone_in("--run", tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_dropout_and_rate_may_be_others(made: dict[str, list[str]], tmp_path: Path) -> None:
    shutil.copytree(made["model"][-1], tmp_path / "run")
    more = ["--run", str(tmp_path / "run"), "--resume", "--dropout", "0", "--lr", "1e-4", "--steps", "2"]
    assert train.main([*made["model"], *more]) == 0
