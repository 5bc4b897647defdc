"""Images in flight at different steps on one backend: what in-flight batching will do, checked against images made
alone.
"""

from __future__ import annotations

import numpy as np

from par_runtime.bundle import Call
from par_runtime.dtypes import Int
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule

SETTINGS = [Settings(guidance=1.5), Settings(top_p=0.9), Settings(guidance=3.0, top_k=20, guidance_interval=3)]
LABELS, SEEDS = [0, 3, 5], [11, 12, 13]


def alone(pipeline: Pipeline) -> Int:
    """Tokens [3,N] of three images, each made in a batch of its own."""
    made = [
        pipeline.generate([label], settings, seeds=[seed], decode=False).tokens
        for label, settings, seed in zip(LABELS, SETTINGS, SEEDS, strict=True)
    ]
    return np.concatenate(made)


def staggered(pipeline: Pipeline) -> Int:
    """The same three images, each begun some calls after the one before, in places of the cache that are all mixed up.

    Images at calls of one query length share a call; the others wait, with their keys where they are.
    """
    bundle, backend = pipeline.bundle, pipeline.backend
    backend.release()
    places = [np.array([4, 1]), np.array([2]), np.array([0, 3])]  # the cache rows of each image
    begins = [0, 3, 7]  # rounds
    tokens = np.zeros((3, bundle.n_tokens), np.int64)
    calls = Schedule.of(bundle, LABELS, SETTINGS, SEEDS).calls
    done = [0, 0, 0]
    for turn in range(10_000):
        ready = [i for i in range(3) if turn >= begins[i] and done[i] < len(calls)]
        if not ready and all(count == len(calls) for count in done):
            return tokens
        for query in sorted({calls[done[i]].query for i in ready}):
            here = [i for i in ready if calls[done[i]].query == query]
            _step(pipeline, here, [calls[done[i]] for i in here], places, tokens)
            for i in here:
                done[i] += 1
                if done[i] == len(calls):
                    backend.release(places[i])
    raise AssertionError("the images were not finished")


def _step(pipeline: Pipeline, here: list[int], calls: list[Call], places: list[Int], tokens: Int) -> None:
    """One call for the images ``here``, each at its own step."""
    guided = [i for i in here if SETTINGS[i].guided]
    cache_row = np.array([places[i][0] for i in here] + [places[i][1] for i in guided])
    schedule = Schedule.of(
        pipeline.bundle,
        [LABELS[i] for i in here],
        [SETTINGS[i] for i in here],
        [SEEDS[i] for i in here],
        cache_row,
    )
    batch, ids, write = schedule.inputs(calls, tokens[here])
    uniform = np.stack([schedule.noise[b, call.positions] for b, call in enumerate(calls)])
    drawn = pipeline.backend.step(batch, ids, write, uniform)
    for b, (image, call) in enumerate(zip(here, calls, strict=True)):
        tokens[image, call.positions] = drawn[b]
