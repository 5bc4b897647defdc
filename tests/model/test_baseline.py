"""The PyTorch baseline: the tokens of the reference from a static cache, every call timed, errors of one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import golden_config, golden_weights
from par_model import baseline as baseline_module
from par_model.baseline import Baseline, BaselineError, Sampling, decode, step, stored_head
from par_model.blank import with_weights
from par_model.generation import generate
from par_model.running import running_sum
from par_model.transformer import PAR
from par_runtime import Pipeline

NAMES = {"fp32": "par_n4_grid8", "n1": "ar_n1_grid8", "n16": "par_n16_grid8"}  # bundle -> its checkpoint


@pytest.mark.parametrize("name", NAMES)
def test_its_tokens_are_those_of_the_reference_and_of_the_runtime(
    name: str, bundles: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    baseline = Baseline(bundles[name], checkpoint=checkpoints[NAMES[name]])
    model = golden_weights(PAR(baseline.config))
    for guidance in (2.0,) if name == "n1" else (1.0, 2.0):
        baseline.run(2, guidance, greedy=True, decoder=False)
        assert (baseline.tokens == generate(model, [0, 1], guidance=guidance, greedy=True)).all()
        assert len(baseline.tokens.unique()) > 5
    with Pipeline.load(bundles[name], device="cpu", threads=1) as pipeline:
        ours = pipeline.generate([0, 1], guidance=2.0, greedy=True, decode=False)
    assert (baseline.tokens.numpy() == ours.tokens).all()


def test_draws_follow_the_seed_and_no_batch_changes_the_next(
    bundles: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    baseline = Baseline(bundles["fp32"], checkpoint=checkpoints["par_n4_grid8"])
    model = golden_weights(PAR(baseline.config))
    for images, guidance, seed in ((2, 2.0, 5), (2, 2.0, 6), (1, 1.0, 5)):
        baseline.run(images, guidance, seed=seed, decoder=False)
        assert (baseline.tokens == generate(model, range(images), guidance=guidance, seed=seed)).all()


def test_pixels_are_those_of_the_runtime(bundles: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    baseline = Baseline(bundles["fp32"], checkpoint=checkpoints["par_n4_grid8"], tokenizer=checkpoints["vq"])
    baseline.run(1, 2.0, greedy=True)
    with Pipeline.load(bundles["fp32"], device="cpu", threads=1) as pipeline:
        wanted = pipeline.generate(0, guidance=2.0, greedy=True).images
    assert wanted is not None
    assert baseline.images is not None
    assert np.abs(baseline.images.numpy().astype(int) - wanted).max() <= 1
    assert len(np.unique(wanted)) > 5


@pytest.mark.parametrize(("name", "calls"), [("fp32", (1, 3, 1, 14)), ("n1", (1, 0, 1, 62)), ("n16", (1, 15, 1, 2))])
def test_every_call_of_every_phase_is_timed(name: str, calls: tuple[int, ...], bundles: dict[str, Path]) -> None:
    took, image_ms = Baseline(bundles[name]).run(1, 1.5)
    counted = dict(zip(("prefill", "sequential", "transition", "group"), calls, strict=True))
    if name == "fp32":
        counted["decoder"] = 1
    assert {phase: len(ms) for phase, ms in took.items()} == {phase: n for phase, n in counted.items() if n}
    assert all(ms > 0 for each in took.values() for ms in each)
    # Every call is part of the batch; only the start of the batch is not part of a call.
    assert 0 < sum(map(sum, took.values())) <= image_ms


def test_chosen_calls_only(bundles: dict[str, Path]) -> None:
    took, _ = Baseline(bundles["fp32"]).run(1, 1.5, calls=(0, 2, 5, 18), decoder=False)
    assert {phase: len(ms) for phase, ms in took.items()} == {"prefill": 1, "sequential": 1, "group": 2}


def test_warming_up_is_not_timed_and_happens_once_per_shape(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline, made = Baseline(bundles["fp32"]), []
    original = baseline_module.step
    monkeypatch.setattr(baseline, "_step", lambda *a: (made.append(len(a[2])), original(*a))[1])
    took, _ = baseline.run(1, 1.5)
    assert sum(len(ms) for phase, ms in took.items() if phase != "decoder") == 19
    assert sorted(made) == sorted([1, 4, *[1] * 4, *[4] * 15])  # one of each query length before the 19
    made.clear()
    baseline.run(1, 1.5)
    assert len(made) == 19


def test_the_whole_length_is_attended_from_the_first_call(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the published code: keys and mask rows of all N slots in every call."""
    seen = set()
    original = torch.nn.functional.scaled_dot_product_attention

    def watch(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
        seen.add((key.shape[2], value.shape[2], attn_mask.shape[-1]))
        return original(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    Baseline(bundles["fp32"]).run(1, 1.5, decoder=False)
    assert seen == {(64, 64, 64)}


def test_random_weights_give_different_tokens_and_pixels(bundles: dict[str, Path]) -> None:
    baseline = Baseline(bundles["fp32"])
    baseline.run(1, 1.5)
    assert len(baseline.tokens.unique()) > 20
    assert baseline.images is not None
    assert len(baseline.images.unique()) > 1


def test_the_model_is_that_of_the_manifest(bundles: dict[str, Path], golden: dict[str, dict[str, Any]]) -> None:
    baseline = Baseline(bundles["fp32"])
    assert baseline.config == golden_config(golden["par_n4_grid8"])
    assert (baseline.name, baseline.version) == ("torch eager", torch.__version__)
    assert Baseline(bundles["n1"]).config.group_size == 1


def test_compiled_needs_a_compiler(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_module.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.delenv("CXX", raising=False)
    assert Baseline(bundles["n1"], compiled=True).name == "torch compiled"
    monkeypatch.setattr(baseline_module.shutil, "which", lambda _: None)
    with pytest.raises(BaselineError, match=r"needs a C\+\+ compiler.*no g\+\+ or clang\+\+.*install one"):
        Baseline(bundles["n1"], compiled=True)
    monkeypatch.setenv("CXX", "nothing-there")
    with pytest.raises(BaselineError, match="CXX=nothing-there"):
        Baseline(bundles["n1"], compiled=True)


def test_a_compilation_that_fails_is_one_line(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("no Python.h\nand a long tale", "backend='inductor' raised:\nno Python.h\n\nSet TORCH_LOGS"):

        def fail(*_: object, text: str = text) -> None:
            raise torch._dynamo.exc.TorchDynamoException(text)

        baseline = Baseline(bundles["n1"])
        baseline.compiled = True
        monkeypatch.setattr(baseline, "_step", fail)
        with pytest.raises(BaselineError, match=r"failed \(no Python.h\); leave") as raised:
            baseline.run(1, 1.0)
        assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses deprecated parts of PyTorch
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_tokens_are_those_of_the_reference_and_nothing_is_compiled_twice(
    bundles: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    baseline = Baseline(bundles["fp32"], compiled=True, checkpoint=checkpoints["par_n4_grid8"])
    model = golden_weights(PAR(baseline.config))
    torch._dynamo.utils.counters.clear()
    baseline.run(1, 2.0, greedy=True)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (baseline.tokens == generate(model, [0], guidance=2.0, greedy=True)).all()
    baseline.run(1, 2.5, greedy=True)
    assert (baseline.tokens == generate(model, [0], guidance=2.5, greedy=True)).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "sampling",
    [pytest.param(Sampling(), id="plain", marks=pytest.mark.slow), pytest.param(Sampling(1.0, 20, 0.9), id="filtered")],
)
def test_the_compiler_meets_no_running_sum(sampling: Sampling, bundles: dict[str, Path]) -> None:
    """PyTorch 2.11 cannot compile one for CUDA, so that no step compiles there; a CPU would not tell."""
    baseline = Baseline(bundles["fp32"])
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    state = baseline._start(2, 2.0, 0)
    plain = state.tokens.clone()
    step(baseline._model, state, torch.arange(4), sampling)
    expected, state.tokens = state.tokens, plain
    compiled = torch.compile(step, dynamic=False, fullgraph=True, backend=record)
    with torch.no_grad():
        compiled(baseline._model, state, torch.arange(4), replace(sampling, sums=running_sum))
    assert (state.tokens == expected).all()
    assert sum("running_sum" in name for name in seen) == (2 if sampling.top_p < 1 else 1)
    assert not [name for name in seen if "cumsum" in name]


def test_what_is_forgotten_is_made_again(bundles: dict[str, Path]) -> None:
    baseline = Baseline(bundles["fp32"])
    baseline.run(2, 2.0, seed=3)
    tokens, images = baseline.tokens.clone(), baseline.images
    baseline.forget()
    assert (baseline._state, baseline.images) == (None, None)
    baseline.run(2, 2.0, seed=3)
    assert (baseline.tokens == tokens).all()
    assert images is not None
    assert baseline.images is not None
    assert (baseline.images == images).all()


def test_what_cannot_be_run_is_one_line(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match=r"no manifest.json that can be read.*give the folder of a bundle"):
        Baseline(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(BaselineError, match="sees no CUDA device; give cpu"):
            Baseline(bundles["n1"], device="cuda")
    with pytest.raises(BaselineError, match="0 images: expected 1 or more"):
        Baseline(bundles["n1"]).run(0, 1.0)
    manifest = json.loads((bundles["fp32"] / "manifest.json").read_text())
    manifest["order"] = manifest["order"][::-1]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BaselineError, match="order is none of distant, raster for grid 1x8x8 and group_size=4; export the bundle again"
    ):
        Baseline(tmp_path)


def heads_of_100(bundle: Path, width: int) -> Baseline:
    """A model with the heads of the PAR-3B, of which ``width`` numbers are stored."""
    baseline = Baseline(bundle)
    baseline.config = replace(baseline.config, dim=100 * baseline.config.n_heads, n_layers=2)
    baseline._model = with_weights(PAR(baseline.config), None, torch.float32, baseline.device)
    baseline.head_width = width
    return baseline


def test_heads_that_are_stored_wider_give_the_same_tokens(bundles: dict[str, Path]) -> None:
    assert [stored_head(size, torch.float16) for size in (64, 80, 96, 100, 128)] == [64, 80, 96, 104, 128]
    assert stored_head(100, torch.float32) == 100
    plain, wide = (heads_of_100(bundles["fp32"], width) for width in (100, stored_head(100, torch.float16)))
    for guidance in (1.0, 2.0):
        for baseline in (plain, wide):
            baseline.run(2, guidance, seed=3, decoder=False)
        assert (plain.tokens == wide.tokens).all()
        assert len(plain.tokens.unique()) > 20
    (narrow, *_), (cache, *_) = (baseline._state.caches for baseline in (plain, wide) if baseline._state is not None)
    assert (narrow.k.shape[-1], cache.k.shape[-1]) == (100, 104)
    assert (narrow.v - cache.v[..., :100]).abs().max() < 1e-5
    assert narrow.v.abs().max() > 0.1
    assert not cache.k[..., 100:].any()
    assert not cache.v[..., 100:].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_decoder_is_one_graph_for_the_compiler(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is compiled for CUDA, for one image, whatever the batch; its images are the caller's own."""
    baseline, seen = Baseline(bundles["fp32"]), list[Any]()
    baseline.run(2, 2.0, seed=3)
    expected = baseline.images
    assert expected is not None
    monkeypatch.setattr(baseline, "_warm", set())
    buffer = torch.empty_like(expected[:1])

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(graph)
        return lambda *inputs: (buffer.copy_(graph.forward(*inputs)[0]),)  # as a CUDA graph, always into one place

    with torch.no_grad():
        monkeypatch.setattr(baseline, "_decode", torch.compile(decode, dynamic=False, fullgraph=True, backend=record))
        took, _ = baseline.run(2, 2.0, seed=3)
    assert len(seen) == 1
    assert len(took["decoder"]) == 1
    buffer.zero_()
    assert baseline.images is not None
    assert (baseline.images == expected).all()
    assert baseline.doubts == ()


def test_a_decoder_that_cannot_be_compiled_runs_eagerly_and_is_marked(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = Baseline(bundles["fp32"])
    baseline.run(1, 2.0, seed=3)
    expected = baseline.images

    def fail(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("backend='inductor' raised:\nno such layout\nand a long tale")

    for images, guidance in ((1, 2.0), (1, 1.0)):  # it stays so in the next shape
        monkeypatch.setattr(baseline, "_warm", set())
        monkeypatch.setattr(baseline, "_decode", fail if not baseline.doubts else baseline._decode)
        baseline.run(images, guidance, seed=3)
        assert baseline.doubts == (
            f"eager decoder: torch.compile of PyTorch {torch.__version__} failed (no such layout)",
        )
        assert expected is not None
        assert baseline.images is not None
        assert (baseline.images == expected).all() == (guidance == 2.0)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("part", ["_decode", "_step"])
def test_memory_that_runs_out_is_no_fault_of_the_compiler(
    part: str, compiling: bool, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a compilation too, whose error wraps that of the memory."""
    error = torch._dynamo.exc.TorchDynamoException if compiling else torch.cuda.OutOfMemoryError
    baseline = Baseline(bundles["fp32"])
    baseline.compiled = True

    def no_memory(*_: object) -> None:
        raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(baseline, part, no_memory)
    for _ in range(2):
        with pytest.raises(MemoryError, match="torch eager: CUDA out of memory"):
            baseline.run(1, 2.0)
    assert baseline.doubts == ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_any_number_of_batch_sizes_is_compiled(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives up after 8 shapes, of which a batch size has two."""
    baseline = Baseline(bundles["fp32"], compiled=True)
    monkeypatch.setattr(baseline, "_step", torch.compile(step, dynamic=False, fullgraph=True, backend="eager"))
    for images in range(1, 6):
        baseline.run(images, 1.0, calls=(0, 5), decoder=False)
    with (
        torch._dynamo.config.patch(recompile_limit=8),
        pytest.raises(BaselineError, match=r"torch\.compile of PyTorch"),
    ):
        baseline.run(6, 1.0, calls=(0, 5), decoder=False)


def test_new_buffers_are_warmed_up_where_there_are_graphs(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is recorded for the addresses of its buffers, which must not happen while it is timed."""
    made: list[int] = []
    original = baseline_module.step
    for graphs, wanted in ((False, [21, 19, 19]), (True, [21, 19, 21])):
        baseline = Baseline(bundles["fp32"])
        baseline._graphs = graphs
        monkeypatch.setattr(baseline, "_step", lambda *a: (made.append(len(a[2])), original(*a))[1])
        counts = []
        for forgotten in (False, False, True):
            if forgotten:
                baseline.forget()
            made.clear()
            baseline.run(1, 1.5, decoder=False)
            counts.append(len(made))
        assert counts == wanted
