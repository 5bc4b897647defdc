"""Random schedules of images that come and go on one backend; each must get the tokens and logits that it gets alone.

Seeded: every run makes the same schedule. In each round a random subset of the images makes its next call, in a random
order, with its keys in random rows of the cache. Between the calls: logits of a next or an earlier call, images are
decoded or given up, rows are released, or used again without a release, whole requests when no image is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from double.fixtures import Make
from test_schedule import BACKENDS, EACH_BACKEND

from par_runtime.backends.base import Batch
from par_runtime.bundle import Call
from par_runtime.dtypes import Float, Int
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule

KINDS = (
    (0, Settings(), 1),
    (3, Settings(guidance=1.5), 2),
    (5, Settings(guidance=3.0, top_k=20, top_p=0.9), 3),
    (1, Settings(top_p=0.8, temperature=1.3), 4),
    (2, Settings(guidance=2.0, greedy=True), 5),
    (4, Settings(guidance=0.0, top_k=5), 6),
    (0, Settings(guidance=2.5, guidance_interval=1), 7),
)  #: (label, settings, seed)
ROUNDS = 150
GROW = 15  #: rounds after which more rows are used: twice as many, while images are in flight
IMAGES, ROWS = 4, 8  #: most images in a call, and cache rows: what the stand-in engines have
TOLERANCE = 1e-4  #: of logits, relative to the largest


@dataclass(frozen=True)
class Alone:
    """An image made in a batch of its own."""

    tokens: Int  #: [N]
    logits: tuple[Float, ...]  #: [q,V] of each call
    pixels: np.ndarray | None


@cache
def made_alone(path: Path) -> tuple[Alone, ...]:
    """Every kind of image, made alone on ONNX Runtime's CPU provider."""
    out = []
    with Pipeline.load(path, device="cpu-ort", threads=1, selftest=False) as pipeline:
        for label, settings, seed in KINDS:
            made = pipeline.generate([label], settings, seeds=[seed])
            schedule = Schedule.of(pipeline.bundle, [label], [settings])
            pipeline.backend.release()
            logits = [pipeline.backend.logits(batch, i, w)[0] for _, batch, i, w in schedule.walk(made.tokens)]
            pixels = None if made.images is None else made.images[0]
            out.append(Alone(made.tokens[0], tuple(logits), pixels))
    return tuple(out)


@dataclass(eq=False)
class Image:
    """An image in flight: how many of its calls are done, and the cache rows of its one or two rows."""

    kind: int
    rows: Int
    done: int = 0


