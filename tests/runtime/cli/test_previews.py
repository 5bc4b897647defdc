"""``parvis generate --preview-every``: what can be wrong is said before the work, and nothing of it ends the work."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run

from par_runtime import Pipeline
from par_runtime.cli import generate
from par_runtime.images import png


def test_previews_are_checked_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    ask: list[object] = ["generate", tiny, "--label", "red fox", "--seed", 6, "--out", tmp_path / "red-fox.png"]
    (tmp_path / "red-fox-0018.png").mkdir()
    assert run(*ask, "--preview-every", 6) == 2
    assert "red-fox-0018.png is a folder; give a file name" in capsys.readouterr().err
    (tmp_path / "red-fox-0018.png").rmdir()
    (tmp_path / "red-fox-0054.png").mkdir()  # of the third batch
    (tmp_path / "red-fox-054.png").mkdir()  # of none
    (tmp_path / "red-fox-0060.png").mkdir()
    assert run(*ask, "--preview-every", 6, "--count", 3, "--batch", 1) == 2
    assert "red-fox-0054.png is a folder; give a file name" in capsys.readouterr().err
    for folder in tmp_path.iterdir():
        folder.rmdir()
    several = ["--preview-every", 1000, "--batch", 1, "--out-dir", tmp_path / ".." / tmp_path.name, "--count", 60]
    assert run(*ask[:5], 1000, *ask[6:], *several) == 2
    assert "red-fox-1000.png: a preview of this command has this name too; give another" in capsys.readouterr().err
    long = tmp_path / ("x" * 251 + ".png")  # a name that the file system takes, and previews have five letters more
    assert run(*ask[:6], "--out", long, "--preview-every", 6) == 2
    assert "the name is too long for this file system" in capsys.readouterr().err
    for bad, text in (
        (["--preview-every", 0], "--preview-every 0: expected 1 or more"),
        (["--preview-every", -1], "--preview-every -1: expected 1 or more"),
        (["--batch", 4097], "--batch 4097: expected 1 to 4096"),
        (["--guidance", "nan"], "guidance nan: expected 0 or more"),
        (["--guidance", "1", "-3"], "guidance -3.0: expected 0 or more"),
        (["--temperature", "-1"], "temperature -1.0: expected 0 or more"),
    ):
        capsys.readouterr()
        assert run(*ask, *bad) == 2
        assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_previews_of_batches_that_the_backend_chooses_are_checked_before_the_first_call(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "default_batch", 1)
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("begun"))
    (tmp_path / "x-0040.png").mkdir()
    ask = ["generate", tiny, "--label", 0, "--count", 3, "--preview-every", 20, "--out", tmp_path / "x.png"]
    assert run(*ask) == 2
    assert "x-0040.png is a folder; give a file name" in capsys.readouterr().err


def test_a_preview_that_cannot_be_written_does_not_end_the_images(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, _: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(png, "write_pixels", full)
    ask = ["generate", tiny, "--label", 0, "--seed", 1, "--preview-every", 6, "--out", tmp_path / "x.png"]
    assert run(*ask) == 0
    assert capsys.readouterr().err == (
        f"parvis: warning: a preview was not written (no space left on the disk of {tmp_path / 'x-0006.png'}; free "
        "some or choose another place); the images go on\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
