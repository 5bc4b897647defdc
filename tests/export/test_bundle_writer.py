"""``parvis export``: what it writes, what it refuses, and that a kill leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import child, golden_weights
from par_export import bundle as writer
from par_export import weights
from par_export.cli import export as cli
from par_export.gate import runner
from par_export.graphs import step
from par_model.config import PARConfig
from par_model.transformer import PAR
from par_runtime import Bundle


def run(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture
def good(checkpoints: dict[str, Path], tmp_path: Path) -> list[object]:
    return [
        "--checkpoint",
        checkpoints["par_n4_grid8"],
        "--tokenizer",
        "none",
        "--heads",
        4,
        "--grid",
        8,
        "--out",
        tmp_path / "out",
    ]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a", "b"], "2 class names for a model of 10 classes; give one per class"),
        ([], "0 class names for a model of 10 classes; give one per class"),
        (["x\n"] * 10, "class name is 'x\\n'; expected a text of 1 to 1000 printable characters"),
        ([""] * 10, "class name is ''; expected a text of 1 to 1000 printable characters"),
    ],
)
def test_bad_class_names_inside_a_checkpoint_name_the_file(
    good: list[object],
    tmp_path: Path,
    checkpoints: dict[str, Path],
    names: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "named.pt"
    torch.save({"model": torch.load(checkpoints["par_n4_grid8"], weights_only=True), "class_names": names}, file)
    assert run(*good, "--checkpoint", file) == 2
    assert capsys.readouterr().err == f"parvis: error: {file}: {text}\n"


def test_the_manifest_describes_the_whole_bundle(
    good: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {i}" for i in range(10)))
    assert run(*good, "--class-names", names, "--guidance", 2.5, "--guidance-interval", 7, "--name", "mine") == 0
    output = capsys.readouterr().out
    assert "n = 4, 19 calls per image" in output
    assert "greedy tokens as in PyTorch" in output
    b = Bundle.open(tmp_path / "out", verify="full")
    assert (b.name, b.calls, b.group_size, b.grid, b.precision) == ("mine", 19, 4, (1, 8, 8), "fp32")
    assert b.class_names is not None
    assert b.class_names[9] == "class 9"
    assert (b.defaults.guidance, b.defaults.guidance_interval) == (2.5, 7)
    assert [p.name for p in b.phases] == ["prefill", "sequential", "transition", "group"]
    assert b.phases[2].inputs == ("token", 523, 524, 525)
    assert set(b.files) == {f"{n}.onnx" for n in ("step", "step_opset23", "prefill", "transition", "group")} | {
        "weights.data"
    }
    assert set(b.parity["phases"]) == {"prefill", "sequential", "transition", "group"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["names.txt", "out"]


def test_an_existing_folder_is_kept_unless_forced(
    good: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*good) == 0
    before = (tmp_path / "out" / "manifest.json").read_text()
    assert run(*good) == 2
    assert "exists; give another --out, or --force" in capsys.readouterr().err
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "out").rename(tmp_path / f".out.old-{ended.pid}")  # as a kill between two renames leaves it
    assert run(*good) == 2
    assert "exists; give another --out, or --force" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_text() == before
    assert run(*good, "--force", "--name", "second") == 0
    assert (tmp_path / "out" / "manifest.json").read_text() != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.txt").write_text("dear")
    assert run(*good[:-1], tmp_path / "other", "--force") == 2
    assert "is not a bundle" in capsys.readouterr().err
    assert (tmp_path / "other" / "photo.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--checkpoint": "nope.pt"}, "nope.pt: no such file"),
        ({"--grid": "7"}, "does not split into 2x2 equal regions"),
        ({"--heads": "3"}, "not a multiple of n_heads=3"),
        ({"--tokenizer": "nope.pt"}, "nope.pt: no such file"),
        ({"--class-names": "NAMES"}, "names.json: 2 class names for a model of 10 classes; give one per class"),
        ({"--class-names": "EMPTY"}, "empty.txt: 0 class names for a model of 10 classes; give one per class"),
        ({"--out": "."}, "--out .: names no new folder; give the name of one"),
        ({"--name": ""}, "name is ''; expected a text of 1 to"),
        ({"--class-names": "/dev/zero"}, "/dev/zero: has more than 67108864 bytes; expected UTF-8"),
        ({"--grid": "2x8x8", "--tokenizer": "VQ"}, "an image tokenizer, and grid 2x8x8 is of video; give a video"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    good: list[object],
    tmp_path: Path,
    checkpoints: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    text: str,
) -> None:
    (tmp_path / "names.json").write_text('["a", "b"]')
    (tmp_path / "empty.txt").write_text("\n")
    arguments = dict(zip(good[::2], good[1::2], strict=True)) | change
    filled = [
        {"VQ": checkpoints["vq"], "NAMES": tmp_path / "names.json", "EMPTY": tmp_path / "empty.txt"}.get(str(v), v)
        for kv in arguments.items()
        for v in kv
    ]
    assert run(*filled) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "names.json"]


def test_a_tokenizer_of_another_codebook_is_refused(
    good: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from par_model.config import VQConfig
    from par_model.vq import VQModel

    other = VQModel(VQConfig(codebook_size=256, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32))
    torch.save(other.state_dict(), tmp_path / "v.pt")
    arguments = dict(zip(good[::2], good[1::2], strict=True)) | {"--tokenizer": tmp_path / "v.pt"}
    assert run(*(v for kv in arguments.items() for v in kv)) == 2
    assert "has 256 codes, the model was trained on 512" in capsys.readouterr().err


def sabotage_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "NORM_EPS", 0.1)


def sabotage_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    real = weights.rotary_table

    def unrotated(config: PARConfig) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = real(config)
        cos[0] = 1  # an angle of zero for the class token, instead of no rotary row
        return cos, sin

    monkeypatch.setattr(weights, "rotary_table", unrotated)


def sabotage_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swap the learnable tokens in the embedding table."""
    real = weights.WeightsWriter.add

    def add(self: Any, name: str, parts: Any, dtype: str) -> None:
        parts = list(parts)
        if name == "embed":
            parts[-1] = parts[-1].flip(0)
        real(self, name, parts, dtype)

    monkeypatch.setattr(weights.WeightsWriter, "add", add)