@dataclass
class Fuzz:
    """One random run over a backend. ``tokens`` of an image are those that it has when it is made alone."""

    pipeline: Pipeline
    alone: Sequence[Alone]
    random: np.random.Generator
    flying: list[Image] = field(default_factory=list)
    returned: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    finished: int = 0
    rows: int = 2  #: cache rows that images may take

    def __post_init__(self) -> None:
        bundle = self.pipeline.bundle
        self.calls = Schedule.of(bundle, [0], [Settings()]).calls

    def run(self, rounds: int) -> None:
        for turn in range(rounds):
            if turn in (GROW, 2 * GROW):
                self.rows = min(2 * self.rows, ROWS)
            self.begin()
            here = self.subset()
            if not here:
                continue
            calls = [self.calls[image.done] for image in here]
            if self.chance(0.1):
                self.logits(here, calls)
            self.step(here, calls)
            if self.chance(0.05):
                self.logits(here, calls)
            if self.chance(0.03):
                self.go_back()
            if self.chance(0.05) and self.pipeline.bundle.image_size is not None:
                self.decode()
            self.end()
        for array, copy in self.returned:  # arrays belong to the caller: no later call wrote into them
            assert (array == copy).all()

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def begin(self) -> None:
        """Put new images into random free rows of the cache."""
        while self.chance(0.5 if self.flying else 1.0):
            taken = [row for image in self.flying for row in image.rows]
            free = self.random.permutation(np.setdiff1d(np.arange(self.rows), taken))
            kind = int(self.random.integers(len(KINDS)))
            need = 2 if KINDS[kind][1].guided else 1
            if len(free) < need or len(self.flying) == IMAGES:
                return
            self.flying.append(Image(kind, free[:need]))

    def subset(self) -> list[Image]:
        """Images that stand at calls of one query length, in a random order."""
        query = self.calls[self.flying[int(self.random.integers(len(self.flying)))].done].query
        ready = [image for image in self.flying if self.calls[image.done].query == query]
        count = int(self.random.integers(1, len(ready) + 1))
        return [ready[i] for i in self.random.permutation(len(ready))[:count]]

    def inputs(self, here: list[Image], calls: list[Call]) -> tuple[Batch, Int, Int, Float]:
        guided = [image for image in here if KINDS[image.kind][1].guided]
        labels, settings, seeds = zip(*(KINDS[image.kind] for image in here), strict=True)
        cache_row = np.array([image.rows[0] for image in here] + [image.rows[1] for image in guided])
        schedule = Schedule.of(self.pipeline.bundle, labels, settings, seeds, cache_row)
        batch, ids, write = schedule.inputs(calls, np.stack([self.alone[image.kind].tokens for image in here]))
        uniform = np.stack([schedule.noise[b, call.positions] for b, call in enumerate(calls)])
        return batch, ids, write, uniform

    def step(self, here: list[Image], calls: list[Call]) -> None:
        batch, ids, write, uniform = self.inputs(here, calls)
        before = ids.copy(), write.copy(), uniform.copy()
        tokens = self.pipeline.backend.step(batch, ids, write, uniform)
        assert all((a == b).all() for a, b in zip((ids, write, uniform), before, strict=True))
        wanted = [self.alone[image.kind].tokens[call.positions] for image, call in zip(here, calls, strict=True)]
        np.testing.assert_array_equal(tokens, np.stack(wanted))
        self.returned.append((tokens, tokens.copy()))
        for image in here:
            image.done += 1

    def logits(self, here: list[Image], calls: list[Call]) -> None:
        batch, ids, write, _ = self.inputs(here, calls)
        got = self.pipeline.backend.logits(batch, ids, write)
        for b, (image, call) in enumerate(zip(here, calls, strict=True)):
            wanted = self.alone[image.kind].logits[self.calls.index(call)]
            np.testing.assert_allclose(got[b], wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())
        self.returned.append((got, got.copy()))

    def go_back(self) -> None:
        """A call that an image has made is made again, for its logits; the image continues behind that call."""
        again = [image for image in self.flying if image.done]
        if again:
            image = again[int(self.random.integers(len(again)))]
            back = int(self.random.integers(image.done))
            self.logits([image], [self.calls[back]])
            image.done = back + 1

    def decode(self) -> None:
        kinds = self.random.integers(len(KINDS), size=int(self.random.integers(1, self.rows // 2 + 1)))
        pixels = self.pipeline.backend.decode(np.stack([self.alone[kind].tokens for kind in kinds]))
        # Another decoder than ONNX Runtime's rounds otherwise.
        assert np.abs(pixels.astype(int) - np.stack([self.alone[kind].pixels for kind in kinds])).max() <= 1
        self.returned.append((pixels, pixels.copy()))

    def end(self) -> None:
        """Images that are finished, or are given up, leave; their rows are released, or not."""
        for image in list(self.flying):
            finished = image.done == len(self.calls)
            if finished or self.chance(0.01):
                self.flying.remove(image)
                self.finished += finished
                if self.chance(0.7):
                    self.pipeline.backend.release(image.rows)
        if self.chance(0.01):  # a whole request, or nothing: either way nobody's keys are needed
            self.flying.clear()
            self.pipeline.backend.release()
            if self.chance(0.5):
                self.request()

    def request(self) -> None:
        kinds = self.random.integers(len(KINDS), size=int(self.random.integers(1, self.rows // 2 + 1)))
        labels, settings, seeds = zip(*(KINDS[kind] for kind in kinds), strict=True)
        made = self.pipeline.generate(labels, settings, seeds=seeds)
        np.testing.assert_array_equal(made.tokens, np.stack([self.alone[kind].tokens for kind in kinds]))


def fuzz(pipeline: Pipeline, seed: int) -> None:
    run = Fuzz(pipeline, made_alone(pipeline.bundle.path), np.random.default_rng(seed))
    run.run(ROUNDS)
    assert run.finished > 3


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_images_that_come_and_go_on_the_cpu(backend: str, seed: int, bundles: dict[str, Path]) -> None:
    with BACKENDS[backend](bundles["fp32"]) as pipeline:
        fuzz(pipeline, seed)


@pytest.mark.parametrize(
    ("mode", "images"),
    [
        ("shared", (1, 2, 4)),
        ("per-phase", (4,)),
        pytest.param("shared", (4,), marks=pytest.mark.slow),
        pytest.param("per-phase", (1, 2, 4), marks=pytest.mark.slow),
    ],
)
def test_images_that_come_and_go_on_the_stand_in_gpu(
    load: Make, tiny: Path, mode: str, images: tuple[int, ...]
) -> None:
    fuzz(load(tiny, images, mode), seed=2)
