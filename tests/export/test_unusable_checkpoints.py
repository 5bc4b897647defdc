"""Checkpoints that are damaged or hold no usable weights: both verbs end in one line, exit code 2."""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files
import pytest
import torch
from hostile_files import CONFIG, State, saved
from safetensors.torch import save_file

from par_runtime.cli import dispatch as cli

refused, state = hostile_files.refused, hostile_files.state  # fixtures


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(tmp_path: Path, state: State, refused: Callable[..., None], zipped: bool) -> None:
    path = saved(tmp_path, state, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (1, 2, 10, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 10):
        path.write_bytes(whole[:length])
        refused(path, "not a readable PyTorch checkpoint")
    path.write_bytes(b"")
    refused(path, "is empty; copy or download it again")


@pytest.mark.parametrize("pattern", ["bits", "zeros"])
def test_damaged_files_are_one_line(
    tmp_path: Path, state: State, capfd: pytest.CaptureFixture[str], pattern: str
) -> None:
    """Any byte of the file changed: an error of one line, no traceback and no crash."""
    path = saved(tmp_path, {"model": {"norm.weight": state["norm.weight"]}})
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] = damaged[at] ^ 0x15 if pattern == "bits" else 0
        path.write_bytes(damaged)
        assert cli.main(["inspect", str(path)]) == 2
        assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(1)}, "found a key of type int"),
        ({("a",): torch.zeros(1)}, "found a key of type tuple"),
        ({b"a": torch.zeros(1)}, "found a key of type bytes"),
        ({"model": {"model": {"a": torch.zeros(1)}}}, "expected tensors by name"),
        ({"ema": {"a": torch.zeros(1)}}, "no key 'tok_embeddings.weight'"),
        ({"ema": {"shadow_params": [torch.zeros(1)]}}, "found shadow_params"),
        ({"a": None}, "expected tensors by name"),
        ({"a\n\x1b[31mb": torch.zeros(1)}, "no key 'tok_embeddings.weight'"),
        (argparse.Namespace(a=1), "holds a Namespace"),
        (torch.zeros(3), "holds a Tensor"),
    ],
)
def test_other_things_than_tensors_by_name(
    tmp_path: Path, refused: Callable[..., None], content: Any, message: str
) -> None:
    refused(saved(tmp_path, content), message)


def test_keys_of_very_high_layer_numbers(tmp_path: Path, state: State, refused: Callable[..., None]) -> None:
    for key, message in (
        ("layers.99999999999.x", "1 unknown (layers.99999999999.x)"),
        ("layers.9999.x", "holds layers 0, 1, 9999; expected layers.0 and on without a gap"),
        (f"layers.{'9' * 6000}.x", "1 unknown (layers.999"),
        ("layers.0.a\nb\x1b\ud800", r"1 unknown (layers.0.a\nb\x1b\ud800)"),
    ):
        content = {"model": state | {key: torch.zeros(1)}, "config": CONFIG}
        refused(saved(tmp_path, content), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int8), "is stored as int8; expected float32, bfloat16 or float16"),
        (lambda t: t.to(torch.float8_e4m3fn), "is stored as float8_e4m3fn"),
        (lambda t: t.to(torch.complex64), "is stored as complex64"),
        (lambda t: t.to("meta"), "is a tensor on the device 'meta', without numbers"),
        (lambda t: t.to_sparse(), "is sparse, quantized or nested"),
    ],
)
def test_tensors_that_cannot_be_weights(
    tmp_path: Path, state: State, refused: Callable[..., None], change: Any, message: str
) -> None:
    weights = {key: change(value) for key, value in state.items()}
    refused(saved(tmp_path, {"model": weights, "config": CONFIG}), message)


def header(folder: Path, text: bytes, length: int | None = None) -> Path:
    path = folder / "c.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 64)
    return path


