"""The C kernels against the graph that they stand for: logits, tokens, images, precisions, instruction sets."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instruction_sets import OTHERS

from par_export.random_bundle import write_family
from par_model.config import PARConfig
from par_runtime import Bundle, BundleError, Pipeline
from par_runtime.backends.base import Batch
from par_runtime.backends.draws import draw_all
from par_runtime.backends.native import library
from par_runtime.backends.native.backend import NativeBackend
from par_runtime.backends.native.library import why_not
from par_runtime.backends.ort.cpu import OrtBackend
from par_runtime.schedule import uniforms

needs_kernels = pytest.mark.skipif(library.library() is None, reason="no compiler at installation, or an older CPU")


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
    """Largest difference of logits over all calls of an image, relative to the largest logit."""
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
    ("fp32", 1, 2.0), ("fp32", 3, 1.0), ("fp16", 2, 3.0), ("bf16", 1, 1.5), ("n1", 2, 2.0), ("n16", 1, 2.0),
    ("n16", 2, 1.0),
])  # fmt: skip
def test_logits_are_the_graphs(name: str, images: int, guidance: float, bundles: dict[str, Path]) -> None:
    assert compare(bundles[name], images, guidance) < 2e-5


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 100, padded to 104, which is no multiple of a panel; a grid whose 144 tokens are none either."""
    config = PARConfig(dim=800, n_layers=2, n_heads=8, vocab_size=256, n_classes=10, grid=(1, 12, 12))
    return write_family(config, (4,), tmp_path_factory.mktemp("odd"), name="odd")[4]


@needs_kernels
@pytest.mark.parametrize("instructions", ["", *OTHERS])
def test_any_number_of_queries(instructions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head's queries are multiplied some at a time, as many as have their sums in registers."""
    monkeypatch.setenv("PARVIS_NATIVE", instructions)
    for side, group_sizes in ((12, (4, 9, 16, 36)), (10, (25,))):
        config = PARConfig(dim=128, n_layers=1, n_heads=2, vocab_size=256, n_classes=10, grid=(1, side, side))
        for path in write_family(config, group_sizes, tmp_path, name=f"side{side}").values():
            assert compare(path, 1, 2.0) < 2e-5


@needs_kernels
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2, 5])
def test_head_size_100_and_any_number_of_threads(odd: Path, threads: int) -> None:
    assert compare(odd, 1, 2.0, threads) < 2e-5


@pytest.fixture(scope="module", params=[1, 12, 250, 1001])
def any_codes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers of codes that fill no whole panel, and no whole vector."""
    config = PARConfig(dim=64, n_layers=2, n_heads=2, vocab_size=request.param, n_classes=3, grid=(1, 4, 4))
    return write_family(config, (4,), tmp_path_factory.mktemp("codes"), name="codes")[4]


@needs_kernels
def test_any_number_of_codes(any_codes: Path) -> None:
    bundle = Bundle.open(any_codes)
    assert why_not(bundle) is None
    assert compare(any_codes, 2, 2.0) < 2e-5
    settings = {"guidance": [1.0, 3.0, 2.0, 1.0], "top_k": [0, 5, 0, 1], "top_p": [1.0, 1.0, 0.6, 1.0]}
    made = []
    for device in ("cpu", "cpu-ort"):
        with Pipeline.load(any_codes, device, selftest=False) as pipeline:
            assert pipeline.backend.info.runtime == {"cpu": "native-cpu", "cpu-ort": "onnxruntime-cpu"}[device]
            made.append(pipeline.generate([0, 1, 2, 0], seed=4, decode=False, **settings).tokens)  # type: ignore[arg-type]
    assert (made[0] == made[1]).all()
    assert made[0].max() < bundle.vocab_size


@needs_kernels
def test_nothing_is_written_behind_the_logits(any_codes: Path) -> None:
    bundle = Bundle.open(any_codes)
    backend, one, size = NativeBackend(bundle, 2), batch(2, 2.0), bundle.vocab_size
    guarded = np.full(2 * size + 64, 12345, np.float32)
    call = backend._prepare(one, np.zeros((4, 1), np.int64), np.zeros(4, np.int64))
    backend._run(call, None, guarded.ctypes.data)
    assert (guarded[2 * size :] == 12345).all()
    assert (guarded[: 2 * size] == backend.logits(one, np.zeros((4, 1), np.int64), np.zeros(4, np.int64)).ravel()).all()
    backend.close()


def run_with(instructions: str, code: str, paths: list[Path]) -> None:
    """Run ``code`` with ``paths`` in a process of its own: the instruction set is chosen when the library is loaded."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    report = "from test_native import library; print(library.library().parvis_instructions().decode())"
    command = [sys.executable, "-c", f"import sys; from pathlib import Path; {report}; {code}", *map(str, paths)]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path, "PARVIS_NATIVE": instructions}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == instructions


