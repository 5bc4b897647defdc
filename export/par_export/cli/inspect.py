"""``parvis inspect`` of a checkpoint; the runtime calls it, because reading a checkpoint needs torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from par_export.checkpoint_report import describe
from par_export.cli.export import grid as parse_grid
from par_model.checkpoint import CheckpointError, Kind, hub
from par_runtime.bench.report.words import size
from par_runtime.cli.common import fail


def show(
    path: str | Path, as_json: bool, weights: Kind | None = None, heads: int | None = None, grid: str | None = None
) -> int:
    """Print what the checkpoint at ``path`` (or its name on the hub) is; exit code 2 if it is none. Raises OSError.

    ``weights``: the trained ones or their average, of a file that holds both. ``heads``, ``grid``: in place of what the
    file says, or does not say.
    """
    try:
        sizes = None if grid is None else parse_grid(grid)
        facts = describe(hub.local(path, lambda line: print(line, file=sys.stderr)), weights, heads, sizes)
    except argparse.ArgumentTypeError as error:
        return fail(f"--grid {error}")
    except CheckpointError as error:
        return fail(error)
    print(json.dumps(facts) if as_json else "\n".join(lines(facts)))
    return 0


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts of :func:`par_export.checkpoint_report.describe` as lines of text."""
    total = sum(facts["files"].values())
    out = [
        f"{facts['path']}: {facts['kind']}, {facts['parameters']:,} parameters in {facts['tensors']} tensors "
        f"({facts['dtypes']}), {total / 1e6:.1f} MB in {len(facts['files'])} "
        f"file{'s' if len(facts['files']) > 1 else ''}"
    ]
    rows = dict(facts["config"])
    kind = "clip" if "calls per clip" in rows else "image"
    if "memory_bytes" in facts:
        rows["memory"] = "of weights and cache, guided, in fp32 (a CPU) and fp16: " + ", ".join(
            f"{images} {kind}{'s' if images != '1' else ''} {size(need['fp32'])} and {size(need['fp16'])}"
            for images, need in facts["memory_bytes"].items()
        )
        bounds = ", ".join(f"{gpu} {ms:.3g}" for gpu, ms in facts["bound_ms"].items())
        rows["bound"] = (
            f"at least, in fp16 by memory bandwidth, for one guided {kind} without decoding, in ms: {bounds}"
        )
    out += [f"  {name:20} {value}" for name, value in rows.items()]
    out += [f"  {name:20} {line}" for name in ("note", "warning") for line in facts[f"{name}s"]]
    return out + ([f"  open: {facts['open']}"] if facts["open"] else [])
