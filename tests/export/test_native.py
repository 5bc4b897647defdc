"""The C kernels against the graph that they stand for: logits, tokens, images, every precision, both instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from par_export.random_bundle import family
from par_model.config import PARConfig
from par_runtime import Bundle, BundleError, Pipeline
from par_runtime.backends.base import Batch
from par_runtime.backends.native import backend as native
from par_runtime.backends.native.backend import NativeBackend, why_not
from par_runtime.backends.ort.cpu import OrtBackend
from par_runtime.schedule import uniforms

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no compiler at installation, or an older CPU")


def batch(images: int, guidance: float) -> Batch:
    guided = guidance > 1
    return Batch(
        rows=images * (2 if guided else 1),
        uncond_row=np.arange(images) + (images if guided else 0),
        guidance=np.full(images, guidance, np.float32),
        temperature=np.ones(images, np.float32),
        top_k=np.zeros(images, np.int64),
        top_p=np.ones(images, np.float32),
    )


def compare(path: Path, images: int, guidance: float, threads: int = 2) -> float:
    """Largest difference of logits over all calls of an image, as a part of the largest logit; the caches go along."""
    bundle = Bundle.open(path)
    ours, graph = NativeBackend(bundle, threads), OrtBackend(bundle, 1)
    one = batch(images, guidance)
    rng = np.random.default_rng(1)
    worst = largest = 0.0
    for phase in bundle.phases:
        for i in range(phase.repeat):
            ids = rng.integers(0, bundle.vocab_size, (one.rows, phase.query))
            write = np.full(one.rows, phase.start + i * phase.query)
            wanted = graph.logits(one, ids, write)
            worst = max(worst, float(np.abs(ours.logits(one, ids, write) - wanted).max()))
            largest = max(largest, float(np.abs(wanted).max()))
    ours.close()
    graph.close()
    return worst / largest


@needs_kernels
@pytest.mark.parametrize(("name", "images", "guidance"), [
    ("fp32", 1, 2.0), ("fp32", 3, 1.0), ("fp16", 2, 3.0), ("bf16", 1, 1.5), ("n1", 2, 2.0), ("n16", 1, 2.0), ("n16", 2, 1.0),
])  # fmt: skip
def test_logits_are_the_graphs(name: str, images: int, guidance: float, bundles: dict[str, Path]) -> None:
    assert compare(bundles[name], images, guidance) < 2e-5


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 100, padded to 104, which is no multiple of a panel; a grid whose 144 tokens are none either."""
    config = PARConfig(dim=800, n_layers=2, n_heads=8, vocab_size=256, n_classes=10, grid=(1, 12, 12))
    return family(config, (4,), tmp_path_factory.mktemp("odd"), name="odd")[4]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_head_size_100_and_any_number_of_threads(odd: Path, threads: int) -> None:
    assert compare(odd, 1, 2.0, threads) < 2e-5


