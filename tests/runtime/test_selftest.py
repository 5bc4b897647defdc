"""The self-test of a bundle: what it compares, what it forgives, how long it takes, and when it can be left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from par_runtime import BundleError, Pipeline
from par_runtime.backends.base import Batch
from par_runtime.bundle import seal
from par_runtime.dtypes import Float, Int
from par_runtime.selftest import LOAD_SECONDS, SelftestError


def test_a_failed_selftest_is_told_with_the_first_position(tiny: Path) -> None:
    pipeline = Pipeline.load(tiny)
    good = pipeline.bundle
    wrong = json.loads(json.dumps(dict(good.selftest)))
    wrong["tokens"][0][13] ^= 1
    pipeline.bundle = replace(good, selftest=wrong)
    with pytest.raises(BundleError, match=r"self-test failed .* at position 13"):
        pipeline.selftest()
    pipeline.selftest(seconds=0)  # ends after every phase ran once, at position 11
    wrong["tokens"][0][9] ^= 1
    with pytest.raises(BundleError, match=r"self-test failed .* at position 9"):
        pipeline.selftest(seconds=0)


def test_a_load_tests_for_a_second_and_every_phase_at_least(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a first image waits for it; ``Pipeline.selftest`` and ``parvis verify`` take longer."""
    given: list[float] = []
    whole = Pipeline.selftest
    monkeypatch.setattr(Pipeline, "selftest", lambda self, seconds: (given.append(seconds), whole(self, seconds)))
    Pipeline.load(tiny_copy)
    assert given == [LOAD_SECONDS] == [1.0]
    monkeypatch.undo()
    monkeypatch.setattr("par_runtime.pipeline.LOAD_SECONDS", 0.0)
    manifest = json.loads((tiny_copy / "manifest.json").read_text())
    for place, refused in ((13, False), (9, True)):  # every phase has run at position 11
        manifest["selftest"]["tokens"][0][place] ^= 1
        (tiny_copy / "manifest.json").write_text(json.dumps(seal(manifest)))
        if refused:
            with pytest.raises(BundleError, match=rf"self-test failed .* at position {place}"):
                Pipeline.load(tiny_copy)
        else:
            Pipeline.load(tiny_copy)


def test_the_selftest_forgives_a_tie_and_nothing_else(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(tiny)
    step = pipeline.backend.step

    def other(batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        tokens = step(batch, ids, write, uniform)
        if write[0] == 8:
            tokens[:, 2] ^= 1
        return tokens

    monkeypatch.setattr(pipeline.backend, "step", other)
    with pytest.raises(BundleError, match=r"self-test failed .* at position 10"):
        pipeline.selftest()
    monkeypatch.setattr(pipeline.backend, "tie", 10.0)  # now every code ties with every other
    pipeline.selftest()


def test_the_selftest_refuses_a_backend_that_computes_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All zero, every candidate ties with every other."""
    pipeline = Pipeline.load(tiny)
    step, logits = pipeline.backend.step, pipeline.backend.logits
    monkeypatch.setattr(pipeline.backend, "step", lambda *a: np.zeros_like(step(*a)))
    monkeypatch.setattr(pipeline.backend, "logits", lambda *a: np.zeros_like(logits(*a)))
    with pytest.raises(BundleError, match=r"self-test failed"):
        pipeline.selftest()


@pytest.mark.parametrize(
    ("raised", "end"),
    [
        (
            SelftestError("a: self-test failed"),
            "a: self-test failed; selftest=False (--no-selftest) loads it regardless",
        ),
        (BundleError("a: cannot be read"), "a: cannot be read"),  # which leaving the self-test out would not change
    ],
)
def test_only_a_self_test_that_fails_can_be_left_out(
    raised: BundleError, end: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object) -> None:
        raise raised

    monkeypatch.setattr("par_runtime.pipeline.check_selftest", check)
    with pytest.raises(BundleError) as caught:
        Pipeline.load(tiny, device="cpu-ort")
    assert str(caught.value) == end
    Pipeline.load(tiny, device="cpu-ort", selftest=False).close()