@needs_kernels
@pytest.mark.parametrize("instructions", OTHERS)
@pytest.mark.parametrize("name", [pytest.param("bf16", marks=pytest.mark.slow), "n16"])
def test_the_other_instruction_set(name: str, instructions: str, bundles: dict[str, Path]) -> None:
    code = "from test_native import compare; assert max(compare(Path(p), 2, 2.0) for p in sys.argv[1:]) < 2e-5"
    run_with(instructions, code, [bundles[name]])


def check_independent_rows(path: Path) -> None:
    """Rows of one call at different positions, with permuted cache rows, have the logits of calls with one row each.

    Row r starts ``lag[r]`` calls late: until then it repeats its first call, which writes the same keys again. Each
    call has the rows in another order, while their keys stay in the same row of the cache. Calls have 3 positions, so
    that some write into two panels of keys.
    """
    bundle = Bundle.open(path)
    query, calls, lag, cache_row = 3, bundle.n_tokens // 3, np.array([0, 4, 9]), np.array([2, 0, 1])
    rng = np.random.default_rng(2)
    ids = rng.integers(0, bundle.vocab_size, (calls, len(lag), query))
    alone = []
    backend = NativeBackend(bundle, 2)
    for row in range(len(lag)):
        one = batch(1, 1.0)
        run = [backend.logits(one, ids[i, [row]], np.array([i * query])) for i in range(calls)]
        alone.append(np.concatenate(run))  # [calls,q,V]
    for i in range(calls):
        rows = rng.permutation(len(lag))
        own = np.maximum(i - lag[rows], 0)  # each row's own call
        several = replace(batch(len(lag), 1.0), cache_row=cache_row[rows])
        logits = backend.logits(several, ids[own, rows], own * query)
        for j, row in enumerate(rows):
            np.testing.assert_array_equal(logits[j], alone[row][own[j]], err_msg=f"call {i}, row {row}")
    backend.close()


@needs_kernels
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_rows_at_different_positions_and_permuted_cache_rows(name: str, bundles: dict[str, Path]) -> None:
    check_independent_rows(bundles[name])


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("instructions", OTHERS)
def test_rows_at_different_positions_on_the_other_instruction_set(instructions: str, bundles: dict[str, Path]) -> None:
    code = "from test_native import check_independent_rows as check; [check(Path(p)) for p in sys.argv[1:]]"
    run_with(instructions, code, [bundles[name] for name in ("fp32", "fp16")])


