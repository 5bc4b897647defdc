"""The recipe's packed images: nothing of the raw ones is lost, and a spoilt pack is one line before anything trains."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from recipe_scripts import RECIPE, full_disk, scripts

from par_model.training.data import ImageFolder
from par_model.training.files import InputError


@pytest.fixture(scope="module")
def pack() -> Iterator[ModuleType]:
    """``pack.py``."""
    with scripts("pack") as (module,):
        yield module


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of the raw images ``train`` and ``val``: 6 of 8x8 pixels in two classes, and 4 others."""
    for name, count, seed in (("train", 6, 0), ("val", 4, 1)):
        folder = tmp_path / "both" / name
        folder.mkdir(parents=True)
        np.random.default_rng(seed).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8).tofile(folder / "images.u8")
        (np.arange(count, dtype=np.uint8) % 2).tofile(folder / "labels.u8")
        (folder / "meta.json").write_text(json.dumps({"count": count, "size": 8, "styles": ["a", "b"]}))
    return tmp_path / "both"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(raw: Path, out: Path, *more: str) -> list[str]:
    return ["--train", str(raw / "train"), "--val", str(raw / "val"), "--out", str(out), "--preset", "0", *more]


def test_raw_images_are_never_replaced(
    pack: ModuleType, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(raw)
    (tmp_path / "other" / "val").mkdir(parents=True)
    shutil.copy(raw / "val" / "images.u8", tmp_path / "other" / "val")
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    monkeypatch.chdir(raw / "train")
    for out, text in (
        (raw, "which is --train"),
        (tmp_path / "link", "which is --train"),
        (Path(".."), "which is --train"),
        (raw / "train" / "packed", "in the folder of --train"),
        (tmp_path / "other", "holds raw images"),
        (tmp_path / "file", "is a file; expected a folder"),
    ):
        assert pack.main(command(raw, out)) == 2
        error = capsys.readouterr().err
        assert error.startswith("pack.py: error: --out ")
        assert text in error
        assert error.count("\n") == 1
    assert pack.main(["--val", str(raw / "train"), "--train", str(raw / "val"), "--out", str(raw)]) == 2
    assert contents(tmp_path) == before


def test_what_pack_cannot_use_is_one_line(
    pack: ModuleType, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def refused(text: str, *more: str) -> None:
        assert pack.main(command(raw, out, *more)) == 2, text
        error = capsys.readouterr().err
        assert error.startswith("pack.py: error: ")
        assert text in error
        assert error.count("\n") == 1
        assert not out.exists()

    for preset in ("99", "-1"):
        refused(f"--preset {preset}: expected a whole number from 0 to 9", "--preset", preset)
    refused("--at-once 0: expected a whole number from 1 to 256", "--at-once", "0")
    refused("no such folder; expected one of images.u8", "--train", str(tmp_path / "none"))
    refused("every image of it is in --train", "--val", str(raw / "train"))
    meta = raw / "val" / "meta.json"
    whole = meta.read_text()
    for text, message in (
        ("[]", "meta.json: holds []; expected an object with count, size and styles"),
        ("null", "meta.json: holds None; expected an object"),
        ("{", "meta.json: not readable as JSON ("),
        (
            '{"count": 4, "size": 8, "count": 8}',
            "meta.json: not readable as JSON (an object has the name 'count' twice",
        ),
        ("{}", "meta.json: has no count; expected a whole number from 1 to 1000000000"),
        ('{"count": 1e3}', "count is 1000.0; expected a whole number"),
        ('{"count": 1e400}', "count is inf; expected a whole number"),
        ('{"count": NaN}', "count is nan; expected a whole number"),
        ('{"count": true}', "count is True; expected a whole number"),
        ('{"count": -1}', "count is -1; expected a whole number"),
        ('{"count": 4, "size": "64"}', "size is '64'; expected a whole number from 1 to 4096"),
        ('{"count": 4, "size": null}', "size is None; expected a whole number"),
        ('{"count": 4, "size": 1%s}' % ("0" * 30), "size is 1000000000000000000000000000000; expected"),
        ('{"count": 4, "size": 1%s}' % ("0" * 90), "size is a very large integer; expected"),
        ('{"count": 4, "size": 8}', "styles is None; expected a list of the names"),
        ('{"count": 4, "size": 8, "styles": [1]}', "styles is [1]; expected a list of the names"),
        ('{"count": 4, "size": 8, "styles": ["a"]}', "has label 1 and 1 class names"),
        ('{"count": 4, "size": 4, "styles": ["a", "b"]}', "has 768 bytes; expected 192, 4x4x4x3 by meta.json"),
        ('{"count": 4, "size": 9, "styles": ["a", "b"]}', "has 768 bytes; expected 972"),
        ('{"count": 3, "size": 8, "styles": ["a", "b"]}', "has 768 bytes; expected 576"),
    ):
        meta.write_text(text)
        refused(message)
        with pytest.raises(InputError, match="not the raw form of images"):  # the trainers' reader is the same
            ImageFolder.open(raw / "val")
    meta.write_bytes(b"\xff\xfe{")
    refused("meta.json: not readable as JSON (")
    meta.write_text(whole)
    (raw / "val" / "labels.u8").write_bytes(bytes(3))
    refused("meta.json has count 4, labels.u8 3 labels")
    (raw / "val" / "images.u8").write_bytes(b"")
    refused("images.u8: has 0 bytes; expected 768")
    (raw / "val" / "images.u8").unlink()
    refused("images.u8: no such file or folder; check")


def test_a_full_disk_names_the_file_and_leaves_the_pack_before(
    pack: ModuleType, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert pack.main(command(raw, out)) == 0
    before = contents(out)
    assert {path.name for path in before} == {"000.xz", "001.xz", "labels.xz", "meta.json"}
    np.random.default_rng(5).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8).tofile(raw / "train" / "images.u8")
    with full_disk(300):
        assert pack.main(command(raw, out)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pack.py: error: {out / 'train'}")
    assert re.search(
        r"00[01]\.xz is larger than this system or its limit \(ulimit -f\) allows; choose another place\n$", error
    )
    assert contents(out) == before  # and nothing half-written beside
    with full_disk(300), pytest.raises(OSError, match="give a folder with more room") as caught:
        pack.unpack(out / "train", tmp_path / "unpacked")
    assert caught.value.filename == str(tmp_path / "unpacked" / "images.u8")
    assert not list((tmp_path / "unpacked").iterdir())


def test_training_and_validation_images_are_of_one_pack(
    pack: ModuleType, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one of another pack, what is held out may have been seen. So both are replaced, or none."""
    out = tmp_path / "out"
    assert pack.main(command(raw, out)) == 0
    (out / "val" / "001.xz").unlink()
    (out / "val" / "001.xz").mkdir()  # which takes no file
    before = contents(out)
    for name, count in (("train", 6), ("val", 4)):
        np.random.default_rng(5).integers(0, 255, (count, 8, 8, 3), np.uint8)[:, ::-1].tofile(raw / name / "images.u8")
    (raw / "train" / "images.u8").write_bytes(bytes(range(192)) * 6)
    capsys.readouterr()
    assert pack.main(command(raw, out)) == 2
    assert capsys.readouterr().err == (
        f"pack.py: error: {out / 'val' / '001.xz'} is a folder where a file is expected; choose another place\n"
    )
    assert contents(out) == before
    assert not list(out.rglob(".*"))


def test_a_pipe_is_refused_and_not_waited_for(
    pack: ModuleType, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_waiting: None
) -> None:
    assert pack.main(command(raw, tmp_path / "out")) == 0
    (tmp_path / "out" / "val" / "labels.xz").unlink()
    os.mkfifo(tmp_path / "out" / "val" / "labels.xz")
    with pytest.raises(InputError, match=r"labels\.xz: is a pipe or a device; expected a file"):
        pack.unpack(tmp_path / "out" / "val", tmp_path / "unpacked")
    capsys.readouterr()
    for name in ("images.u8", "labels.u8", "meta.json"):
        file = raw / "val" / name
        kept = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert pack.main(command(raw, tmp_path / "other")) == 2
        assert capsys.readouterr().err == f"pack.py: error: {file}: is a pipe or a device; expected a file\n"
        file.unlink()
        file.write_bytes(kept)


def test_links_that_lead_in_a_circle_and_folders_that_cannot_be_are_one_line(
    pack: ModuleType, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for out, text in (
        (tmp_path / "loop", f"--out {tmp_path / 'loop'}: is a link that leads to no folder; expected a folder"),
        (tmp_path / "loop" / "in", "links lead in a circle"),
        (Path("/dev/null/in"), "/dev/null/in/train is a file where a folder is expected"),
    ):
        assert pack.main(command(raw, out)) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1


def test_a_validation_set_of_other_images_is_refused(
    pack: ModuleType, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "val" / "meta.json").write_text(json.dumps({"count": 16, "size": 4, "styles": ["a", "b"]}))
    (raw / "val" / "labels.u8").write_bytes(bytes(16))
    assert pack.main(command(raw, tmp_path / "out")) == 2
    assert f"--val {raw / 'val'}: size is 4, that of --train {raw / 'train'} is 8; give" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unpacking_that_is_stopped_leaves_the_images_before(pack: ModuleType, raw: Path, tmp_path: Path) -> None:
    assert pack.main(command(raw, tmp_path / "out")) == 0
    unpacked = tmp_path / "unpacked"
    pack.unpack(tmp_path / "out" / "val", unpacked)
    before = contents(unpacked)
    assert {path.name for path in before} == {"images.u8", "labels.u8", "meta.json"}

    def stop() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pack.unpack(tmp_path / "out" / "train", unpacked, stop)
    assert contents(unpacked) == before


def test_a_pack_of_fewer_classes_leaves_no_file_of_the_one_before(pack: ModuleType, raw: Path, tmp_path: Path) -> None:
    assert pack.main(command(raw, tmp_path / "out")) == 0
    (raw / "val" / "labels.u8").write_bytes(bytes(4))
    assert pack.main(command(raw, tmp_path / "out")) == 0
    assert {path.name for path in (tmp_path / "out" / "val").iterdir()} == {"000.xz", "labels.xz", "meta.json"}


def test_a_damaged_pack_is_one_clear_error(pack: ModuleType, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack.main(command(raw, out)) == 0
    unpacked = tmp_path / "unpacked"

    def refused(message: str, name: str, content: bytes) -> None:
        whole = (out / "train" / name).read_bytes()
        (out / "train" / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            pack.unpack(out / "train", unpacked)
        assert message in str(caught.value)
        assert not unpacked.exists() or not list(unpacked.iterdir())
        (out / "train" / name).write_bytes(whole)

    for name in ("labels.xz", "000.xz", "001.xz"):
        whole = (out / "train" / name).read_bytes()
        for size in (0, 10, len(whole) // 2, len(whole) - 1):
            refused(f"{name}: cut off or damaged (", name, whole[:size])
        refused(f"{name}: cut off or damaged (", name, b"garbage" * 100)
        refused(f"{name}: cut off or damaged (", name, whole[: len(whole) // 2] + bytes(20) + whole[len(whole) // 2 :])
    refused("labels.xz: holds 5 labels, meta.json has count 6", "labels.xz", lzma.compress(bytes(5)))
    refused("labels.xz: holds more than 6 labels, meta.json has count 6", "labels.xz", lzma.compress(bytes(10**6)))
    refused("labels.xz: holds label 7, meta.json 2 styles", "labels.xz", lzma.compress(bytes([7] * 6)))
    refused("000.xz: holds less than 6 images of 8x8 pixels", "labels.xz", lzma.compress(bytes(6)))
    meta = {"count": 6, "size": 8, "styles": ["a", "b"]}
    for text, message in (
        ("[]", "meta.json: holds []; expected an object with count, size and styles"),
        ("null", "meta.json: holds None"),
        ("{}", "meta.json: has no count"),
        ('{"count": 6, "size": 1e400}', "size is inf; expected a whole number from 1 to 4096"),
        ('{"count": 6, "size": [1]}', "size is [1]; expected"),
        ('{"count": 6, "size": 10000000}', "size is 10000000; expected"),
        ('{"count": 6, "size": "x"}', "size is 'x'; expected"),
        (json.dumps(meta | {"size": 4}), "holds more than 3 images of 4x4 pixels, which labels.xz and meta.json say"),
        (json.dumps(meta | {"size": 16}), "holds less than 3 images of 16x16 pixels"),
        (json.dumps(meta | {"count": 5}), "labels.xz: holds more than 5 labels"),
    ):
        refused(message, "meta.json", text.encode())
    assert pack.unpack(out / "train", unpacked) == 6
    assert (unpacked / "images.u8").read_bytes() == (raw / "train" / "images.u8").read_bytes()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_checks_before_it_draws_and_draws_once(tmp_path: Path) -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-C", str(RECIPE), f"WORK={tmp_path}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    without = make("gpu-pack", "PYTHON=/nowhere/python", "GPU_COUNT=5")
    assert without.returncode != 0
    assert "/nowhere/python with numpy is needed: give another, for instance PYTHON=" in without.stderr
    assert "render.mjs" not in without.stdout
    assert not list(tmp_path.iterdir())
    bundles = make("gpu-bundles", "PYTHON=/nowhere/python")
    assert "pip install '.[cpu,calibrate]'" in bundles.stderr
    assert "bundles.py" not in bundles.stdout

    drawing = "--count 5 --seed-prefix train"
    assert drawing in make("-n", "gpu-pack", "GPU_COUNT=5").stdout
    (tmp_path / "train-5").mkdir()
    (tmp_path / "train-5" / "meta.json").touch()
    again = make("-n", "gpu-pack", "GPU_COUNT=5").stdout
    assert drawing not in again
    assert "pack.py --train" in again
    more = """--device cpu --tokenizer-options "--channels 8 --batch 16" """
    assert f"--minutes 1.5 {more.strip()}" in make("-n", "gpu-train", f"GPU_MORE={more}", "MINUTES=1.5").stdout


def test_packing_needs_no_torch() -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(RECIPE)!r}); import pack"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
