"""Outputs of one command that are in each other's way."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from par_runtime.cli.dispatch import main


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
