"""Standard output and standard error as they may be: closed, full, without a reader, with few characters."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from par_runtime.cli import dispatch
from par_runtime.cli.streams import steady
from par_runtime.images import png
from par_runtime.system import HALF, explain, write_beside


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``line``, where "parvis" is the command."""
    line = line.replace("parvis", f"'{sys.executable}' -m par_runtime", 1)
    return subprocess.run(
        ["/bin/sh", "-c", line], cwd=cwd, capture_output=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize(
    ("redirected", "code", "error"),
    [
        (">&-", 0, b""),
        ("2>&-", 0, b""),
        (">&- 2>&- <&-", 0, b""),
        (
            "> /dev/full",
            2,
            b"parvis: error: what was printed is not complete (No space left on device on standard output); "
            b"files are not affected\n",
        ),
        ("> /dev/full 2>&1", 2, b""),
        ("2> /dev/full", 0, b""),
    ],
)
def test_the_image_is_written_wherever_text_goes(
    tiny: Path, tmp_path: Path, redirected: str, code: int, error: bytes
) -> None:
    if "full" in redirected and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = shell(f"parvis generate '{tiny}' --label 0 --seed 1 --out a.png {redirected}", tmp_path)
    assert (done.returncode, done.stderr) == (code, error)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (16, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_reader_that_stops_is_no_error_and_work_goes_on(tiny: Path, tmp_path: Path) -> None:
    line = f"(parvis generate '{tiny}' --label 0 --out a.png; echo $? > code) | true"
    assert shell(line, tmp_path).stderr == b""
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "a.png").is_file()


def test_a_stream_of_another_program_gets_escapes_while_a_verb_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook or a test runner has them: they stay in their place, and are afterwards as they were."""

    class Theirs(io.TextIOWrapper):
        pass

    streams = [Theirs(io.BytesIO(), "ascii", errors) for errors in ("strict", "replace")]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with steady() as lost:
        assert (sys.stdout, sys.stderr) == tuple(streams)
        print("füchse, łosie")
        print("füchse", file=sys.stderr)
        assert lost() == ""
    assert [stream.buffer.getvalue() for stream in streams] == [  # type: ignore[attr-defined]
        b"f\\xfcchse, \\u0142osie\n",
        b"f\\xfcchse\n",
    ]
    assert [stream.errors for stream in streams] == ["strict", "replace"]
    with pytest.raises(UnicodeEncodeError):
        streams[0].write("ü")
    print("ü", file=sys.stderr, flush=True)
    assert streams[1].buffer.getvalue().endswith(b"?\n")  # type: ignore[attr-defined]


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    code = (
        "from par_runtime.cli.streams import steady\n"
        "with steady() as lost:\n"
        "    print('x' * 300_000)\n"
        "    assert lost() == ''"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=write) as process:
        os.close(write)
        with open(read, "rb") as reader:
            assert reader.read() == b"x" * 300_000 + b"\n"
        assert process.wait() == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        pytest.param({"LC_ALL": "C"}, marks=pytest.mark.slow),
        pytest.param({"PYTHONIOENCODING": "utf-8:strict"}, marks=pytest.mark.slow),
    ],
)
def test_names_that_a_stream_cannot_write_are_escaped(tiny: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = os.fsencode(tmp_path) + "/füchse 😀".encode()
    os.mkdir(folder)
    line = f"parvis generate '{tiny}' --label 0 --seed 1 --out-dir 'füchse 😀' --json"
    done = shell(line, tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(json.loads(done.stdout)["written"]) == 1
    assert os.listdir(folder) == [b"red-fox-1.png"]
    done = shell(f"parvis generate '{tiny}' --label 0 --out 'füchse 😀/x.jpg'", tmp_path, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(b"parvis: error: --out f")
    assert done.stderr.count(b"\n") == 1


def test_a_path_that_is_no_text_is_escaped(tiny: Path, tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"f\xfcchse.png")
    try:
        name.touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    name.unlink()
    command = [sys.executable, "-m", "par_runtime", "generate", str(tiny), "--label", "0", "--out", str(name)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"/f\\udcfcchse.png: 1 image" in done.stdout
    assert name.is_file()


def test_what_a_terminal_obeys_is_escaped_in_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.main(["inspect", "no\nsuch\x1b[31m"]) == 2
    assert "no\\nsuch\\x1b[31m" in capsys.readouterr().err


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "no permission for {}: it is on a read-only file system; choose another place"),
        (errno.ENOSPC, "no space left on the disk of {}; free some or choose another place" + HALF),
        (errno.EDQUOT, "the disk quota is used up, at {}; free some space or choose another place"),
        (errno.EIO, "{}: the disk reports an error (EIO); check the disk, or choose another place"),
        (errno.EACCES, "no permission for {}; choose another place or change its permissions"),
        (errno.EXDEV, "{}: Invalid cross-device link"),
    ],
)
@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_an_error_names_the_file_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, when: str
) -> None:
    def fail(part: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), *((str(part), None, str(part)) if when == "renaming" else ()))

    path = tmp_path / "a.png"
    if when == "renaming":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError) as caught:  # noqa: PT011, the message is what is tested
        write_beside(path, fail if when == "writing" else Path.touch)
    assert explain(caught.value) == message.format(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EFBIG, "the output is larger than this system or its limit (ulimit -f) allows; choose another place"),
        (errno.EDQUOT, "the disk quota is used up, at the output; free some space or choose another place"),
        (errno.EBADF, "Bad file descriptor"),
    ],
)
def test_an_error_of_an_open_file_without_its_name(number: int, text: str) -> None:
    assert explain(OSError(number, os.strerror(number))) == text


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".png")  # 254 bytes
    write_beside(path, lambda part: part.write_bytes(b"1"))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    longer = tmp_path / ("x" * 252 + ".png")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        write_beside(longer, Path.touch)
    assert explain(caught.value).endswith(".png: the name is too long for this file system; give a shorter one")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.png", tmp_path / "file" / "more" / "a.png"):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            write_beside(path, Path.touch)
        assert (
            explain(caught.value) == f"{tmp_path / 'file'} is a file where a folder is expected; choose another place"
        )


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_beside(path, lambda part: part.write_text("1"))
    path.unlink()
    path.parent.rmdir()
    write_beside(path, lambda part: part.write_text("2"))
    assert path.read_text() == "2"


def test_a_disk_that_gets_full_in_between_counts_the_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace, done = os.replace, []

    def full(source: str, target: str) -> None:
        if len(done) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    line = ["generate", str(tiny), "--label", "0", "--count", "4", "--seed", "1", "--out-dir", str(tmp_path)]
    assert dispatch.main([*line, "--tokens", str(tmp_path / "t.npy")]) == 2
    assert capsys.readouterr().err == (
        f"parvis: error: no space left on the disk of {tmp_path}/red-fox-3.png; free some or choose another place; "
        f"2 of 5 files were written, the last is {tmp_path}/red-fox-2.png\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["red-fox-1.png", "red-fox-2.png"]


def test_an_output_never_replaces_the_input(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, link = tmp_path / "a.png", tmp_path / "link.png"
    assert dispatch.main(["generate", str(tiny), "--label", "0", "--seed", "1", "--out", str(image)]) == 0
    link.symlink_to(image)
    content = image.read_bytes()
    capsys.readouterr()
    for out in (image, link, tmp_path / "." / "a.png"):
        for verb in (["redo", str(image)], ["edit", str(image), "--keep", "left"], ["reconstruct", str(image)]):
            assert dispatch.main([*verb, "--bundle", str(tiny), "--out", str(out)]) == 2, verb
            assert f"--out {out} is the file that is read; give another name" in capsys.readouterr().err
    assert image.read_bytes() == content


LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  #: names of files are ASCII, others are escaped


@pytest.mark.skipif(sys.platform != "linux", reason="names of files that are no text")
@pytest.mark.parametrize(
    ("name", "environment"), [(b"b\xff", {}), pytest.param("bünd😀le".encode(), LATIN, marks=pytest.mark.slow)]
)
def test_a_bundle_in_a_folder_whose_name_is_not_of_this_system(
    tiny: Path, tmp_path: Path, name: bytes, environment: dict[str, str]
) -> None:
    folder = os.path.join(os.fsencode(tmp_path), name)
    shutil.copytree(os.fsencode(tiny), folder)
    for device in ("cpu", "cpu-ort"):  # the weights are mapped, so /proc/self/maps has the name too
        line = f"parvis generate {os.fsdecode(folder)} --label 0 --seed 1 --device {device} --out {device}.png --quiet"
        done = shell(line, tmp_path, **environment)
        assert (done.returncode, done.stderr) == (0, b"")
    assert shell(f"parvis generate {tiny} --label 0 --seed 1 --out plain.png --quiet", tmp_path).returncode == 0
    assert (tmp_path / "cpu.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    made = [png.read(tmp_path / f"{each}.png") for each in ("cpu", "cpu-ort")]
    assert replace(made[0][0], made_on=None) == replace(made[1][0], made_on=None)
    assert (made[0][1] == made[1][1]).all()


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not allow")
def test_names_of_files_do_not_reach_the_terminal_as_they_are(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, bundle = "\x1b]0;owned\x07\n\u202egnp.png", ["--bundle", str(tiny)]
    shown = "\\x1b]0;owned\\x07\\n\\u202egnp.png"
    assert dispatch.main(["generate", str(tiny), "--label", "0", "--seed", "1", "--out", name]) == 0
    assert capsys.readouterr().out.startswith(f"{shown}: 1 image")
    assert dispatch.main(["redo", name, *bundle]) == 0
    assert capsys.readouterr().out.startswith(f"{shown}: identical")
    assert dispatch.main(["reconstruct", name, *bundle, "--out", f"r{name}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [shown, f"r{shown}"]
    with Image.open(name) as image:
        image.load()
    image.putpixel((0, 0), (1, 2, 3))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parvis", image.text["parvis"])  # type: ignore[attr-defined]
    image.save(name, pnginfo=info)
    assert dispatch.main(["edit", name, *bundle, "--keep", "left", "--out", f"e{name}"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"e{shown}: 1 image of red fox")
    assert printed.err == f"parvis: the pixels of {shown} were changed since parvis wrote it; encoding its pixels\n"


@pytest.mark.parametrize(
    "arguments", [["labels", "x" * 10**5], ["train", "--vocab", "x" * 10**5], ["doctor", "x" * 10**5]]
)
def test_an_error_is_not_longer_than_a_reader_reads(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("parvis: error: ")
    assert len(error) < 2200
    assert error.count("\n") == 1
