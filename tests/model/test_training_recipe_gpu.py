"""The recipe's way to train on a GPU, rehearsed on the CPU with tiny models: images in, weights and sheets out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_scripts import scripts

from par_model.checkpoint import open_checkpoint, par_config, vq_config
from par_model.training.cli import transformer as train
from par_model.training.data import ImageFolder
from par_model.training.files import InputError

TOKENIZER = "--codes 16 --channels 8 --multipliers 1 --z-channels 8 --norm-groups 4 --batch 8 --steps 6 --report 3"
MODEL = "--vocab 16 --dim 16 --layers 1 --heads 2 --batch 8 --steps 6 --report 3"


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    """The scripts ``pack.py`` and ``gpu.py``."""
    names = ("pack", "gpu", "gpu_parts")
    with scripts(*names) as modules:
        yield dict(zip(names, modules, strict=True))


@pytest.fixture(scope="module")
def packed(recipe: dict[str, ModuleType], training_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training images, and 12 others of which 4 are equal to some of these, packed."""
    folder = tmp_path_factory.mktemp("packed")
    val = folder / "val-raw"
    shutil.copytree(training_images, val)
    pixels = np.fromfile(training_images / "images.u8", np.uint8).reshape(48, 8, 8, 3)[:12].copy()
    pixels[4:] ^= 1
    pixels.tofile(val / "images.u8")
    (np.arange(12, dtype=np.uint8) % 2).tofile(val / "labels.u8")
    (val / "meta.json").write_text(json.dumps({"count": 12, "size": 8, "styles": ["left", "right"]}))
    assert recipe["pack"].main(["--train", str(training_images), "--val", str(val), "--out", str(folder / "p")]) == 0
    return folder / "p"


