"""A finished report: its figures, what is above the budget, and its forms for a manifest, a terminal and a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_calibration.report.budget import LIMITS, Budget, Limit
from par_calibration.report.forced import CLASS, LEARNABLE
from par_calibration.report.layers import LayerError, outliers, worst, worst_kind
from par_calibration.report.measures import Agreement, Drawn, Frechet, Likelihood
from par_runtime.metrics import finite
from par_runtime.quantised import GROUPS
from par_runtime.system import write_beside

HEAD = "output"  #: the name of the head's matrix
#: An arithmetic -> the next that rounds less.
MILDER = {"int8": "bf16", "bf16": "fp32"}
FAR = 2.0  #: times as large an error is another one
WEIGHTS, ROUNDING, BOTH = "weights", "rounding", "both"
COSTS = {
    WEIGHTS: "weights alone, in fp32 arithmetic",
    ROUNDING: "rounded activations alone",
    BOTH: "as it will run",
}


@dataclass(frozen=True)
class Side:
    """One of the two bundles."""

    name: str
    hash: str
    weights: str  #: what its matrices are stored in
    group: int
    kept: tuple[str, ...]
    arithmetic: str
    cache: str
    decoder_precision: str
    megabytes: float  #: of its weights file
    backend: str


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that was measured of a candidate against the bundle that it was made from."""

    original: Side
    candidate: Side
    images: int  #: held-out images
    images_from: str
    real: bool  #: whether they are real images, or tokens that the original drew
    guidance: float
    seed: int
    agreements: tuple[Agreement, ...]
    profiles: Mapping[str, tuple[float, ...]]  #: by cost: mean KL divergence at each position, unguided
    likelihoods: Mapping[str, Likelihood]  #: by cost
    layers: tuple[LayerError, ...]
    decoder_psnr: float | None  #: of the worst image, in dB; None where both decoders compute in fp32
    drawn: Drawn | None  #: None where no images were generated
    frechet: Frechet | None  #: None where the bundle has no encoder, too
    labels: tuple[int, ...]  #: classes of the generated images
    notes: tuple[str, ...]  #: what was not measured and why, and what the figures are not
    budget: Budget
    pairs: NDArray[np.uint8] | None = field(default=None, repr=False)  #: images [P,2,H,W,3]: original, candidate
    pair_names: tuple[str, ...] = ()

    def agreement(self, where: str = "all", guided: bool = False, cost: str = BOTH) -> Agreement | None:
        """The figures over the positions ``where``; None where there are none."""
        wanted = (where, guided, cost)
        return next((one for one in self.agreements if (one.where, one.guided, one.cost) == wanted), None)

    def measures(self) -> dict[str, float]:
        """The value of each measure that has a limit, by its key in ``budget.LIMITS``; those that were measured."""
        out: dict[str, float] = {}
        every = [a for a in self.agreements if a.cost == BOTH]
        whole = [a for a in every if a.where == "all"]
        out["top1"] = min(a.top1 for a in whole)
        out["kl"] = _largest(a.kl for a in whole)
        out["kl_p95"] = _largest(a.kl_p95 for a in whole)
        sinks = [[a for a in every if a.where in (CLASS, LEARNABLE) and a.guided == guided] for guided in (False, True)]
        # Both kinds together: an image has one class input and few learnable ones.
        out["kl_inputs"] = _largest(sum(a.kl * a.positions for a in s) / sum(a.positions for a in s) for s in sinks)
        out["likelihood"] = self.likelihoods[BOTH].farthest
        layer = worst(self.layers)
        if layer is not None:
            out["layer"] = layer.relative_error
        if self.frechet is not None:
            out["frechet"] = self.frechet.ratio
        if self.decoder_psnr is not None:
            out["decoder"] = self.decoder_psnr
        return out

    def exceeded(self, budget: Budget | None = None) -> list[str]:
        """A line for each measure beyond its limit (default: those of the report's own budget): by how much, and what
        to try. Empty: the calibration passes.
        """
        limits = (budget or self.budget).limits
        lines: list[str] = []
        advice = self._advice()
        for key, value in self.measures().items():
            if key not in limits:
                continue
            limit, most = LIMITS[key], limits[key]
            if not limit.within(value, most):
                mend = advice if key != "decoder" else "give --decoder-precision fp32"
                lines.append(
                    f"{limit.name}: {limit.text(value)}, {'at least' if limit.least else 'at most'} "
                    f"{limit.text(most)} ({_beyond(value, most, limit)}); {mend}"
                )
        return lines

    def _advice(self) -> str:
        """What to try: where the error comes from decides."""
        side = self.candidate
        together, alone = self.agreement(cost=BOTH), self.agreement(cost=WEIGHTS)
        if together is not None and alone is not None and together.kl > FAR * alone.kl:
            milder = [f"--arithmetic {MILDER[side.arithmetic]}"] * (side.arithmetic in MILDER)
            milder += ["--cache fp32"] * (side.cache != "fp32")
            return f"most of it comes of rounded activations: try {' or '.join(milder)}"
        head = [] if HEAD in side.kept else ["head"]
        keep = outliers(self.layers) or head or worst_kind(self.layers)
        tries = [f"--keep {' '.join(keep)}{', with what is kept already' if side.kept else ''}"] if keep else []
        if side.group > min(GROUPS):
            tries.append(f"--group {side.group // 2}")
        if side.weights == "int4":
            tries += ["--refine with 2000 steps or more", "--weights int8"]
        return "try " + (", ".join(tries) or "a larger --keep: the page shows the worst layers")

    def summary(self) -> dict[str, Any]:
        """The figures for a manifest: what was measured on what, with the limits."""
        out: dict[str, Any] = {
            "images": self.images,
            "real": self.real,
            "images_from": self.images_from[:200],
            "guidance": self.guidance,
            "measures": {key: _short(value) for key, value in self.measures().items()},
            "budget": dict(self.budget.limits),
            "nats_per_token": {
                "original": _short(self.likelihoods[BOTH].original),
                "candidate": _short(self.likelihoods[BOTH].candidate),
            },
        }
        if self.drawn is not None:
            out["tokens_until_divergence"] = {
                "median": self.drawn.median,
                "identical_images": self.drawn.identical,
                "images": self.drawn.images,
            }
        cleaned: dict[str, Any] = finite(out)
        return cleaned

    def as_json(self) -> dict[str, Any]:
        """All figures, without the images."""
        out = asdict(self, dict_factory=_without_arrays)
        out["budget"] = dict(self.budget.limits)
        out["measures"] = self.measures()
        out["exceeded"] = self.exceeded()
        if self.drawn is not None:
            out["drawn"]["survival"] = self.drawn.survival()
        cleaned: dict[str, Any] = finite(out)
        return cleaned

    def write_json(self, path: Path) -> None:
        """Write :meth:`as_json` to ``path``. Raises OSError."""
        text = json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n"
        write_beside(path, lambda part: part.write_text(text, encoding="utf-8"))

    def write_html(self, path: Path) -> None:
        """Write the page to ``path``: one file that needs no other. Raises OSError."""
        from par_calibration.report.page import page

        text = page(self)
        write_beside(path, lambda part: part.write_text(text, encoding="utf-8"))

    def write_images(self, path: Path) -> None:
        """Write the sheet of pairs to ``path``, a PNG. Raises CalibrationError where there are none, OSError."""
        from par_calibration.report.sheet import write_sheet

        write_sheet(self, path)

    def table(self) -> list[str]:
        """The lines for a terminal."""
        from par_calibration.report.text import table

        return table(self)


def _largest(values: Any) -> float:
    """The largest; NaN where one is."""
    return float(np.max(list(values)))


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _beyond(value: float, most: float, limit: Limit) -> str:
    if not np.isfinite(value):
        return "not a finite number"
    if limit.least:
        return f"{100 * (most - value):.2f} points too low" if limit.percent else f"{limit.text(most - value)} too low"
    return f"{value / most:.3g} times as much" if most else "more than nothing"


def _without_arrays(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if key not in ("pairs", "budget")}
