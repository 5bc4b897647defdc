"""Outputs of one command that are in each other's way."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from PIL import Image

from par_runtime.cli.dispatch import VERBS, main


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_an_output_is_no_folder_of_another(
    tiny: Path, tiny_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is made or written: the folder would take the name of the file."""
    picture, place = tmp_path / "a.png", tmp_path / "place"
    Image.new("RGB", (16, 16)).save(picture)
    place.mkdir()
    ask = ("--label", 0, "--seed", 1)
    edit = ("edit", picture, *ask[:2], "--keep", "left", "--seed", 1, "--bundle", tiny)
    for suffix, verbs in (
        (".png", [("generate", tiny, *ask), edit, ("reconstruct", picture, "--bundle", tiny)]),
        (".gif", [("generate", tiny_video, *ask), ("reconstruct", picture, "--bundle", tiny_video)]),
    ):
        out = place / f"q{suffix}"
        for verb in verbs:
            for tokens in (out / "x.npy", out / "deep" / "x.npy", out / ".." / "x.npy"):
                assert run(*verb, "--out", out, "--tokens", tokens) == 2
                assert capsys.readouterr().err == (
                    f"parvis: error: {tokens}: lies in {out}, another output of this command, which is a file; change "
                    "one\n"
                )
                assert not list(place.iterdir())
        tokens = place / "x.npy"
        for more in (["--out-dir", out, "--out", out], ["--out-dir", tokens, "--tokens", tokens]):
            assert run(*verbs[0], *more) == 2
            assert "another output of this command, which is a file; change one" in capsys.readouterr().err
            assert not list(place.iterdir())
    out = place / "d" / "q.png"
    assert run("generate", tiny, *ask, "--out", out, "--tokens", out.with_suffix(".npy"), "--out-dir", out.parent) == 0


@pytest.mark.parametrize("folder", [".", "..", "/"])
def test_a_folder_is_no_file(folder: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where its path has no name."""
    for command in (("generate", tiny, "--label", 0, "--out", folder), ("bench", tiny, "--csv", folder)):
        assert run(*command) == 2
        assert capsys.readouterr().err == f"parvis: error: {folder} is a folder; give a file name\n"


def test_a_folder_for_an_output_is_made_when_it_is_written(tiny: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(picture)
    outs = ["--out", tmp_path / "new" / "x.png", "--tokens", picture / "x.npy"]
    assert run("generate", tiny, "--label", 0, *outs) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


#: Verbs with an option or argument that is a path, and how many these are at least.
PATHS = {"generate": 4, "redo": 3, "bench": 9, "inspect": 1, "export": 4, "build": 4, "tune": 2, "calibrate": 7}
PATHS |= {"train": 5, "train-tokenizer": 5, "train-video-tokenizer": 3, "encode": 3, "edit": 4, "reconstruct": 3}


@pytest.mark.parametrize("verb", VERBS)
def test_an_empty_path_is_not_the_current_folder(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = importlib.import_module(VERBS[verb].module).parser()
    assert not [action.dest for action in parser._actions if action.type is Path]
    paths = [action for action in parser._actions if getattr(action.type, "__name__", "") in ("path", "place")]
    assert len(paths) >= PATHS.get(verb, 0)
    for action in paths:
        name = action.option_strings[0] if action.option_strings else ""
        assert run(verb, *filter(None, [name]), "") == 2
        text = f"argument {name or action.metavar}: '' is empty; expected the name of a file or folder"
        assert capsys.readouterr().err.startswith(f"parvis: error: {text} ('.' is the current one); 'parvis {verb} -")
