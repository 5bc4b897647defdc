"""The trainers: a run that was killed and resumed ends with the weights of a run that was not killed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from par_model.checkpoint import open_checkpoint, par_config, vq_config
from par_model.config import VQConfig
from par_model.training import tokenizer as tokenizer_training
from par_model.training import transformer as transformer_training
from par_model.training.cli import encode as encode_codes
from par_model.training.cli import tokenizer as train_tokenizer
from par_model.training.cli import transformer as train
from par_model.training.run import batch_index, cosine
from par_model.vq import VQModel

pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture(scope="module")
def images(training_images: Path) -> Path:
    return training_images


TOKENIZER = [
    "--codes",
    "16",
    "--channels",
    "8",
    "--multipliers",
    "1",
    "2",
    "--z-channels",
    "8",
    "--norm-groups",
    "4",
    "--batch",
    "8",
]


def tokenizer(images: Path, run: Path, *more: str) -> dict[str, torch.Tensor]:
    base = ["--data", str(images), "--val", str(images), "--run", str(run), "--report", "2", *TOKENIZER, *more]
    assert train_tokenizer.main(base) == 0
    weights: dict[str, torch.Tensor] = torch.load(run / "checkpoint.pt", weights_only=True)["live"]
    return weights


def test_a_tokenizer_run_resumes_where_it_stopped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("par_model.training.tokenizer.validate", lambda *_: ({}, np.zeros((8, 8, 3), np.uint8)))
    whole = tokenizer(images, tmp_path / "a", "--steps", "4")
    # The stopped run has the same schedule; it stops after two steps.
    stop_after(monkeypatch, tokenizer_training, 2)
    tokenizer(images, tmp_path / "b", "--steps", "4")
    monkeypatch.undo()
    monkeypatch.setattr("par_model.training.tokenizer.validate", lambda *_: ({}, np.zeros((8, 8, 3), np.uint8)))
    resumed = tokenizer(images, tmp_path / "b", "--steps", "4", "--resume")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def stop_after(monkeypatch: pytest.MonkeyPatch, module: object, steps: int) -> None:
    """Stop a trainer as Ctrl-C does (should_stop) after ``steps`` steps."""
    real = module.Run  # type: ignore[attr-defined]

    class Stopping(real):  # type: ignore[misc, valid-type]
        def log(self, **row: object) -> None:
            super().log(**row)
            self.should_stop = row["step"] == steps

    monkeypatch.setattr(module, "Run", Stopping)


def test_from_images_to_a_trained_model(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer(images, tmp_path / "vq", "--steps", "4")
    assert (tmp_path / "vq" / "sheet.png").stat().st_size > 0
    rows = [json.loads(line) for line in (tmp_path / "vq" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert vq_config(open_checkpoint(tmp_path / "vq" / "model.pt")).norm_groups == 4
    vq = str(tmp_path / "vq" / "model.pt")
    codes = str(tmp_path / "codes.npz")
    assert encode_codes.main(["--data", str(images), "--tokenizer", vq, "--out", codes]) == 0
    base = [
        "--codes",
        codes,
        "--val",
        codes,
        "--vocab",
        "16",
        "--dim",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--batch",
        "8",
    ]
    base += ["--tokenizer", vq, "--report", "2", "--sheet", "4", "--steps", "4", "--dropout", "0"]
    for optimizer in ("adamw", "muon"):
        options = [*base, "--optimizer", optimizer, "--schedule", "cosine"]
        a, b = tmp_path / f"{optimizer}-a", tmp_path / f"{optimizer}-b"
        assert train.main([*options, "--run", str(a)]) == 0
        assert (a / "sheet-000004.png").stat().st_size > 0
        with monkeypatch.context() as patch:
            stop_after(patch, transformer_training, 2)
            train.main([*options, "--run", str(b)])
        train.main([*options, "--run", str(b), "--resume"])
        whole, resumed = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
        assert whole["step"] == resumed["step"] == 4
        assert all(torch.equal(whole["live"][k], resumed["live"][k]) for k in whole["live"])
        assert all(torch.equal(whole["model"][k], resumed["model"][k]) for k in whole["model"])
    config = par_config(open_checkpoint(tmp_path / "adamw-a" / "model.pt"))
    assert (config.grid, config.vocab_size, config.n_classes) == ((1, 4, 4), 16, 2)


@pytest.mark.parametrize("fast", [False, True])
def test_codes_are_those_of_fp32_whatever_is_fast_here(
    training_images: Path, tmp_path: Path, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime encodes in fp32; in bf16 many codes are others, which a model should not be trained on."""
    torch.manual_seed(1)
    config = VQConfig(4096, 8, channels=8, channel_multipliers=(1, 1), res_blocks=1, z_channels=8, norm_groups=4)
    model = VQModel(config).eval()
    torch.save({"model": model.state_dict(), "config": asdict(config) | {"kind": "vq"}}, tmp_path / "vq.pt")
    monkeypatch.setattr("par_model.training.device.bf16_is_fast", lambda *_: fast)
    out = tmp_path / "codes.npz"
    options = ["--data", str(training_images), "--tokenizer", str(tmp_path / "vq.pt"), "--out", str(out)]
    assert encode_codes.main(options) == 0
    images = np.fromfile(training_images / "images.u8", np.uint8).reshape(-1, 8, 8, 3)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        exact = model.encode(pixels).numpy()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.encode(pixels).numpy()
    with np.load(out) as file:
        assert (file["codes"] == exact).mean() > 0.999  # batches of other sizes may add up in another order
    assert (rounded == exact).mean() < 0.98


