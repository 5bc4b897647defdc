"""Engines of kernels for the stand-in GPU: their cubins are names, by which the stand-in knows what to run.

``bare.register`` tells it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from par_export.kernels.build import write_files
from par_export.kernels.compiler import Compiled
from par_export.kernels.contents import Contents
from par_export.kernels.plan import plan
from par_export.kernels.spec import Planned
from par_export.kernels.targets import TARGETS
from par_runtime.backends.engines import ENGINE_JSON, ENGINE_SCHEMA, ENGINES, KERNELS
from par_runtime.backends.program import VERSION, to_json
from par_runtime.bundle import Bundle, seal

SHARED = 64 * 1024  #: bytes of shared memory of each stand-in kernel: more than it may take without asking


def write_engine(
    bundle: Bundle,
    planned: Planned,
    precision: str = "fp32",
    decoder_precision: str = "fp32",
    target: str = "SM80",
    label: str = "",
    **changes: Any,
) -> Path:
    """An engine folder of what is ``planned``, with stand-in cubins; ``changes`` are fields of ``engine.json``."""
    folder = bundle.path / ENGINES / f"{KERNELS}-{VERSION}-{target.lower()}-{precision}{label}"
    folder.mkdir(parents=True)
    compiled = {
        name: Compiled(
            cubin=f"stand-in for {name} on {target}".encode(),
            function=spec.source.rpartition(".")[2],
            warps=spec.warps,
            shared=SHARED,
            registers=32,
            spills=0,
            trailing=2,
            scratch=0,
            loads={},
            copies={},
            products={},
            seconds=0.0,
        )
        for name, spec in planned.specs.items()
    }
    described = write_files(folder, planned, compiled, "stand-in 1", decoder_precision)
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


def planned(bundle: Bundle, images: tuple[int, ...], target: str, precision: str, decoder: str) -> Planned:
    """What a build plans for ``bundle``, also in fp32."""
    return plan(Contents(bundle, precision, decoder), images, TARGETS[target])


def parts(backend: Any) -> list[tuple[int, int]]:
    """The buffers that lie in one allocation: address and bytes of weights, counters and scratch of ``backend``."""
    out = []
    for program in backend.programs.values():
        shared, described = program.shared, backend.engine.kernels
        out += [(shared.addresses[name], weight.bytes) for name, weight in described.weights.items()]
        state = shared.states[program.name]
        out += [(state + offset, size) for offset, size in program.program.state.values()]
        for profile, context in program._contexts.items():
            for name, (_, size) in program.program.profiles[backend.engine.images[profile]].scratch.items():
                with suppress(KeyError):  # no launch takes it
                    out.append((context.launches.address(name), size))
    return out
