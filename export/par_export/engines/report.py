"""The report of a build: fused layers against the model's, kernels per plan, bytes against the bundle's.

Kernels are the launch cost of a step, and they can be counted without a GPU: with detailed profiling verbosity the
builder names every fused layer of the finished plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from par_export.engines.builder import BuildOutcome

#: Entries of the builder's list that launch no kernel: they synchronise streams.
NOT_KERNELS = ("signal", "wait")
_LAYER = re.compile(r"Name: ([^,]+), LayerType: ([^,]+),")
#: Kernels that only dequantise a matrix, into scratch memory: the product after it reads it there.
_UNPACKS = re.compile(r"__myl_(?:Repl|Resh|Gath|Cast)*CastMul(?:Cast)?_myl")
_PLACE = re.compile(r"_myl(\d+)_(\d+)$")


@dataclass(frozen=True)
class Kernels:
    """The kernels of one plan at one batch size. ``per_layer`` is None for a model of one layer."""

    images: int
    names: tuple[str, ...]
    attention: int  #: how many of them are fused attention
    per_layer: float | None
    around: float | None  #: before the first and after the last layer, in sum
    unpack: int = 0  #: how many only write a quantised matrix out in the plan's precision

    @property
    def total(self) -> int:
        """How many kernels there are."""
        return len(self.names)


def kernels(log: Sequence[str], images: Sequence[int], layers: int) -> list[Kernels]:
    """The kernels of every profile, from the builder's log of the finished plan of a model of ``layers`` layers."""
    by_profile: dict[int, list[tuple[str, str]]] = {}
    for message in log:
        for name, kind in _LAYER.findall(message):
            place = _PLACE.search(name)
            profile = int(place.group(1)) if place else 0
            if kind not in NOT_KERNELS:
                by_profile.setdefault(profile, []).append((name, kind))
    return [_summary(size, [name for name, _ in by_profile.get(i, [])], layers) for i, size in enumerate(images)]


def _summary(images: int, names: list[str], layers: int) -> Kernels:
    attention = [i for i, name in enumerate(names) if "mha" in name]
    per_layer = around = None
    if len(attention) == layers > 1:
        # From one attention to the next is one layer, even where kernels were fused across the border of layers.
        per_layer = (attention[-1] - attention[0]) / (layers - 1)
        around = len(names) - per_layer * layers
    return Kernels(images, tuple(names), len(attention), per_layer, around, sum(map(bool, map(_UNPACKS.match, names))))


def plan_report(
    outcome: BuildOutcome, counted: list[Kernels], layers: int, plan_bytes: int, weights_bytes: int
) -> dict[str, Any]:
    """The report of one plan, for ``engine.json``. ``weights_bytes`` is the size of its weights in the bundle."""
    return {
        "seconds": round(outcome.seconds, 2),
        "plan_bytes": plan_bytes,
        "bundle_weights_bytes": weights_bytes,
        **outcome.memory,
        "layers": {
            "model": layers,
            "ATTENTION": outcome.layers.get("ATTENTION_INPUT", 0),
            "KV_CACHE_UPDATE": outcome.layers.get("KV_CACHE_UPDATE", 0),
            "ROTARY_EMBEDDING": outcome.layers.get("ROTARY_EMBEDDING", 0),
        },
        "profiles": [asdict(k) | {"total": k.total} for k in counted],
        "warnings": [w for w in outcome.warnings if "Make sure" not in w],
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """The report of an engine as lines of text."""
    lines = [
        f"{'plan':12} {'images':>6} {'attention':>13} {'caches':>9} {'rotary':>7} {'kernels':>8} {'per layer':>10} "
        f"{'around':>7} {'plan MB':>8} {'weights MB':>11} {'of bundle':>10} {'memory MB':>10}"
    ]
    for name, plan in report["plans"].items():
        layers = plan["layers"]
        model = layers["model"]
        for i, profile in enumerate(plan["profiles"]):
            first = i == 0
            attention = f"{profile['attention']}/{model} fused" if model else "-"
            caches = f"{layers['KV_CACHE_UPDATE']}/{2 * model}" if model else "-"
            rotary = f"{layers['ROTARY_EMBEDDING']}/{model}" if model else "-"
            sizes = (
                f"{plan['plan_bytes'] / 1e6:8.1f} {plan['weights_bytes'] / 1e6:11.1f} "
                f"{plan['weights_bytes'] / max(plan['bundle_weights_bytes'], 1):10.2f} "
                f"{plan['activation_bytes'] / 1e6:10.1f}"
            )
            lines.append(
                f"{name if first else '':12} {profile['images']:6} {attention:>13} {caches:>9} {rotary:>7} "
                f"{profile['total']:8} {_number(profile['per_layer']):>10} {_number(profile['around']):>7} "
                f"{sizes if first else ''}".rstrip()
            )
    for name, plan in report["plans"].items():
        unpack = max(profile.get("unpack", 0) for profile in plan["profiles"])
        if unpack:
            lines.append(
                f"{name}: {unpack} kernels of a call only unpack quantised weights, whose products then read them "
                "unpacked: such a plan takes less memory, not less time (docs/engines.md)"
            )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
