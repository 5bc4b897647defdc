"""Blocks of many rows: what is planned for them has room, and what Triton makes of them is what they are for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_step_compile import assembly, let_next_when_the_sums_are_done, planned

from par_export.kernels.compiler import Compiler
from par_export.kernels.shape_sets import is_of
from par_export.kernels.spec import Planned, Spec
from par_export.kernels.targets import TARGETS
from par_export.kernels.tile_shapes import numbers_of
from par_export.kernels.tiles import choose
from par_export.kernels.tune import candidates
from par_model.config import named
from par_runtime.backends.program import Pointer

OF_EIGHT = (1, 8)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler(2) as compiler:
        yield compiler


def of_many(planned: Planned) -> list[Spec]:
    return [spec for spec in planned.specs.values() if dict(spec.constants).get("PANELS")]


@pytest.mark.parametrize(("size", "query", "images"), [("L", 16, 8), ("L", 16, 3), ("3B", 16, 8), ("XL", 4, 16)])
@pytest.mark.parametrize("target", ["SM80", "SM90"])
def test_scratch_memory_holds_what_the_blocks_write(size: str, query: int, images: int, target: str) -> None:
    """Rows that are none too: they are multiplied, so what lies there must be a place; and each part of every sum."""
    config = replace(named(size, group_size=query), n_layers=2)
    program = planned(config, target, "fp16", (1, images)).programs["step"]
    profile, seen = program.profiles[images], 0
    kernels = {spec.name: spec for spec in planned(config, target, "fp16", (1, images)).specs.values()}
    for launch in (*profile.layer, *profile.after):
        spec = kernels[launch.kernel]
        constants, names = dict(spec.constants), [name for name, _ in spec.parameters]
        if "PANELS" not in constants:
            continue
        seen += constants["PANELS"] > 0
        rows, blocks, parts = launch.grid
        bm, bn = int(constants["BM"]), int(constants["BN"])
        assert rows * bm >= 2 * query * images > (rows - 1) * bm
        at = {name: each for name, each in zip(names, launch.arguments, strict=True) if isinstance(each, Pointer)}
        reads = "inputs" if "inputs" in at else "h"
        stride = int(constants["K_STRIDE"] if reads == "inputs" else constants["STRIDE"])
        assert profile.scratch[at[reads].name][1] >= rows * bm * stride * 2
        tiles = constants["TILES"] if "TILES" in constants else blocks * max(1, int(constants["PANELS"]))
        assert profile.scratch[at["ss"].name][1] >= rows * bm * int(tiles) * 4
        if parts > 1:
            assert profile.scratch["partial"][1] >= rows * blocks * parts * bm * bn * 4
            assert program.state["counters"][1] >= 4 * rows * blocks
    assert seen >= 1


@pytest.mark.parametrize(
    ("size", "source"),
    [
        ("L", "step.gates"),
        ("3B", "step.residual"),
        pytest.param("3B", "step.gates", marks=pytest.mark.slow),
        pytest.param("3B", "step.qkv", marks=pytest.mark.slow),
        pytest.param("3B", "step.head", marks=pytest.mark.slow),
        pytest.param("XL", "step.gates", marks=pytest.mark.slow),
    ],
)
def test_a_turn_multiplies_while_the_next_ones_are_copied(
    size: str, source: str, compiler: Compiler, tmp_path: Path
) -> None:
    """The loop of a block of 256 rows' worth of work on SM90, in the machine code: copies of 16 bytes in the
    background, the wide instruction, and one product on its way when the next turn begins.
    """
    card = TARGETS["SM90"]
    config = named(size, group_size=16)
    spec = next(spec for spec in of_many(planned(config, "SM90", "fp16", OF_EIGHT)) if spec.source == source)
    kernel, constants = compiler.compile([spec], card)[spec.name], dict(spec.constants)
    assert kernel.fault(card) is None
    assert set(kernel.copies) == {"16"}
    wide = re.compile(f"wgmma.mma.m64n{constants['BM']}k16")
    assert all(wide.fullmatch(kind) for kind in kernel.products)
    turn = int(constants["DEEP"]) * int(constants["PARTS"])
    per_warpgroup = int(constants["BN"]) // 64 / (spec.warps / 4)
    assert sum(kernel.products.values()) == turn // 16 * per_warpgroup
    lines = [line for line in assembly(kernel, tmp_path) if "*/" in line]
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line]
    of_turn = [int(re.findall(r"gsb0, (0x\d)", lines[i])[0], 16) for i in waits]
    assert min(of_turn[:-1]) >= 1  # so many are still on their way; none after the last turn
    loop = lines[products[0] : waits[-1]]  # with few turns, all of them one after the other
    assert sum("LDGSTS" in line for line in loop) >= 8
    assert not [line for line in loop if re.search(r"(?<!@!PT )\b(STS|LDS|LDL|STL|LDG)\b", line)]
    assert len(loop) < 25 * len(products)
    wait = next(i for i, line in enumerate(lines) if "ACQBULK" in line)
    assert let_next_when_the_sums_are_done(lines[:wait], lines[wait:])


@pytest.mark.parametrize("codes", [("int8", 64), pytest.param(("int4", 64), marks=pytest.mark.slow)])
def test_the_wide_instruction_takes_codes_from_registers(
    codes: tuple[str, int], compiler: Compiler, tmp_path: Path
) -> None:
    """They come in the background, become numbers in registers, and are not stored again; scales are on their way while
    the turn before multiplies.
    """
    card = TARGETS["SM90"]
    specs = of_many(planned(named("3B", group_size=16), "SM90", "fp16", OF_EIGHT, codes))
    spec = next(spec for spec in specs if spec.source == "step.gates")
    kernel = compiler.compile([spec], card)[spec.name]
    assert kernel.fault(card) is None
    assert not {"1", "2", "4"} & {*kernel.copies}
    lines = [line for line in assembly(kernel, tmp_path) if "*/" in line]
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    assert all(re.search(r"HGMMA.64x\d+x16.F32 R\d+, R\d+, gdesc", lines[i]) for i in products)
    loop = lines[products[0] : products[-1]]
    assert not any(re.search(r"\b(STS|LDL|STL|SHFL)\b", line) for line in loop)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("size", "codes"), [("L", None), ("3B", None), ("L", ("int8", 64)), ("L", ("int4", 32))])
def test_every_target_has_blocks_of_many_rows_that_compile(
    size: str, codes: tuple[str, int] | None, target: str, compiler: Compiler
) -> None:
    """Most of them at the first try; a build plans others in place of those that keep registers in memory."""
    refused, card = frozenset[Spec](), TARGETS[target]
    for _ in range(4):
        specs = of_many(planned(named(size, group_size=16), target, "fp16", OF_EIGHT, codes, refused=refused))
        assert len(specs) >= 2
        compiled = compiler.compile(specs, card)
        faults = [spec for spec in specs if compiled[spec.name].fault(card) is not None]
        if not faults:
            return
        assert len(faults) <= 2
        refused |= frozenset(faults)
    pytest.fail("some are always refused")


def test_tuning_tries_other_blocks_and_the_best_shape_for_few_rows() -> None:
    config, card = named("3B", group_size=16), TARGETS["SM90"]
    found = candidates(config, "gates", OF_EIGHT, card, 6, 8)
    first = choose(config, OF_EIGHT, card)[8].gates
    assert found[0] == first
    assert first.many is not None
    alike = [tile for tile in found[:4] if (tile.BN, tile.BK) == (first.BN, first.BK)]  # type: ignore[union-attr]
    assert alike == [first, found[1], found[2], replace(first, many=None)]
    blocks = [numbers_of(tile) for tile in found[:3]]
    assert len({(each["columns"], each["block_rows"]) for each in blocks}) == 3
    of_one = candidates(config, "gates", OF_EIGHT, card, 6, 1)
    assert all(tile.many is None for tile in of_one)  # type: ignore[union-attr]


def test_a_kernel_is_told_apart_from_one_of_other_blocks() -> None:
    config, card = named("3B", group_size=16), TARGETS["SM90"]
    tile = choose(config, OF_EIGHT, card)[8].gates
    specs = [spec for spec in planned(config, "SM90", "fp16", OF_EIGHT).specs.values() if spec.source == "step.gates"]
    kernels = [SimpleNamespace(constants=dict(spec.constants), warps=spec.warps) for spec in specs]
    assert [is_of(tile, kernel) for kernel in kernels] == [bool(kernel.constants["PANELS"]) for kernel in kernels]  # type: ignore[arg-type]
    few = choose(config, OF_EIGHT, card)[1].gates
    assert [is_of(few, kernel) for kernel in kernels] == [not kernel.constants["PANELS"] for kernel in kernels]  # type: ignore[arg-type]
