"""Trainings that end after a time: the schedule comes down with it, and a resumed one counts what was before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from par_model.training.cli import tokenizer as train_tokenizer
from par_model.training.cli import transformer as train
from par_model.training.run import Run, cosine

pytestmark = pytest.mark.usefixtures("without_gpu")


def test_the_schedule_is_as_far_as_the_time_or_the_steps() -> None:
    def rate(step: int, share: float) -> float:
        return cosine(step, 100, 1.0, 10, floor=0.0, share=share)

    assert rate(55, 0.0) == rate(55, 0.5) == pytest.approx(0.5)
    assert rate(20, 0.5) == pytest.approx(0.5)  # the time is further
    assert rate(20, 1.0) == rate(20, 1.7) == pytest.approx(0.0)
    assert rate(5, 0.9) == rate(5, 0.0)  # a warm-up goes by steps
    assert cosine(20, 10**9, 1.0, 10, floor=1.0, share=0.9) == 1.0


def test_a_run_is_over_after_its_minutes(tmp_path: Path) -> None:
    run = Run(tmp_path, minutes=2.0, seconds_before=60.0)
    assert run.share == pytest.approx(0.5, abs=0.2)
    assert not run.done(3, 4)
    assert run.done(4, 4)
    run.seconds_before = 120.0
    assert run.done(1, 4)
    assert not run.done(0, 4)  # one step at least: it has a report
    forever = Run(tmp_path, seconds_before=1e9)
    assert (forever.share, forever.done(3, 4)) == (0.0, False)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_training_of_minutes_ends_in_order_and_can_go_on(tmp_path: Path, training_images: Path) -> None:
    codes, labels = np.zeros((16, 4, 4), np.uint16), np.zeros(16, np.int64)
    np.savez(tmp_path / "codes.npz", codes=codes, labels=labels, class_names=np.array(["a"]))
    files = ["--codes", str(tmp_path / "codes.npz"), "--val", str(tmp_path / "codes.npz"), "--vocab", "16"]
    model = [*files, "--dim", "16", "--layers", "1", "--heads", "2", "--batch", "4", "--report", "1000000"]
    images = ["--data", str(training_images), "--val", str(training_images), "--report", "1000000", "--batch", "4"]
    small = ["--codes", "16", "--channels", "8", "--multipliers", "1", "2", "--z-channels", "8", "--norm-groups", "4"]
    for trainer, options in ((train, [*model, "--schedule", "cosine"]), (train_tokenizer, [*images, *small])):
        run = tmp_path / trainer.__name__.rpartition(".")[2]
        endless = [*options, "--run", str(run), "--steps", "1000000000"]
        assert trainer.main([*endless, "--minutes", "0.02"]) == 0
        assert [row["seconds"] >= 1.2 for row in rows(run)] == [True]  # one report, at the end
        first = torch.load(run / "model.pt", weights_only=True)
        assert trainer.main([*endless, "--minutes", "0.02", "--resume"]) == 0  # its time was over
        again = torch.load(run / "model.pt", weights_only=True)["model"]
        assert all(torch.equal(first["model"][key], again[key]) for key in again)
        longer = str(rows(run)[0]["seconds"] / 60 + 0.05)
        assert trainer.main([*endless, "--minutes", longer, "--resume"]) == 0
        assert rows(run)[-1]["step"] > rows(run)[0]["step"]


def test_other_classes_than_those_of_the_training_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels are numbers: codes whose names stand in another order would be those of other classes."""
    codes, labels = np.zeros((2, 4, 4), np.uint16), np.array([0, 1])
    for name, names in (("codes", "ab"), ("turned", "ba"), ("more", "abc")):
        np.savez(tmp_path / f"{name}.npz", codes=codes, labels=labels, class_names=np.array(list(names)))

    def trained(codes: str, val: str, *more: str) -> int:
        files = ["--codes", str(tmp_path / f"{codes}.npz"), "--val", str(tmp_path / f"{val}.npz"), "--vocab", "16"]
        sizes = ["--dim", "16", "--layers", "1", "--heads", "2", "--batch", "2", "--steps", "1"]
        return train.main([*files, *sizes, "--run", str(tmp_path / "run"), *more])

    for val, why in (("turned", "class 0 is 'b', not 'a'"), ("more", "has 3 classes, not 2")):
        assert trained("codes", val) == 2
        text = f"{val}.npz: {why} as in {tmp_path / 'codes.npz'}; encode images of the same classes"
        assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert trained("codes", "codes") == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert trained("turned", "turned", "--resume") == 2
    text = f"turned.npz, class 0 is 'b', not 'a' as in the run in {tmp_path / 'run'}; give the same options"
    assert text in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_labels_without_a_class_name_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = tmp_path / "codes.npz"
    np.savez(codes, codes=np.zeros((2, 4, 4), np.uint16), labels=np.array([0, 3]), class_names=np.array(["a", "b"]))
    assert train.main(["--codes", str(codes), "--val", str(codes), "--vocab", "16", "--run", str(tmp_path / "r")]) == 2
    assert "has labels 0..3 and 2 class names; encode the images again" in capsys.readouterr().err
