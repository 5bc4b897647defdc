"""Graphs as an enemy made them, hash and size recomputed: one clear line of whoever opens, runs or builds them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from par_export.bundle import ExportRequest
from par_export.bundle import export as export_bundle
from par_export.engines.build import BuildRequest, build
from par_export.errors import ExportError
from par_export.parts import write_manifest
from par_export.random_bundle import write_like
from par_runtime.bundle import Bundle, seal
from par_runtime.errors import BundleError
from par_runtime.pipeline import Pipeline
from par_runtime.system import sha256


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def change_graph(bundle: Path, name: str, change: Callable[[onnx.ModelProto, Path], object]) -> None:
    """Change a graph, and give the manifest its new hash."""
    file = bundle / f"{name}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model, bundle)
    file.write_bytes(model.SerializeToString())
    reseal(bundle)


def reseal(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
    (bundle / "manifest.json").write_text(json.dumps(seal(manifest)))


def external(model: onnx.ModelProto, name: str = "embed") -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def place(key: str, value: str, name: str = "embed") -> Callable[[onnx.ModelProto, Path], None]:
    """A change of where a tensor lies."""

    def change(model: onnx.ModelProto, _: Path) -> None:
        next(entry for entry in external(model, name).external_data if entry.key == key).value = value

    return change


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """Give the value ``old`` of the graph's nodes another name, so that another node can make it."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def in_a_pipe(model: onnx.ModelProto, bundle: Path) -> None:
    os.mkfifo(bundle / "pipe")
    place("location", "pipe")(model, bundle)


def larger_than_memory(model: onnx.ModelProto, _: Path) -> None:
    external(model).dims[0] = 10**10


def other_input(model: onnx.ModelProto, _: Path) -> None:
    rename(model, "ids", "idz")
    model.graph.input[0].name = "idz"


def one_input_more(model: onnx.ModelProto, _: Path) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.INT64, ["R"]))


def no_logits(model: onnx.ModelProto, _: Path) -> None:
    del model.graph.output[[output.name for output in model.graph.output].index("logits")]


def tokens_as_numbers(model: onnx.ModelProto, _: Path) -> None:
    rename(model, "tokens", "drawn")
    model.graph.node.append(helper.make_node("Cast", ["drawn"], ["tokens"], to=TensorProto.FLOAT))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT


def larger_cache(model: onnx.ModelProto, _: Path) -> None:
    rename(model, "present_k.0", "written")
    model.graph.node.append(helper.make_node("Concat", ["written", "written"], ["present_k.0"], axis=0))


def tokens_beyond_the_codes(model: onnx.ModelProto, _: Path) -> None:
    rename(model, "tokens", "drawn")
    model.graph.initializer.append(numpy_helper.from_array(np.array(10**12), "much"))
    model.graph.node.append(helper.make_node("Add", ["drawn", "much"], ["tokens"]))


def unknown_operator(model: onnx.ModelProto, _: Path) -> None:
    model.graph.node[3].op_type = "\x1b[2J" * 10_000


def nothing(model: onnx.ModelProto, _: Path) -> None:
    model.Clear()


STEPS = [
    (place("offset", "159567"), r"step\.onnx: onnxruntime .* cannot load it \(.*out of bounds"),
    (place("offset", "-4096"), r"step\.onnx: onnxruntime .* cannot load it"),
    (place("length", "10" * 9), r"step\.onnx: onnxruntime .* cannot load it"),
    (place("location", "/dev/zero"), r"step\.onnx: onnxruntime .* cannot load it"),
    (place("location", "../../../../etc/passwd"), r"step\.onnx: onnxruntime .* cannot load it"),
    (in_a_pipe, r"step\.onnx: onnxruntime .* cannot load it"),
    (other_input, r"its input 'ids' is none; the manifest's model needs int64\[R,q\]"),
    (one_input_more, r"its input 'more' is int64\[R\]; the manifest's model needs none"),
    (no_logits, r"its output 'logits' is none; the manifest's model needs float32\[B,q,64\]"),
    (tokens_as_numbers, r"its output 'tokens' is float32\[R,q\]; the manifest's model needs int64\[R,q\]"),
    (larger_cache, r"cannot run a graph of the bundle \(.*present_k.0"),
    (tokens_beyond_the_codes, r"cannot run a graph of the bundle \(.*out of data bounds"),
    (unknown_operator, r"step\.onnx: onnxruntime .* cannot load it"),
    (nothing, r"step\.onnx: onnxruntime .* cannot load it"),
]


