"""Files of every format, keys of every wrapper, names on the hub."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save, save_file

from conftest import golden_weights
from par_model.checkpoint import CheckpointError, hub, open_checkpoint, par_config, recognise
from par_model.config import PARConfig
from par_model.transformer import PAR

SMALL = PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=20, n_classes=3, grid=(1, 4, 4), group_size=4)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return {key: value.contiguous() for key, value in golden_weights(PAR(SMALL)).state_dict().items()}


def sharded(folder: Path, state: State, shards: int = 3) -> Path:
    """As ``save_pretrained`` writes it: shards and an index."""
    places = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(state)}
    for name in set(places.values()):
        save_file({key: state[key] for key, place in places.items() if place == name}, str(folder / name))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def same(path: Path, state: State) -> bool:
    checkpoint = open_checkpoint(path)
    assert par_config(checkpoint, heads=2, grid=(1, 4, 4)) == SMALL
    checkpoint.release()
    return all(torch.equal(checkpoint.tensor(key), value) for key, value in state.items())


def test_safetensors_one_file_shards_and_folders(tmp_path: Path, state: State) -> None:
    save_file(state, str(tmp_path / "one.safetensors"))
    assert same(tmp_path / "one.safetensors", state)
    assert same(tmp_path, state)  # the only checkpoint in the folder
    (tmp_path / "shards").mkdir()
    index = sharded(tmp_path / "shards", state)
    assert same(index, state)
    assert same(index.parent, state)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files that are no text")
def test_names_that_are_not_utf8(tmp_path: Path, state: State) -> None:
    folder = tmp_path / os.fsdecode(b"m\xfcller")
    folder.mkdir()
    (tmp_path / "one.safetensors").write_bytes(save(state))
    shutil.copy(tmp_path / "one.safetensors", folder)
    assert same(folder / "one.safetensors", state)
    for zipped in (True, False):  # False: the format before torch 1.6
        torch.save(state, tmp_path / "one.pt", _use_new_zipfile_serialization=zipped)
        shutil.copy(tmp_path / "one.pt", folder)
        assert same(folder / "one.pt", state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_safetensors_in_half_precision(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    save_file({key: value.to(dtype) for key, value in state.items()}, str(tmp_path / "half.safetensors"))
    assert open_checkpoint(tmp_path / "half.safetensors").tensor("norm.weight").dtype == dtype


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda key: f"module.{key}",  # DDP
        lambda key: f"_orig_mod.{key}",  # torch.compile
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_fsdp_wrapped_module.{key}",
        lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda key: key.replace("attention.w", "attention._checkpoint_wrapped_module.w"),
        lambda key: f"module._fsdp_wrapped_module.{key}".replace(
            "layers.1.", "layers.1._fsdp_wrapped_module._orig_mod."
        ),
    ],
)
def test_what_wrappers_add_to_keys_is_removed(tmp_path: Path, state: State, wrapped: object) -> None:
    assert callable(wrapped)
    torch.save({"model": {wrapped(key): value for key, value in state.items()}}, tmp_path / "c.pt")
    assert same(tmp_path / "c.pt", state)


def test_two_models_in_one_file_are_refused(tmp_path: Path, state: State) -> None:
    torch.save(state | {f"module.{key}": value for key, value in state.items()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"keys '.*' and 'module\..*' are both '.*' without what wrappers added"):
        open_checkpoint(tmp_path / "c.pt")


def test_damaged_shards_are_refused(tmp_path: Path, state: State) -> None:
    index = sharded(tmp_path, state)
    first = tmp_path / "model-00001-of-00003.safetensors"
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00003.safetensors: not a readable safetensors file .*truncated"
    ):
        open_checkpoint(index)
    first.unlink()
    with pytest.raises(CheckpointError, match=r"1 shards are missing \(model-00001-of-00003.safetensors\); put all 3"):
        open_checkpoint(index)
    first.write_bytes(whole)
    content = json.loads(index.read_text())
    content["weight_map"]["norm.weight"] = "../../outside.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names files outside its folder"):
        open_checkpoint(index)
    del content["weight_map"]["norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"shards and index do not agree about norm.weight"):
        open_checkpoint(index)
    text = json.dumps(content)
    index.write_text(text.replace('"weight_map": {', f'"weight_map": {{"output.weight": "{first.name}", '))
    with pytest.raises(CheckpointError, match=r"not an index of shards .*has the name 'output.weight' twice; give it"):
        open_checkpoint(index)
    index.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"not an index of shards"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "permission denied); change its permissions, or run it as another user"),
        (errno.EIO, "input/output error); the disk reports an error: check the disk, and its connection"),
        (errno.ELOOP, "too many levels of symbolic links); give a checkpoint: .pt, .safetensors or an index of shards"),
    ],
)
def test_a_fault_of_the_system_is_not_said_to_be_the_file(
    number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "stat", fail)
    assert recognise.not_a_file(tmp_path / "x.pt") == f"cannot be read ({says}"


def test_a_folder_with_several_checkpoints_is_refused(tmp_path: Path, state: State) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, str(tmp_path / name))
    with pytest.raises(CheckpointError, match=r"found a.safetensors, b.safetensors; give the file itself"):
        open_checkpoint(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no .pt, .safetensors or index of shards"):
        open_checkpoint(tmp_path / "empty")


def test_hub_names() -> None:
    assert hub.local("models/x.pt") == Path("models/x.pt")
    assert hub.HubFile.parse("hf://a/b/c/d.pt@v1") == hub.HubFile("a/b", "c/d.pt", "v1")
    assert hub.HubFile.parse("hf://Epiphqny/PAR/PAR-XL-4x.pt").revision is None
    for wrong in (
        *("hf://", "hf://a", "hf://a/b", "hf://a/b/", "hf://a/b/../../c", "hf://a b/c/d", "hf://a/b//etc/passwd"),
        *("hf://a/b/c\\..\\d", "hf://a/b/c\0", "hf://a/b/./c", "hf://a/b/c@", "hf://a/b/c@../../d", "hf://../../c"),
        *("HF://a/b/c", "hf:/a/b/c", "s3://a/b.pt", "https://example.org/c.pt", f"hf://{'a' * 9999}/b/c"),
    ):
        with pytest.raises(CheckpointError, match="expected hf://OWNER/REPOSITORY/FILE") as error:
            hub.local(wrong)
        assert len(str(error.value)) < 400
    with pytest.raises(CheckpointError, match="the name of a checkpoint is empty"):
        hub.local("")


@pytest.mark.parametrize("host", ["https://huggingface.co", "huggingface.co", "https://www.hf.co"])
@pytest.mark.parametrize("page", ["blob", "resolve"])
def test_an_address_of_the_hub_is_given_back_as_its_name(host: str, page: str) -> None:
    with pytest.raises(CheckpointError, match=r"is an address; give hf://a/b/d/c.pt in its place"):
        hub.local(f"{host}/a/b/{page}/main/d/c.pt?download=true")
    with pytest.raises(CheckpointError, match=r"give hf://a/b/c.pt@v1 in its place"):
        hub.local(f"{host}/a/b/{page}/v1/c.pt")


def test_a_hub_file_is_downloaded_at_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / "x.pt")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub.local("hf://a/b/c.pt@0123abc") == tmp_path / "x.pt"
    assert asked == [("a/b", "c.pt", "0123abc")]


def test_the_commit_of_a_hub_file_without_a_revision_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--a--b" / "snapshots" / commit / "d" / "c.pt"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(cached))
    lines: list[str] = []
    assert hub.local("hf://a/b/d/c.pt", lines.append) == cached
    assert lines == [f"hf://a/b/d/c.pt: is at commit {commit} today; hf://a/b/d/c.pt@{commit} names this very file"]
    hub.local(f"hf://a/b/d/c.pt@{commit}", lines.append)
    assert len(lines) == 1  # pinned already


def test_a_name_that_the_hub_cannot_have_is_refused() -> None:
    with pytest.raises(CheckpointError, match="expected hf://OWNER/REPOSITORY/FILE"):
        hub.local("hf://a--b/c/x.pt")


def test_without_the_hub_the_error_names_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("not in the cache, and no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        CheckpointError,
        match=r"cannot be reached; .* download https://.*/a/b/resolve/main/d/c.pt, copy .* give its path \(c.pt\)",
    ):
        hub.local("hf://a/b/d/c.pt")


def test_a_user_without_a_home_is_told_where_downloads_would_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)  # as for a user id that has no entry in the list of users
    with pytest.raises(CheckpointError, match=r"download it to \(Could not .*\); set HF_HOME to a folder, or"):
        hub.local("hf://a/b/c.pt")
