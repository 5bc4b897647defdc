"""Plans really built by TensorRT-RTX, for an A100, on this machine without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import child
from par_export.cli import build as build_cli
from par_export.engines import builder
from par_export.engines import report as engine_report
from par_export.engines import weights as engine_weights
from par_export.engines.build import BuildRequest, build
from par_export.engines.builder import BuildOutcome, Target, build_plan
from par_export.engines.cache import EngineCache
from par_export.engines.network import ExpectedAttention
from par_export.engines.weights import MappedWeights
from par_export.errors import BuildError
from par_export.graphs import step
from par_export.graphs.step import Form, padded_head_dim, step_graph
from par_export.graphs.writer import SCALE, Graph, WeightTable
from par_model.config import PARConfig
from par_runtime.backends.engines import Engine
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Bundle, Stored, seal
from par_runtime.errors import EngineError

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'")
SM80 = Target("SM80")
SMALL = PARConfig(dim=128, n_layers=2, n_heads=2, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=4)


@pytest.fixture(scope="module")
def trt() -> trt_module.TensorRT:
    return trt_module.load(trt_module.RTX)


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARVIS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny, tmp_path / "tiny")
    return tmp_path / "tiny"


@dataclass
class Case:
    """A step network with random weights."""

    config: PARConfig
    table: WeightTable
    file: Path

    def build(
        self,
        trt: trt_module.TensorRT,
        precision: str = "float16",
        query: int = 4,
        form: Form | None = None,
        images: tuple[int, ...] = (1,),
        attention: ExpectedAttention | None = None,
    ) -> tuple[BuildOutcome, list[engine_report.Kernels], bytes]:
        form = form or Form.of(query)
        graph = step_graph(
            self.config, self.table, name="step", compute=precision, query=query, sampling="topk", form=form
        )
        wanted = attention or ExpectedAttention(self.config.n_layers, form.lengths, decomposable=precision == "float32")
        data, pieces = MappedWeights(self.file), list[bytes]()
        try:
            built = build_plan(
                trt,
                graph,
                data,
                SM80,
                images,
                lambda piece: pieces.append(bytes(piece)),
                attention=wanted,
                allow_tf32=False,
            )
        finally:
            data.close()
        return built, engine_report.kernels(built.log, images, self.config.n_layers), b"".join(pieces)


def random_case(folder: Path, config: PARConfig = SMALL, dtype: str = "float16", quantised: str | None = None) -> Case:
    """Weights of the layout of ``par_export.weights``, written without torch; matrices ``quantised`` to int8 or int4."""
    rng = np.random.default_rng(0)
    d, heads, size = config.dim, config.n_heads, padded_head_dim(config)
    wide = heads * size
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab_size + config.n_classes + config.group_size, d),
        "norm": (d,),
        "output": (d, config.vocab_size),
    }
    for i in range(config.n_layers):
        layer = f"layers.{i}."
        shapes |= {layer + "attention_norm": (d,), layer + "ffn_norm": (d,), layer + "wqkv": (d, 3 * wide)}
        shapes |= {layer + "wo": (wide, d), layer + "w13": (d, 2 * config.ffn_dim), layer + "w2": (config.ffn_dim, d)}
    entries: dict[str, Stored] = {}
    file = folder / "weights.data"
    with file.open("wb") as out:

        def add(name: str, raw: bytes, kind: str, shape: tuple[int, ...]) -> None:
            out.write(b"\0" * (-out.tell() % 64))
            entries[name] = Stored(kind, shape, out.tell(), len(raw))
            out.write(raw)

        for table in ("cos", "sin"):
            add(
                table,
                rng.random((config.n_tokens, size // 2), np.float32).tobytes(),
                "float32",
                (config.n_tokens, size // 2),
            )
        for name, shape in shapes.items():
            if quantised and len(shape) == 2 and name.startswith("layers"):
                per_byte = 2 if quantised == "int4" else 1
                add(name, rng.integers(0, 256, shape[0] * shape[1] // per_byte, np.uint8).tobytes(), quantised, shape)
                scales = (shape[1],) if quantised == "int8" else (shape[0] // 64, shape[1])
                add(name + SCALE, np.full(scales, 0.002, engine_weights.NUMPY_DTYPE[dtype]).tobytes(), dtype, scales)
                continue
            values = rng.random(shape, np.float32) * 0.04 - 0.02
            add(name, values.astype(engine_weights.NUMPY_DTYPE[dtype]).tobytes(), dtype, shape)
    return Case(config, WeightTable(entries), file)


# -- step networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_every_attention_layer_is_fused_and_every_cache_is_updated(
    trt: trt_module.TensorRT, tmp_path: Path, precision: str
) -> None:
    built, counted, plan = random_case(tmp_path, dtype=precision).build(trt, precision, images=(1, 3))
    assert len(plan) > 100_000
    assert built.layers["ATTENTION_INPUT"] == 2
    assert built.layers["KV_CACHE_UPDATE"] == 4
    assert built.layers["ROTARY_EMBEDDING"] == 2
    assert [k.images for k in counted] == [1, 3]
    if precision != "float32":
        assert all(k.attention == 2 for k in counted)


@pytest.mark.parametrize(("dim", "heads"), [(128, 2), (200, 2), (256, 2)], ids=["64", "100 padded", "128"])
def test_head_sizes(trt: trt_module.TensorRT, tmp_path: Path, dim: int, heads: int) -> None:
    config = PARConfig(dim=dim, n_layers=2, n_heads=heads, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=4)
    for query in (1, 4):
        _, counted, _ = random_case(tmp_path, config).build(trt, query=query)
        assert counted[0].attention == 2


@pytest.mark.parametrize("quantised", ["int8", "int4"])
def test_quantised_weights_stay_small(trt: trt_module.TensorRT, tmp_path: Path, quantised: str) -> None:
    config = PARConfig(dim=512, n_layers=2, n_heads=8, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=4)
    (tmp_path / "half").mkdir()
    whole, _, half_plan = random_case(tmp_path / "half", config).build(trt)
    built, counted, plan = random_case(tmp_path, config, quantised=quantised).build(trt)
    assert counted[0].attention == 2
    factor = {"int8": 0.65, "int4": 0.45}[quantised]
    assert built.memory["weights_bytes"] < factor * whole.memory["weights_bytes"]
    assert len(plan) < 0.8 * len(half_plan)


def test_kernels_of_par_l(trt: trt_module.TensorRT, tmp_path: Path) -> None:
    """The launch cost of a step, counted: at most 10 kernels a layer and 12 around them, at q = 1 and q = 4."""
    config = PARConfig(dim=1024, n_layers=2, n_heads=16)  # PAR-L, two of its layers
    case = random_case(tmp_path, config)
    for query, per_layer in ((1, 9), (4, 10)):
        _, (kernels,), _ = case.build(trt, query=query)
        print(f"q = {query}: {kernels.total} kernels, {kernels.per_layer} per layer, {kernels.around} around")
        assert kernels.per_layer is not None
        assert kernels.around is not None
        assert kernels.per_layer <= per_layer
        assert kernels.around <= 11


def test_a_norm_after_the_product_saves_a_kernel_per_layer(trt: trt_module.TensorRT, tmp_path: Path) -> None:
    case = random_case(tmp_path, PARConfig(dim=1024, n_layers=3, n_heads=16))
    stored = case.table
    with engine_weights.weights_in(case.file, stored, "float16", tmp_path, fold=True) as (table, _):
        shutil.copyfile(tmp_path / ".weights", tmp_path / "folded.data")
    case = Case(case.config, table, tmp_path / "folded.data")
    for query, per_layer in ((1, 8), (4, 9)):
        _, (kernels,), _ = case.build(trt, query=query, form=Form(query > 1, lengths=True, norm_after=True))
        assert kernels.per_layer == per_layer
        assert kernels.around is not None
        assert kernels.around <= 11
        assert kernels.attention == 3


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_both_forms_at_sixteen(trt: trt_module.TensorRT, tmp_path: Path, grouped: bool, lengths: bool) -> None:
    config = PARConfig(dim=128, n_layers=2, n_heads=2, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=16)
    _, (kernels,), _ = random_case(tmp_path, config).build(trt, query=16, form=Form(grouped, lengths))
    assert kernels.attention == 2
    assert any(("gemv_mha" if grouped else "gemm_mha") in name for name in kernels.names)


# -- sabotage: what must not get through --------------------------------------------------------------------------------


def test_attention_without_visibility_is_refused(trt: trt_module.TensorRT, tmp_path: Path) -> None:
    case = random_case(tmp_path)
    with pytest.raises(BuildError, match=r"attention layer 'Attention:.*' has neither a mask nor lengths"):
        case.build(
            trt,
            form=Form(grouped=True, lengths=True),
            attention=ExpectedAttention(2, lengths=False, decomposable=False),
        )


def test_the_mask_removed_is_refused(trt: trt_module.TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_mask", lambda *_: "")
    with pytest.raises(BuildError, match="has neither a mask nor lengths"):
        random_case(tmp_path).build(trt, form=Form(grouped=True, lengths=False))


def test_a_cache_that_is_copied_is_refused(
    trt: trt_module.TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Graph.op

    def op(self: Graph, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        if op_type == "TensorScatter" and name == "present_v.1":
            return real(self, "Identity", real(self, op_type, *inputs, **attributes), name=name)
        return real(self, op_type, *inputs, name=name, **attributes)

    monkeypatch.setattr(Graph, "op", op)
    with pytest.raises(BuildError, match=r"cache 'past_v.1' is not updated in place: its output 'present_v.1'"):
        random_case(tmp_path).build(trt)


def test_a_head_size_without_kernel_is_refused_by_name(
    trt: trt_module.TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "padded_head_dim", lambda config: config.head_dim)  # 100, not padded to 104
    monkeypatch.setattr(sys.modules[__name__], "padded_head_dim", lambda config: config.head_dim)
    config = PARConfig(dim=200, n_layers=2, n_heads=2, vocab_size=256, n_classes=10, grid=(1, 8, 8), group_size=4)
    with pytest.raises(BuildError, match=r"no fused attention kernel for layer '.*' with head size 100"):
        random_case(tmp_path, config).build(trt)


def test_an_input_that_the_parser_ignores_is_refused(
    trt: trt_module.TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builder.make_logger

    def log(trt: trt_module.TensorRT) -> Any:
        made = real(trt)
        made.warnings.append("ModelImporter: Unused Input: group/mask")
        return made

    monkeypatch.setattr(builder, "make_logger", log)
    with pytest.raises(BuildError, match=r"ignores an input of step: .*Unused Input: group/mask"):
        random_case(tmp_path).build(trt)


def test_missing_attention_layers_are_refused(trt: trt_module.TensorRT, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="2 of 3 attention layers were recognised"):
        random_case(tmp_path).build(trt, attention=ExpectedAttention(3, lengths=True, decomposable=False))


# -- whole bundles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_bundle_becomes_an_engine(tiny_copy: Path, precision: str) -> None:
    said: list[str] = []
    steps: list[tuple[str, float]] = []
    folder = build(
        BuildRequest(tiny_copy, "SM80", precision, images=(1, 2)), said.append, lambda *progress: steps.append(progress)
    )
    opened = Engine.open(folder, Bundle.open(tiny_copy), verify="full")
    assert folder == tiny_copy / "engines" / f"tensorrt_rtx-{opened.version}-sm80-{precision}"
    assert opened.capability == (8, 0)
    assert opened.images == (1, 2)
    assert set(opened.plans) == {"step"}
    assert opened.plans["step"].query == 4
    assert opened.decoder is not None
    assert {p.name for p in folder.iterdir()} == {"step.plan", "decoder.plan", "engine.json"}
    assert any("2/2 fused" in line and "4/4" in line for line in said)
    for plan in ("step", "decoder"):  # progress only grows, to the end
        reached = [fraction for phase, fraction in steps if phase.startswith(f"{plan}: ")]
        assert reached == sorted(reached)
        assert reached[0] < 0.5
        assert reached[-1] == 1.0
    assert not [p for p in folder.parent.iterdir() if p != folder]  # nothing half-made beside it
    assert Bundle.open(tiny_copy, verify="full").hash == Bundle.open(tiny_copy).hash  # the bundle is as it was


def test_an_engine_per_phase(tiny_copy: Path) -> None:
    folder = build(BuildRequest(tiny_copy, "SM80", images=(1,), mode="per-phase"), lambda _: None)
    plans = Engine.open(folder, Bundle.open(tiny_copy)).plans
    assert {name: (plan.query, plan.phases) for name, plan in plans.items()} == {
        "prefill": (1, ("prefill", "sequential")),
        "transition": (4, ("transition",)),
        "group": (4, ("group",)),
    }


def test_a_bundle_with_the_exact_tail_is_built_with_topk(tiny_copy: Path) -> None:
    manifest = json.loads((tiny_copy / "manifest.json").read_text())
    manifest["graphs"]["group"]["sampling"] = "exact"
    del manifest["hash"]
    (tiny_copy / "manifest.json").write_text(json.dumps(seal(manifest)))
    folder = build(BuildRequest(tiny_copy, "SM80", images=(1,)), lambda _: None)
    assert Engine.open(folder, Bundle.open(tiny_copy)).sampling == "topk"
    with pytest.raises(BuildError, match="sampling 'exact'; plans are built with one of plain, topk"):
        build(BuildRequest(tiny_copy, "SM80", sampling="exact"), lambda _: None)


def test_the_second_build_comes_from_the_cache(tiny_copy: Path) -> None:
    said: list[str] = []
    request = BuildRequest(tiny_copy, "SM80", images=(1,))
    first = build(request, said.append)
    plan = (first / "step.plan").read_bytes()
    shutil.rmtree(first)
    said.clear()
    again = build(request, said.append)
    assert "taken from the engine cache" in said[0]
    assert (again / "step.plan").read_bytes() == plan
    said.clear()
    with (again / "step.plan").open("r+b") as f:  # in place: the file is one with the cache's
        f.write(b"damaged")
    whole = build(request, said.append)
    assert "taken from" not in said[0]
    Engine.open(whole, Bundle.open(tiny_copy), verify="full")  # not byte for byte the same: builds are not
    assert (whole / "step.plan").read_bytes()[:7] != b"damaged"
    said.clear()
    build(BuildRequest(tiny_copy, "SM80", images=(1, 2)), said.append)  # another build: other profiles
    assert "taken from" not in said[0]


def test_two_builds_of_the_same_engine_wait_for_each_other(tiny_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_copy, other)
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda path=path: build(BuildRequest(path, "SM80", images=(1,)), said.append))
        for path in (tiny_copy, other)
    ]
    previous = signal.getsignal(signal.SIGTERM)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert signal.getsignal(signal.SIGTERM) is previous
    assert sum("taken from the engine cache" in line for line in said) == 1


def test_the_cache_stays_within_its_size(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, limit_bytes=2500)
    for i in range(4):
        source = tmp_path / f"source{i}"
        source.mkdir()
        (source / "step.plan").write_bytes(bytes([i]) * 1000)
        with cache.locked(f"key{i}"):
            cache.put(f"key{i}", source)
        os.utime(cache.folder / f"key{i}", (i, i))
    kept = [i for i in range(4) if cache.get(f"key{i}", tmp_path / f"out{i}")]
    assert kept == [2, 3]  # the least recently used went
    assert (tmp_path / "out3" / "step.plan").read_bytes() == b"\x03" * 1000
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "step.plan").write_bytes(bytes(3000))
    cache.put("large", tmp_path / "large")
    assert not cache.get("large", tmp_path / "none")  # larger than the cache: not kept, and nothing else was lost
    assert cache.get("key3", tmp_path / "again")


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path) -> None:
    case = random_case(tmp_path, dtype="float32")
    entry = case.table.entries["layers.1.w2"]
    with case.file.open("r+b") as f:
        f.seek(entry.offset)
        f.write(np.float32(1e6).tobytes())
    with (
        pytest.raises(BuildError, match=r"weight 'layers.1.w2' reaches 1e\+06, beyond float16; give --precision bf16"),
        engine_weights.weights_in(case.file, case.table, "float16", tmp_path),
    ):
        pass
    with engine_weights.weights_in(case.file, case.table, "bfloat16", tmp_path) as (table, data):
        assert table.entries["layers.1.w2"].dtype == "bfloat16"
        assert table.entries["cos"].dtype == "float32"
        data.release()
    assert not (tmp_path / ".weights").exists()


def truncated(folder: Path) -> None:
    plan = folder / "step.plan"
    plan.write_bytes(plan.read_bytes()[:-100])


def changed(folder: Path) -> None:
    plan = folder / "decoder.plan"
    raw = bytearray(plan.read_bytes())
    raw[len(raw) // 2] ^= 1
    plan.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("spoil", "message"), [(truncated, "step.plan: truncated"), (changed, "decoder.plan: its content was changed")]
)
def test_a_spoilt_plan_is_refused(tiny_copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    request = BuildRequest(tiny_copy, "SM80", images=(1,), use_cache=False)
    folder = build(request, lambda _: None)
    spoil(folder)
    with pytest.raises(EngineError, match=message):
        Engine.open(folder, Bundle.open(tiny_copy))


# -- the command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_report_or_json(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny_copy), "--target", "sm80", "--max-images", "3", "--no-cache"]
    assert build_cli.main([*arguments, "--kernels"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tiny: step, decoder for SM80 with tensorrt_rtx .*, fp16, in .* s, peak memory \d+ MB", out)
    assert re.search(r"step +1 +2/2 fused +4/4 +2/2 +\d+ +10 ", out)
    assert "_gemv_mha" in out
    assert build_cli.main([*arguments, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert [p["images"] for p in entry["report"]["plans"]["step"]["profiles"]] == [1, 2, 3]
    assert entry["report"]["plans"]["step"]["form"] == {
        "grouped": True,
        "lengths": True,
        "norm_after": False,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "A100"], "'A100': expected SM and a compute capability"),
        (["--target", "SM70"], "target 'SM70': tensorrt_rtx .* builds for SM75, SM80, .* or local"),
        (["--target", "local"], r"no GPU here|NVIDIA driver|cannot be imported"),
        (["--target", "SM80", "--max-images", "0"], "'0': expected a number of images from 1 to 256"),
        (["--target", "SM80", "--precision", "int3"], "invalid choice: 'int3'"),
        (["--target", "SM80", "--sampling", "exact"], "invalid choice: 'exact'"),
        (["--target", "SM80", "--cache-gb", "inf"], "'inf': expected gigabytes, 0 or more"),
        (["--target", "SM80", "--list", "/nonexistent/x.json"], "--list /nonexistent/x.json: no folder /nonexistent"),
        ([], "required: --target"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(
    tiny_copy: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = build_cli.main([str(tiny_copy), *arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(message, error)
    assert error.startswith("parvis: error: ")
    assert error.count("\n") == 1
    assert not (tiny_copy / "engines").exists()


def test_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_cli.main([str(tmp_path / "none"), "--target", "SM80"]) == 2
    assert "no such folder; give the path of a bundle" in capsys.readouterr().err


def test_ctrl_c_ends_a_build_and_leaves_nothing(tiny_copy: Path) -> None:
    """The signal comes from the builder's own progress, so it always falls into the build."""
    code = (
        "import os, signal, sys; from par_export.cli import build as build_cli\n"
        "build_cli.PlanBar.__call__ = lambda self, *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(build_cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(tiny_copy), "--target", "SM80", "--no-cache"]
    started = time.monotonic()
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "parvis: stopped; nothing was written" in error
    assert not (tiny_copy / "engines").exists()
    assert time.monotonic() - started < 60


def test_a_build_needs_no_torch(tiny_copy: Path) -> None:
    code = (
        "import sys; from par_export.cli import build as build_cli\n"
        "code = build_cli.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(tiny_copy), "--target", "SM80", "--quiet", "--images", "1"]
    subprocess.run(command, check=True)