@pytest.mark.parametrize(("change", "message"), STEPS, ids=range(len(STEPS)))
def test_a_changed_step_graph(
    bundle: Path, change: Callable[[onnx.ModelProto, Path], object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change_graph(bundle, "step", change)
    with pytest.raises(BundleError, match=message) as caught, Pipeline.load(bundle, "cpu-ort") as pipeline:
        pipeline.generate(0, seed=1)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert capfd.readouterr() == ("", "")  # ONNX Runtime's own log would be further lines


def test_a_graph_that_asks_for_more_memory_than_there_is(bundle: Path) -> None:
    change_graph(bundle, "step", larger_than_memory)
    with pytest.raises((MemoryError, BundleError), match=r"bad_alloc|cannot load it"):
        Pipeline.load(bundle, "cpu-ort")


def twice_as_high(model: onnx.ModelProto, _: Path) -> None:
    rename(model, "images", "half")
    model.graph.node.append(helper.make_node("Concat", ["half", "half"], ["images"], axis=1))


def of_unknown_height(model: onnx.ModelProto, bundle: Path) -> None:
    """Twice as high in a way that only running it shows."""
    rename(model, "images", "half")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 1, 1]), "times"))
    model.graph.node.append(helper.make_node("Shape", ["tokens"], ["shape"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0), "zero"))
    model.graph.node.append(helper.make_node("Mul", ["shape", "zero"], ["zeros"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["zeros", "axis0"], ["none"], keepdims=0))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis0"))
    model.graph.node.append(helper.make_node("Add", ["times", "none"], ["repeats"]))
    model.graph.node.append(helper.make_node("Tile", ["half", "repeats"], ["images"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice_as_high, r"its output 'images' is uint8\[None,32,16,3\]; the manifest's model needs uint8\[B,16,16,3\]"),
        (of_unknown_height, r"output 'images' has shape \[1, 32, 16, 3\], expected \[1, 16, 16, 3\]"),
        (nothing, r"decoder\.onnx: onnxruntime .* cannot load it"),
    ],
)
def test_a_changed_decoder(bundle: Path, change: Callable[[onnx.ModelProto, Path], object], message: str) -> None:
    change_graph(bundle, "decoder", change)
    with (
        Pipeline.load(bundle, "cpu-ort") as pipeline,
        pytest.raises(BundleError, match=message) as caught,
    ):
        pipeline.generate(0, seed=1)
    assert len(str(caught.value)) < 1000


def test_a_decoder_in_place_of_the_step(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["graphs"]["step"]["file"] = "decoder.onnx"
    (bundle / "manifest.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(BundleError, match=r"decoder\.onnx: its input 'cond_row' is none; the manifest's model needs"):
        Pipeline.load(bundle, "cpu-ort")


def lose_the_norm(model: onnx.ModelProto, _: Path) -> None:
    external(model, "norm").name = "other"
    rename(model, "norm", "other")


def other_shape(model: onnx.ModelProto, _: Path) -> None:
    external(model, "output").dims[:] = [64, 16]


def few_embeddings(model: onnx.ModelProto, bundle: Path) -> None:
    external(model).dims[0] = 8
    place("length", str(8 * 16 * 2))(model, bundle)


BUILDS = [
    ("group", place("offset", "159567"), r"tensor 'embed' of 2368 bytes at 159567 does not fit its shape, or weights"),
    ("group", place("offset", "-1"), r"tensor 'embed' has no place in weights\.data"),
    ("group", place("length", "1"), "tensor 'embed' of 1 bytes at 0 does not fit"),
    ("group", place("location", "/dev/zero"), "tensor 'embed' is in the file '/dev/zero'; expected weights.data"),
    ("group", larger_than_memory, "tensor 'embed' of 2368 bytes at 0 does not fit its shape"),
    ("group", lose_the_norm, "norm has shape None in its graphs, expected"),
    ("group", other_shape, r"output has shape \(64, 16\) in its graphs, expected \(16, 64\)"),
    ("group", few_embeddings, "its graphs have 8 embeddings, too few"),
    ("group", nothing, "its graphs have 0 embeddings"),
    ("decoder", nothing, "vq.codebook has shape None in its graphs"),
    ("decoder", place("offset", "159567", "vq.codebook"), "does not fit its shape"),
]


@pytest.mark.parametrize(("name", "change", "message"), BUILDS, ids=range(len(BUILDS)))
def test_a_build_of_changed_graphs(
    bundle: Path, tmp_path: Path, name: str, change: Callable[[onnx.ModelProto, Path], object], message: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    change_graph(bundle, name, change)
    with pytest.raises(BundleError, match=message) as caught:
        build(BuildRequest(bundle, "SM80", images=(1,), use_cache=False), lambda _: None)
    assert str(caught.value).isprintable()
    assert not (bundle / "engines").exists()


def test_a_text_in_place_of_a_graph(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (bundle / "group.onnx").write_bytes(b"\x08" + b"x" * 10_000)
    reseal(bundle)
    with pytest.raises(BundleError, match=r"group\.onnx: .*; export the bundle again"):
        build(BuildRequest(bundle, "SM80", images=(1,), use_cache=False), lambda _: None)


def test_a_name_never_becomes_a_path(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(seal(manifest | {"name": "../../up/ä b"})))
    made = write_like(bundle, 1, tmp_path / "deep" / "out")
    assert made == tmp_path / "deep" / "out" / ".._.._up_ä_b-random-n1"
    assert Bundle.open(made).group_size == 1


def test_an_export_refuses_what_no_runtime_would_read(
    checkpoints: dict[str, Path], golden: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    names = [f"class {i}" for i in range(golden["par_n4_grid8"]["spec"]["classes"])]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "a\x1b[2J"}, r"name is 'a\\x1b\[2J'; expected a text of 1 to 200 printable characters"),
        ({"defaults": {"guidance": 1e39}}, r"default guidance 1e\+39; expected"),
        ({"defaults": {"top_k": 2.5}}, r"default top_k 2\.5; expected a whole number"),
        ({"class_names": [*names[:-1], "x\n"]}, r"class name is 'x\\n'; expected a text of 1 to 1000 printable"),
    ]
    for changes, message in cases:
        given: dict[str, Any] = {"heads": 4, "grid": (1, 8, 8)} | changes
        request = ExportRequest(checkpoints["par_n4_grid8"], None, tmp_path / "out", **given)
        with pytest.raises(ExportError, match=message):
            export_bundle(request, say=lambda _: None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="would not be readable: no entry 'name'"):
        write_manifest(tmp_path / "folder", {})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
