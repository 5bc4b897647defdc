"""The ``exact`` tail of large codebooks: its search against the oracle's sampler, where it is hardest and at the size
of the paper's video model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import top_k_8000
import torch
from engine_cases import SMALL, random_case
from sampling_tails import session as tail

from par_export.graphs import sampling
from par_export.graphs.sampling import SamplingVariant
from par_export.graphs.searched import Split, largest_codebook
from par_export.graphs.writer import COMPATIBLE_OPSET
from par_model.generation import sample as oracle
from par_runtime.backends.draws import distance_of, draw_all
from par_runtime.backends.tails import TAILS, TOPK_LIMIT
from par_runtime.backends.trt import module as trt_module

VOCAB = top_k_8000.VOCAB


def drawn(
    session: ort.InferenceSession, logits: np.ndarray, uniform: np.ndarray, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """Tokens [B,q] of ``logits`` [B,q,V], all with the same settings."""
    images = len(logits)
    settings = {
        "temperature": np.full(images, temperature, np.float32),
        "top_k": np.full(images, top_k),
        "top_p": np.full(images, top_p, np.float32),
    }
    tokens: np.ndarray = session.run(None, {"logits": logits, "uniform": uniform} | settings)[0]
    return tokens


def check(
    session: ort.InferenceSession, logits: np.ndarray, temperature: float, top_k: int, top_p: float, name: str
) -> int:
    """Every token is the oracle's, or beside it by no more than sums in another order explain; returns how many are
    not the oracle's."""
    uniform = np.random.default_rng(top_k + 1).random(logits.shape[:2], dtype=np.float32)
    uniform[0, :2] = 0, 1 - 2**-24
    got = drawn(session, logits, uniform, temperature, top_k, top_p)
    wanted = oracle(torch.from_numpy(logits), torch.from_numpy(uniform), temperature, top_k, top_p).numpy()
    different = list(zip(*np.nonzero(got != wanted), strict=True))
    for at in different:
        case = f"{name}: {got[at]} in place of {wanted[at]}, top-k {top_k}, top-p {top_p}"
        settings = (temperature, top_k, top_p)
        distance, allowed = distance_of(logits[at], logits[at], int(got[at]), float(uniform[at]), *settings)
        assert distance is not None, f"{case}: was filtered out"
        assert distance <= allowed, f"{case}: {distance} of {allowed}"
    return len(different)


def hardest(vocab: int) -> int:
    """The least number of sorted entries with which ``vocab`` codes can be searched."""
    return next(limit for limit in range(2, vocab) if Split.of(vocab, limit) is not None)


