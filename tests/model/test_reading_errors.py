"""A file that is opened and then cannot be read (a broken disk, a server that is gone): its name is in the error."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from par_export.cli import export
from par_export.engines.weights import MappedWeights
from par_model.checkpoint import open_checkpoint
from par_model.checkpoint.file import _read_one, read_json
from par_model.checkpoint.pickle import read_pickle
from par_model.training.clips import ClipFolder
from par_model.training.data import picture
from par_model.training.raw import read_labels, read_meta
from par_model.training.resume import read_run
from par_model.training.transformer import load_codes
from par_runtime.system import sha256

#: A regular file whose first bytes nobody can read: they are no memory of the process.
BROKEN = Path("/proc/self/mem")
pytestmark = pytest.mark.skipif(not BROKEN.exists(), reason="needs a /proc as Linux has it")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.pt", open_checkpoint),
        ("a.pt", _read_one),
        ("a.safetensors", _read_one),
        ("a.json", lambda path: read_json(path, "")),
        ("checkpoint.pt", read_run),
        ("codes.npz", lambda path: load_codes(path, 16)),
        ("meta.json", lambda path: read_meta(path.parent, names="a")),
        ("labels.u8", lambda path: read_labels(path.parent, 1, 1)),
        ("a.png", lambda path: picture(path, 8)),
        ("weights.data", sha256),
        ("names.txt", export._class_names),
        ("names.json", export._class_names),
    ],
)
def test_a_read_that_fails_names_the_file(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    (tmp_path / name).symlink_to(BROKEN)
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(tmp_path / name)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(tmp_path / name)


@pytest.mark.parametrize("read", [read_pickle, MappedWeights])
def test_a_mapping_or_a_copy_that_fails_names_the_file(
    tmp_path: Path, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("mmap.mmap", fails)
    monkeypatch.setattr("torch.load", fails)
    (tmp_path / "a.pt").write_bytes(b"\x80\x02 not empty")
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(tmp_path / "a.pt")
    assert caught.value.filename == str(tmp_path / "a.pt")


def test_labels_of_clips_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    meta = '{"count": 2, "frames": 3, "size": 8, "channels": 1, "class_names": ["a"]}'
    (tmp_path / "meta.json").write_text(meta)
    (tmp_path / "clips.u8").write_bytes(bytes(2 * 3 * 8 * 8))
    (tmp_path / "labels.u8").symlink_to(tmp_path)
    with pytest.raises(OSError, match="Is a directory") as caught:
        ClipFolder.open(tmp_path)
    assert Path(str(caught.value.filename)) == tmp_path / "labels.u8"


def test_the_verb_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--checkpoint", "--tokenizer"):
        other = "--tokenizer" if option == "--checkpoint" else "--checkpoint"
        given = [option, str(BROKEN), other, "none" if other == "--tokenizer" else str(BROKEN)]
        assert export.main([*given, "--out", str(tmp_path / "out")]) == 2
        assert "/proc/self/mem: the disk reports an error (EIO); check the disk" in capsys.readouterr().err
    names = ["--checkpoint", str(tmp_path), "--tokenizer", "none", "--class-names", str(BROKEN)]
    assert export.main([*names, "--out", str(tmp_path / "out")]) == 2
    assert "/proc/self/mem: the disk reports an error (EIO); check the disk" in capsys.readouterr().err
