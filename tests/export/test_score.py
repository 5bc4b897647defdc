"""Scoring and editing: tokens are given instead of drawn; scores are compared with the oracle's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import golden_config, golden_weights
from par_model.transformer import PAR
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline


@pytest.fixture
def pipeline(tiny: Path) -> Pipeline:
    return Pipeline.load(tiny, device="cpu", selftest=False)


@torch.no_grad()
def test_the_score_is_the_oracles(bundles: dict[str, Path], golden: dict[str, dict[str, Any]]) -> None:
    pipeline = Pipeline.load(bundles["fp32"], device="cpu", selftest=False)
    model = golden_weights(PAR(golden_config(golden["par_n4_grid8"])))
    tokens = np.random.default_rng(0).integers(0, pipeline.bundle.vocab_size, (3, 64))
    labels = [1, 4, 9]
    logits = model(torch.from_numpy(tokens), torch.tensor(labels))
    wanted = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(tokens)[..., None])[..., 0].numpy()
    got = pipeline.score(tokens, labels)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    np.testing.assert_allclose(pipeline.score(tokens[1], 4), got[1:2], atol=1e-5)


def test_kept_tokens_stay_and_the_others_depend_on_them(pipeline: Pipeline) -> None:
    first = pipeline.generate([2, 3], seed=1)
    keep = np.zeros((8, 8), bool)
    keep[:, :4] = True  # the left half
    order = np.array(pipeline.bundle.order)
    left = keep.reshape(-1)[order]
    again = pipeline.generate([4, 5], seed=9, keep=keep, tokens=first.tokens)
    np.testing.assert_array_equal(again.tokens[:, left], first.tokens[:, left])
    assert (again.tokens[:, ~left] != first.tokens[:, ~left]).any()
    # Drawn tokens depend on kept ones: with the same noise, other tokens on the left give others on the right.
    other = pipeline.generate([4, 5], seed=9, keep=keep, tokens=first.tokens[::-1])
    assert (other.tokens[:, ~left] != again.tokens[:, ~left]).any()
    free = pipeline.generate([4, 5], seed=9, keep=~keep & keep, tokens=first.tokens)  # nothing kept
    np.testing.assert_array_equal(free.tokens, pipeline.generate([4, 5], seed=9).tokens)
    whole = pipeline.generate([4, 5], seed=9, keep=keep | ~keep, tokens=first.tokens)  # all kept
    np.testing.assert_array_equal(whole.tokens, first.tokens)
    np.testing.assert_array_equal(whole.images, first.images)


def test_a_mask_and_tokens_per_image_over_several_batches(pipeline: Pipeline) -> None:
    tokens = np.random.default_rng(1).integers(0, 64, (5, 64))
    keep = np.random.default_rng(2).random((5, 8, 8)) < 0.5
    order = np.array(pipeline.bundle.order)
    places = keep.reshape(5, -1)[:, order]
    whole = pipeline.generate([0, 1, 2, 3, 4], seed=3, keep=keep, tokens=tokens)
    split = pipeline.generate([0, 1, 2, 3, 4], seed=3, keep=keep, tokens=tokens, max_batch=2)
    np.testing.assert_array_equal(whole.tokens, split.tokens)
    np.testing.assert_array_equal(whole.tokens[places], tokens[places])


@pytest.mark.parametrize(
    ("keep", "tokens", "message"),
    [
        (None, np.zeros(64, int), "keep and tokens belong together"),
        (np.zeros((8, 8), bool), None, "keep and tokens belong together"),
        (np.zeros((8, 8)), np.zeros(64, int), r"keep has shape \(8, 8\) and type float64; expected bool"),
        (np.zeros((4, 8), bool), np.zeros(64, int), r"keep has shape \(4, 8\)"),
        (np.zeros((8, 8), bool), np.zeros(63, int), r"tokens have shape \(63,\).*expected integers \[64\] or \[1,64\]"),
        (np.zeros((8, 8), bool), np.zeros(64), r"tokens have shape \(64,\) and type float64"),
        (np.zeros((8, 8), bool), np.full(64, 64), r"tokens lie in 64..64; expected 0..63"),
        (np.zeros((8, 8), bool), [[1], [2, 3]], r"tokens: not an array, its rows have different lengths"),
        ([[True], [False, True]], np.zeros(64, int), r"keep: not an array, its rows have different lengths"),
        (np.zeros((3, 8, 8), bool), np.zeros(64, int), r"keep has shape \(3, 8, 8\).*or \(1, 8, 8\)"),
        (np.zeros(64, bool), np.zeros(64, int), r"keep has shape \(64,\) and type bool"),
        (
            np.zeros((8, 8), bool),
            np.zeros((2, 64), int),
            r"tokens have shape \(2, 64\).*expected integers \[64\] or \[1,64\]",
        ),
    ],
)
def test_masks_and_tokens_that_do_not_fit_are_refused(pipeline: Pipeline, keep: Any, tokens: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipeline.generate([0], seed=1, keep=keep, tokens=tokens)


def test_one_kept_token_changes_only_later_tokens(pipeline: Pipeline) -> None:
    free = pipeline.generate([2], seed=4)
    order = np.array(pipeline.bundle.order)
    for place in (0, 27, 63):
        keep = np.zeros(64, bool)
        keep[place] = True
        at = int(np.flatnonzero(order == place)[0])
        tokens = free.tokens.copy()
        tokens[0, at] = (tokens[0, at] + 1) % 64
        edited = pipeline.generate([2], seed=4, keep=keep.reshape(8, 8), tokens=tokens)
        assert edited.kept is not None
        assert edited.kept.sum() == 1
        assert edited.tokens[0, at] == tokens[0, at]
        np.testing.assert_array_equal(edited.tokens[0, :at], free.tokens[0, :at])
    # A kept token that equals the drawn one changes nothing: guided, greedy or with top-k.
    for settings in ({"guidance": 3.0}, {"greedy": True}, {"top_k": 5}):
        drawn = pipeline.generate([2], seed=4, **settings)  # type: ignore[arg-type]
        keep = np.eye(8, dtype=bool)
        again = pipeline.generate([2], seed=4, keep=keep, tokens=drawn.tokens, **settings)  # type: ignore[arg-type]
        np.testing.assert_array_equal(again.tokens, drawn.tokens)


def test_decode_refuses_other_arrays_than_integer_tokens(pipeline: Pipeline) -> None:
    for bad in (np.full((1, 64), 1.7), np.full((1, 64), np.nan), np.zeros(64, int), np.zeros((1, 63), int), [["x"]]):
        with pytest.raises(RequestError, match="tokens have shape"):
            pipeline.decode(bad)  # type: ignore[arg-type]
    assert pipeline.decode(np.zeros((0, 64), int)).shape == (0, 16, 16, 3)


@torch.no_grad()
@pytest.mark.parametrize(("name", "checkpoint"), [("n1", "ar_n1_grid8"), ("n16", "par_n16_grid8")])
def test_the_score_is_the_oracles_for_other_groups(
    bundles: dict[str, Path], checkpoints: dict[str, Path], name: str, checkpoint: str
) -> None:
    from par_model.checkpoint import open_checkpoint, par_config

    pipeline = Pipeline.load(bundles[name], device="cpu", selftest=False)
    file = open_checkpoint(checkpoints[checkpoint])
    model = PAR(par_config(file, heads=4, grid=(1, 8, 8))).eval()
    model.load_state_dict(dict(file.tensors))
    tokens = np.random.default_rng(0).integers(0, pipeline.bundle.vocab_size, (2, 64))
    logits = model(torch.from_numpy(tokens), torch.tensor([1, 4]))
    wanted = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(tokens)[..., None])[..., 0].numpy()
    np.testing.assert_allclose(pipeline.score(tokens, [1, 4]), wanted, atol=2e-4)


def test_a_score_of_tokens_that_do_not_fit_is_refused(pipeline: Pipeline) -> None:
    assert pipeline.score(np.zeros((0, 64), int), []).shape == (0, 64)
    with pytest.raises(RequestError, match=r"tokens: not an array"):
        pipeline.score([[1, 2], [3]], [0, 1])
    with pytest.raises(RequestError, match=r"label 99: this model has classes 0\.\.5"):
        pipeline.score(np.zeros(64, int), 99)
    with pytest.raises(RequestError, match=r"expected integers \[64\] or \[2,64\]"):
        pipeline.score(np.zeros((3, 64), int), [0, 1])
