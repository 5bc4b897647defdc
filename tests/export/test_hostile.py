"""Files made to do harm, and files that time spoilt: nothing is ever run, each is one line and exit code 2 in both verbs."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import golden_weights
from par_model.config import PARConfig
from par_model.transformer import PAR
from par_runtime.cli import dispatch as cli

State = dict[str, torch.Tensor]
CONFIG = {"n_heads": 2, "grid": (1, 4, 4)}
VICTIM = "victim"  # a folder that hostile code would make


@pytest.fixture(scope="module")
def state() -> State:
    model = PAR(PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=20, n_classes=3, grid=(1, 4, 4), group_size=4))
    return {key: value.contiguous() for key, value in golden_weights(model).state_dict().items()}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Check that both verbs end in one line with ``message``, write no bundle and run nothing."""
    monkeypatch.chdir(tmp_path)

    def check(path: Path, message: str, *options: str) -> None:
        for verb in ("inspect", "export"):
            arguments = (
                [str(path)] if verb == "inspect" else ["--checkpoint", str(path), "--tokenizer", "none", "--out", "b"]
            )
            assert cli.main([verb, *arguments, *(options if verb == "export" else ())]) == 2, (verb, path)
            out, told = capfd.readouterr()
            assert out == ""
            assert told.startswith("parvis: error: ")
            assert told.count("\n") == 1, told
            assert message in told
            assert "safe_globals" not in told  # torch's advice to allow it is not passed on
            assert "weights_only" not in told
            assert not (tmp_path / "b").exists()
            assert not (tmp_path / VICTIM).exists()

    return check


class Reduced:
    """Pickled as a call of ``function`` with ``arguments``, and a state."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Stateful:
    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}

    def __setstate__(self, state: object) -> None:
        os.mkdir(VICTIM)


class Subclass(argparse.Namespace):
    pass


class Mode(enum.Enum):
    FAST = 1


def saved(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "c.pt", **options)
    return folder / "c.pt"


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Reduced(os.mkdir, (VICTIM,)), "mkdir"),
        (Reduced(os.system, (f"mkdir {VICTIM}",)), "system"),
        (Reduced(eval, (f"__import__('os').mkdir({VICTIM!r})",)), "(eval)"),
        (Reduced(getattr, (Path, "mkdir")), "(getattr)"),
        (Reduced(torch.load, (VICTIM,)), "torch.serialization.load"),
        (Stateful(), "Stateful"),
        (Subclass(a=1), "Subclass"),
        (argparse.Namespace(inner=Subclass(a=1)), "Subclass"),
        (Mode.FAST, "Mode"),
        ([{"deep": (Stateful(),)}], "Stateful"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_refused_by_name(
    tmp_path: Path, state: State, refused: Callable[..., None], thing: Any, name: str, zipped: bool
) -> None:
    content = {"model": state, "config": CONFIG, "args": argparse.Namespace(thing=thing)}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    refused(path, "holds something other than tensors and plain values")
    refused(path, name)
    refused(path, "it was not run")


class StorageId:
    """Pickled as torch's persistent id of a storage, or of something else."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        return thing.parts if isinstance(thing, StorageId) else None


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def archive(folder: Path, data: bytes, top: str = "a", method: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive like torch.save's, with ``data`` as its pickle and one storage of 16 bytes."""
    with zipfile.ZipFile(folder / "c.pt", "w", method) as file:
        file.writestr(f"{top}/data.pkl", data)
        file.writestr(f"{top}/data/0", b"\0" * 16)
        file.writestr(f"{top}/version", "3\n")
    return folder / "c.pt"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, key: str = "0", count: int = 4) -> Reduced:
    storage = StorageId("storage", torch.FloatStorage, key, "cpu", count)
    return Reduced(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, collections.OrderedDict()))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (tensor((1000, 1000), (1000, 1)), "not a readable"),
        (tensor((2, 2), (2, 1), offset=10**6), "not a readable"),
        (tensor((2, 2), (2, 1), offset=-100), "not a readable"),
        (tensor((2**10, 2**10), (2**10, 1), count=2**30), "not a readable"),
        (tensor((2, 2), (2, 1), count=-4), "not a readable"),
        (tensor((2**40, 2**20), (0, 0)), "tok_embeddings.weight is of shape (1099511627776, 1048576) but holds fewer"),
        (tensor((2, 2), (2, 1), key="../../../etc/passwd"), "not a readable"),
        (Reduced(VICTIM.join, ("ab",)), "(getattr)"),
    ],
)
def test_tensors_that_reach_outside_the_file(
    tmp_path: Path, refused: Callable[..., None], made: Reduced, message: str
) -> None:
    refused(archive(tmp_path, pickled({"model": {"tok_embeddings.weight": made}})), message)


