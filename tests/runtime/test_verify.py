"""``parvis verify``: two sound backends agree, and every kind of sabotage is told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from par_runtime import verify
from par_runtime.backends.base import Batch
from par_runtime.backends.draws import distance_of, draw
from par_runtime.dtypes import Float, Int
from par_runtime.pipeline import Pipeline
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule, uniforms
from par_runtime.verify import FLOORS, Report, Trial, as_json, load, run, table

LABELS = [0, 2, 4, 5]


class Sabotaged:
    """A backend that does everything as the true one, but for what a subclass changes."""

    def __init__(self, backend: Any) -> None:
        self.true = backend
        # No CPU backend of ours: it is held to the precision that it states.
        self.info = replace(backend.info, runtime="sabotaged", computes="fp16")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.true, name)


@pytest.fixture(scope="module")
def pair(tiny: Path) -> tuple[Pipeline, Pipeline]:
    """Candidate and reference: both step graphs on the CPU."""
    return load(tiny, "cpu", 1, "none"), load(tiny, "cpu-opset23", 1, "none")


def trial(pipeline: Pipeline, images: int = 4, **kwargs: Any) -> Trial:
    return Trial(LABELS[:images], image_settings(pipeline.bundle, images, **kwargs), list(range(images)), images)


def report(
    pair: tuple[Pipeline, Pipeline], sabotage: Any = None, floors: dict[str, float] | None = None, **kwargs: Any
) -> Report:
    candidate, reference = pair
    if sabotage is not None:
        candidate = Pipeline(candidate.bundle, sabotage(candidate.backend))
    return run(candidate, reference, trial(reference, **kwargs), overrides=floors)


def failed(r: Report) -> list[str]:
    return [check.name for check in r.checks if not check.passed]


UNEXPLAINED = ["tokens that rounding does not explain"]

# -- sound backends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"guidance": 3.0, "top_p": 0.9, "top_k": 30}, {"greedy": True}])
def test_two_step_graphs_agree(pair: tuple[Pipeline, Pipeline], kwargs: dict[str, Any]) -> None:
    r = report(pair, **kwargs)
    assert r.passed
    assert r.reference.backend.info.name == f"{r.candidate.backend.info.name} (step_opset23)"
    assert str(r.reference.backend._step._model_path).endswith("step_opset23.onnx")  # type: ignore[attr-defined]
    assert r.floors == FLOORS["fp32"]  # the bundle is fp16, what computes here is not
    assert [(p.phase, p.calls, p.positions) for p in r.logits] == [
        ("prefill", 1, 4),
        ("sequential", 3, 12),
        ("transition", 1, 16),
        ("group", 14, 224),
    ]
    assert all(p.relative_error < 1e-5 < p.scale and p.kl < 1e-9 for p in r.logits)
    assert (r.tokens.tokens, r.tokens.identical_images) == (256, 4)
    assert r.images is not None
    assert r.images.max_difference <= 1  # of 255: the candidate decodes in C, where it can


def test_batches_change_nothing(pair: tuple[Pipeline, Pipeline]) -> None:
    candidate, reference = pair
    whole = trial(reference, top_p=0.8)
    parts = [verify.compare_logits(candidate, reference, replace(whole, batch=size)) for size in (4, 3)]
    assert [p.positions for p in parts[0]] == [p.positions for p in parts[1]]
    assert [p.scale for p in parts[0]] == pytest.approx([p.scale for p in parts[1]], rel=1e-5)


def test_the_numpy_sampler_draws_what_the_graphs_drew(pair: tuple[Pipeline, Pipeline]) -> None:
    _, reference = pair
    classes = list(range(6)) * 3
    greedy = [False] * 17 + [True]
    each = image_settings(
        reference.bundle,
        18,
        guidance=[1.0, 3.0, 1.5] * 6,
        temperature=[1.0, 0.5, 2.0, 1.0, 0.0, 1.0] * 3,
        top_k=[0, 5, 64, 20, 0, 1, 0, 63, 2] * 2,
        top_p=[1.0, 1.0, 1.0, 0.9, 0.5, 0.0] * 3,
        greedy=greedy,
    )
    tokens = np.zeros((18, 64), np.int64)
    schedule = Schedule.of(reference.bundle, classes, each, range(18))
    noise = schedule.noise
    for call, batch, ids, at in schedule.walk(tokens):
        write = call.write
        logits = reference.backend.logits(batch, ids, at)
        tokens[:, call.positions] = reference.backend.step(batch, ids, at, noise[:, call.positions])
        for b, s in enumerate(each):
            t, k, p = (1.0, 1, 1.0) if s.greedy else (s.temperature, s.top_k, s.top_p)
            for j in range(call.query):
                u, token = float(noise[b, write + j]), int(tokens[b, write + j])
                assert draw(logits[b, j], u, t, k, p) == token, (b, write + j)
                assert distance_of(logits[b, j], logits[b, j], token, u, t, k, p)[0] == pytest.approx(0, abs=1e-6)


def test_distance_is_from_the_candidates_token_in_the_references_cdf() -> None:
    even = np.zeros(4, np.float32)
    assert distance_of(even, even, 2, 0.4, 1.0, 0, 1.0) == pytest.approx((0.1, 2.0**-21))
    assert distance_of(even, even, 0, 0.4, 1.0, 0, 1.0) == pytest.approx((0.15, 2.0**-21))
    # Half of the codes up by h and half down moves their boundary by tanh(h)/2: a little less than the worst case.
    other = np.array([0.05, 0.05, -0.05, -0.05], np.float32)
    moved = math.tanh(0.05) / 2
    distance, explained = distance_of(even, other, 1, 0.5 + moved, 1.0, 0, 1.0)
    assert distance == pytest.approx(moved)
    assert moved < explained < 1.001 * moved
    # Filtered by both: out of reach. Kept by the candidate alone: its filter is what differs, not its draw.
    peaked = np.array([2.0, 1.0, 0.999, -9.0], np.float32)
    assert distance_of(peaked, peaked, 2, 0.99, 1.0, 2, 1.0)[0] is None
    swapped = np.array([2.0, 1.0, 1.001, -9.0], np.float32)
    assert distance_of(peaked, swapped, 2, 0.99, 1.0, 2, 1.0)[0] == 0


# -- near-ties: other tokens, and no failure --------------------------------------------------------------------------


def noisy(size: float) -> type[Sabotaged]:
    """A backend that rounds more roughly: its logits are off by up to ``size``, and it draws from those."""

    class Noisy(Sabotaged):
        def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
            logits: Float = self.true.logits(batch, ids, write)
            for b in range(len(logits)):  # by image and position, whatever the batch
                logits[b] += (
                    np.random.default_rng([write[b], b]).uniform(-size, size, logits[b].shape).astype(np.float32)
                )
            return logits

        def step(self, s: Batch, ids: Int, write: Int, uniform: Float) -> Int:
            logits = self.logits(s, ids, write)
            drawn = [
                [
                    draw(row, float(u), float(s.temperature[b]), int(s.top_k[b]), float(s.top_p[b]))
                    for row, u in zip(logits[b], uniform[b], strict=True)
                ]
                for b in range(s.images)
            ]
            return np.array(drawn)

    return Noisy


@pytest.mark.parametrize(
    "kwargs", [{}, {"guidance": 3.0, "top_p": 0.7}, {"top_k": 3, "top_p": 0.95}, {"temperature": 0.3}, {"greedy": True}]
)
def test_rounding_makes_near_ties_and_no_failure(pair: tuple[Pipeline, Pipeline], kwargs: dict[str, Any]) -> None:
    r = report(pair, noisy(0.05), floors={"tie": 0.05}, **kwargs)
    assert r.floors_of == "fp16"  # the sabotaged one is no CPU backend: the bundle's precision
    assert failed(r) == []
    assert r.tokens.equal < r.tokens.tokens
    assert r.tokens.divergences
    for d in r.tokens.divergences:
        assert d.near_tie
        assert d.distance is not None
        assert 0 <= d.distance <= d.explained < 0.2
        assert d.logit_error < 0.02
    assert "a near-tie, decided by rounding" in table(r)


def test_divergences_are_named_by_image_in_every_batch(pair: tuple[Pipeline, Pipeline]) -> None:
    candidate, reference = pair
    flipped = 63 - int(reference.generate([2], seeds=[1]).tokens[0, 9])
    other = Pipeline(candidate.bundle, forced({0: flipped}, position=9)(candidate.backend))
    r = run(other, reference, replace(trial(reference), batch=1))  # so it is the first image of each batch
    assert [(d.image, d.label, d.seed) for d in r.tokens.divergences if d.position == 9][-1] == (3, 5, 3)
    assert all((d.label, d.seed) == (LABELS[d.image], d.image) for d in r.tokens.divergences)


def forced(token_by_image: dict[int, int], position: int = 0) -> type[Sabotaged]:
    """A backend that gives other tokens at one position of some images, with the true logits."""

    class Forced(Sabotaged):
        def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
            tokens: Int = self.true.step(batch, ids, write, uniform)
            if write[0] <= position < write[0] + ids.shape[1]:
                for image, token in token_by_image.items():
                    tokens[image, position - write[0]] = token
            return tokens

    return Forced


@pytest.mark.parametrize(("away", "tie"), [(1e-7, True), (1e-3, False)])
def test_a_draw_on_a_boundary_is_a_near_tie_and_beside_it_is_not(
    pair: tuple[Pipeline, Pipeline], monkeypatch: pytest.MonkeyPatch, away: float, tie: bool
) -> None:
    _, reference = pair
    t = trial(reference, 2)
    schedule = Schedule.of(reference.bundle, t.classes, t.settings)
    _, batch, ids, write = next(schedule.walk(np.zeros((2, 64), np.int64)))
    logits = reference.backend.logits(batch, ids, write)[1, 0].astype(np.float64)
    cdf = np.cumsum(np.exp(logits - logits.max()))
    cdf /= cdf[-1]
    token = int(np.diff(cdf).argmax())  # its right neighbour's share is the largest

    def on_the_boundary(seed: int, count: int) -> Float:
        noise = uniforms(seed, count)
        noise[0] = cdf[token] + away if seed == 1 else noise[0]
        return noise

    monkeypatch.setattr("par_runtime.schedule.uniforms", on_the_boundary)
    r = report(pair, forced({1: token}), images=2)
    assert failed(r) == ([] if tie else UNEXPLAINED)
    assert r.tokens.identical_images == 1
    (d,) = r.tokens.divergences
    assert (d.image, d.label, d.seed, d.phase, d.position) == (1, 2, 1, "prefill", 0)
    assert (d.reference_token, d.candidate_token, d.near_tie) == (token + 1, token, tie)
    assert d.distance == pytest.approx(away, rel=0.3)
    assert d.logit_gap == pytest.approx(logits[token + 1] - logits[token], rel=1e-5)
    assert ("a near-tie" in table(r)) == tie


# -- sabotage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "phase"), [(0, 0, "prefill"), (3, 3, "sequential"), (4, 4, "transition"), (60, 60, "group")]
)
def test_one_wrong_logit_is_told_by_its_phase(
    pair: tuple[Pipeline, Pipeline], first: int, last: int, phase: str
) -> None:
    class OneWrong(Sabotaged):
        def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
            logits: Float = self.true.logits(batch, ids, write)
            if first <= write[0] <= last:
                logits[-1, -1, 7] += 0.5
            return logits

    r = report(pair, OneWrong, floors={"kl": 1.0})
    assert failed(r) == [f"relative logit error of {phase}"]
    assert next(p for p in r.logits if p.phase == phase).max_error == pytest.approx(0.5, abs=1e-3)


def test_small_errors_everywhere_are_told_by_the_divergence(pair: tuple[Pipeline, Pipeline]) -> None:
    r = report(pair, noisy(0.3), floors={"kl": 1e-3, "tie": 1.0})
    assert failed(r) == [f"KL divergence of {p} (nats)" for p in ("prefill", "sequential", "transition", "group")]
    assert r.logits[-1].kl == pytest.approx(0.3**2 / 6, rel=0.5)  # half the variance


def test_other_most_probable_codes_are_told(pair: tuple[Pipeline, Pipeline]) -> None:
    class Reversed(Sabotaged):
        def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
            logits: Float = self.true.logits(batch, ids, write)
            return logits[..., ::-1]

    r = report(pair, Reversed, floors={"kl": 100.0, "logits": 100.0})
    assert failed(r) == ["argmax agreement"]


def test_a_token_with_a_large_margin_fails(pair: tuple[Pipeline, Pipeline]) -> None:
    wanted = report(pair).reference.generate(LABELS, seeds=[0, 1, 2, 3]).tokens
    r = report(pair, forced({2: int(wanted[2, 41]) ^ 32}, position=41))
    assert failed(r) == UNEXPLAINED
    (d,) = r.tokens.divergences
    assert (d.image, d.phase, d.position, d.near_tie) == (2, "group", 41, False)
    assert d.distance is not None
    assert d.distance > d.explained
    assert "a real disagreement: the logits do not explain this draw" in table(r)
    assert table(r).splitlines()[-1].startswith("verify: FAIL, 1 of 11 checks: sabotaged 1.")


def test_a_token_that_is_none_fails(pair: tuple[Pipeline, Pipeline]) -> None:
    r = report(pair, forced({0: 64, 3: -1}, position=63))
    assert failed(r) == UNEXPLAINED
    assert [d.verdict for d in r.tokens.divergences] == ["a real disagreement: codes are 0..63"] * 2


@pytest.mark.parametrize(("field", "value"), [("top_p", 1.0), ("top_k", 0), ("temperature", 1.3), ("uniform", 0.5)])
def test_a_sampler_that_ignores_what_was_asked_fails(pair: tuple[Pipeline, Pipeline], field: str, value: float) -> None:
    class Deaf(Sabotaged):
        def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
            if field == "uniform":
                uniform = np.full_like(uniform, value)
            else:
                batch = replace(batch, **{field: np.full_like(getattr(batch, field), value)})
            tokens: Int = self.true.step(batch, ids, write, uniform)
            return tokens

    assert failed(report(pair, Deaf, top_p=0.6, top_k=12)) == UNEXPLAINED


def test_wrong_logits_explain_no_token(pair: tuple[Pipeline, Pipeline]) -> None:
    """Tokens may follow from the candidate's logits; if those are off, that is no excuse."""
    r = report(pair, noisy(1.0), floors={"kl": 10.0, "argmax": 0.0, "tie": 1.0})
    assert failed(r)[-1:] == UNEXPLAINED
    assert {d.verdict for d in r.tokens.divergences} == {
        "a real disagreement: the logits of this call differ by more than rounding"
    }
    assert failed(report(pair, noisy(0.3), floors={"kl": 10.0, "tie": 1e-4})) == UNEXPLAINED