@pytest.mark.two_cores
@needs_kernels
@pytest.mark.parametrize("options", [
    {"greedy": True}, {}, {"top_k": 7}, {"top_p": 0.6, "temperature": 0.8},
    {"top_k": 40, "top_p": 0.9, "guidance": 1.0},
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
        levels = made["cpu"].images.astype(int) - made["cpu-ort"].images
        assert np.abs(levels).max() <= 1  # of grey: a decoder of our own


@pytest.mark.two_cores
@needs_kernels
def test_a_batch_leaves_nothing_to_the_next_and_rows_are_independent(bundles: dict[str, Path]) -> None:
    with Pipeline.load(bundles["fp32"], device="cpu", threads=2) as pipeline:
        alone = [pipeline.generate(label, seeds=[7 + label]).tokens[0] for label in range(3)]
        pipeline.generate([5] * 6, guidance=1.0, seed=0)
        batched = pipeline.generate([0, 1, 2], seeds=[7, 8, 9]).tokens
    assert (np.stack(alone) == batched).all()


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
    """Some threads have no core while others work, and are late in many calls: the same tokens every time."""
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


def test_why_not_gives_the_reason(bundles: dict[str, Path], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(bundles["fp32"])
    if library.library() is not None:
        assert why_not(bundle) is None
        assert why_not(Bundle.open(tiny)) == "a width of the model is not a multiple of 32"
        assert "no table of weights" in (why_not(replace(bundle, weights={})) or "")
        model = {**bundle.model, "n_heads": 16, "head_dim_padded": 12}
        assert "12 numbers, which is not a multiple of 8" in (why_not(replace(bundle, model=model)) or "")
        with pytest.raises(
            BundleError, match=r"cannot run on the C kernels: a width.*; device \(--device\) cpu-ort takes ONNX Runtime"
        ):
            NativeBackend(Bundle.open(tiny))
    monkeypatch.setattr(library, "library_file", lambda: None)
    assert "the C kernels were not built" in (why_not(bundle) or "")
    with Pipeline.load(bundles["fp32"], device="cpu") as pipeline:
        assert pipeline.backend.info.name.startswith("onnxruntime-cpu")


def test_a_file_that_is_no_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    file = tmp_path / "_step.so"
    file.write_bytes(b"no library")
    monkeypatch.setattr(library, "library_file", lambda: file)
    assert library.library() is None
    assert (why_not(Bundle.open(tiny)) or "").startswith(f"{file} cannot be loaded (")


@needs_kernels
@pytest.mark.parametrize("structure", ["Matrix", "Model", "Step"])
def test_a_library_with_other_structures_is_refused(
    structure: str, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A structure that is one field longer in Python than in C: as after an update that did not build the kernels."""

    class Longer(getattr(library, structure)):
        _fields_ = (("more", ctypes.c_int64),)

    built = library.library_file()
    assert built is not None
    copy = tmp_path / built.name  # another path, since a library is loaded and checked once
    shutil.copy(built, copy)
    monkeypatch.setattr(library, "library_file", lambda: copy)
    monkeypatch.setattr(library, structure, Longer)
    bundle = Bundle.open(bundles["fp32"])
    assert library.library() is None
    assert "built from other sources" in (why_not(bundle) or "")
    assert "install parvis again" in (why_not(bundle) or "")
    with pytest.raises(BundleError, match="built from other sources"):
        NativeBackend(bundle)
    with Pipeline.load(bundles["fp32"], device="cpu") as pipeline:
        assert pipeline.backend.info.name.startswith("onnxruntime-cpu")


def test_a_library_from_before_the_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not report the sizes of its structures; here any other compiled module stands for it."""
    monkeypatch.setattr(library, "library_file", lambda: Path(np.linalg._umath_linalg.__file__))
    with pytest.raises(library.KernelError, match="built from other sources"):
        library.open_library(library.library_file())


@needs_kernels
def test_a_bundle_whose_weights_were_changed_fails_its_self_test(bundles: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "spoilt"
    shutil.copytree(bundles["fp32"], path)
    at = Bundle.open(path).weights["layers.1.w2"]
    with (path / "weights.data").open("r+b") as file:
        file.seek(at.offset)
        file.write(b"\0" * at.length)
    with pytest.raises(BundleError, match="self-test failed on native-cpu"):
        Pipeline.load(path, device="cpu", verify="none")


@needs_kernels
def test_a_call_draws_from_its_guided_logits(bundles: dict[str, Path]) -> None:
    """Guided and unguided images in one call, each with settings of its own."""
    bundle = Bundle.open(bundles["fp32"])
    mixed = Batch(
        rows=6,
        uncond_row=np.array([5, 1, 4, 3]),
        guidance=np.array([3.0, 1.0, 0.5, 1.0], np.float32),
        temperature=np.array([1.0, 0.5, 2.0, 1.0], np.float32),
        top_k=np.array([0, 5, 1, 40]),
        top_p=np.array([0.9, 1.0, 1.0, 0.5], np.float32),
    )
    one = replace(mixed, uncond_row=np.arange(4), image_of_row=mixed.image_of_row)
    rng = np.random.default_rng(4)
    backend = NativeBackend(bundle, 2)
    for phase in bundle.phases:
        ids, write = rng.integers(0, bundle.vocab_size, (6, phase.query)), np.full(6, phase.start)
        uniform = rng.random((4, phase.query), np.float32)
        logits, cond = backend.logits(mixed, ids, write), backend.logits(one, ids, write)
        assert (cond[[1, 3]] == logits[[1, 3]]).all()
        settings = [np.repeat(each, phase.query) for each in (mixed.temperature, mixed.top_k, mixed.top_p)]
        wanted = draw_all(logits.reshape(-1, bundle.vocab_size), uniform.reshape(-1), *settings)  # type: ignore[arg-type]
        assert backend.step(mixed, ids, write, uniform).reshape(-1).tolist() == wanted.tolist()
    with pytest.raises(IndexError, match=r"ids from -1 to 3; the embedding has rows 0\.\."):
        backend.step(mixed, np.array([[3], [2], [-1], [0], [0], [0]]), np.zeros(6, np.int64), uniform[:, :1])
    with pytest.raises(IndexError, match="ids from 0 to 1000000;"):
        backend.logits(mixed, np.array([[0]] * 5 + [[10**6]]), np.zeros(6, np.int64))
    backend.close()
