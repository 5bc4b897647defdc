"""``gpu.py`` checks everything before it starts, and ends in order when it is told to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from recipe_scripts import RECIPE, scripts

from par_model.checkpoint import open_checkpoint, par_config, vq_config
from par_model.config import PARConfig, VQConfig
from par_model.training.files import alone_in
from par_model.transformer import PAR
from par_model.vq import VQModel

ROOT = Path(__file__).parents[2]
VQ = VQConfig(16, channels=8, channel_multipliers=(1,), res_blocks=1, z_channels=8, norm_groups=4)
TOKENIZER = "--codes 16 --channels 8 --multipliers 1 --z-channels 8 --norm-groups 4 --batch 8 --report 1"
MODEL = "--vocab 16 --dim 16 --layers 1 --heads 2 --batch 8 --report 1"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """``gpu.py``."""
    with scripts("gpu") as (module,):
        yield module


@pytest.fixture
def packed(gpu: ModuleType, training_images: Path, tmp_path: Path) -> Path:
    """Packed images, and beside them weights: ``vq.pt`` of 16 codes, ``n4.pt``, and cut ones of both."""
    val = tmp_path / "val-raw"
    shutil.copytree(training_images, val)
    (np.fromfile(val / "images.u8", np.uint8) ^ 1).tofile(val / "images.u8")
    pack = sys.modules["pack"]
    command = ["--train", str(training_images), "--val", str(val), "--out", str(tmp_path / "packed"), "--preset", "0"]
    assert pack.main(command) == 0
    torch.save({"model": VQModel(VQ).state_dict(), "config": asdict(VQ) | {"kind": "vq"}}, tmp_path / "vq.pt")
    config = PARConfig(16, 1, 2, vocab_size=16, n_classes=2, grid=(1, 8, 8), group_size=4)
    content = {"model": PAR(config).state_dict(), "config": asdict(config) | {"kind": "par"}}
    torch.save(content | {"class_names": ["left", "right"]}, tmp_path / "n4.pt")
    torch.save(content | {"class_names": ["left", "down"]}, tmp_path / "other.pt")
    for name in ("vq", "n4"):
        (tmp_path / f"cut-{name}.pt").write_bytes((tmp_path / f"{name}.pt").read_bytes()[:-100])
    return tmp_path / "packed"


def test_what_it_cannot_use_is_one_line_before_anything_starts(
    gpu: ModuleType, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (tmp_path / "file").touch()
    small = ["--tokenizer-options", TOKENIZER, "--model-options", MODEL]

    bad_heads, wider = f"{MODEL} --heads 5", f"{MODEL} --dim 32"

    def refused(text: str, *more: str) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        command = ["--data", "packed", "--out", "out", "--device", "cpu", "--minutes", "0.01", *small, *more]
        assert gpu.main(command) == 2, text
        printed = capsys.readouterr()
        assert text in printed.err
        assert printed.err.startswith("gpu.py: error: ")
        assert (printed.err.count("\n"), printed.out) == (1, "")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert not list(temporary.glob("parvis-gpu-*"))

    for value in ("0", "nan", "-1", "1e9", "inf"):
        refused(f"--minutes {float(value)}: expected a number above 0, and below 1000", "--minutes", value)
    refused("--start-seconds nan: expected 0 to 3600", "--start-seconds", "nan")
    refused("--grace-seconds -1.0: expected 0 to 3600", "--grace-seconds", "-1")
    refused("--share-model nan: expected 0 to 1", "--share-model", "nan")
    refused("shares of the time (0.36, 0.9, 0.19): expected numbers", "--share-model", "0.9")
    refused("--device gpu: expected auto, cpu", "--device", "gpu")
    refused("--model none.pt: no such file", "--model", "none.pt")
    refused("--tokenizer none.pt: no such file", "--tokenizer", "none.pt")
    refused("cut-vq.pt: not a readable PyTorch checkpoint", "--tokenizer", "cut-vq.pt")
    refused("cut-n4.pt: not a readable PyTorch checkpoint", "--model", "cut-n4.pt")
    refused("n4.pt: ", "--tokenizer", "n4.pt")
    refused("vq.pt: ", "--model", "vq.pt")
    for name in ("--tokenizer-options", "--model-options"):
        refused(f"{name}: unrecognized arguments: --nix 3", name, "--nix 3")
        refused(f"{name} '--lr \"3': no closing quotation; close each quotation", name, '--lr "3')
        refused(f"{name}: --lr nan: expected a number above 0", name, "--lr nan")
        refused(f"{name}: has --run, which gpu.py sets itself", name, "--run x")
        refused(f"{name}: has --minutes, which gpu.py sets itself", name, "--minutes 3")
    refused("--tokenizer-options: channels=9 times multiplier 1 is not", "--tokenizer-options", "--channels 9")
    refused(
        "images of 8 pixels; expected a multiple of 16", "--tokenizer-options", f"{TOKENIZER} --multipliers 1 1 1 1 1"
    )
    refused("the tokenizer has 16 codes, --model-options has --vocab 8", "--model-options", "--vocab 8")
    refused("--model-options, for n = 4: dim=16 is not a multiple of n_heads=5", "--model-options", bad_heads)
    refused("for n = 16: group_size=16 is more than half", "--tokenizer-options", f"{TOKENIZER} --multipliers 1 1")
    refused("--model n4.pt: has dim 16, the models that begin", "--model", "n4.pt", "--model-options", wider)
    refused("--model other.pt: class 1 is 'down', not 'right' as in --data packed; give", "--model", "other.pt")
    refused("--model-options: --init n4.pt: has dim 16", "--model-options", f"{MODEL} --dim 32 --init n4.pt")
    refused("has no folder train; expected the folder that pack.py wrote", "--data", ".")
    refused("--out file: is a file", "--out", "file")
    refused("--work file: is a file", "--work", "file")
    refused("--out work/deep is in --work work", "--work", "work", "--out", "work/deep")
    refused("in the folder of --data packed", "--out", "packed")
    refused("in the folder of --data packed", "--work", "packed")
    shutil.copy("n4.pt", "model-n1.pt")
    refused("--out .: would write model-n1.pt, which is --model", "--out", ".", "--model", "model-n1.pt")
    (packed / "val" / "001.xz").rename(packed / "001.xz")
    refused("has no 001.xz; take the whole folder here again")
    (packed / "001.xz").rename(packed / "val" / "001.xz")
    (packed / "val" / "labels.xz").write_bytes(b"")
    refused("labels.xz: cut off or damaged")
    (packed / "val" / "meta.json").write_text('{"count": 48, "size": 1e400}')
    refused("meta.json: size is inf; expected a whole number")


@pytest.mark.parametrize("option", ["--out", "--work"])
def test_a_second_one_beside_it_moves_nothing_away(
    gpu: ModuleType, packed: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    (out / "tokenizer.pt").write_text("of the first one")
    command = ["--data", str(packed), "--out", str(out), "--work", str(work), "--device", "cpu"]
    command += ["--tokenizer-options", TOKENIZER, "--model-options", MODEL]
    folder = {"--out": out, "--work": work}[option]
    with alone_in(option, folder):
        assert gpu.main(command) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"gpu.py: error: {option} {folder}: another process writes into it now; wait")
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert [path.name for path in out.iterdir()] == ["tokenizer.pt"]
    assert not work.exists() or not list(work.iterdir())


def still_running(text: str) -> list[str]:
    """The processes with ``text`` in their command."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [command] if text in command and process.parent.name != str(os.getpid()) else []
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_parts_and_keeps_what_they_made(packed: Path, tmp_path: Path, number: signal.Signals) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    out = tmp_path / "out"
    command = [sys.executable, str(RECIPE / "gpu.py"), "--data", str(packed), "--out", str(out), "--device", "cpu"]
    options = ["--minutes", "9", "--tokenizer-options", TOKENIZER, "--model-options", MODEL]
    part = "tokenizer" if number is signal.SIGINT else "model-n4"
    if part == "model-n4":
        options += ["--tokenizer", str(tmp_path / "vq.pt")]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not list(temporary.glob(f"parvis-gpu-*/{part}/checkpoint.pt")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed + errors
    assert errors == ""
    assert printed.splitlines()[-1].endswith(f"stopped by {number.name}; what was made until then is in {out}")
    assert "FAILED" not in printed  # the training was told, saved and ended by itself
    assert not still_running(str(tmp_path))
    assert not list(temporary.glob("parvis-gpu-*"))
    rows = json.loads((out / "results.json").read_text())
    assert [(row["part"], row["ended"]) for row in rows] == [(part, "stopped")]
    made = open_checkpoint(out / f"{part}.pt")
    assert vq_config(made).codebook_size == 16 if part == "tokenizer" else par_config(made).dim == 16
