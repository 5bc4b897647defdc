"""The walk over an image: which calls it is made of, the inputs of each call, and the noise of each token.

Generation, self-test, likelihood, ``verify`` and ``bench`` all walk an image with this class. The order, the phases and
the ids come from the bundle's manifest.

    schedule = Schedule.of(bundle, classes, settings, seeds)
    for call, batch, ids, write in schedule.walk(tokens):
        tokens[:, call.positions] = backend.step(batch, ids, write, schedule.noise[:, call.positions])

Letters: R rows (two for a guided image), B images, N tokens, q positions of one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.random import Philox  # by its name: numpy imports the module at its first use, in any thread
from numpy.typing import NDArray

from par_runtime.backends.base import Backend, Batch
from par_runtime.bundle import Bundle, Call, image_calls
from par_runtime.dtypes import Float, Int
from par_runtime.request import Settings, class_indices, image_seeds, image_settings

Bool = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """The calls of a batch of images, and all their inputs except the tokens drawn so far.

    Where a guidance interval ends before an image does, the rows change from call to call: once no later call of the
    image is guided, its row without class is left out. Between its two stages the row is there without being used,
    because the second stage begins guided and needs its keys.
    """

    calls: tuple[Call, ...]
    batch: Batch  #: of the first call; of every call, unless the rows change
    class_ids: Int  #: [R], the ids of the first call
    noise: Float  #: [B,N] in [0,1)
    limits: Int  #: [B], the largest index of a guided call; that of all calls where the guidance does not end
    _known: dict[bytes, _Rows] = field(default_factory=dict, repr=False)  #: so that the same rows are the same object

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
        classes = class_indices(bundle, classes)
        images, calls = len(classes), image_calls(bundle.phases)
        settings = image_settings(bundle, images, settings)
        seeds = None if seeds is None else image_seeds(images, None, seeds)
        guided = [i for i, s in enumerate(settings) if s.guided]
        uncond_row = np.arange(images)
        uncond_row[guided] = images + np.arange(len(guided))
        last = max(guidance_index(calls).values())
        ends = [s.guidance_interval if s.guided and 0 <= s.guidance_interval < last else last for s in settings]
        limits = np.array(ends, np.int64)
        if cache_row is None and (limits < last).any():
            # Rows that are left out first come last, because a graph runs all rows up to the last that is named.
            place = np.argsort(np.argsort(-limits[guided], kind="stable"), kind="stable")
            cache_row = np.concatenate([np.arange(images), images + place])
        batch = Batch(
            rows=images + len(guided),
            uncond_row=uncond_row,
            guidance=np.array([s.guidance if s.guided else 1.0 for s in settings], np.float32),
            temperature=np.array([1.0 if s.greedy else s.temperature for s in settings], np.float32),
            top_k=np.array([1 if s.greedy else min(s.top_k, bundle.vocab_size) for s in settings], np.int64),
            top_p=np.array([1.0 if s.greedy else s.top_p for s in settings], np.float32),
            **({} if cache_row is None else {"cache_row": np.asarray(cache_row, np.int64)}),
        )
        return Schedule(
            calls=calls,
            batch=batch,
            class_ids=np.array([bundle.class_base + c for c in classes] + [bundle.no_class] * len(guided), np.int64),
            noise=noise(settings, seeds, bundle.n_tokens),
            limits=limits,
        )

    def __repr__(self) -> str:
        return f"Schedule({len(self.calls)} calls, {self.batch!r})"

    @cached_property
    def rows_change(self) -> bool:
        """Whether the guidance of an image ends before its last call."""
        return bool((self.limits < max(self._index.values())).any())

    def inputs(self, at: Call | Sequence[Call], tokens: Int) -> tuple[Batch, Int, Int]:
        """The inputs of a call: its rows, ids [R,q], and the first position of each row [R].

        ``at``: one call for all images, or one for each image, all with the same q. ``tokens`` [B,N]: those so far.
        """
        if isinstance(at, Call):
            rows = self._rows(at)
            ids = self._ids(at, rows.batch.image_of_row, rows.class_ids, tokens)
            return rows.batch, ids, np.full(rows.batch.rows, at.write)
        if len(at) != self.batch.images or len({call.query for call in at}) != 1:
            raise ValueError(
                f"calls of {[call.query for call in at]} positions for {self.batch.images} images; expected a call "
                "for each image, all of one query length: images at another one wait for a call of theirs"
            )
        rows = self._rows(at)
        image_of_row = rows.batch.image_of_row
        ids = np.empty((rows.batch.rows, at[0].query), np.int64)
        write = np.array([at[image].write for image in image_of_row], np.int64)
        for call in dict.fromkeys(at):
            here = np.flatnonzero(write == call.write)
            ids[here] = self._ids(call, image_of_row[here], rows.class_ids[here], tokens)
        return rows.batch, ids, write

    def _ids(self, call: Call, images: Int, class_ids: Int, tokens: Int) -> Int:
        """The ids [R',q] of rows at ``call``. ``images`` [R']: those of the rows; ``class_ids`` [R'] of each row."""
        slots = call.phase.token_slots
        fed: Int = tokens[images, call.write - len(slots) : call.write]  # positions before the call's are done
        if len(slots) == call.query:
            return fed
        ids = np.empty((len(images), call.query), np.int64)
        ids[:, slots] = fed
        for slot, entry in enumerate(call.phase.inputs):
            if entry != "token":
                ids[:, slot] = class_ids if entry == "class" else entry
        return ids

    def _rows(self, at: Call | Sequence[Call]) -> _Rows:
        """The rows of a call; ``at`` as in :meth:`inputs`."""
        if not self.rows_change:
            return _Rows(self.batch, self.class_ids)
        calls = [at] * self.batch.images if isinstance(at, Call) else at
        # Of each image: whether it is guided now, and whether this call or a later one is guided.
        guided = np.array([self._index[call] for call in calls]) <= self.limits
        needed = np.array([call.write for call in calls]) <= self._last_guided
        key = guided.tobytes() + needed.tobytes()
        if key not in self._known:
            self._known[key] = self._choose(guided, needed)
        return self._known[key]

    def _choose(self, guided: Bool, needed: Bool) -> _Rows:
        """The rows of a call in which the images ``guided`` [B] use their row without class, and ``needed`` [B] keep
        it.
        """
        full, images = self.batch, self.batch.images
        kept = np.concatenate([np.arange(images), images + np.flatnonzero(needed[full.image_of_row[images:]])])
        uncond_row = np.arange(images)
        for row, image in enumerate(full.image_of_row[kept]):
            if row >= images and guided[image]:
                uncond_row[image] = row
        if len(kept) == full.rows and (uncond_row == full.uncond_row).all():
            return _Rows(full, self.class_ids)
        batch = replace(
            full,
            rows=len(kept),
            uncond_row=uncond_row,
            guidance=np.where(uncond_row == np.arange(images), np.float32(1), full.guidance),
            cache_row=full.cache_row[kept],
            image_of_row=full.image_of_row[kept],
        )
        return _Rows(batch, self.class_ids[kept])

    @cached_property
    def _index(self) -> dict[Call, int]:
        return guidance_index(self.calls)

    @cached_property
    def _last_guided(self) -> Int:
        """The first position of the last guided call of each image: [B]."""
        return np.array([max(c.write for c, i in self._index.items() if i <= limit) for limit in self.limits])

    def walk(self, tokens: Int) -> Iterator[tuple[Call, Batch, Int, Int]]:
        """Every call with its inputs: (call, batch, ids [R,q], write [R]).

        Later calls read their ids from ``tokens`` [B,N]. So the loop must write the tokens of each call into it, unless
        it holds them from the start.
        """
        for call in self.calls:
            yield call, *self.inputs(call, tokens)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a call, and the ids [R] of their classes."""

    batch: Batch
    class_ids: Int


def guidance_index(calls: Sequence[Call]) -> dict[Call, int]:
    """The index of each call that a guidance interval is compared with (``Settings.guidance_interval``).

    The published sampler has no index in the prefill (here -1: always guided), and two loops that each count from 0:
    over the sequential calls, and over the calls that make a group. The transition makes the first group, so it is call
    0 of the second loop.
    """
    out: dict[Call, int] = {}
    index = -1
    for call in calls:
        index = 0 if call.phase.name == "transition" else index
        out[call] = index
        index += 1
    return out


@contextmanager
def rows_of(backend: Backend, schedule: Schedule) -> Iterator[None]:
    """The cache rows of ``schedule``, empty at the beginning and released at the end; other rows keep their keys.

    Not a part of ``walk``: a generator that an error left behind ends when the error's traceback is freed, which may be
    in the middle of another image.
    """
    rows = schedule.batch.cache_row
    backend.release(rows)
    try:
        yield
    finally:
        backend.release(rows)


def uniforms(seed: int, n_tokens: int) -> Float:
    """The noise of one image: [N] float32 in [0,1), the top 24 bits of Philox4x64-10 keyed by ``seed``.

    Philox counts instead of keeping a state, so a number depends only on the seed and the position, not on batch, order
    or backend. The reference generation of ``par_model`` makes the same numbers.
    """
    raw = Philox(key=int(seed)).random_raw(n_tokens)
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
