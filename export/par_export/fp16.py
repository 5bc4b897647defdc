"""Which numbers fp16 holds, and what a bundle's manifest says about the numbers of its model. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from par_export.errors import BuildError

FP16_MAX = 65504.0  #: the largest number of fp16; what is rounded beyond it becomes infinite
#: The gate looks at two or three images. Others may reach larger numbers, so a factor of fp16's range is kept free.
FP16_MARGIN = 2.0
FP16_ALLOWED = FP16_MAX / FP16_MARGIN

#: quantity -> what it is in words; the keys of ``parity.largest`` in the manifest.
QUANTITIES = {
    "norm": "a normalised input",
    "q": "a query",
    "k": "a key",
    "v": "a value",
    "scores": "an attention score q k / sqrt(D)",
    "attention": "an output of attention",
    "gate": "the gate w1 x",
    "up": "w3 x",
    "product": "the feed-forward product silu(w1 x) * w3 x",
    "feed_forward": "an output of the feed-forward layer",
    "residual": "the residual stream",
    "logits": "a logit",
}
REASON = (
    f"fp16 holds numbers up to {FP16_MAX:.0f}, and other images may reach larger ones, so up to {FP16_ALLOWED:.0f} is "
    "allowed"
)


def largest_in(parity: Mapping[str, Any]) -> tuple[float, str, int] | None:
    """The largest number in the ``parity`` entry of a manifest: value, quantity, index; None where it has none.

    Bundles that were exported before these numbers were taken, or with random weights, have none.
    """
    found: list[tuple[float, str, int]] = []
    entry = parity.get("largest")
    for quantity, values in (entry if isinstance(entry, Mapping) else {}).items():
        if isinstance(values, Sequence):
            found += [(float(v), str(quantity), i) for i, v in enumerate(values) if isinstance(v, (int, float))]
    return max(found, default=None)


def check_build(parity: Mapping[str, Any], step: str, decoder: str, others: str = "--precision bf16, or fp32") -> None:
    """Raise BuildError where the numbers of the model do not fit the dtypes ``step`` and ``decoder`` of its engine.

    ``parity`` is the manifest's entry. A bundle in fp32 or bf16 may be built in fp16, which its export did not check.
    ``others``: the options that the message proposes.
    """
    largest = largest_in(parity)
    if step == "float16" and largest is not None and largest[0] > FP16_ALLOWED:
        value, quantity, _ = largest
        what = f"{QUANTITIES.get(quantity, quantity)} reaches {value:.4g}"
        raise BuildError(f"precision fp16: {what} in this model; {REASON}; give {others}")
    half = parity.get("decoder_fp16")
    if decoder == "float16" and isinstance(half, Mapping) and half.get("left_out"):
        why = half.get("why", "its images differ too much from those in fp32")
        raise BuildError(f"decoder precision fp16: the export left it out: {why}; give --decoder-precision fp32")