@pytest.mark.parametrize("sabotage", [sabotage_scale, sabotage_rotary, sabotage_order])
def test_the_gate_refuses_a_wrong_graph_and_publishes_nothing(
    good: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Any,
) -> None:
    sabotage(monkeypatch)
    assert run(*good) == 1
    assert "Nothing was published" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_gate_names_the_first_greedy_token_that_differs(
    good: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner.run_step

    def wrong(*arguments: Any, **more: Any) -> Any:
        tokens, logits = real(*arguments, **more)
        if len(tokens) > 1:  # the first image is fed random tokens
            tokens[1, 17] = (tokens[1, 17] + 1) % 512
        return tokens, logits

    monkeypatch.setattr(runner, "run_step", wrong)
    assert run(*good) == 1
    assert "differ from the oracle first at image 0, position 17" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    good: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_graphs", full)
    assert run(*good) == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_is_one_line(
    good: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)  # root may write anywhere, so the refusal is made here
    assert run(*good) == 2
    assert "no permission to write" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sig", [*(pytest.param(sig, marks=pytest.mark.slow) for sig in (signal.SIGTERM, signal.SIGINT)), signal.SIGKILL]
)
def test_a_killed_export_leaves_no_bundle_and_the_next_cleans_up(
    good: list[object], tmp_path: Path, sig: signal.Signals
) -> None:
    hang = (
        "import sys, time; from par_export.gate import model as model_gate; from par_export.cli import export as cli\n"
        "def wait(*a, **k): print('gate', flush=True); time.sleep(60)\n"
        "model_gate.gate = wait; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", hang, *map(str, good)]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "gate":
            assert process.poll() is None
        assert [p.name for p in tmp_path.iterdir()] == [f".out.part-{process.pid}"]
        process.send_signal(sig)
        _, error = process.communicate(timeout=30)
    assert "Traceback" not in error
    assert process.returncode != 0
    assert not (tmp_path / "out").exists()
    if sig != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []
    assert run(*good) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_memory_stays_near_the_size_of_the_checkpoint(tmp_path: Path) -> None:
    """At most 1.3 times the checkpoint plus 1 GB, for a checkpoint of about 1 GB."""
    config = PARConfig(dim=1024, n_layers=17, n_heads=16, vocab_size=16384, n_classes=10, grid=(1, 8, 8), group_size=4)
    torch.save(golden_weights(PAR(config)).state_dict(), tmp_path / "c.pt")
    size = os.path.getsize(tmp_path / "c.pt")
    assert size > 0.95e9
    for precision in ("fp32", "fp16", "bf16"):
        code = (
            "import sys; from par_runtime import system; from par_export.cli import export as cli; code = "
            "cli.main(sys.argv[1:])\n"
            "print(system.peak_bytes()); sys.exit(code)"
        )
        arguments = [
            "--checkpoint",
            tmp_path / "c.pt",
            "--tokenizer",
            "none",
            "--heads",
            16,
            "--grid",
            8,
            "--precision",
            precision,
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments), "--out", str(tmp_path / precision)],
            capture_output=True,
            text=True,
            check=True,
        )
        peak = int(done.stdout.splitlines()[-1])
        assert peak <= 1.3 * size + 1e9, f"{precision}: {peak / 1e6:.0f} MB for a checkpoint of {size / 1e6:.0f} MB"


def test_stale_folders_of_living_processes_are_left_alone(good: list[object], tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        mine = tmp_path / f".out.part-{sleeper.pid}"
        mine.mkdir()
        assert run(*good) == 0
        assert mine.exists()
    finally:
        sleeper.kill()
        sleeper.wait()
    time.sleep(0.1)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["schema"] == 1
