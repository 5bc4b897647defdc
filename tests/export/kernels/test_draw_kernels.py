"""The sampler's kernels in the interpreter against ``draws.draw``, and against the distribution that they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import top_k_8000
from kernel_arrays import launch
from scipy import stats

from par_runtime.backends.draws import distance_of, draw, kept, probabilities, scaled

SMALL = [("resident", {}), ("looped", {"CHUNK": 32})]


def tokens_of(
    form: tuple[str, dict[str, Any]],
    logits: np.ndarray,
    uniform: np.ndarray,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    image: np.ndarray | None = None,
    quick: bool = True,
) -> np.ndarray:
    """The kernel's tokens [R, q] for logits [B, q, V]; a setting is one number, or one per image."""
    images, query, vocab = logits.shape
    image = np.arange(images) if image is None else image
    out = np.full((len(image), query), -1)
    settings = {
        "temperature": ("*fp32", np.full(images, temperature, np.float32)),
        "top_k": ("*i64", np.full(images, top_k, np.int64)),
        "top_p": ("*fp32", np.full(images, top_p, np.float32)),
    }
    arguments = {
        "logits": ("*fp32", np.ascontiguousarray(logits, np.float32)), "uniform": ("*fp32", uniform),
        **settings, "image": ("*i64", image.astype(np.int64)), "tokens": ("*i64", out), "ROWS": ("i32", len(image)),
    }  # fmt: skip
    constants = {"QUERY": query, "V": vocab, "DEPENDENT": True} | form[1]
    if form[0] == "resident":
        constants["WIDE"] = max(16, 1 << (vocab - 1).bit_length())
        constants["LINE"] = 1 << (constants["WIDE"].bit_length() // 2)
    launch(f"draw.{form[0]}", constants, (images * query,), arguments, quick=quick)
    return out


def check(
    form: tuple[str, dict[str, Any]],
    logits: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    quick: bool = True,
) -> None:
    """Every token is that of ``draws.draw``, or lies beside it by no more than sums in another order explain."""
    rng = np.random.default_rng(top_k)
    uniform = rng.random(logits.shape[:2], dtype=np.float32)
    uniform.reshape(-1)[:2] = np.float32(1) - np.float32(2) ** -24, 0
    got = tokens_of(form, logits, uniform, temperature, top_k, top_p, quick=quick)
    for row, u, token in zip(logits.reshape(-1, logits.shape[-1]), uniform.reshape(-1), got.reshape(-1), strict=True):
        wanted = draw(row, float(u), temperature, top_k, top_p)
        if token != wanted:
            distance, allowed = distance_of(row, row, int(token), float(u), temperature, top_k, top_p)
            assert distance is not None, (token, wanted, "was filtered out")
            assert distance <= allowed, (token, wanted, temperature, top_k, top_p)


@pytest.mark.parametrize("form", SMALL, ids=lambda form: form[0])
@pytest.mark.parametrize("vocab", [pytest.param(7, marks=pytest.mark.slow), 50])
def test_every_top_k_and_top_p(form: tuple[str, dict[str, Any]], vocab: int) -> None:
    logits = np.random.default_rng(1).normal(size=(1, 3, vocab)).astype(np.float32) * 3
    pairs = [
        (0, 0.0),
        (0, 0.5),
        (0, 1 - 2.0**-24),
        (0, 1.0),
        (1, 1.0),
        (1, 0.5),
        (2, 1.0),
        (vocab // 2, 0.8),
        (vocab - 1, 1.0),
        (vocab, 0.9),
        (vocab + 5, 1.0),
    ]
    if vocab > 7:
        pairs += [(k, p) for k in (1, 2, 25, 49, 50, 55) for p in (0.0, 1e-6, 0.3, 0.7, 0.95, 1.0)]
    for top_k, top_p in pairs:
        # Small ones in Triton's interpreter, the others in the stand-in GPU's language.
        check(form, logits, 0.7 if top_k == 2 else 1.0, top_k, top_p, quick=vocab > 7)


@pytest.mark.parametrize("form", SMALL, ids=lambda form: form[0])
def test_ties(form: tuple[str, dict[str, Any]]) -> None:
    """Many equal logits, zeros of both signs, one value only, and codes that weigh nothing."""
    rng = np.random.default_rng(2)
    steps = np.round(rng.normal(size=(4, 64)) * 2) / 2
    cases = np.stack(
        [steps[3], steps[0] * 0.0, np.where(np.arange(64) % 2, 0.0, -0.0), steps[1] - 5000, steps[2] * 200]
    )
    for top_k, top_p in ((0, 0.3), (5, 1.0), (30, 0.8), (0, 0.0), (0, 1.0)):
        check(form, cases[:, None].astype(np.float32), 1.0, top_k, top_p)


@pytest.mark.parametrize("form", SMALL, ids=lambda form: form[0])
def test_greedy_takes_the_lowest_of_the_largest(form: tuple[str, dict[str, Any]]) -> None:
    logits = np.zeros((1, 3, 50), np.float32)
    logits[0, 0, [7, 31]] = 2
    logits[0, 1, 49] = 1e-3
    logits[0, 2] = -1e30
    got = tokens_of(form, logits, np.zeros((1, 3), np.float32), top_k=1)
    assert got.tolist() == [[7, 49, 0]]
    logits = np.full((1, 1, 50), -1, np.float32)
    logits[0, 0, [3, 7]] = -1e-45, 0  # over the temperature, a zero below zero: they tie
    got = tokens_of(form, logits, np.zeros((1, 1), np.float32), temperature=10, top_k=1, quick=False)
    assert got[0, 0] == 3 == draw(logits[0, 0], 0.0, 10, 1, 1.0)


@pytest.mark.parametrize("form", SMALL, ids=lambda form: form[0])
def test_tokens_reach_every_row_of_their_image(form: tuple[str, dict[str, Any]]) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(3, 4, 64)).astype(np.float32)
    uniform = rng.random((3, 4), dtype=np.float32)
    settings: dict[str, Any] = {"temperature": [0.5, 1.0, 2.0], "top_k": [0, 3, 20], "top_p": [0.9, 1.0, 0.5]}
    image = np.array([2, 0, 1, 1, 0, 2] + [1] * 40)
    got = tokens_of(form, logits, uniform, image=image, **settings)
    for row, b in enumerate(image):
        for j in range(4):
            of = [settings[name][b] for name in ("temperature", "top_k", "top_p")]
            assert got[row, j] == draw(logits[b, j], float(uniform[b, j]), *of)


@pytest.mark.parametrize(
    ("vocab", "top_k", "top_p"),
    [
        (64, 0, 1.0),
        pytest.param(1024, 0, 1.0, marks=pytest.mark.slow),
        pytest.param(256, 30, 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_distribution_is_the_promised_one(vocab: int, top_k: int, top_p: float) -> None:
    """A chi-square test of the draws of one row of logits."""
    logits = np.random.default_rng(4).normal(size=vocab).astype(np.float32)
    count = 2000
    uniform = np.random.default_rng(5).random((1, count), dtype=np.float32)
    got = tokens_of(
        ("resident", {}), np.broadcast_to(logits, (1, count, vocab)), uniform, 1.0, top_k, top_p
    )  # fmt: skip
    keep = kept(scaled(logits, 1.0), top_k, top_p)
    assert keep[got].all()
    expected = probabilities(logits, keep) * count
    seen = np.bincount(got.reshape(-1), minlength=vocab)
    rare = expected < 5  # are counted together
    observed = np.append(seen[~rare], seen[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize(
    ("form", "vocab", "top_k", "top_p"),
    [
        (("resident", {}), 16384, 0, 1.0),
        (("resident", {}), 16384, 2000, 0.9),
        (("looped", {"CHUNK": 16384}), 64000, 8000, 0.97),
    ],
)
def test_large_codebooks(form: tuple[str, dict[str, Any]], vocab: int, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(6).normal(size=(1, 2, vocab)).astype(np.float32) * 2
    check(form, logits, 1.0, top_k, top_p)


@pytest.mark.slow
def test_top_k_8000_of_64000_is_distributed_as_promised() -> None:
    form = ("looped", {"CHUNK": 16384})
    top_k_8000.check(lambda x, u: tokens_of(form, x[None], u[None], 1.0, 8000, 1.0), 300, 100)


@pytest.mark.parametrize("form", [("resident", {}), ("looped", {"CHUNK": 8192})], ids=lambda form: form[0])
def test_the_edge_of_top_k_is_exact(form: tuple[str, dict[str, Any]]) -> None:
    """The first and the last code that the ends of the CDF draw are those of the 8000 largest."""
    vocab, k = 16384, 8000
    order = np.random.default_rng(7).permutation(vocab)
    logits = np.zeros(vocab, np.float32)
    logits[order] = np.linspace(1, -1, vocab, dtype=np.float32)
    keep = kept(scaled(logits, 1.0), k, 1.0)
    assert keep.sum() == k
    ids = np.flatnonzero(keep)
    uniform = np.array([[0, np.float32(1) - np.float32(2) ** -24]], np.float32)
    got = tokens_of(form, np.broadcast_to(logits, (1, 2, vocab)), uniform, top_k=k)
    assert got.tolist() == [[ids[0], ids[-1]]]
