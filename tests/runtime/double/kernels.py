"""Engines of kernels for the stand-in GPU: their cubins are names, by which the stand-in knows what to run.

``bare.register`` tells it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from par_export.kernels.spec import Planned
from par_runtime.backends.engines import ENGINE_JSON, ENGINE_SCHEMA, ENGINES, KERNELS
from par_runtime.backends.program import ALIGN, CONSTANTS, VERSION, Kernel, Kernels, to_json
from par_runtime.bundle import Bundle, seal
from par_runtime.system import sha256

SHARED = 64 * 1024  #: bytes of shared memory of each stand-in kernel: more than it may take without asking


def write_engine(
    bundle: Bundle,
    planned: Planned,
    precision: str = "fp32",
    target: str = "SM80",
    label: str = "",
    **changes: Any,
) -> Path:
    """An engine folder of what is ``planned``, with stand-in cubins; ``changes`` are fields of ``engine.json``."""
    folder = bundle.path / ENGINES / f"{KERNELS}-{VERSION}-{target.lower()}-{precision}{label}"
    folder.mkdir(parents=True)
    constants, weights = bytearray(), dict(planned.weights)
    for name, content in planned.constants.items():
        weights[name] = replace(weights[name], offset=len(constants))
        constants += content.ljust(-(-len(content) // ALIGN) * ALIGN, b"\0")
    (folder / CONSTANTS).write_bytes(constants)
    kernels = {}
    for name, spec in planned.specs.items():
        file = folder / f"{name}.cubin"
        file.write_text(f"stand-in for {name} on {target}")
        kernels[name] = Kernel(
            file.name,
            file.stat().st_size,
            sha256(file),
            spec.source.rpartition(".")[2],
            spec.source,
            dict(spec.constants),
            spec.parameters,
            trailing=2,
            warps=spec.warps,
            shared=SHARED,
            registers=32,
            spills=0,
            dependent=spec.dependent,
        )
    described = Kernels(
        "stand-in 1",
        precision,
        kernels,
        planned.programs,
        weights,
        constants_bytes=len(constants),
        constants_sha256=sha256(folder / CONSTANTS),
    )
    document = {
        "schema": ENGINE_SCHEMA,
        "bundle": bundle.hash,
        "runtime": KERNELS,
        "version": VERSION,
        "target": target,
        "device": None,
        "precision": precision,
        "mode": "shared",
        "images": sorted(planned.programs["step"].profiles),
        "sampling": "exact",
        "plans": {},
        "decoder": None,
        "kernels": to_json(described),
        "tuned": {},
        "report": {},
    }
    (folder / ENGINE_JSON).write_text(json.dumps(seal(document | changes)))
    return folder
