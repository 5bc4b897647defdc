"""Files and folders that people give in place of a checkpoint: both verbs say what each is, and what to do."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
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
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3100000000\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.pt", LFS, "is a Git LFS pointer, not the weights: run 'git lfs pull'"),
        ("c.safetensors", LFS, "is a Git LFS pointer, not the weights: run 'git lfs pull'"),
        (
            "c.pt",
            b"<!DOCTYPE html>\n<html><head><title>c.pt</title>",
            "is a web page, not the weights: download the file",
        ),
        ("c.safetensors", b"\n<html lang='en'>", "is a web page, not the weights"),
        ("c.pt", b'{"error": "Repository not found"}', "is JSON, not a checkpoint (it begins "),
        ("c.pt", b"Entry not found at this address\n", "is text, not a checkpoint (it begins 'Entry not found"),
        ("c.gguf", b"GGUF\x03\0\0\0", "is a GGUF file of llama.cpp"),
        ("c.h5", b"\x89HDF\r\n\x1a\n\0", "is an HDF5 file of Keras"),
        ("c.pt.gz", b"\x1f\x8b\x08\0", "is a gzip archive: unpack it"),
        ("c.tar.xz", b"\xfd7zXZ\0\0", "is an xz archive: unpack it"),
        ("c.tar.zst", b"\x28\xb5\x2f\xfd\0", "is a zstd archive: unpack it"),
        ("c.onnx", b"\x08\x0a\x12\x07pytorch", "is an ONNX graph: give the PyTorch checkpoint"),
        ("saved_model.pb", b"\x08\x01\x12", "is a graph of TensorFlow"),
        ("c.msgpack", b"\x81\xa6", "is a checkpoint of Flax"),
        ("c.npy", b"\x93NUMPY\x01\0", "is an array of numpy"),
        ("c.png", b"\x89PNG\r\n\x1a\n", "is a picture, not a checkpoint"),
        ("c.pt.part", b"PK\x03\x04", "is a download that did not end"),
        ("c.pt", b"\0" * 4096, "begins with zeros: a download or a copy of it did not end"),
        ("__0_0.distcp", b"PK\x03\x04", "is one rank's part of a checkpoint of torch.distributed: give its folder"),
        ("c.pt", b"", "is empty; copy or download it again"),
        ("c.safetensors", b"", "is empty; copy or download it again"),
    ],
)
def test_files(tmp_path: Path, refused: Callable[..., None], name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["c/code/x.py", "c/constants.pkl", "c/data.pkl"], "is a TorchScript archive: load it with torch.jit.load"),
        (["arr_0.npy"], "holds arrays of numpy"),
        (["model.weights.h5", "config.json"], "is an archive of Keras"),
        (["README.md", "c.pt"], "is a zip archive (README.md, c.pt), which torch.save did not write: unpack it"),
    ],
)
def test_zip_archives(tmp_path: Path, refused: Callable[..., None], entries: list[str], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as file:
        for entry in entries:
            file.writestr(entry, b"1")
    refused(tmp_path / "c.zip", message)


def test_a_tar_archive(tmp_path: Path, refused: Callable[..., None]) -> None:
    with tarfile.open(tmp_path / "c.tar", "w") as file:
        file.addfile(tarfile.TarInfo("c.pt"), io.BytesIO())
    refused(tmp_path / "c.tar", "is a tar archive: unpack it and give the checkpoint in it")


def test_what_is_no_file(tmp_path: Path, refused: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing waits for a writer that never comes."""
    os.mkfifo(tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "is a pipe, not a file")
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "c.pt")
    assert cli.main(["export", "--checkpoint", str(tmp_path / "pipes"), "--tokenizer", "none", "--out", "b"]) == 2
    assert "expected a folder with one checkpoint" in capfd.readouterr().err
    refused(Path("/dev/null"), "is a device, not a file")
    for name in ("no.pt", "a\0b.pt", "x" * 5000 + ".pt"):
        assert cli.main(["export", "--checkpoint", name, "--tokenizer", "none", "--out", "b"]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert len(error) < 1100
        assert "give a checkpoint: .pt, .safetensors or an index of shards" in error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path, state: State, refused: Callable[..., None]) -> None:
    path = saved(tmp_path, state)
    path.chmod(0)
    refused(path, "no permission to read it")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cls_embedding.cap_proj.fc1.weight": 4, "tok_embeddings.weight": 4}, "is a text-to-image model (cls_"),
        ({"base_model.model.layers.0.attention.wqkv.lora_A.weight": 4}, "holds an adapter (LoRA), not a model"),
        ({"_flat_param": 4}, "holds FSDP's flattened parameters (_flat_param): save the whole state dict"),
        ({"layers.0.attention.wqkv.weight.absmax": 4}, "holds quantized weights (layers.0."),
        ({"layers.0.attention.wqkv.qweight": 4}, "holds quantized weights"),
        ({"tok_embeddings.weight": 0, "norm.weight": 0}, "its tensors are empty (tok_embeddings.weight): ZeRO-3"),
        ({"encoder.down.0.block.0.conv1.weight": 4}, "this is an image tokenizer of taming-transformers"),
        ({"blocks.0.attn.mat_qkv.weight": 4}, "this is a VAR model"),
        ({"model.embed_tokens.weight": 4}, "this is a language model of transformers"),
        ({"fc.weight": 4, "fc.bias": 4}, "among its 2 (fc.weight, fc.bias); expected a PAR"),
    ],
)  # fmt: skip
def test_weights_of_other_things(
    tmp_path: Path, refused: Callable[..., None], keys: dict[str, int], message: str
) -> None:
    refused(saved(tmp_path, {"model": {key: torch.zeros(size) for key, size in keys.items()}}), message)


