"""Which cache rows hold keys that are still needed, and the inputs of those rows in a graph with fixed rows.

A graph computes all rows that it is bound to, one cache row each. Where a batch names only some of them, the others are
idle: they compute something, and must not overwrite their keys. So an idle row writes behind the keys that it holds,
where its own next call will write first. (A row that holds all N keys has no next call; its last keys are overwritten.)

Letters: R rows of a batch, R' rows that are run, q positions of one call, N tokens.
"""

from __future__ import annotations

import numpy as np

from par_runtime.backends.base import Batch, check_positions
from par_runtime.dtypes import Int


class CacheRows:
    """How many keys each cache row holds; 0 for a row that was released, or never written."""

    def __init__(self, n_tokens: int) -> None:
        self._n_tokens = n_tokens
        self._lengths = np.zeros(0, np.int64)

    @property
    def count(self) -> int:
        """Rows up to the last one that holds keys."""
        held = np.flatnonzero(self._lengths)
        return int(held[-1]) + 1 if held.size else 0

    @property
    def longest(self) -> int:
        """The most keys that a row holds."""
        return int(self._lengths.max(initial=0))

    def release(self, rows: Int | None = None) -> None:
        """The keys of ``rows`` (default: all) are not needed again."""
        if rows is None:
            self._lengths[:] = 0
        else:
            self._lengths[rows[rows < self._lengths.size]] = 0

    def without_keys(self, batch: Batch, write: Int) -> Int:
        """The cache rows of ``batch`` that do not hold all keys before their first position ``write`` [R]."""
        self._extend(batch.cache_rows)
        return batch.cache_row[write > self._lengths[batch.cache_row]]

    def note(self, batch: Batch, write: Int, query: int) -> None:
        """A call of ``query`` positions writes keys from ``write`` [R] on. Raises ValueError where they do not fit."""
        check_positions(write, query, self._n_tokens)
        self._extend(batch.cache_rows)
        self._lengths[batch.cache_row] = write + query

    def write(self, batch: Batch, ids: Int, write: Int, run: int, written: int | None = None) -> tuple[Int, Int]:
        """Note a call of ``batch`` and spread it over ``run`` rows: ids [R',q] and first positions [R'].

        ``ids`` [R,q] and ``write`` [R] are those of the batch's rows; ``written``: positions that the network writes
        of each row (default: q), where it is padded to more than the call has.
        """
        query = ids.shape[1]
        self.note(batch, write, query)
        self._extend(run)
        all_ids = np.zeros((run, query), np.int64)
        all_write = np.minimum(self._lengths[:run], self._n_tokens - (written or query))
        all_ids[batch.cache_row] = ids
        all_write[batch.cache_row] = write
        return all_ids, all_write

    def _extend(self, rows: int) -> None:
        if self._lengths.size < rows:
            self._lengths = np.concatenate([self._lengths, np.zeros(rows - self._lengths.size, np.int64)])
