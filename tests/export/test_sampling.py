"""The sampling tails, each as a graph of its own, token by token against the oracle's sampler."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from sampling_tails import session
from scipy import stats

from par_export.graphs.sampling import SamplingVariant
from par_model.generation import sample as oracle
from par_runtime.backends.tails import TOPK_LIMIT

VARIANTS: list[SamplingVariant] = ["dynamic", "topk", "exact"]
_sessions: dict[tuple[int, str], ort.InferenceSession] = {}


def tail(vocab: int, variant: SamplingVariant) -> ort.InferenceSession:
    if (vocab, variant) not in _sessions:
        _sessions[vocab, variant] = session(vocab, variant)
    return _sessions[vocab, variant]


def draw(
    vocab: int,
    variant: SamplingVariant,
    logits: np.ndarray,
    uniform: np.ndarray,
    temperature: object,
    top_k: object,
    top_p: object,
) -> np.ndarray:
    images = len(logits)
    feed = {
        "logits": logits,
        "uniform": uniform,
        "temperature": np.broadcast_to(np.float32(temperature), images).copy(),
        "top_k": np.broadcast_to(np.int64(top_k), images).copy(),
        "top_p": np.broadcast_to(np.float32(top_p), images).copy(),
    }
    tokens: np.ndarray = tail(vocab, variant).run(None, feed)[0]
    return tokens


def check(
    vocab: int,
    variant: SamplingVariant,
    logits: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    allowed: float = 0.0,
) -> None:
    uniform = np.random.default_rng(top_k).random(logits.shape[:2], dtype=np.float32)
    got = draw(vocab, variant, logits, uniform, temperature, top_k, top_p)
    wanted = oracle(torch.from_numpy(logits), torch.from_numpy(uniform), temperature, top_k, top_p).numpy()
    assert (got != wanted).mean() <= allowed, (vocab, variant, temperature, top_k, top_p)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vocab", [7, 512])
def test_every_top_k_and_top_p_small(vocab: int, variant: SamplingVariant) -> None:
    logits = np.random.default_rng(1).normal(size=(2, 40, vocab)).astype(np.float32) * 3
    for top_k in [0, 1, 2, 3, vocab // 2, vocab - 1, vocab, vocab + 5]:
        for top_p in [0.0, 1e-6, 0.3, 0.7, 0.95, 1.0]:
            check(vocab, variant, logits, 1.0, top_k, top_p)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_are_kept_as_the_oracle_keeps_them(variant: SamplingVariant) -> None:
    logits = np.random.default_rng(2).integers(-3, 3, (4, 30, 64)).astype(np.float32)
    for top_k in [1, 2, 5, 30, 63, 0]:
        for top_p in [0.23, 0.51, 0.93, 1.0]:  # no fraction that m of n equal codes could hit exactly
            check(64, variant, logits, 1.0, top_k, top_p)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("vocab", "ks"), [(16384, [0, 1, 50, 2000, 3840]), (64000, [0, 1, 500, 3840])])
def test_large_codebooks(vocab: int, ks: list[int], variant: SamplingVariant) -> None:
    logits = np.random.default_rng(3).normal(size=(1, 4, vocab)).astype(np.float32) * 2
    for top_k in ks:
        for top_p in [0.5, 0.92, 1.0]:
            if variant == "topk" and top_k == 0 and top_p < 1:
                continue  # this variant does not support it; see the next test
            # Sums of 64,000 terms in another order: a draw may fall on the other side of a boundary.
            check(vocab, variant, logits, 1.0, top_k, top_p, allowed=0.25 if vocab == 64000 else 0.0)


@pytest.mark.parametrize(
    ("variant", "top_k"), [("dynamic", 8000), ("exact", 8000), ("exact", 16000), ("dynamic", 16383)]
)
def test_top_k_beyond_the_sort_limit(variant: SamplingVariant, top_k: int) -> None:
    assert top_k > TOPK_LIMIT
    logits = np.random.default_rng(4).normal(size=(1, 6, 16384)).astype(np.float32)
    check(16384, variant, logits, 1.0, top_k, 1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_one_batch_keep_their_own_settings(variant: SamplingVariant) -> None:
    logits = np.random.default_rng(5).normal(size=(4, 9, 100)).astype(np.float32) * 2
    uniform = np.random.default_rng(6).random((4, 9), dtype=np.float32)
    ts, ks, ps = [1.0, 0.5, 2.0, 0.0], [0, 10, 1, 100], [0.5, 1.0, 1.0, 0.9]
    got = draw(100, variant, logits, uniform, ts, ks, ps)
    for i in range(4):
        wanted = oracle(torch.from_numpy(logits[i : i + 1]), torch.from_numpy(uniform[i : i + 1]), ts[i], ks[i], ps[i])
        assert (got[i] == wanted.numpy()[0]).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "row",
    [
        np.zeros(32),
        np.r_[100.0, np.full(31, -1e30)],
        np.full(32, -1e30),
        np.arange(32) * 1e-7,
        1e-20 * np.arange(32),
        np.r_[5.0, np.arange(31) * 1e-6],
        -np.arange(32.0) * 50,
    ],
)
def test_extreme_logits(variant: SamplingVariant, row: np.ndarray) -> None:
    logits = np.tile(row.astype(np.float32), (1, 50, 1))
    for top_k, top_p in [(0, 1.0), (5, 1.0), (0, 0.5), (31, 0.99), (1, 1.0), (3, 0.0)]:
        check(32, variant, logits, 1.0, top_k, top_p)


@pytest.mark.parametrize("variant", [*VARIANTS, "plain"])
def test_greedy_is_the_lowest_of_the_largest(variant: SamplingVariant) -> None:
    logits = np.random.default_rng(7).integers(0, 4, (3, 20, 50)).astype(np.float32)
    got = draw(50, variant, logits, np.zeros((3, 20), np.float32), 1.0, 1, 1.0)
    assert (got == logits.argmax(-1)).all()


def test_plain_draws_from_everything() -> None:
    logits = np.random.default_rng(8).normal(size=(2, 30, 200)).astype(np.float32)
    check(200, "plain", logits, 0.8, 0, 1.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (6, 1.0), (0, 0.7), (8, 0.8)])
def test_draws_follow_the_reference_distribution(variant: SamplingVariant, top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(9)
    row = rng.normal(size=24).astype(np.float32) * 1.5
    draws = 20000
    tokens = draw(24, variant, np.tile(row, (1, draws, 1)), rng.random((1, draws), dtype=np.float32), 1.0, top_k, top_p)
    # The reference sampler: torch softmax and multinomial over the filtered logits.
    x = torch.from_numpy(row).double()
    if top_k:
        x = torch.where(x < x.topk(top_k).values[-1], -torch.inf, x)
    ranked, order = x.sort(descending=True)
    over = ranked.softmax(-1).cumsum(-1) > top_p
    remove = torch.cat([torch.tensor([False]), over[:-1]])
    x[order[remove]] = -torch.inf
    p = x.softmax(-1).numpy()
    counts = np.bincount(tokens.reshape(-1), minlength=24)
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], p[p > 0] * draws).pvalue > 1e-3