def test_safetensors_with_bad_headers(tmp_path: Path, state: State, refused: Callable[..., None]) -> None:
    def entry(offsets: list[int], shape: list[int], dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    bad: list[Any] = [
        {"a": entry([-16, 0], [4])},
        {"a": entry([0, 64], [16]), "b": entry([0, 16], [4])},
        {"a": entry([0, 2**60], [2**58])},
        {"a": entry([0, 64], [2**40, 2**40])},
        {"a": entry([0, 16], [4], "X9")},
        [1, 2],
    ]
    for content in bad:
        refused(header(tmp_path, json.dumps(content).encode()), "not a readable safetensors file")
    for text in (b"[" * 50_000 + b"]" * 50_000, b"\xff\xfe", b"", b"{"):
        refused(header(tmp_path, text), "not a readable safetensors file")
    refused(header(tmp_path, b"{}", 2**62), "not a readable safetensors file")
    save_file(state, str(tmp_path / "c.safetensors"))
    whole = (tmp_path / "c.safetensors").read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "c.safetensors").write_bytes(whole[:length])
        message = "not a readable safetensors file" if length else "is empty; copy or download it again"
        refused(tmp_path / "c.safetensors", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "not an index of shards"),
        (b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not an index of shards"),
        (b'{"weight_map": {"a": 1}}', "not an index of shards"),
        (b'{"weight_map": {"a": NaN}}', "not an index of shards"),
        (b'{"weight_map": ["s.safetensors"]}', "not an index of shards"),
        (b'{"weight_map": {}}', "expected tensors by name"),
        (b"\xff\xfe\0", "not an index of shards"),
        (b'{"weight_map": {"a": "../s.safetensors"}}', "names files outside its folder ('../s.safetensors')"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "names files outside its folder ('/etc/passwd')"),
        (b'{"weight_map": {"a": ".."}}', "names files outside its folder ('..')"),
        (b'{"weight_map": {"a": "s\\u0000"}}', "names files outside its folder"),
        (b'{"weight_map": {"a": "model.safetensors.index.json"}}', "is JSON, not a checkpoint"),
    ],
)
def test_indexes_of_shards(tmp_path: Path, refused: Callable[..., None], text: bytes, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text)
    refused(index, message)


def test_numbers_that_are_not_finite_in_the_precision(
    tmp_path: Path, state: State, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vq = torch.load(checkpoints["vq"], weights_only=True)
    model = ["--checkpoint", str(checkpoints["par_n4_grid8"]), "--heads", "4", "--grid", "8"]
    for name, change, precision, message in (
        ("norm.weight", float("nan"), "fp32", "norm.weight holds 32 numbers that are NaN or infinite"),
        ("output.weight", float("inf"), "fp32", "output.weight holds 640 numbers that are NaN or infinite"),
        (
            "layers.1.feed_forward.w1.weight",
            1e7,
            "fp16",
            "beyond what float16 can store; give --precision bf16 or fp32",
        ),
    ):
        path = saved(tmp_path, {"model": state | {name: state[name] * change}, "config": CONFIG})
        arguments = ["--checkpoint", str(path), "--tokenizer", "none", "--precision", precision]
        assert cli.main(["export", *arguments, "--out", str(tmp_path / "b")]) == 2
        assert message in capsys.readouterr().err
    for name, change, precision in (
        ("post_quant_conv.bias", float("nan"), "fp32"),
        ("decoder.conv_in.weight", 1e7, "fp16"),
        ("encoder.conv_in.weight", float("inf"), "fp32"),
    ):
        torch.save(vq | {name: vq[name] * change}, tmp_path / "v.pt")
        arguments = ["--tokenizer", str(tmp_path / "v.pt"), "--precision", precision, "--out", str(tmp_path / "b")]
        assert cli.main(["export", *model, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"v.pt: {name} holds" in error
        assert not (tmp_path / "b").exists()


def test_tokenizers_that_do_not_belong_to_the_model(
    tmp_path: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, vq = checkpoints["par_n4_grid8"], checkpoints["vq"]
    weights = torch.load(model, weights_only=True)
    args = argparse.Namespace(image_size=128, downsample_size=16)
    torch.save({"model": weights, "args": args}, tmp_path / "c.pt")
    wide = torch.load(vq, weights_only=True)
    wide["decoder.conv_out.weight"] = torch.zeros(3, 32, 5, 5)
    torch.save(wide, tmp_path / "v.pt")
    for checkpoint, tokenizer, message in (
        (vq, vq, "this is an image tokenizer: give it as --tokenizer"),
        (vq, model, f"{vq} is a tokenizer and {model} is a model; swap them: --checkpoint {model} --tokenizer {vq}"),
        (model, model, "this is a PAR model: give it as --checkpoint"),
        (tmp_path / "c.pt", vq, "makes a token of 2x2 pixels, the model's args say downsample_size 16"),
        (model, tmp_path / "v.pt", "decoder.conv_out.weight has shape (3, 32, 5, 5); expected (3, 32, 3, 3)"),
        (model, tmp_path, "expected a folder with one checkpoint, found c.pt, v.pt; give the file itself"),
    ):
        arguments = ["--checkpoint", str(checkpoint), "--tokenizer", str(tokenizer), "--heads", "4", "--grid", "8"]
        assert cli.main(["export", *arguments, "--out", str(tmp_path / "b")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "b").exists()
