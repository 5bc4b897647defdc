"""The cache of keys and values on ONNX Runtime: a window that grows, in place, allocated once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from par_runtime import Pipeline
from par_runtime.backends.ort.cpu import OPSET24_SINCE, OrtBackend, spread, window


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Pipeline:
    return Pipeline.load(tiny, threads=1)


def test_window_grows_in_buckets_and_covers() -> None:
    sizes = [window(p, 576) for p in range(1, 577)]
    assert sizes == sorted(sizes)
    assert all(p <= s <= 576 for p, s in enumerate(sizes, 1))
    assert len(set(sizes)) == 8
    assert window(5, 5) == 5


def test_spread_moves_pieces_apart_in_place() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 8, 65):
        for old in (0, 1, 3, 8):
            for new in range(max(old, 1), 3 * old + 3):
                flat = rng.random(count * new + 5, dtype=np.float32)
                wanted = flat[: count * old].reshape(count, old).copy()
                spread(flat, count, old, new)
                assert (flat[: count * new].reshape(count, new)[:, :old] == wanted).all(), (count, old, new)


def test_the_cache_is_allocated_once_and_serves_smaller_batches(tiny: Path) -> None:
    pipeline = Pipeline.load(tiny, threads=1)
    backend, layout = pipeline.backend, pipeline.bundle.cache
    assert isinstance(backend, OrtBackend)
    first = pipeline.generate([0, 1, 2], seed=4, guidance=2).tokens
    held = [buffer.ctypes.data for buffer in backend._caches]
    assert sum(b.nbytes for b in backend._caches) == len(layout.inputs) * 6 * layout.heads * 64 * layout.head_dim * 4
    pipeline.generate([5], seed=9, guidance=1)
    assert (pipeline.generate([0, 1, 2], seed=4, guidance=2).tokens == first).all()
    assert [buffer.ctypes.data for buffer in backend._caches] == held
    pipeline.generate([0] * 4, seed=9, guidance=2)
    assert (pipeline.generate([0, 1, 2], seed=4, guidance=2).tokens == first).all()


def test_too_little_memory_is_a_memory_error(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def run_with_iobinding(self, _: object) -> None:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 99")

    pipeline.generate(0, seed=1)
    monkeypatch.setattr(pipeline.backend, "_step", Full())
    with pytest.raises(MemoryError, match="size 99"):
        pipeline.generate(0, seed=1)


def test_growing_the_window_changes_nothing(pipeline: Pipeline, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = pipeline.generate([0, 1], seed=4).tokens
    monkeypatch.setattr("par_runtime.backends.ort.cpu.BUCKETS", 1)
    fixed = Pipeline.load(tiny, threads=1).generate([0, 1], seed=4).tokens
    assert (grown == fixed).all()


def test_the_cache_is_updated_in_place(tiny: Path) -> None:
    """ONNX Runtime says on stderr when TensorScatter copies the cache; generation must never make it say so."""
    log = "import sys; from par_runtime.backends.ort import sessions; sessions.LOG_SEVERITY = 2\n"
    run = log + "from par_runtime import Pipeline; Pipeline.load(sys.argv[1]).generate([0, 1], seed=1)"
    done = subprocess.run([sys.executable, "-c", run, str(tiny)], capture_output=True, text=True, check=True)
    assert "in-place" not in done.stderr
    assert done.stderr == ""
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < OPSET24_SINCE:
        return  # the older graph writes with ScatterND, which copies in silence
    # The warning exists and would be seen: the same step, output bound to another buffer.
    copied = log + (
        "from par_runtime import Pipeline; from par_runtime.backends.ort import cpu as ort; bind = "
        "ort._bind; others = []\n"
        "def other(a): others.append(a.copy()); return others[-1]\n"
        "ort._bind = lambda b, n, a, output=False: bind(b, n, other(a) if n.startswith('present') else a, output)\n"
        "p = Pipeline.load(sys.argv[1], selftest=False); p.generate([0, 1], seed=1)"
    )
    done = subprocess.run([sys.executable, "-c", copied, str(tiny)], capture_output=True, text=True, check=False)
    assert "in-place" in done.stderr