@needs_kernels
def test_the_other_instruction_set(bundles: dict[str, Path]) -> None:
    """AVX2 where this machine has more: chosen when the library is loaded, so in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from test_native import compare, native; "
        "print(native.library().parvis_instructions().decode()); "
        "assert max(compare(Path(p), 2, 2.0) for p in sys.argv[1:]) < 2e-5"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code, *(str(bundles[name]) for name in ("fp32", "fp16", "bf16", "n16"))]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path, "PARVIS_NATIVE": "avx2"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "avx2"


@needs_kernels
@pytest.mark.parametrize("options", [
    {"greedy": True}, {}, {"top_k": 7}, {"top_p": 0.6, "temperature": 0.8}, {"top_k": 40, "top_p": 0.9, "guidance": 1.0},
    {"guidance": [1.0, 3.0, 1.0, 2.0], "top_k": [0, 5, 1, 0], "top_p": [1.0, 0.5, 1.0, 0.9]},
])  # fmt: skip
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_tokens_and_images_are_onnx_runtimes(name: str, options: dict[str, Any], bundles: dict[str, Path]) -> None:
    made = {}
    for device in ("cpu", "cpu-ort"):
        with Pipeline.load(bundles[name], device=device, threads=2) as pipeline:
            made[device] = pipeline.generate([0, 3, 5, 9], seed=11, **options)
            backend = pipeline.backend.info.name
            assert backend.startswith("native-cpu" if device == "cpu" else "onnxruntime-cpu")
    same = made["cpu"].tokens == made["cpu-ort"].tokens
    assert same.all() or (
        options.get("greedy") is None and same[:, :4].mean() > 0.9
    )  # a draw may lie on a rounding edge
    if same.all():
        assert (made["cpu"].images == made["cpu-ort"].images).all()


@needs_kernels
def test_a_batch_leaves_nothing_to_the_next_and_rows_do_not_meet(bundles: dict[str, Path]) -> None:
    with Pipeline.load(bundles["fp32"], device="cpu", threads=2) as pipeline:
        alone = [pipeline.generate(label, seeds=[7 + label]).tokens[0] for label in range(3)]
        pipeline.generate([5] * 6, guidance=1.0, seed=0)
        together = pipeline.generate([0, 1, 2], seeds=[7, 8, 9]).tokens
    assert (np.stack(alone) == together).all()


@needs_kernels
def test_scores_and_kept_tokens(bundles: dict[str, Path]) -> None:
    made = {}
    for device in ("cpu", "cpu-ort"):
        with Pipeline.load(bundles["fp32"], device=device, threads=1) as pipeline:
            tokens = np.random.default_rng(0).integers(0, 512, (2, 64))
            keep = np.zeros((8, 8), bool)
            keep[:3] = True
            made[device] = (
                pipeline.score(tokens, [1, 2]),
                pipeline.generate([1, 2], seed=3, keep=keep, tokens=tokens).tokens,
            )
    np.testing.assert_allclose(made["cpu"][0], made["cpu-ort"][0], atol=2e-3)
    assert (made["cpu"][1] == made["cpu-ort"][1]).mean() > 0.9


@needs_kernels
def test_many_calls_with_more_threads_than_cores(bundles: dict[str, Path]) -> None:
    """Barriers under pressure: the same tokens every time."""
    bundle = Bundle.open(bundles["n16"])
    backend = NativeBackend(bundle, 7)
    one = batch(1, 2.0)
    first: np.ndarray | None = None
    for _ in range(20):
        noise = uniforms(3, bundle.n_tokens)
        drawn = [
            backend.step(one, np.full((2, p.query), 5), np.full(2, p.start + i * p.query), noise[None, : p.query])
            for p in bundle.phases
            for i in range(p.repeat)
        ]
        tokens = np.concatenate(drawn, 1)
        first = tokens if first is None else first
        assert (tokens == first).all()
    backend.close()
    backend.close()  # twice is once


def test_what_it_cannot_run_says_why(bundles: dict[str, Path], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(bundles["fp32"])
    if native.library() is not None:
        assert why_not(bundle) is None
        assert why_not(Bundle.open(tiny)) == "a width of the model is no multiple of 32"
        assert "no table of weights" in (why_not(replace(bundle, weights={})) or "")
        with pytest.raises(
            BundleError, match=r"cannot run on the C kernels: a width.*; --device cpu-ort takes ONNX Runtime"
        ):
            NativeBackend(Bundle.open(tiny))
    monkeypatch.setattr(native, "library", lambda: None)
    assert "the C kernels were not built" in (why_not(bundle) or "")
    with Pipeline.load(bundles["fp32"], device="cpu") as pipeline:
        assert pipeline.backend.info.name.startswith("onnxruntime-cpu")


@needs_kernels
def test_a_bundle_whose_weights_were_changed_fails_its_self_test(bundles: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "spoilt"
    shutil.copytree(bundles["fp32"], path)
    at = Bundle.open(path).weights["layers.1.w2"]
    with (path / "weights.data").open("r+b") as file:
        file.seek(at.offset)
        file.write(b"\0" * at.length)
    with pytest.raises(BundleError, match="self-test failed on native-cpu"):
        Pipeline.load(path, device="cpu", verify="none")
