"""Engines of kernels for the stand-in GPU: their cubins are names, by which the stand-in knows what to run.

``bare.register`` tells it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from par_export.kernels import plan_decoder, plan_step
from par_export.kernels.build import write_files
from par_export.kernels.compiler import Compiled
from par_export.kernels.contents import Contents
from par_export.kernels.spec import Planned, Spec
from par_export.kernels.step_weights import storages
from par_export.kernels.targets import TARGETS
from par_export.kernels.tile_shapes import Many, ProductTile, Tiles
from par_export.kernels.tiles import choose
from par_runtime.backends.engines import ENGINE_JSON, ENGINE_SCHEMA, ENGINES, KERNELS
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.kernels.plan import KernelContext, KernelProgram
from par_runtime.backends.program import VERSION, to_json
from par_runtime.bundle import Bundle, seal

SHARED = 64 * 1024  #: bytes of shared memory of each stand-in kernel: more than it may take without asking


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``engine.json`` and seal it again."""
    entry = json.loads((folder / ENGINE_JSON).read_text())
    del entry["hash"]
    change(entry)
    (folder / ENGINE_JSON).write_text(json.dumps(seal(entry)))


def stand_in_of(spec: Spec, cubin: str, **changes: Any) -> Compiled:
    """What a compiler says of ``spec``, with a name for a cubin; ``changes`` are fields."""
    made = Compiled(
        cubin=cubin.encode(),
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
    return replace(made, **changes)


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
    compiled = {name: stand_in_of(spec, f"stand-in for {name} on {target}") for name, spec in planned.specs.items()}
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


def planned(
    bundle: Bundle, images: tuple[int, ...], target: str, precision: str, decoder: str, many: bool = False
) -> Planned:
    """What a build plans for ``bundle``, also in fp32, and in small pieces: products in two parts of K, whose sums the
    last block adds up, and keys in several spans. ``many``: batches of two images and more take blocks of many rows, of
    two panels of 16 columns.
    """
    contents, card = Contents(bundle, precision, decoder), TARGETS[target]
    config = contents.config
    tiles = choose(config, images, card, storages=storages(contents.step))
    tiles = {
        count: replace(
            of,
            attention=replace(of.attention, span=32, chunk=32),
            w2=replace(of.w2, BK=min(of.w2.BK, config.ffn_dim // 2), split=2),
        )
        for count, of in tiles.items()
    }
    if many:
        tiles = {count: replace(of, **_many(of, count)) for count, of in tiles.items()}
    phases = [phase.name for phase in bundle.phases]
    out = plan_step.plan(config, contents.step, contents.read, phases, images, precision, card, tiles)
    if contents.tokenizer is not None:
        out.merge(plan_decoder.plan(contents.tokenizer, config, contents.decoder, images, decoder, card))
    return out


def _many(tiles: Tiles, images: int) -> dict[str, ProductTile]:
    """The products of ``tiles`` in panels of 16 columns, of one part or two, and such blocks."""
    out = {}
    for i, kind in enumerate(("qkv", "wo", "gates", "w2", "head")):
        tile = replace(getattr(tiles, kind), BN=16, BK=32, warps=1 + i % 2, ahead=0)
        block = Many(32, 16, 16, 4, 2) if images > 1 else None
        out[kind] = replace(tile, many=block)
    return out


class Parts:
    """The buffers that lie in one allocation, as launches of ``backend`` see them: weights, counters, scratch."""

    def __init__(self, backend: GpuBackend) -> None:
        self._backend = backend
        self._of: dict[int, list[tuple[int, int]]] = {}

    def __call__(self, at: int) -> list[tuple[int, int]]:
        """Address and bytes of each, for the launch whose arguments lie at ``at``."""
        if not self._of:
            for program in self._programs:
                for profile, context in program._contexts.items():
                    found = self._all(program, profile, context)
                    self._of |= {call[2]: found for call in context.launches._calls}
        return self._of.get(at, [])  # none of a launch that packs a matrix

    def clear(self) -> None:
        """Scratch memory may have moved."""
        self._of.clear()

    @property
    def _programs(self) -> list[KernelProgram]:
        return list(self._backend.programs.values())  # type: ignore[arg-type]

    def _all(self, program: KernelProgram, profile: int, context: KernelContext) -> list[tuple[int, int]]:
        shared, engine = program.shared, self._backend.engine
        assert engine.kernels is not None
        out = [(shared.addresses[name], weight.bytes) for name, weight in engine.kernels.weights.items()]
        state = shared.states[program.name]
        out += [(state + offset, size) for offset, size in program.program.state.values()]
        for name, (_, size) in program.program.profiles[engine.images[profile]].scratch.items():
            with suppress(KeyError):  # no launch takes it
                out.append((context.launches.address(name), size))
        return out
