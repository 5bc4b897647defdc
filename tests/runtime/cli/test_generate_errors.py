"""Wrong input of ``parvis generate`` and ``parvis redo``, and places that cannot be written: one line, nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import run
from PIL import Image

from par_runtime import system
from par_runtime.cli import dispatch as cli
from par_runtime.images import png


def test_outputs_that_would_replace_each_other(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["generate", tiny, "--label", 0, "--seed", 1, "--out-dir", tmp_path]
    assert run(*ask, "--guidance", 2, 1, 2) == 2
    assert (
        "--guidance: a scale is given twice, so two images would have one file name; give each scale once"
        in capsys.readouterr().err
    )
    assert run(*ask, "--out", tmp_path / ".." / tmp_path.name / "red-fox-1.png") == 2
    assert "red-fox-1.png: two outputs of this command have this name, so one would be lost" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "red-fox-2.png").mkdir()
    assert run(*ask, "--count", 2) == 2
    assert "red-fox-2.png is a folder, but this command would write a file of that name;" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["red-fox-2.png"]


ERRORS = [
    (
        ["generate", "BUNDLE"],
        "the following arguments are required: --label; 'parvis generate --help' lists the options",
    ),
    (["generate", "BUNDLE", "--label", "0", "--count", "x"], "argument --count: invalid int value: 'x'"),
    (["generate", "BUNDLE", "--label", "0", "--columns", "0", "--out", "TMP/a.png"], "--columns 0: expected 1 or more"),
    (["generate", "BUNDLE", "--label", "0", "--out", "/dev/null"], "ends in .png"),
    (
        ["generate", "BUNDLE", "--label", "0", "--out", "TMP/plain.png/a.png"],
        "plain.png is a file where a folder is",
    ),
    (["generate", "BUNDLE", "--label", "0", "--out-dir", "TMP/plain.png"], "plain.png"),
    (["generate", "BUNDLE", "--label", "fux", "--out", "TMP/a.png"], "unknown label 'fux'"),
    (["generate", "BUNDLE", "--label", "7", "--out", "TMP/a.png"], "label 7: this model has classes 0..5"),
    (["generate", "BUNDLE", "--label", "0", "--out", "TMP/a.jpg"], "ends in .png"),
    (["generate", "BUNDLE", "--label", "0", "--out", "TMP"], "is a folder"),
    (["generate", "BUNDLE", "--label", "0", "--tokens", "TMP/a.txt"], "ends in .npy"),
    (["generate", "TMP/nope", "--label", "0", "--out", "TMP/a.png"], "no such folder"),
    (["generate", "BUNDLE", "--label", "0", "--count", "0", "--out", "TMP/a.png"], "--count 0"),
    (
        ["generate", "BUNDLE", "--label", "all", "--count", "100000000000", "--out", "TMP/a.png"],
        "at most 100000 in one",
    ),
    (["generate", "BUNDLE", "--label", "0", "--top-p", "2", "--out", "TMP/a.png"], "top_p 2.0: expected 0 to 1"),
    (["generate", "BUNDLE", "--label", "0", "--device", "cuda:0", "--out", "TMP/a.png"], "device 'cuda:0'"),
    (["generate", "BUNDLE", "--label", "0", "--threads", "0", "--out", "TMP/a.png"], "threads 0"),
    (
        ["generate", "BUNDLE", "--label", "0", "--preview-every", "2", "--tokens", "TMP/a.npy"],
        "--preview-every writes beside --out",
    ),
    (["redo", "TMP/none.png", "--bundle", "BUNDLE"], "none.png: no such file or folder"),
    (["redo", "TMP/plain.png", "--bundle", "BUNDLE"], "has no 'parvis' entry"),
    (["redo", "TMP/text.png", "--bundle", "BUNDLE"], "not an image that can be read"),
    (["redo", "TMP/cut.png", "--bundle", "BUNDLE"], "not an image that can be read"),
    (["redo", "TMP/damaged.png", "--bundle", "BUNDLE"], "its 'parvis' entry cannot be read"),
    (["redo", "TMP/infinite.png", "--bundle", "BUNDLE"], "its 'parvis' entry cannot be read"),
]


@pytest.mark.parametrize(("arguments", "text"), ERRORS)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:-30])
    infinite = '{"images": [], "bundle": {"name": "a", "hash": "b"}, "columns": Infinity}'
    for name, entry in (("damaged", '{"images": []}'), ("infinite", infinite)):
        damaged = png.PngImagePlugin.PngInfo()
        damaged.add_itxt("parvis", entry)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png", pnginfo=damaged)
    before = sorted(tmp_path.rglob("*"))
    filled = [a.replace("BUNDLE", str(tiny)).replace("TMP", str(tmp_path)) for a in arguments]
    assert run(*filled) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("parvis: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_old_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run("generate", tiny, "--label", 0, "--out", out) == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_really_full_disk(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    part = tmp_path / "part"
    part.symlink_to("/dev/full")  # a link, so that a mistake in the clean-up cannot remove the device
    monkeypatch.setattr(system, "_part", lambda path: part)
    assert run("generate", tiny, "--label", 0, "--out", tmp_path / "a.png") == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_no_permission_is_an_error_before_any_work(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", denied)  # root, which runs CI in containers, may write anywhere
    monkeypatch.setattr("par_runtime.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("work was started"))
    for option, path in (
        ("--out", tmp_path / "a.png"),
        ("--out-dir", tmp_path / "d"),
        ("--tokens", tmp_path / "t.npy"),
    ):
        assert run("generate", tiny, "--label", 0, option, path) == 2
        assert "no permission for" in capsys.readouterr().err


def test_a_device_is_not_replaced(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert run("generate", tiny, "--label", 0, "--out", pipe) == 2
    assert "is a device or a pipe" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_a_bundle_that_is_a_file_is_refused_as_one(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(tiny / "manifest.json"), "--label", "0"]) == 2
    assert "manifest.json: is a file, not a folder; give the path of a bundle" in capsys.readouterr().err
