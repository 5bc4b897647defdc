"""The tolerances of the parity gate, and the comparisons of a graph with the oracle that apply them."""

from __future__ import annotations

import numpy as np

from par_export.errors import ParityError

#: Largest allowed |logit error| relative to the largest |logit|, by the dtype that the graph computes in.
LOGIT_TOLERANCE = {"float32": 2e-5, "float16": 2e-2}
#: Two candidates closer than this (relative to the largest |logit|) may swap by rounding; such ties are counted.
TIE_TOLERANCE = 2e-5


def compare_logits(name: str, got: np.ndarray, wanted: np.ndarray, scale: float, compute: str) -> dict[str, float]:
    """Compare logits ``got`` and ``wanted`` of one shape [...,V]; ``scale`` is the oracle's largest |logit|.

    ``name`` names the graph in errors, ``compute`` is the dtype it computes in. Returns the manifest's entries. Raises
    ParityError beyond the tolerance.
    """
    if compute != "float32" and np.isfinite(wanted).all() and not np.isfinite(got).all():
        raise ParityError(
            f"{name}: the model computes numbers beyond what {compute} can hold (its logits are not finite); give "
            "--precision bf16 or fp32. Nothing was published"
        )
    error = float(np.abs(got - wanted).max())
    if not error <= LOGIT_TOLERANCE[compute] * scale:
        raise ParityError(
            f"{name}: logits differ from the oracle by {error:.3g}; at most {LOGIT_TOLERANCE[compute] * scale:.3g} "
            f"is allowed ({compute}, largest logit {scale:.3g}). Nothing was published; this is a bug in the export, "
            "please report it"
        )
    return {"max_logit_error": error, "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).mean())}


def compare_greedy(tokens: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, int]:
    """Compare the graph's greedy ``tokens`` [B,N] with the oracle's ``logits`` [B,N,V] for them.

    Returns the oracle's margins [B,N] (its best logit minus its second best) and how many tokens are ties. Raises
    ParityError where the oracle chooses another token.
    """
    best = np.sort(np.partition(logits, -2, axis=-1)[..., -2:], axis=-1)
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    behind = best[..., 1] - chosen  # 0 where the oracle's argmax is the token
    allowed = TIE_TOLERANCE * max(1.0, float(np.abs(logits).max()))
    if not (behind <= allowed).all():
        image, position = np.argwhere(~(behind <= allowed))[0]
        raise ParityError(
            f"greedy tokens differ from the oracle first at image {image}, position {position}: the graph chose "
            f"{tokens[image, position]}, whose logit is {behind[image, position]:.3g} below the oracle's choice "
            f"{logits[image, position].argmax()}. Nothing was published; this is a bug in the export, please report it"
        )
    return best[..., 1] - best[..., 0], int((behind > 0).sum())