def test_parts_of_trainings(tmp_path: Path, state: State, refused: Callable[..., None]) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    refused(saved(tmp_path, optimizer.state_dict()), "holds the state of an optimizer, not weights")
    torch.save(state, tmp_path / "c.safetensors")
    refused(tmp_path / "c.safetensors", "is a file of torch.save, not of safetensors: rename it to c.pt")
    split = {"module": state, "mp_world_size": 4, "ds_version": "0.14"}
    refused(saved(tmp_path, split), "is one of 4 parts of a model that DeepSpeed split")


def folder_of(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["__0_0.distcp", ".metadata"], "format_utils dcp_to_torch {folder} model.pt' and give model.pt"),
        ([f"zero_pp_rank_{i}_mp_rank_00_model_states.pt" for i in range(2)], "'python zero_to_fp32.py . OUT' in the"),
        (["adapter_model.safetensors", "adapter_model.bin"], "holds an adapter (LoRA), not a model"),
        (["0005000/consolidated.pth"], "holds no checkpoint itself, but {folder}/0005000 does; give that folder"),
        (["snapshots/0123/c2i_B_384.pt"], "holds no checkpoint itself, but {folder}/snapshots/0123 does"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "without their index; copy"),
        (["a.pt", "b.safetensors"], "found a.pt, b.safetensors; give the file itself"),
        (["optimizer.pt", "rng_state_0.pth", "training_args.bin"], "found no .pt, .safetensors or index of shards"),
    ],
)  # fmt: skip
def test_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None], names: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a short path: a long one would be shown shortened
    folder = folder_of(Path("f"), names)
    refused(folder, message.replace("{folder}", str(folder)))


def test_one_shard_of_several(tmp_path: Path, state: State, refused: Callable[..., None]) -> None:
    save_file(state, str(tmp_path / "model-00001-of-00004.safetensors"))
    refused(tmp_path / "model-00001-of-00004.safetensors", "is one of 4 shards; give the folder that holds all of them")


