"""Engines of whole bundles, built by TensorRT-RTX for an A100: their folders, the cache, plans that were damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_cases import random_case

from par_export.engines import weights as engine_weights
from par_export.engines.build import build, tail_of
from par_export.engines.cache import EngineCache
from par_export.engines.request import BuildRequest
from par_export.errors import BuildError
from par_runtime.backends.engines import Engine
from par_runtime.bundle import Bundle, seal
from par_runtime.errors import EngineError

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'")


@pytest.mark.parametrize(
    "precision", ["fp16", *(pytest.param(other, marks=pytest.mark.slow) for other in ("bf16", "fp32"))]
)
def test_a_bundle_becomes_an_engine(tiny_copy: Path, precision: str) -> None:
    lines: list[str] = []
    steps: list[tuple[str, float]] = []
    folder = build(
        BuildRequest(tiny_copy, "SM80", precision, images=(1, 2)),
        lines.append,
        lambda *progress: steps.append(progress),
    )
    opened = Engine.open(folder, Bundle.open(tiny_copy), verify="full")
    assert folder == tiny_copy / "engines" / f"tensorrt_rtx-{opened.version}-sm80-{precision}"
    assert opened.capability == (8, 0)
    assert opened.images == (1, 2)
    assert set(opened.plans) == {"step"}
    assert opened.plans["step"].query == 4
    assert opened.decoder is not None
    assert {p.name for p in folder.iterdir()} == {"step.plan", "decoder.plan", "engine.json"}
    assert any("2/2 fused" in line and "4/4" in line for line in lines)
    for plan in ("step", "decoder"):  # progress only grows, to the end
        reached = [fraction for phase, fraction in steps if phase.startswith(f"{plan}: ")]
        assert reached == sorted(reached)
        assert reached[0] < 0.5
        assert reached[-1] == 1.0
    assert not [p for p in folder.parent.iterdir() if p != folder]  # nothing unfinished beside it
    assert Bundle.open(tiny_copy, verify="full").hash == Bundle.open(tiny_copy).hash  # the bundle is as it was


@pytest.mark.slow
def test_an_engine_per_phase(tiny_copy: Path) -> None:
    folder = build(BuildRequest(tiny_copy, "SM80", images=(1,), mode="per-phase"), lambda _: None)
    plans = Engine.open(folder, Bundle.open(tiny_copy)).plans
    assert {name: (plan.query, plan.phases) for name, plan in plans.items()} == {
        "prefill": (1, ("prefill", "sequential")),
        "transition": (4, ("transition",)),
        "group": (4, ("group",)),
    }


def with_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    del manifest["hash"]
    (path / "manifest.json").write_text(json.dumps(seal(manifest)))


@pytest.mark.slow
def test_a_plan_has_the_tail_of_the_bundle(tiny_copy: Path) -> None:
    with_manifest(tiny_copy, lambda m: m["graphs"]["group"].update(sampling="exact"))
    folder = build(BuildRequest(tiny_copy, "SM80", images=(1,)), lambda _: None)
    assert Engine.open(folder, Bundle.open(tiny_copy)).sampling == "exact"
    folder = build(BuildRequest(tiny_copy, "SM80", images=(1,), sampling="topk"), lambda _: None)
    again = Engine.open(folder, Bundle.open(tiny_copy))
    assert again.sampling == "topk"
    assert again.rebuild.endswith(" --max-images 1 --sampling topk")
    with pytest.raises(BuildError, match="sampling 'sorted'; plans are built with one of plain, topk, exact"):
        build(BuildRequest(tiny_copy, "SM80", sampling="sorted"), lambda _: None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_tail_that_does_not_draw_with_the_bundles_settings_is_warned_of(tiny_copy: Path) -> None:
    with_manifest(tiny_copy, lambda m: m["defaults"].update(top_k=5, top_p=0.9))
    lines: list[str] = []
    build(BuildRequest(tiny_copy, "SM80", images=(1,), sampling="plain", use_cache=False), lines.append)
    assert (
        "warning: --sampling plain draws from the whole codebook, or greedily; the bundle's own settings are top-k 5, "
        "top-p 0.9, so each request must give others"
    ) in lines
    assert any(", sampling plain, in " in line for line in lines)
    lines.clear()
    build(BuildRequest(tiny_copy, "SM80", images=(1,), use_cache=False), lines.append)
    assert not any("warning" in line for line in lines)


@pytest.mark.parametrize(
    ("own", "vocab", "top_k", "top_p", "wanted"),
    [
        ("topk", 16384, 0, 1.0, "topk"),
        ("topk", 16384, 2000, 0.9, "topk"),
        ("topk", 64000, 8000, 1.0, "exact"),
        ("topk", 16384, 0, 0.9, "exact"),
        ("topk", 3840, 0, 0.9, "topk"),
        ("plain", 16384, 0, 1.0, "plain"),
        ("plain", 16384, 1, 1.0, "plain"),
        ("plain", 16384, 50, 1.0, "topk"),
        ("exact", 16384, 0, 1.0, "exact"),
        ("later", 16384, 0, 1.0, "topk"),
    ],
)
def test_a_plan_can_draw_with_the_settings_of_its_bundle(
    own: str, vocab: int, top_k: int, top_p: float, wanted: str
) -> None:
    assert tail_of(own, vocab, top_k, top_p) == wanted


@pytest.mark.slow
def test_the_second_build_comes_from_the_cache(tiny_copy: Path) -> None:
    lines: list[str] = []
    request = BuildRequest(tiny_copy, "SM80", images=(1,))
    first = build(request, lines.append)
    plan = (first / "step.plan").read_bytes()
    shutil.rmtree(first)
    lines.clear()
    again = build(request, lines.append)
    assert "taken from the engine cache" in lines[0]
    assert (again / "step.plan").read_bytes() == plan
    lines.clear()
    with (again / "step.plan").open("r+b") as f:  # in place: the file is a hard link to the cache's
        f.write(b"damaged")
    whole = build(request, lines.append)
    assert "taken from" not in lines[0]
    Engine.open(whole, Bundle.open(tiny_copy), verify="full")  # the bytes may differ: builds are not reproducible
    assert (whole / "step.plan").read_bytes()[:7] != b"damaged"


@pytest.mark.slow
def test_a_build_with_other_profiles_is_another_one(tiny_copy: Path) -> None:
    lines: list[str] = []
    for images in ((1,), (1, 2)):
        lines.clear()
        build(BuildRequest(tiny_copy, "SM80", images=images), lines.append)
        assert "taken from" not in lines[0]


def test_two_builds_of_the_same_engine_wait_for_each_other(tiny_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_copy, other)
    lines: list[str] = []
    threads = [
        threading.Thread(target=lambda path=path: build(BuildRequest(path, "SM80", images=(1,)), lines.append))
        for path in (tiny_copy, other)
    ]
    previous = signal.getsignal(signal.SIGTERM)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert signal.getsignal(signal.SIGTERM) is previous
    assert sum("taken from the engine cache" in line for line in lines) == 1


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
    assert kept == [2, 3]  # the least recently used were removed
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


def test_a_damaged_plan_is_refused(tiny_copy: Path, tmp_path: Path) -> None:
    request = BuildRequest(tiny_copy, "SM80", images=(1,), use_cache=False)
    folder = build(request, lambda _: None)
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    for damage, message in ((truncated, "step.plan: truncated"), (changed, "decoder.plan: its content was changed")):
        damage(folder)
        with pytest.raises(EngineError, match=message):
            Engine.open(folder, Bundle.open(tiny_copy))
        shutil.copytree(whole, folder, dirs_exist_ok=True)
    Engine.open(folder, Bundle.open(tiny_copy))