def test_packed_images_come_back(
    recipe: dict[str, ModuleType], packed: Path, training_images: Path, tmp_path: Path
) -> None:
    assert recipe["pack"].unpack(packed / "train", tmp_path / "train") == 48
    for name in ("images.u8", "labels.u8"):
        assert (tmp_path / "train" / name).read_bytes() == (training_images / name).read_bytes()
    assert recipe["pack"].unpack(packed / "val", tmp_path / "val") == 8  # without those that the training set has
    val, seen = ImageFolder.open(tmp_path / "val"), ImageFolder.open(training_images)
    assert not {image.tobytes() for image in val.images} & {image.tobytes() for image in seen.images}
    shutil.copytree(packed / "train", tmp_path / "cut")
    whole = (tmp_path / "cut" / "001.xz").read_bytes()
    (tmp_path / "cut" / "001.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"001\.xz: cut off or damaged"):
        recipe["pack"].unpack(tmp_path / "cut", tmp_path / "never")


def test_a_damaged_pack_moves_no_results_away(
    recipe: dict[str, ModuleType], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, out = Path(shutil.copytree(packed, tmp_path / "cut")), tmp_path / "out"
    whole = (cut / "train" / "001.xz").read_bytes()
    (cut / "train" / "001.xz").write_bytes(whole[: len(whole) // 2])
    out.mkdir()
    for name in ("tokenizer.pt", "results.json", "log.txt"):
        (out / name).write_text(f"{name} of an earlier try")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert rehearse(recipe, cut, out, "--model-options", MODEL) == 2
    assert "001.xz: cut off or damaged" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_results_that_options_of_the_trainers_name_stay(recipe: dict[str, ModuleType], tmp_path: Path) -> None:
    gpu = recipe["gpu"]
    for name in gpu.RESULTS:
        (tmp_path / name).touch()
    options = ["--tokenizer-options", f"--init {tmp_path / 'tokenizer.pt'}", "--model-options"]
    options.append(f"--dropout 0 --init={tmp_path / 'model-n4.pt'}")
    args = gpu.parser().parse_args(["--data", "d", "--out", str(tmp_path), *options])
    moved = gpu.set_aside(tmp_path, gpu.in_options(args))
    assert moved == tmp_path / "earlier-1"
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.pt", "model-n4.pt", "earlier-1"}


def test_the_last_whole_row_of_a_log(recipe: dict[str, ModuleType], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for text, row in (
        ("", {}),
        ('{"step": 3}\n{"step": 4, "ps', {"step": 3}),
        ('{"step": 3}\n{"step": 4}\n', {"step": 4}),
    ):
        log.write_text(text)
        assert recipe["gpu_parts"].last_row(log) == row


def rehearse(recipe: dict[str, ModuleType], packed: Path, out: Path, *more: str) -> int:
    """Run the whole of it with tiny models; nothing is stopped for its time."""
    options = ["--data", str(packed), "--out", str(out), "--minutes", "10", "--device", "cpu", "--grace-seconds", "600"]
    code: int = recipe["gpu"].main([*options, "--tokenizer-options", TOKENIZER, *more])
    return code


@pytest.mark.slow
def test_the_whole_training_makes_what_an_export_takes_and_a_part_that_fails_loses_nothing(
    recipe: dict[str, ModuleType], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert rehearse(recipe, packed, out, "--model-options", MODEL) == 0, capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "tokenizer.pt",
        *(f"model-n{n}.pt" for n in (1, 4, 16)),
        "val.npz",
        "sheets.png",
        "results.json",
        "log.txt",
    }
    assert vq_config(open_checkpoint(out / "tokenizer.pt")).codebook_size == 16
    for n in (1, 4, 16):
        checkpoint = open_checkpoint(out / f"model-n{n}.pt")
        assert par_config(checkpoint).group_size == n
        assert checkpoint.class_names == ["left", "right"]
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float16}
    rows = json.loads((out / "results.json").read_text())
    assert [row["part"] for row in rows] == ["tokenizer", "model-n4", "model-n1", "model-n16"]
    assert {row["ended"] for row in rows} == {"in time"}
    assert all(row["step"] == 6 and row["mb"] > 0 for row in rows)
    with np.load(out / "val.npz") as arrays:
        assert arrays["codes"].shape == (8, 8, 8)
    with Image.open(out / "sheets.png") as sheets:
        assert sheets.height == 12 + 8 * 2 + 3 * (8 + 12 + 4 * 8)  # with captions
        assert (np.asarray(sheets)[:12] < 128).any()
    table = capsys.readouterr().out.splitlines()[-6:]
    assert table[0].split()[:3] == ["part", "ended", "step"]
    assert table[4].startswith("model-n16")
    assert "model-n1: step=6 images=48 loss=" in (out / "log.txt").read_text()

    # A second try begins with the tokenizer of the first one; what its work folder has of the models is damaged.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    work = tmp_path / "work"
    for n in (1, 4, 16):
        (work / f"model-n{n}").mkdir(parents=True)
        (work / f"model-n{n}" / "checkpoint.pt").write_bytes(b"cut")
        os.utime(work / f"model-n{n}" / "checkpoint.pt", (0, 0))
    given = ["--tokenizer", str(out / "tokenizer.pt"), "--model-options", MODEL, "--work", str(work)]
    assert rehearse(recipe, packed, out, *given) == 1
    assert {path.name for path in out.iterdir()} == {"tokenizer.pt", "val.npz", "results.json", "log.txt", "earlier-1"}
    del before["tokenizer.pt"]
    assert {path.name: path.read_bytes() for path in (out / "earlier-1").iterdir()} == before
    rows = json.loads((out / "results.json").read_text())
    assert [(row["part"], row["ended"]) for row in rows] == [(f"model-n{n}", "FAILED") for n in (4, 1, 16)]
    printed = capsys.readouterr().out
    assert f"what an earlier try left in {out} is in {out / 'earlier-1'}" in printed
    assert f"model-n4: FAILED with code 2: parvis: error: --resume: {work / 'model-n4' / 'checkpoint.pt'}: " in printed
    assert (work / "model-n4" / "checkpoint.pt").read_bytes() == b"cut"


def test_a_part_that_is_late_is_stopped_and_leaves_its_last_report(
    recipe: dict[str, ModuleType], packed: Path, tmp_path: Path
) -> None:
    arguments = (
        recipe["gpu"]
        .parser()
        .parse_args(["--data", str(packed), "--out", str(tmp_path / "out"), "--device", "cpu", "--start-seconds", "60"])
    )
    work = recipe["gpu_parts"].Work(arguments, tmp_path, torch.device("cpu"))
    sleeping = recipe["gpu_parts"].Part(
        "late", [sys.executable, "-c", "import time; time.sleep(600)"], -70, tmp_path / "late"
    )
    work.run([sleeping])
    assert sleeping.code == -15
    assert work.collect(sleeping, halves=True) is None
    codes = tmp_path / "codes.npz"
    np.savez(codes, codes=np.zeros((8, 4, 4), np.uint16), labels=np.zeros(8, np.int64), class_names=np.array(["a"]))
    run = ["--codes", str(codes), "--val", str(codes), "--device", "cpu", "--run", str(tmp_path / "late")]
    assert train.main([*run, *MODEL.split()]) == 0
    (tmp_path / "late" / "model.pt").unlink()  # as if it had been stopped before it was written
    assert work.collect(sleeping, halves=True) == tmp_path / "out" / "late.pt"
    assert [row["ended"] for row in work.rows] == ["FAILED", "too late"]
    assert par_config(open_checkpoint(tmp_path / "out" / "late.pt")).dim == 16
