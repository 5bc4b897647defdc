"""Cached generation against teacher forcing, and the sampler against slow definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import GOLDEN, golden_weights
from par_model.config import PARConfig
from par_model.generation import generate, sample, uniforms
from par_model.transformer import PAR

CONFIGS = {
    "n1": PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=50, n_classes=5, grid=(1, 4, 4), group_size=1),
    "n4": PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=50, n_classes=5, grid=(1, 6, 8), group_size=4),
    "n16": PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=50, n_classes=5, grid=(1, 8, 8), group_size=16),
    "head100": PARConfig(dim=200, n_layers=1, n_heads=2, vocab_size=50, n_classes=5, grid=(1, 4, 4), group_size=4),
    "video": PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=50, n_classes=5, grid=(2, 4, 4), group_size=4),
    "raster": PARConfig(
        dim=32, n_layers=2, n_heads=2, vocab_size=50, n_classes=5, grid=(1, 4, 4), group_size=4, order="raster"
    ),
    "parallel start": PARConfig(
        dim=32,
        n_layers=2,
        n_heads=2,
        vocab_size=50,
        n_classes=5,
        grid=(1, 4, 4),
        group_size=4,
        sequential_initial=False,
    ),
    "causal groups": PARConfig(
        dim=32, n_layers=2, n_heads=2, vocab_size=50, n_classes=5, grid=(1, 4, 4), group_size=4, causal_groups=True
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cached_generation_is_teacher_forcing_one_phase_at_a_time(name: str) -> None:
    config = CONFIGS[name]
    model = golden_weights(PAR(config))
    labels = torch.tensor([0, 4])
    tokens = generate(model, labels, guidance=2.0, greedy=True)
    cond, uncond = model(tokens, labels), model(tokens, torch.full_like(labels, config.n_classes))
    logits = uncond + (cond - uncond) * 2.0
    assert (logits.argmax(-1) == tokens).all()
    assert tokens.shape == (2, config.n_tokens)
    assert len(tokens.unique()) > 5  # a constant image would agree with anything


@pytest.mark.parametrize(
    ("name", "interval", "guided"),
    [
        ("n1", 0, {0, 1}),
        ("n1", 2, {0, 1, 2, 3}),
        ("n4", 0, {0, 1, 4, 5, 6, 7}),  # the prefill, the first sequential call, the transition
        ("n4", 1, {0, 1, 2, *range(4, 12)}),
        ("n4", 2, {0, 1, 2, 3, *range(4, 16)}),
        ("n16", 1, {0, 1, 2, *range(16, 48)}),
        ("parallel start", 1, set(range(8))),
        ("n4", -1, set(range(48))),
        ("n4", 10, set(range(48))),  # the index of the last call
        ("n4", 9, set(range(44))),
    ],
)
@torch.no_grad()
def test_the_positions_that_a_guidance_interval_guides(name: str, interval: int, guided: set[int]) -> None:
    config = CONFIGS[name]
    model = golden_weights(PAR(config))
    labels = torch.tensor([0, 4])
    tokens = generate(model, labels, guidance=5.0, greedy=True, guidance_interval=interval)
    cond, uncond = model(tokens, labels), model(tokens, torch.full_like(labels, config.n_classes))
    inside = torch.tensor([position in guided for position in range(config.n_tokens)])[None, :, None]
    both = uncond + (cond - uncond) * 5.0
    assert (torch.where(inside, both, cond).argmax(-1) == tokens).all()
    if len(guided) < config.n_tokens:
        assert (both.argmax(-1) != tokens).any()


@torch.no_grad()
def test_an_image_depends_on_its_own_seed_only() -> None:
    model = golden_weights(PAR(CONFIGS["n4"]))
    batch = generate(model, [1, 2, 3], guidance=1.5, seed=7)
    for i, label in enumerate([1, 2, 3]):
        assert (generate(model, [label], guidance=1.5, seed=7 + i) == batch[i : i + 1]).all()
    assert (generate(model, [3, 1], guidance=1.5, seed=[9, 7]) == batch[[2, 0]]).all()


def test_generation_refuses_what_it_cannot_do() -> None:
    model = PAR(CONFIGS["n4"])
    for bad, text in [
        ({"labels": [6]}, "expected 0..4, or 5 for no class"),
        ({"labels": [0], "seed": [1, 2]}, "2 seeds for 1 labels"),
        ({"labels": [0], "top_p": 1.5}, "top_p=1.5"),
        ({"labels": [0], "seed": -1}, "seed=-1"),
        ({"labels": [0], "guidance_interval": -2}, "guidance_interval=-2; expected -1"),
    ]:
        with pytest.raises(ValueError, match=text):
            generate(model, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected \[B,48\]"):
        model(torch.zeros(1, 47, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_noise_is_the_golden_noise() -> None:
    golden = json.loads((GOLDEN / "noise.json").read_text())
    for seed, numerators in golden["times_2**24"].items():
        numbers = uniforms(int(seed), 64)
        assert (numbers[: len(numerators)] * 2**24).tolist() == numerators
        assert numbers.dtype == np.float32
    assert uniforms(3, 5000).max() < 1
    assert uniforms(3, 5000).min() >= 0


def slow_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Temperature, top-k and top-p as ``par_model.generation.sample`` documents them, for one position, in fp64."""
    x = logits.astype(np.float64) / max(temperature, 1e-5)
    kept = np.ones(len(x), bool)
    if 0 < top_k < len(x):
        kept = x >= np.sort(x)[-top_k]
    p = np.where(kept, np.exp(x - x.max()), 0)
    p /= p.sum()
    if top_p < 1:
        before, stay = 0.0, np.zeros(len(x), bool)
        for i in np.lexsort((np.arange(len(x)), -p)):
            stay[i] = before <= top_p or not stay.any()
            before += p[i]
        p = np.where(stay, p, 0)
        p /= p.sum()
    return p


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.7, 0, 1), (1, 5, 1), (1, 0, 0.6), (1.3, 8, 0.8)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20).astype(np.float32) * 2
    p = slow_distribution(logits, temperature, top_k, top_p)
    draws = 20000
    u = torch.from_numpy(rng.random((draws, 1), dtype=np.float32))
    tokens = sample(torch.from_numpy(logits).expand(draws, 1, 20), u, temperature, top_k, top_p)
    counts = np.bincount(tokens.flatten(), minlength=20)
    assert counts[p == 0].sum() == 0
    kept = p > 0
    assert stats.chisquare(counts[kept], p[kept] * draws).pvalue > 1e-3


def test_ties_with_the_kth_are_kept_and_the_first_over_the_threshold_too() -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, 2.0, 2.0, 0.0]]])
    u = torch.linspace(0, 0.999, 500).view(-1, 1)
    assert set(sample(logits.expand(500, 1, 6), u, 1.0, 3, 1.0).flatten().tolist()) == {1, 2, 3, 4}
    p = logits.flatten().softmax(0)  # 1 and 2 each about 0.34; 0.5 is passed by the second of them
    assert set(sample(logits.expand(500, 1, 6), u, 1.0, 0, 0.5).flatten().tolist()) == {1, 2}
    assert float(p[1]) < 0.5 < float(p[1] + p[2])
    assert set(sample(logits.expand(500, 1, 6), u, 1.0, 0, 0.0).flatten().tolist()) == {1}


def test_greedy_is_top_k_one() -> None:
    logits = torch.randn(1, 6, 30, generator=torch.Generator().manual_seed(1))
    assert (sample(logits, torch.rand(1, 6), 1.0, 1, 1.0) == logits.argmax(-1)).all()
