"""The ``exact`` sampling tail: any top-k and top-p of a codebook that is too large for one ``TopK`` of an engine.

An engine's ``TopK`` gives at most ``TOPK_LIMIT`` entries. The edge of a filter is found with several of them, whatever
the values of the logits are:

1. The codebook is cut into parts that ``TopK`` can sort, and the sorted parts into blocks of ``b`` codes. The first
   code of each block is its head: the largest of the block, and no smaller than those of the part's later blocks.
2. The heads of all blocks are sorted. Blocks are taken in this order while all their codes together are surely within
   the filter: for top-k while they are fewer than k, for top-p while their mass is within the limit. Of each part these
   are the first blocks.
3. Of the blocks taken, all but the last one of each part lie above a head that was taken, so none of their codes is
   below the edge. They need not be looked at again: their number (or their mass) is known.
4. The edge is among the next ``b * (parts + 1)`` codes of the rest: the first block that was not taken, and at most one
   block that was taken of each part, have no more codes than that. One more ``TopK`` sorts them.

Codes that tie at the edge of top-p stay by id. Two cumulative sums, of the mass above the edge and of the number of
ties, are one operator; how many ties stay follows from a division. Docs: ``docs/engines.md``, "Sampling in the plan".

Letters: B images, q positions, V codes, P parts of L codes, b codes of a block, M blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from par_export.graphs.writer import ONNX_DTYPE, Graph

FLOAT = ONNX_DTYPE["float32"]
NO_LIMIT = 1e9  #: more ties than any codebook has
LEAST_MASS = 1e-38  #: divides where the mass at the edge is 0 in fp32: such ties are never drawn


@dataclass(frozen=True)
class Split:
    """How a codebook is cut: ``parts`` of ``length`` codes in blocks of ``block``; the last part may be filled up."""

    parts: int
    length: int
    block: int

    @property
    def blocks(self) -> int:
        """M, blocks of all parts."""
        return self.parts * self.length // self.block

    @property
    def candidates(self) -> int:
        """How many codes of the rest are sorted."""
        return min(self.block * (self.parts + 1), self.parts * self.length)

    @staticmethod
    def of(vocab: int, limit: int) -> Split | None:
        """The split of ``vocab`` codes that sorts the fewest entries, ``limit`` at a time; None where there is none."""
        least = -(-vocab // limit)
        splits = [
            Split(parts, -(-vocab // (parts * block)) * block, block)
            for parts in range(least, min(vocab, 2 * least + 16) + 1)
            for block in (2**i for i in range(limit.bit_length()))
        ]
        fitting = [s for s in splits if max(s.length, s.blocks, s.block * (s.parts + 1)) <= limit]
        # What is filled up is copied first, which is one more kernel.
        return min(fitting, key=lambda s: (s.parts * s.length > vocab, s.blocks + s.candidates), default=None)


def searched_sums(g: Graph, logits: str, top_k: str, top_p: str, vocab: int, split: Split) -> str:
    """The cumulative sums [B,q,V] of the mass of the kept codes, from ``logits`` [B,q,V] over the temperature;
    ``top_k`` and ``top_p`` are [B,1,1]."""
    return _Search(g, vocab, split).sums(logits, top_k, top_p)


class _Search:
    """The search in the graph ``g``."""

    def __init__(self, g: Graph, vocab: int, split: Split) -> None:
        self.g, self.vocab, self.split = g, vocab, split
        self.per_part = split.length // split.block  # blocks of a part
        self.last = g.const([-1])
        self.zero, self.one = g.const(0.0, "float32"), g.const(1.0, "float32")
        self.lowest, self.highest = g.const(-np.inf, "float32"), g.const(np.inf, "float32")

    def sums(self, logits: str, top_k: str, top_p: str) -> str:
        """See :func:`searched_sums`."""
        g, split = self.g, self.split
        blocks, ranked, order = self.sorted_parts(logits)
        peak = g.op("Slice", ranked, g.const([0]), g.const([1]), self.last)
        # The part of the block at each rank: [B,q,1,M].
        owner = g.op("Unsqueeze", g.op("Div", order, g.const(self.per_part)), g.const([2]))

        k = g.op("Cast", top_k, to=FLOAT)  # counts up to 2**24 are exact in fp32
        sure = g.op("Less", g.op("Mul", self.numbers(1, split.blocks), g.const(split.block, "float32")), k)
        taken = self.surely_taken(sure, owner)
        candidates = self.rest(blocks, self.inside(taken))
        number = g.op("Mul", g.op("ReduceSum", taken, self.last, keepdims=1), g.const(split.block, "float32"))
        here = g.op("Equal", self.numbers(1, split.candidates), g.op("Sub", k, number))
        kth = g.op("ReduceMax", g.op("Where", here, candidates, self.lowest), self.last, keepdims=1)
        filters = g.op("And", g.op("Greater", top_k, g.const(0)), g.op("Less", top_k, g.const(self.vocab)))
        kth = g.op("Where", filters, kth, self.lowest)

        cut, limit = self.cut_of_p(blocks, ranked, order, owner, peak, kth, top_p)
        by_p = g.op("Less", top_p, self.one)
        cut = g.op("Max", g.op("Where", by_p, cut, kth), kth)
        return self.kept_sums(logits, peak, cut, limit, by_p)

    def sorted_parts(self, logits: str) -> tuple[str, str, str]:
        """The sorted parts [B,q,P,L/b,b]; the heads of all blocks sorted [B,q,M], and which block each is of."""
        g, split = self.g, self.split
        fill = split.parts * split.length - self.vocab
        if fill:
            logits = g.op("Pad", logits, g.const([0, 0, 0, 0, 0, fill]), self.lowest)
        parts = g.op("Reshape", logits, g.const([0, 0, split.parts, split.length]))
        in_order = self.top(parts, split.length)[0]
        blocks = g.op("Reshape", in_order, g.const([0, 0, split.parts, self.per_part, split.block]))
        heads = g.op("Slice", blocks, g.const([0]), g.const([1]), self.last)
        ranked, order = self.top(g.op("Reshape", heads, g.const([0, 0, split.blocks])), split.blocks)
        return blocks, ranked, order

    def surely_taken(self, sure: str, owner: str) -> str:
        """Of each part, how many blocks are surely above the edge: [B,q,P] fp32; ``sure`` [B,q,M]: the ranks taken."""
        g = self.g
        part = g.op("Unsqueeze", g.op("Range", g.const(0), g.const(self.split.parts), g.const(1)), g.const([1]))
        of_part = g.op("And", g.op("Equal", owner, part), g.op("Unsqueeze", sure, g.const([2])))
        count = g.op("ReduceSum", g.op("Cast", of_part, to=FLOAT), self.last, keepdims=0)
        return g.op("Max", g.op("Sub", count, self.one), self.zero)

    def inside(self, taken: str) -> str:
        """Whether each block is among the first ``taken`` [B,q,P] of its part: [B,q,P,L/b,1]."""
        place = self.g.op("Unsqueeze", self.numbers(0, self.per_part), self.g.const([1]))
        return self.g.op("Less", place, self.g.op("Unsqueeze", taken, self.g.const([3, 4])))

    def rest(self, blocks: str, inside: str) -> str:
        """The largest codes of the blocks that are not ``inside``, sorted: [B,q,candidates]."""
        g, split = self.g, self.split
        rest = g.op("Where", inside, self.lowest, blocks)
        return self.top(g.op("Reshape", rest, g.const([0, 0, split.parts * split.length])), split.candidates)[0]

    def cut_of_p(
        self, blocks: str, ranked: str, order: str, owner: str, peak: str, kth: str, top_p: str
    ) -> tuple[str, str]:
        """The value of the last code that top-p keeps of those from ``kth`` on, and the mass that may lie before it:
        both [B,q,1]."""
        g, split = self.g, self.split
        wide = g.const([3, 4])
        weights = self.mass(blocks, g.op("Unsqueeze", peak, wide), g.op("Unsqueeze", kth, wide))
        weights = g.op("ReduceSum", weights, self.last, keepdims=0)  # [B,q,P,L/b]
        flat = g.op("Reshape", weights, g.const([0, 0, split.blocks]))
        upto = g.op("CumSum", g.op("GatherElements", flat, order, axis=-1), g.const(-1))
        total = g.op("Slice", upto, g.const([split.blocks - 1]), g.const([split.blocks]), self.last)
        limit = g.op("Mul", top_p, total)
        inside = self.inside(self.surely_taken(g.op("LessOrEqual", upto, limit), owner))
        candidates = self.rest(blocks, inside)
        above = g.op("Where", g.op("Squeeze", inside, g.const([4])), weights, self.zero)
        above = g.op("ReduceSum", g.op("Reshape", above, g.const([0, 0, split.blocks])), self.last, keepdims=1)
        mass = self.mass(candidates, peak, kth)
        before = g.op("Sub", g.op("Add", above, g.op("CumSum", mass, g.const(-1))), mass)
        stay = g.op("LessOrEqual", before, limit)
        cut = g.op("ReduceMin", g.op("Where", stay, candidates, self.highest), self.last, keepdims=1)
        # If rounding leaves none of them, the first one is the edge.
        return g.op("Min", cut, g.op("Slice", candidates, g.const([0]), g.const([1]), self.last)), limit

    def kept_sums(self, logits: str, peak: str, cut: str, limit: str, by_p: str) -> str:
        """The cumulative sums of the mass above ``cut`` and of the codes that tie with it, as many as ``limit`` allows.

        The mass above the edge and the number of ties are summed in one operator, along an axis that both lie on.
        """
        g, pair = self.g, self.g.const([2])
        above = g.op("Where", g.op("Greater", logits, cut), g.op("Exp", g.op("Sub", logits, peak)), self.zero)
        ties = g.op("Cast", g.op("Equal", logits, cut), to=FLOAT)
        both = g.op("Concat", g.op("Unsqueeze", above, pair), g.op("Unsqueeze", ties, pair), axis=2)
        both = g.op("CumSum", both, g.const(-1))
        sums, counts = (g.op("Squeeze", half, pair) for half in g.ops("Split", both, g.const([1, 1]), count=2, axis=2))
        total = g.op("Slice", sums, g.const([self.vocab - 1]), g.const([self.vocab]), self.last)
        each = g.op("Exp", g.op("Sub", cut, peak))  # the mass of one tie
        room = g.op("Div", g.op("Sub", limit, total), g.op("Max", each, g.const(LEAST_MASS, "float32")))
        most = g.op("Add", g.op("Floor", room), self.one)  # a tie stays while the mass before it is within the limit
        most = g.op("Max", g.op("Where", by_p, most, g.const(NO_LIMIT, "float32")), self.one)
        return g.op("Add", sums, g.op("Mul", each, g.op("Min", counts, most)))

    def mass(self, values: str, peak: str, kth: str) -> str:
        """``exp(values - peak)`` of those from ``kth`` on, 0 of the others."""
        g = self.g
        return g.op("Where", g.op("GreaterOrEqual", values, kth), g.op("Exp", g.op("Sub", values, peak)), self.zero)

    def numbers(self, first: int, count: int) -> str:
        """``first``, ``first + 1``, ...: [count] fp32."""
        g = self.g
        return g.op("Cast", g.op("Range", g.const(first), g.const(first + count), g.const(1)), to=FLOAT)

    def top(self, values: str, count: int) -> list[str]:
        """The ``count`` largest of ``values`` along the last axis, sorted, and their places."""
        return self.g.ops("TopK", values, self.g.const([count]), count=2, axis=-1, largest=1, sorted=1)


def largest_codebook(limit: int) -> int:
    """The largest codebook that :meth:`Split.of` cuts for ``TopK`` of ``limit`` entries."""
    blocks = (2**i for i in range(limit.bit_length()))
    return max(min((limit // block - 1) * (limit // block * block), limit * block) for block in blocks)
