"""Every number that a trainer takes has limits, and one beyond them is one line before any work."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from par_model.training.cli import encode, numbers, parsed
from par_model.training.cli import tokenizer as train_tokenizer
from par_model.training.cli import transformer as train
from par_model.training.cli import video_tokenizer as train_video
from par_model.training.files import InputError

VERBS = (train_tokenizer, train_video, train, encode)
FILES = {
    train_tokenizer: ["--data", "d", "--val", "d", "--run", "run"],
    train_video: ["--data", "d", "--val", "d", "--run", "run"],
    train: ["--codes", "c", "--val", "c", "--vocab", "16", "--run", "run"],
    encode: ["--data", "d", "--tokenizer", "t", "--out", "o"],
}
NUMBERS = [
    (verb, action.option_strings[0], action.type)
    for verb in VERBS
    for action in verb.parser()._actions
    if action.type in (int, float)
]


@pytest.mark.parametrize(("verb", "option", "kind"), NUMBERS)
def test_a_number_beyond_its_limits_is_one_line(
    verb: ModuleType,
    option: str,
    kind: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    limit = numbers.LIMITS[option[2:].replace("-", "_")]
    assert limit.least in (0, 1, 2)
    for value in ("-5", "1" + "0" * 40) if kind is int else ("-1", "nan", "inf", "-inf", "1e400"):
        assert verb.main([*FILES[verb], f"{option}={value}"]) == 2
        error = capsys.readouterr().err
        assert re.match(rf"parvis: error: {option} (-?[\w.]+|a very large number): expected .*\d", error), error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "options", "text"),
    [
        (train, "--lr 0", "--lr 0.0: expected a number above 0, at most 1000; 0.001 is a usual one"),
        (train_video, "--lr 0", "--lr 0.0: expected a number above 0"),
        (train, "--muon-lr 0", "--muon-lr 0.0: expected a number above 0, at most 1000; 0.02 is the usual one"),
        (train, "--report 0", "--report 0: expected 1 to 1000000000000000"),
        (train, "--sheet 0", "--sheet 0: expected 1 to"),
        (train_tokenizer, "--steps 0", "--steps 0: expected 1 to"),
        (train, "--dropout 2", "--dropout 2.0: expected 0 or more, and below 1"),
        (train, "--ema 1", "--ema 1.0: expected 0 or more, and below 1"),
        (train, "--dim 0", "--dim 0: expected 1 to 65536"),
        (train_tokenizer, "--multipliers 1 0", "--multipliers 0: expected 1 to 1024"),
        (train_tokenizer, "--norm-groups 0", "--norm-groups 0: expected 1 to"),
        (train_video, "--levels 8 1", "--levels 1: expected 2 to"),
        (train_video, "--levels 8 -1", "--levels -1: expected 2 to"),
        (train, "--lr -1e-3", "--lr -0.001: expected a number above 0"),
        (train, "--lr -.5", "--lr -0.5: expected a number above 0"),
        (train, "--lr -inf", "--lr -inf: expected a number above 0"),
        (train_video, "--time-strides 3", "--time-strides 3: expected 1 to 2"),
    ],
)
def test_limits_say_what_is_expected(
    verb: ModuleType, options: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb.main([*FILES[verb], *options.split()]) == 2
    assert capsys.readouterr().err.startswith(f"parvis: error: {text}")


def test_several_negative_numbers_are_a_value_and_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_video.main([*FILES[train_video], "--levels", "-1,2"])
    assert "argument --levels: invalid int value: '-1,2'" in capsys.readouterr().err


def test_the_defaults_and_the_ends_are_allowed() -> None:
    for verb in VERBS:
        numbers.check(verb.parser().parse_args(FILES[verb]))
    numbers.check(train.parser().parse_args([*FILES[train], "--warmup", "0", "--ema", "0", "--dropout", "0"]))
    assert not any(limit.allows(value) for limit in numbers.LIMITS.values() for value in (math.nan, math.inf))


def test_options_in_a_text_are_one_line_with_its_name() -> None:
    for options, text in (
        ("--nix 3", "--model-options: unrecognized arguments: --nix 3; 'parvis train --help' lists the options"),
        ("--batch many", "--model-options: argument --batch: invalid int value: 'many'"),
        ("--lr nan", "--model-options: --lr nan: expected a number above 0"),
        ("--help", "--model-options: expected options, not --help"),
    ):
        with pytest.raises(InputError) as caught:
            parsed("--model-options", train.parser(), [*FILES[train], *options.split()])
        assert str(caught.value).startswith(text)
        assert "\n" not in str(caught.value)