def test_the_learning_rate_of_muon_is_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = str(tmp_path / "codes.npz")
    random = np.random.default_rng(1)
    np.savez(
        codes,
        codes=random.integers(16, size=(8, 4, 4)).astype(np.uint16),
        labels=np.arange(8, dtype=np.uint8) % 2,
        class_names=np.array(["a", "b"]),
    )
    base = (
        f"--codes {codes} --val {codes} --vocab 16 --dim 16 --layers 1 --heads 2 --batch 8 --lr 0.5 --dropout 0 --ema 0"
    )
    first = [*base.split(), "--optimizer", "muon", "--warmup", "0", "--run", str(tmp_path / "first")]
    assert train.main([*first, "--steps", "1"]) == 0
    before = open_checkpoint(tmp_path / "first" / "model.pt")
    moved = {}
    for rate in ("0.02", "1e-9"):
        run = tmp_path / rate
        more = ["--steps", "1", "--init", str(tmp_path / "first" / "model.pt"), "--muon-lr", rate, "--run", str(run)]
        assert train.main([*first, *more]) == 0
        after = open_checkpoint(run / "model.pt")
        moved[rate] = {key: float((after.tensor(key) - before.tensor(key)).abs().max()) for key in before.tensors}
    matrices = [key for key in before.tensors if key.startswith("layers.") and len(before.tensors[key].shape) == 2]
    assert matrices
    assert all(moved["1e-9"][key] < 1e-6 < 1e-4 < moved["0.02"][key] for key in matrices)
    assert moved["1e-9"]["output.weight"] == moved["0.02"]["output.weight"] > 0.1  # AdamW's rate is another
    capsys.readouterr()
    assert train.main([*base.split(), "--muon-lr", "0.01", "--run", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        "parvis: error: --muon-lr 0.01: is of Muon, and the optimizer is adamw; give --optimizer muon, or --lr\n"
    )
    assert not (tmp_path / "none").exists()


def test_a_run_is_not_overwritten_silently(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("par_model.training.tokenizer.validate", lambda *_: ({}, np.zeros((8, 8, 3), np.uint8)))
    tokenizer(images, tmp_path, "--steps", "1")
    base = ["--data", str(images), "--val", str(images), "--run", str(tmp_path), *TOKENIZER]
    assert train_tokenizer.main([*base, "--steps", "1"]) == 2
    assert "give --resume to continue" in capsys.readouterr().err


def test_every_image_is_seen_once_an_epoch() -> None:
    seen = np.concatenate([batch_index(1, step, 8, 48) for step in range(6)])
    assert sorted(seen) == list(range(48))
    assert (batch_index(1, 7, 8, 48) != batch_index(1, 1, 8, 48)).any()


def test_the_schedule_warms_up_and_comes_down() -> None:
    rates = [cosine(step, 100, 1.0, 10, floor=0.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)
    assert cosine(50, 100, 1.0, 10, floor=1.0) == 1.0


def test_bad_input_is_one_line_and_exit_code_2(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = tmp_path / "codes.npz"
    np.savez(codes, codes=np.full((2, 4, 4), 20, np.uint16), labels=np.zeros(2, np.uint8), class_names=np.array(["a"]))
    (tmp_path / "text.npz").write_text("hello")
    whole = codes.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "empty.npz", codes=np.zeros((0, 4, 4), np.uint16), labels=np.zeros(0), class_names=["a"])
    names = np.array([2**31 - 1], np.uint32).view("U1")  # no character
    np.savez(
        tmp_path / "names.npz", codes=np.zeros((1, 4, 4), np.uint16), labels=np.zeros(1, np.uint8), class_names=names
    )
    os.mkfifo(tmp_path / "pipe.npz")
    run = ["--run", str(tmp_path / "run")]
    for module, arguments, text in [
        (
            train_tokenizer,
            ["--data", str(tmp_path), "--val", str(images), *run],
            "holds no pictures; expected a folder",
        ),
        (train_tokenizer, ["--data", str(images), "--val", str(images), *run, "--channels", "5"], "norm_groups=8"),
        (
            train_tokenizer,
            ["--data", str(images), "--val", str(images), *run, "--structure", "-1"],
            "--structure -1.0: expected 0 to 1000000; 1 to 3 are good numbers",
        ),
        (
            train,
            ["--codes", "none.npz", "--val", str(codes), "--vocab", "16", *run],
            "none.npz: no such file or folder; check the name",
        ),
        *(
            (train, ["--codes", str(tmp_path / name), "--val", str(codes), "--vocab", "16", *run], text)
            for name, text in (
                ("cut.npz", "cut.npz: not a file of parvis encode"),
                ("array.npy", "array.npy: not a file of parvis encode"),
                ("names.npz", "names.npz: not a file of parvis encode"),
                ("pipe.npz", "pipe.npz: is a pipe or a device; expected a file"),
                ("empty.npz", "expected whole numbers, codes [M,h,w]"),
            )
        ),
        (
            train,
            ["--codes", str(tmp_path / "text.npz"), "--val", str(codes), "--vocab", "16", *run],
            "not a file of parvis",
        ),
        (
            train,
            ["--codes", str(codes), "--val", str(codes), "--vocab", "16", *run],
            "has code 20, --vocab 16 allows 0..15",
        ),
        (train, ["--codes", str(codes), "--val", str(codes), "--vocab", "32", "--dim", "8", *run], "go together"),
        (
            train,
            ["--codes", str(codes), "--val", str(codes), "--vocab", "32", "--group-size", "3", *run],
            "not a square",
        ),
        (encode_codes, ["--data", str(images), "--tokenizer", "none.pt", "--out", str(codes)], "none.pt: no such file"),
    ]:
        assert module.main(arguments) == 2, text  # type: ignore[attr-defined]
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [train_tokenizer, train, encode_codes])
def test_wrong_options_are_one_line_and_exit_code_2(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        module.main(["--batch", "many"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("parvis: error: argument --batch: invalid int value: 'many'")
    assert f"'{module.parser().prog} --help'" in error
    assert error.count("\n") == 1


def test_an_encoder_is_trained_for_an_unchanged_tokenizer(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer(images, tmp_path / "first", "--steps", "2")
    given = tmp_path / "first" / "model.pt"
    run = tmp_path / "second"
    data = ["--data", str(images), "--val", str(images), "--run", str(run), "--batch", "8"]
    assert train_tokenizer.main([*data, "--encoder-for", str(given), "--steps", "3", "--report", "1"]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (given, run / "model.pt"))
    assert before["config"] == after["config"]
    same = {key for key in before["model"] if torch.equal(before["model"][key], after["model"][key])}
    encoder = {key for key in before["model"] if key.startswith(("encoder.", "quant_conv."))}
    assert same == before["model"].keys() - encoder  # the encoder is a new one, and nothing else changed
    assert (
        train_tokenizer.main([*data[:-2], "--encoder-for", str(images / "labels.u8"), "--run", str(tmp_path / "c")])
        == 2
    )
    assert f"parvis: error: {images / 'labels.u8'}: " in capsys.readouterr().err.splitlines()[-1]


def test_a_tokenizer_is_trained_further(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer(images, tmp_path / "first", "--steps", "2")
    given, run = tmp_path / "first" / "model.pt", tmp_path / "second"
    data = [
        "--data",
        str(images),
        "--val",
        str(images),
        "--batch",
        "8",
        "--steps",
        "2",
        "--report",
        "1",
        "--lr",
        "1e-6",
    ]
    # Sizes are those of the file, whatever else is given.
    assert train_tokenizer.main([*data, "--init", str(given), "--run", str(run), "--channels", "64"]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (given, run / "model.pt"))
    assert before["config"] == after["config"]
    moved = {key: float((before["model"][key] - after["model"][key]).abs().max()) for key in before["model"]}
    assert max(moved.values()) < 1e-5  # from where it was
    for part in ("encoder.conv_in", "quant_conv", "quantize.embedding", "post_quant_conv", "decoder.conv_out"):
        assert moved[f"{part}.weight"] > 0  # all of it
    assert train_tokenizer.main([*data, "--init", str(images / "labels.u8"), "--run", str(tmp_path / "c")]) == 2
    assert f"parvis: error: {images / 'labels.u8'}: " in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit) as stopped:
        train_tokenizer.main([*data, "--init", str(given), "--encoder-for", str(given), "--run", str(tmp_path / "c")])
    assert stopped.value.code == 2
    assert "argument --encoder-for: not allowed with argument --init" in capsys.readouterr().err