def test_archives_that_torch_did_not_write(tmp_path: Path, refused: Callable[..., None]) -> None:
    evil = pickled(Reduced(os.mkdir, (VICTIM,)))
    refused(archive(tmp_path, evil), "mkdir); it was not run")
    refused(archive(tmp_path, evil, "../../outside"), "c.pt: ")
    refused(archive(tmp_path, b"\0" * 10**8, method=zipfile.ZIP_DEFLATED), "'a/data.pkl' is compressed")
    path = archive(tmp_path, b"\0" * 1000)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"a/data/0"))  # of the storage, in the table of contents
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    refused(path, "its entries are larger than the file")
    with tarfile.open(tmp_path / "c.pt", "w") as file:
        for name in ("../../../outside", "storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(evil)
            file.addfile(entry, io.BytesIO(evil))
    refused(tmp_path / "c.pt", "not a readable PyTorch checkpoint")
    (tmp_path / "c.pt").write_bytes(pickled({"model": StorageId("evil", "x")}))
    refused(tmp_path / "c.pt", "not a readable PyTorch checkpoint")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Reduced(os.mkdir, (VICTIM,))))
    refused(tmp_path / "c.pt", "pickled with protocol 4 or 5")


def test_a_namespace_takes_no_attribute_of_the_file(tmp_path: Path, state: State, capsys: Any) -> None:
    """What argparse's own class would: its class, its dict, or a ``__setstate__`` for the next state."""
    for chosen in (
        {"__class__": 1, "__dict__": 2, "values": 3, "image_size": 64},
        (None, {"__class__": collections.OrderedDict, "__setstate__": torch._utils._rebuild_tensor_v2}),
        [1, 2],
    ):
        content = {"model": state, "config": CONFIG, "args": Reduced(argparse.Namespace, (), chosen)}
        assert (
            cli.main(["inspect", str(saved(tmp_path, content))]) == 0 or "contradicts itself" in capsys.readouterr().err
        )


class Hung:
    """Pickled as an ``OrderedDict`` whose methods a file has replaced."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items = items

    def __reduce__(self) -> tuple[Any, ...]:
        methods = dict.fromkeys(("items", "keys", "get", "values", "__iter__"), torch.Size)
        return collections.OrderedDict, (), methods, None, iter(self.items.items())


def test_attributes_hung_on_dicts_and_tensors_are_never_called(tmp_path: Path, state: State) -> None:
    norm = state["norm.weight"].clone()
    vars(norm).update(dict.fromkeys(("to", "detach", "float", "numel"), torch.Size))
    content = Hung({"model": Hung(state | {"norm.weight": norm}), "config": Hung(CONFIG)})
    path = saved(tmp_path, content)
    assert cli.main(["inspect", str(path)]) == 0
    assert cli.main(["export", "--checkpoint", str(path), "--tokenizer", "none", "--out", str(tmp_path / "b")]) == 0


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
def test_spoilt_files_are_refused_or_read(
    tmp_path: Path, state: State, capfd: pytest.CaptureFixture[str], pattern: str
) -> None:
    """A byte changed anywhere in the pickle: an error of one line, or numbers that are merely other ones."""
    path = saved(tmp_path, {"model": {"norm.weight": state["norm.weight"]}})
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[at] = spoilt[at] ^ 0x15 if pattern == "bits" else 0
        path.write_bytes(spoilt)
        assert cli.main(["inspect", str(path)]) == 2
        assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(1)}, "found a key of type int"),
        ({("a",): torch.zeros(1)}, "found a key of type tuple"),
        ({b"a": torch.zeros(1)}, "found a key of type bytes"),
        ({"model": {"model": {"a": torch.zeros(1)}}}, "expected tensors by name"),
        ({"ema": {"a": torch.zeros(1)}}, "found ema"),
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


def test_keys_that_would_cost_an_unending_model(tmp_path: Path, state: State, refused: Callable[..., None]) -> None:
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
def test_tensors_that_are_no_weights(
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
        refused(tmp_path / "c.safetensors", "not a readable safetensors file")


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
        (b'{"weight_map": {"a": "model.safetensors.index.json"}}', "not a readable safetensors file"),
    ],
)
def test_indexes_of_shards(tmp_path: Path, refused: Callable[..., None], text: bytes, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text)
    refused(index, message)


def test_numbers_that_no_graph_can_compute_with(
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
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"v.pt: {name} holds" in told
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
        (model, model, "this is a PAR model: give it as --checkpoint"),
        (tmp_path / "c.pt", vq, "makes a token of 2x2 pixels, the model's args say downsample_size 16"),
        (model, tmp_path / "v.pt", "decoder.conv_out.weight has shape (3, 32, 5, 5); expected (3, 32, 3, 3)"),
        (model, tmp_path, "expected a folder with one checkpoint, found c.pt, v.pt; give the file itself"),
    ):
        arguments = ["--checkpoint", str(checkpoint), "--tokenizer", str(tokenizer), "--heads", "4", "--grid", "8"]
        assert cli.main(["export", *arguments, "--out", str(tmp_path / "b")]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert message in told
        assert not (tmp_path / "b").exists()
