"""The walk over an image: which calls it is made of, the inputs of each call, and the noise of each token.

Generation, self-test, likelihood, ``verify`` and ``bench`` all walk an image with this class. The order, the phases and
the ids come from the bundle's manifest.

    schedule = Schedule.of(bundle, classes, settings, seeds)
    for call, ids, write in schedule.walk(tokens):
        tokens[:, call.positions] = backend.step(schedule.batch, ids, write, schedule.noise[:, call.positions])

Letters: R rows (two for a guided image), B images, N tokens, q positions of one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from par_runtime.backends.base import Batch
from par_runtime.bundle import Bundle, Call, image_calls
from par_runtime.dtypes import Float, Int
from par_runtime.request import Settings


@dataclass(frozen=True)
class Schedule:
    """The calls of a batch of images, and all their inputs except the tokens drawn so far."""

    calls: tuple[Call, ...]
    batch: Batch
    image_of_row: Int  #: [R]
    class_ids: Int  #: [R], the ids of the first call
    noise: Float  #: [B,N] in [0,1)

    @staticmethod
    def of(
        bundle: Bundle,
        classes: Sequence[int],
        settings: Sequence[Settings],
        seeds: Sequence[int] | None = None,
        cache_row: Int | None = None,
    ) -> Schedule:
        """The schedule of one image for each of ``classes``, with its settings and its seed.

        Without ``seeds`` the noise is zero; walks that draw nothing, or draw greedily, need none. ``cache_row`` [R]:
        the cache row of each row, first of those with a class, then of those without (default: 0, 1, ...).
        """
        images = len(classes)
        guided = [i for i, s in enumerate(settings) if s.guided]
        uncond_row = np.arange(images)
        uncond_row[guided] = images + np.arange(len(guided))
        image_of_row = np.array([*range(images), *guided], np.int64)
        batch = Batch(
            rows=len(image_of_row),
            uncond_row=uncond_row,
            guidance=np.array([s.guidance if s.guided else 1.0 for s in settings], np.float32),
            temperature=np.array([1.0 if s.greedy else s.temperature for s in settings], np.float32),
            top_k=np.array([1 if s.greedy else min(s.top_k, bundle.vocab_size) for s in settings], np.int64),
            top_p=np.array([1.0 if s.greedy else s.top_p for s in settings], np.float32),
            **({} if cache_row is None else {"cache_row": np.asarray(cache_row, np.int64)}),
        )
        return Schedule(
            calls=image_calls(bundle.phases),
            batch=batch,
            image_of_row=image_of_row,
            class_ids=np.array([bundle.class_base + c for c in classes] + [bundle.no_class] * len(guided), np.int64),
            noise=noise(settings, seeds, bundle.n_tokens),
        )

    def inputs(self, at: Call | Sequence[Call], tokens: Int) -> tuple[Int, Int]:
        """The inputs of a call: ids [R,q], and the first position of each row [R].

        ``at``: one call for all images, or one for each image, all with the same q. ``tokens`` [B,N]: those so far.
        """
        if isinstance(at, Call):
            return self._ids(at, slice(None), tokens), np.full(self.batch.rows, at.write)
        if len(at) != self.batch.images or len({call.query for call in at}) != 1:
            raise ValueError(
                f"calls of {[call.query for call in at]} positions for {self.batch.images} images; expected a call "
                "for each image, all of one query length: images at another one wait for a call of theirs"
            )
        ids = np.empty((self.batch.rows, at[0].query), np.int64)
        write = np.array([at[image].write for image in self.image_of_row], np.int64)
        for call in dict.fromkeys(at):
            rows = np.flatnonzero(write == call.write)
            ids[rows] = self._ids(call, rows, tokens)
        return ids, write

    def _ids(self, call: Call, rows: slice | Int, tokens: Int) -> Int:
        """The ids [rows,q] that these rows are fed at ``call``."""
        slots, images = call.phase.token_slots, self.image_of_row[rows]
        fed: Int = tokens[images, call.write - len(slots) : call.write]  # positions before the call's are done
        if len(slots) == call.query:
            return fed
        ids = np.empty((len(images), call.query), np.int64)
        ids[:, slots] = fed
        for slot, entry in enumerate(call.phase.inputs):
            if entry != "token":
                ids[:, slot] = self.class_ids[rows] if entry == "class" else entry
        return ids

    def walk(self, tokens: Int) -> Iterator[tuple[Call, Int, Int]]:
        """Every call with its inputs: (call, ids [R,q], write [R]).

        Later calls read their ids from ``tokens`` [B,N]. So the loop must write the tokens of each call into it, unless
        it holds them from the start.
        """
        for call in self.calls:
            yield call, *self.inputs(call, tokens)


def uniforms(seed: int, n_tokens: int) -> Float:
    """The noise of one image: [N] float32 in [0,1), the top 24 bits of Philox4x64-10 keyed by ``seed``.

    Philox counts instead of keeping a state, so a number depends only on the seed and the position, not on batch, order
    or backend. The reference generation of ``par_model`` makes the same numbers.
    """
    raw = np.random.Philox(key=seed).random_raw(n_tokens)
    numbers: Float = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return numbers


def noise(settings: Sequence[Settings], seeds: Sequence[int] | None, n_tokens: int) -> Float:
    """The noise [B,N] of images with these settings and seeds; zero without seeds, and for greedy images.

    Greedy is top-k 1; with noise 0, the draw takes the lowest id of several equal logits.
    """
    out = np.zeros((len(settings), n_tokens), np.float32)
    for image, (s, seed) in enumerate(zip(settings, seeds or (), strict=seeds is not None)):
        if not s.greedy:
            out[image] = uniforms(seed, n_tokens)
    return out