def test_the_folder_of_a_run(tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": state, "config": CONFIG}, tmp_path / "model.pt")
    torch.save({"model": state, "step": 3}, tmp_path / "checkpoint.pt")
    assert inspected(tmp_path, capsys)["config"]["heads"] == "2 of 16 (the file's config)"


def test_a_bundle_given_as_a_checkpoint(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--checkpoint", str(tiny), "--tokenizer", "none", "--out", str(tmp_path / "b")]) == 2
    assert "is a bundle already: 'parvis generate' takes it as it is" in capsys.readouterr().err


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["inspect", str(path), "--json"]) == 0, capsys.readouterr().err
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_forms_that_are_read(tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    """A name, or the files beside it, say little about what a file is."""
    config = json.dumps({"n_head": 2, "block_size": 16})

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        return tmp_path / name

    shards = folder("shards")
    names = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, shards / name)
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    single = folder("bin")
    torch.save(state, single / "pytorch_model.bin")
    torch.save({"step": 1}, single / "optimizer.bin")
    twice = folder("twice")
    torch.save(state, twice / "pytorch_model.bin")
    save_file(state, str(twice / "model.safetensors"))
    lightning = folder("lightning")
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, lightning / "last.ckpt")
    deepspeed = folder("deepspeed")
    torch.save({"module": state, "mp_world_size": 1}, deepspeed / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, deepspeed / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    unnamed = folder("unnamed")
    save_file(state, str(unnamed / "c.pt"))  # safetensors
    for path in (
        shards,
        shards / "pytorch_model.bin.index.json",
        single,
        twice,
        lightning,
        deepspeed,
        unnamed,
    ):
        facts = inspected(path, capsys)
        assert facts["kind"] == "PAR model"
        assert facts["config"]["heads"] == "2 of 16 (config.json beside the file)"
        assert facts["config"]["grid"] == "1x4x4 (config.json beside the file: block_size 16)"
        assert facts["warnings"] == []


def test_shards_of_torch_save_that_do_not_fit(tmp_path: Path, state: State, refused: Callable[..., None]) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    torch.save(state, tmp_path / "a.bin")
    torch.save(state, tmp_path / "b.bin")
    index.write_text(json.dumps({"weight_map": {key: f"{'ab'[i % 2]}.bin" for i, key in enumerate(state)}}))
    refused(index, "two shards hold ")
    for name, message in (
        ("../../x.bin", "names files outside its folder"),
        ("c.bin", "1 shards are missing (c.bin); put all 1 shards beside the index"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
        refused(index, message)


def test_inspect_says_that_weights_are_not_finite(
    tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = state | {"norm.weight": state["norm.weight"] * float("nan")}
    facts = inspected(saved(tmp_path, {"model": broken, "config": CONFIG}), capsys)
    assert facts["warnings"] == [f"NaN or infinite numbers in norm.weight (1 of {len(state)} tensors)"]


def test_the_weights_option_of_both_verbs(
    tmp_path: Path, state: State, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    average = {key: value * 0.5 for key, value in state.items()}
    path = saved(tmp_path, {"model": state, "ema": average, "config": CONFIG})
    assert inspected(path, capsys)["notes"] == [
        "weights under 'model'; the file also holds some under 'ema' (--weights ema)"
    ]
    assert cli.main(["inspect", str(path), "--weights", "ema"]) == 0
    assert "weights under 'ema'; the file also holds some under 'model'" in capsys.readouterr().out
    arguments = ["export", "--checkpoint", str(path), "--tokenizer", "none", "--out"]
    for options, wanted in (([], state), (["--weights", "model"], state), (["--weights", "ema"], average)):
        out = tmp_path / f"b{len(options)}{options[-1:]}"
        assert cli.main([*arguments, str(out), *options]) == 0
        assert f"{path}: weights under " in capsys.readouterr().out
        table = torch.from_file(str(out / "weights.data"), size=640, dtype=torch.float32).reshape(20, 32)
        assert torch.equal(table, wanted["tok_embeddings.weight"])
    only = saved(tmp_path, {"model": state, "config": CONFIG})
    assert cli.main([*arguments, str(tmp_path / "b"), "--weights", "ema"]) == 2
    assert f"{only}: holds no averaged weights (ema), only those under 'model'; give --weights model" in (
        capsys.readouterr().err
    )
