"""What ``--force`` replaces, and that nothing else is lost: not beside a bundle, not meanwhile, not by a signal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from par_export import staging as module
from par_export.errors import OutputError
from par_export.staging import ENGINE, staging


def bundle_at(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(text)
    (path / "weights.data").write_text(text)
    (path / "step.onnx").write_text(text)
    return path


def replaced(out: Path, during: Callable[[], object] = lambda: None) -> None:
    """Replace ``out`` by a bundle "new"; ``during`` is called while it is written."""
    with staging(out, force=True) as part:
        part.rmdir()
        bundle_at(part, "new")
        during()


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(params=["exchange", "two renames"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder is replaced: as on Linux, and as elsewhere."""
    if request.param == "two renames":
        monkeypatch.setattr(module, "_exchanged", lambda *_: False)
    return str(request.param)


@pytest.mark.parametrize("name", [".", "", "/", "..", "x/.."])
def test_a_place_without_a_name_is_no_place_for_a_bundle(name: str) -> None:
    with (
        pytest.raises(OutputError, match=r"^--out .*: names no new folder; give the name of one$"),
        staging(Path(name), force=True),
    ):
        pass


def test_a_bundle_does_not_lie_in_another(tmp_path: Path) -> None:
    out = bundle_at(tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    before = content(out)
    for place in (out / "inner", out / "deep" / "inner", tmp_path / "link" / "inner"):
        with pytest.raises(OutputError, match=re.escape(f"--out {place}: lies in the bundle {out}; give another")):
            replaced(place)
    assert content(out) == before
    replaced(tmp_path / "link")  # itself may be replaced


def test_a_bundle_is_replaced_with_its_engines(tmp_path: Path, renames: str) -> None:
    out = bundle_at(tmp_path / "out")
    engine = out / "engines" / "kernels-1-sm90-fp16"
    engine.mkdir(parents=True)
    for name in ("engine.json", "step.cubin", "constants.data", ".engine.json.12-0.part"):
        (engine / name).touch()
    (out / "engines" / ".kernels-1-sm80-fp16.part-12").mkdir()
    (out / "engines" / ".kernels-1-sm80-fp16.old-12").mkdir()
    for folder in (out, out / "engines", engine):
        (folder / ".DS_Store").touch()
    (out / "heldout.npz").touch()
    replaced(out)
    assert content(tmp_path) == {f"out/{name}": "new" for name in ("manifest.json", "weights.data", "step.onnx")}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        ("model.pt", "holds model.pt, which is not of a bundle; only a bundle is replaced, as a whole: move it away"),
        ("notes/thesis.txt", "holds notes, which is not of a bundle"),
        ("engines/mine.txt", "its engines/mine.txt is not an engine (it holds no engine.json)"),
        ("engines/a/mine.txt", "its engines/a is not an engine (it holds no engine.json)"),
        ("engines/b/mine.txt", "its engines/b holds mine.txt, which is not of an engine"),
    ],
)
def test_what_else_lies_in_a_bundle_is_not_lost(mine: str, message: str, tmp_path: Path) -> None:
    out = bundle_at(tmp_path / "out")
    (out / mine).parent.mkdir(parents=True, exist_ok=True)
    (out / mine).write_text("mine")
    if mine.startswith("engines/b"):
        (out / "engines" / "b" / "engine.json").touch()
    before = content(tmp_path)
    with pytest.raises(OutputError, match=re.escape(f"{out} exists and {message}")):
        replaced(out)
    assert content(tmp_path) == before