@pytest.mark.parametrize(
    "vocab", [40, 64, 100, *(pytest.param(vocab, marks=pytest.mark.slow) for vocab in (512, 1000))]
)
def test_the_search_where_it_is_hardest(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorts as short as they can be, and logits that tie, are all equal, differ in the last bit, or are sorted."""
    monkeypatch.setattr(sampling, "TOPK_LIMIT", hardest(vocab))
    session = tail(vocab, "exact")
    random = np.random.default_rng(vocab)
    numbers = np.arange(vocab)
    some_inf = np.where(random.random((1, 30, vocab)) < 0.7, -np.inf, random.normal(size=(1, 30, vocab)))
    some_inf[..., 0] = 0
    cases = {
        "normal": random.normal(size=(2, 30, vocab)) * 3,
        "ties": random.integers(-3, 3, (2, 30, vocab)),
        "equal": np.zeros((1, 30, vocab)),
        "peaked": np.where(numbers == vocab // 3, 100.0, -1e30) * np.ones((1, 30, 1)),
        "flat": random.normal(size=(1, 30, vocab)) * 1e-6,
        "falling": np.tile(numbers * -0.05, (1, 30, 1)),
        "rising": np.tile(numbers * 0.05, (1, 30, 1)),
        "-inf": some_inf,
    }
    different = count = 0
    for name, logits in cases.items():
        for top_k in sorted({0, 1, 2, 3, vocab // 4, vocab // 2, vocab - 1, vocab, vocab + 5}):
            for top_p in (0.0, 1e-6, 0.23, 0.51, 0.93, 1.0):
                for temperature in (1.0, 0.01) if name == "normal" else (1.0,):
                    given = np.ascontiguousarray(logits, np.float32)
                    different += check(session, given, temperature, top_k, top_p, name)
                    count += given.shape[0] * given.shape[1]
    assert different < 0.02 * count  # rounding moves few of them


def test_the_search_at_64000_codes() -> None:
    session = tail(VOCAB, "exact")
    random = np.random.default_rng(1)
    cases = {
        "normal": random.normal(size=(1, 4, VOCAB)) * 2,
        "ties at the edge": np.round(random.normal(size=(1, 4, VOCAB)) * 4) / 4,
        "equal": np.zeros((1, 2, VOCAB)),
        "flat": random.normal(size=(1, 2, VOCAB)) * 1e-3,
    }
    for name, logits in cases.items():
        for top_k, top_p in [(1, 1.0), (3841, 1.0), (8000, 1.0), (8000, 0.9), (63999, 1.0), (0, 0.5)]:
            check(session, logits.astype(np.float32), 1.0, top_k, top_p, name)


@pytest.mark.parametrize("vocab", [3841, 4096, 10007, 16384, 64000, 65536, 131072, 200000])
def test_every_sort_of_a_split_is_one_that_tensorrt_has(vocab: int) -> None:
    split = Split.of(vocab, TOPK_LIMIT)
    assert split is not None
    assert split.length % split.block == 0
    assert (split.parts - 1) * split.length < vocab <= split.parts * split.length
    assert max(split.length, split.blocks, split.candidates) <= TOPK_LIMIT
    assert split.candidates >= min(split.block * (split.parts + 1), vocab)


def test_a_codebook_can_be_too_large_to_search() -> None:
    largest = largest_codebook(TOPK_LIMIT)
    assert largest == 226_560
    assert [Split.of(vocab, TOPK_LIMIT) is None for vocab in (largest, largest + 1, 300_000)] == [False, True, True]
    for limit in (16, 72, 100, 126):
        largest = largest_codebook(limit)
        assert [Split.of(vocab, limit) is None for vocab in (largest, largest + 1)] == [False, True]
    with pytest.raises(ValueError, match=r"300000 codes are too many for --sampling exact .at most 226560.; give"):
        tail(300_000, "exact")


@pytest.mark.parametrize(
    "who",
    [
        *(pytest.param(who, marks=pytest.mark.slow) for who in ("oracle", "dynamic", "dynamic, compatible", "exact")),
        "numpy",
    ],
)
def test_top_k_8000_of_64000_is_distributed_as_promised(who: str) -> None:
    """That of the C step and of our GPU kernels is tested beside their draws."""
    if who == "oracle":
        top_k_8000.check(
            lambda x, u: oracle(torch.from_numpy(x[None]), torch.from_numpy(u[None]), 1.0, 8000, 1.0).numpy(), 900, 100
        )
        return
    if who == "numpy":
        ones = np.ones(100, np.float32)
        top_k_8000.check(lambda x, u: draw_all(x, u, ones, np.full(100, 8000), ones), 900, 100)
        return
    variant: SamplingVariant = "exact" if who == "exact" else "dynamic"
    session = tail(VOCAB, variant, COMPATIBLE_OPSET if "compatible" in who else None)
    top_k_8000.check(lambda x, u: drawn(session, x[None], u[None], 1.0, 8000, 1.0), 900, 100)


@pytest.mark.parametrize("fault", ["one too many", "no last eighth", "first half twice as often"])
def test_a_fault_of_the_distribution_is_seen(fault: str) -> None:
    """With the fewest draws that any of these tests makes."""
    logits = top_k_8000.row()
    p = np.where(logits >= np.sort(logits)[-top_k_8000.TOP_K], np.exp(logits.astype(np.float64)), 0)
    if fault == "one too many":
        best = int(np.argmax(np.where(p > 0, -np.inf, logits)))
        p[best] = p.sum() / 50
    cdf = np.cumsum(p) / p.sum()

    def draw(rows: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        if fault == "no last eighth":
            uniform = uniform * 7 / 8
        elif fault == "first half twice as often":
            uniform = np.where(uniform < 2 / 3, uniform * 3 / 4, (uniform - 2 / 3) * 3 / 2 + 1 / 2)
        return np.searchsorted(cdf, uniform)

    with pytest.raises(AssertionError):
        top_k_8000.check(draw, 300, 100)


@pytest.mark.slow
@pytest.mark.parametrize("query", [1, 4, 16])
def test_a_plan_searches_in_few_kernels(query: int, tmp_path: Path) -> None:
    """TensorRT-RTX builds it, for an A100; docs/engines.md tells the numbers."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'")
    trt = trt_module.load(trt_module.RTX)
    case = random_case(tmp_path, replace(SMALL, vocab_size=VOCAB))
    counts = {}
    for name in TAILS[1:]:
        _, kernels, _ = case.build(trt, query=query, images=(1, 4), sampling=name)
        counts[name] = [profile.total for profile in kernels]
    assert [exact - topk for exact, topk in zip(counts["exact"], counts["topk"], strict=True)] == [13, 13]