@pytest.mark.parametrize(("off", "psnr", "passes"), [(1, 48.1, True), (4, 36.1, False)])
def test_wrong_images_are_told_by_their_psnr(
    pair: tuple[Pipeline, Pipeline], off: int, psnr: float, passes: bool
) -> None:
    class Darker(Sabotaged):
        def decode(self, tokens: Int) -> np.ndarray:
            images: np.ndarray = self.true.decode(tokens).copy()
            images[-1] ^= off  # one image of the four
            return images

    r = report(pair, Darker)
    assert failed(r) == ([] if passes else ["PSNR of the worst image"])
    assert r.images is not None
    assert r.images.identical_images == 3
    assert r.images.max_difference == off
    assert r.images.psnr == pytest.approx(psnr, abs=0.1)
    assert f"3 of 4 identical; the worst has {psnr} dB" in table(r)


def test_nan_fails_and_its_json_is_valid(pair: tuple[Pipeline, Pipeline]) -> None:
    class Broken(Sabotaged):
        def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
            logits: Float = self.true.logits(batch, ids, write)
            logits[0, 0, 5] = np.nan
            return logits

    class BrokenAndOther(Broken, forced({0: 9}, position=20)):  # type: ignore[misc]
        pass

    r = report(pair, BrokenAndOther, floors={"logits": 1e9, "kl": 1e9, "argmax": 0.0, "tie": 1.0})
    assert len(failed(r)) == 9  # every phase twice, and the token
    assert not r.passed
    assert r.tokens.divergences[0].verdict.endswith("the logits of this call differ by more than rounding")
    text = json.dumps(as_json(r), allow_nan=False)
    assert json.loads(text)["logits"][0]["max_error"] is None


def test_an_engine_is_held_to_its_own_precision(pair: tuple[Pipeline, Pipeline]) -> None:
    class Engine(Sabotaged):
        def __init__(self, backend: Any) -> None:
            super().__init__(backend)
            self.info = replace(self.info, computes="bf16")

    assert pair[0].bundle.precision == "fp16"
    assert report(pair, Engine).floors == FLOORS["bf16"]