def test_a_folder_with_another_manifest_is_no_bundle(tmp_path: Path) -> None:
    """Web pages and browser extensions have a manifest.json."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "my app"}')
    with pytest.raises(OutputError, match=r"web exists and is not a bundle \(it holds no weights\.data\)"):
        replaced(tmp_path / "web")
    with pytest.raises(OutputError, match="is not an engine"), staging(tmp_path / "web", force=True, kind=ENGINE):
        pass
    assert (tmp_path / "web" / "manifest.json").read_text() == '{"name": "my app"}'


def test_what_appears_meanwhile_is_kept(tmp_path: Path, renames: str) -> None:
    for name, make in (
        ("folder", lambda out: out.mkdir() or (out / "thesis.txt").write_text("mine")),
        ("file", lambda out: out.write_text("mine")),
        ("link", lambda out: out.symlink_to("nowhere")),
    ):
        out = tmp_path / name
        with pytest.raises(OutputError, match="was made by another command meanwhile and is kept; give another --out"):
            replaced(out, lambda make=make, out=out: make(out))  # type: ignore[misc]
    assert content(tmp_path) == {"folder/thesis.txt": "mine", "file": "mine"}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]
    replaced(tmp_path / "bundle", lambda: bundle_at(tmp_path / "bundle"))  # another export with --force
    assert content(tmp_path / "bundle")["weights.data"] == "new"


def test_a_link_to_a_bundle_leads_to_the_new_one(tmp_path: Path, renames: str) -> None:
    real = bundle_at(tmp_path / "models" / "v1")
    (tmp_path / "current").symlink_to("models/v1")
    replaced(tmp_path / "current")
    assert (tmp_path / "current").is_symlink()
    assert content(real)["weights.data"] == "new"
    assert sorted(os.listdir(tmp_path)) == ["current", "models"]
    assert os.listdir(tmp_path / "models") == ["v1"]


def test_a_signal_between_two_renames_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle_at(tmp_path / "out")
    rename = os.rename

    def stopped(a: Path, b: Path) -> None:
        rename(a, b)
        if ".old-" in str(b):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "_exchanged", lambda *_: False)
    monkeypatch.setattr(os, "rename", stopped)
    with pytest.raises(SystemExit) as ended:
        replaced(out)
    assert ended.value.code == 143
    assert content(out)["weights.data"] == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, gone: int) -> None:
    """The next command of that --out brings the bundle back, whatever becomes of its own."""
    out = tmp_path / "out"
    left = bundle_at(tmp_path / f".out.old-{gone}")
    with pytest.raises(OutputError, match=re.escape(f"{out} exists; give another --out")), staging(out, force=False):
        pass
    assert content(tmp_path) == {f"out/{name}": "old" for name in ("manifest.json", "weights.data", "step.onnx")}
    out.rename(left)

    def fails() -> None:
        assert content(out)["weights.data"] == "old"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replaced(out, fails)
    assert content(tmp_path) == {f"out/{name}": "old" for name in ("manifest.json", "weights.data", "step.onnx")}
    out.rename(left)
    replaced(out)
    assert content(out)["weights.data"] == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_kill_after_both_renames_left_goes(tmp_path: Path, gone: int) -> None:
    """The new bundle is in its place. A folder of a process that runs is left alone."""
    out = bundle_at(tmp_path / "out", "new")
    bundle_at(tmp_path / f".out.old-{gone}")
    bundle_at(tmp_path / f".out.old-{os.getpid()}")
    with pytest.raises(OutputError, match="exists; give another --out"), staging(out, force=False):
        pass
    assert content(out)["weights.data"] == "new"
    assert sorted(os.listdir(tmp_path)) == [f".out.old-{os.getpid()}", "out"]


@pytest.mark.skipif(os.uname().sysname != "Linux" if hasattr(os, "uname") else True, reason="Linux alone exchanges")
def test_there_is_a_bundle_at_every_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle_at(tmp_path / "out")
    assert module._exchanged(out, bundle_at(tmp_path / "new", "new"))
    assert content(out)["weights.data"] == "new"
    assert content(tmp_path / "new")["weights.data"] == "old"
    assert not module._exchanged(out, tmp_path / "nothing")
    shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("a folder was away for a moment"))
    replaced(out)
    assert os.listdir(tmp_path) == ["out"]


def test_folders_that_were_made_for_what_failed_go_with_it(tmp_path: Path) -> None:
    def fails(out: Path, other: Path | None = None) -> None:
        with staging(out, force=False) as part:
            assert part.is_dir()
            if other is not None:  # of another program
                other.touch()
            raise ZeroDivisionError

    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "new" / "deep" / "out", tmp_path / "mine" / "out"):
        with pytest.raises(ZeroDivisionError):
            fails(out)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(ZeroDivisionError):
        fails(tmp_path / "new" / "deep" / "out", tmp_path / "new" / "log.txt")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["mine", "new", "new/log.txt"]
    with pytest.raises(OSError, match="too long"):  # the upper one was made before
        fails(tmp_path / "more" / ("x" * 300) / "out")
    assert not (tmp_path / "more").exists()
