"""The kernels of a step, really compiled: what they take of a processor, and how they read memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from par_export.kernels.compiler import Compiled, Compiler
from par_export.kernels.plan_step import plan
from par_export.kernels.spec import Planned, Refused, Spec
from par_export.kernels.step_weights import storages
from par_export.kernels.targets import TARGETS, Target
from par_export.kernels.tile_shapes import AttentionTile, ProductTile
from par_export.kernels.tiles import MOST_HELD_BYTES, choose, holding_keys
from par_model.config import PARConfig, named
from par_runtime.bundle import Stored
from par_runtime.manifest import MATRICES, STORED_BYTES
from par_runtime.quantised import SCALE

pytest.importorskip("triton", reason="needs triton: pip install '.[kernels-build]'")
knobs = pytest.importorskip("triton.knobs")


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler(2) as compiler:
        yield compiler


def table(config: PARConfig) -> dict[str, Stored]:
    """Where the weights of a model would lie."""
    d, ffn, padded = config.dim, config.ffn_dim, -(-config.head_dim // 8) * 8
    inner = config.n_heads * padded
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab_size + 1020, d), "cos": (config.n_tokens, padded // 2),
        "sin": (config.n_tokens, padded // 2), "norm": (d,), "output": (d, config.vocab_size),
    }  # fmt: skip
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.attention_norm": (d,), f"layers.{i}.ffn_norm": (d,), f"layers.{i}.wqkv": (d, 3 * inner),
            f"layers.{i}.wo": (inner, d), f"layers.{i}.w13": (d, 2 * ffn), f"layers.{i}.w2": (ffn, d),
        }  # fmt: skip
    dtypes = {name: ("float32", 4) if name in ("cos", "sin") else ("float16", 2) for name in shapes}
    return {n: Stored(dtypes[n][0], shape, 0, dtypes[n][1] * int(np.prod(shape))) for n, shape in shapes.items()}


def quantised(stored: dict[str, Stored], dtype: str, group: int) -> dict[str, Stored]:
    """``stored`` with every matrix that has whole groups in codes of ``dtype``."""
    out = dict(stored)
    for name, at in stored.items():
        if name.endswith((*MATRICES, "output")) and at.shape[0] % group == 0:
            k, n = at.shape
            out[name] = Stored(dtype, at.shape, 0, int(k * n * STORED_BYTES[dtype]))
            out[name + SCALE] = Stored("float16", (k // group, n), 0, k // group * n * 2)
    return out


def planned(
    config: PARConfig,
    target: str | Target,
    precision: str,
    images: tuple[int, ...],
    codes: tuple[str, int] | None = None,
    given: Mapping[str, ProductTile | AttentionTile] = MappingProxyType({}),
    refused: Refused = frozenset(),
) -> Planned:
    def ones(stored: Stored) -> Any:
        return np.ones(stored.shape, np.float32)

    card = target if isinstance(target, Target) else TARGETS[target]
    stored = table(config)
    if codes is not None:
        stored = quantised(stored, *codes)
    tiles = choose(config, images, card, refused, given, storages(stored))
    return plan(config, stored, ones, ["group"], images, precision, card, tiles)


TINY = PARConfig(dim=40, n_layers=1, n_heads=2, vocab_size=50, n_classes=2, grid=(1, 8, 8), group_size=4)
CASES = [
    pytest.param("L", 4, "SM80", "fp16", 1, marks=pytest.mark.slow),
    pytest.param("L", 4, "SM90", "fp16", 1, marks=pytest.mark.slow),
    pytest.param("3B", 16, "SM90", "bf16", 1, marks=pytest.mark.slow),
    pytest.param("tiny", 4, "SM90", "fp16", 1, marks=pytest.mark.slow),  # tests of an engine compile these too
]


@pytest.mark.parametrize(("size", "query", "target", "precision", "images"), CASES, ids=str)
def test_kernels_of_a_step(size: str, query: int, target: str, precision: str, images: int, compiler: Compiler) -> None:
    config = TINY if size == "tiny" else named(size, group_size=query)
    of = planned(config, target, precision, (images,))
    specs = [spec for spec in of.specs.values() if spec.source != "pack.panels"]
    assert len(specs) <= 8
    compiled = compiler.compile(specs, TARGETS[target])
    for spec in specs:
        kernel, constants = compiled[spec.name], dict(spec.constants)
        assert kernel.fault(TARGETS[target]) is None, spec.source
        assert 16 <= kernel.registers <= 255
        assert kernel.warps == spec.warps
        if "BK" in constants:
            check_product(kernel, constants, target, config is TINY)
    if config is not TINY:
        units = {product.partition(".")[0] for kernel in compiled.values() for product in kernel.products}
        assert ("wgmma" in units) == (target == "SM90")
        assert {"step.qkv", "step.residual", "step.gates", "step.head"} <= {
            spec.source for spec in specs if "BK" in dict(spec.constants)
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "dtype", "group", "target", "precision", "images"),
    [("L", "int4", 32, "SM90", "bf16", 8), ("3B", "int8", 128, "SM80", "fp16", 1)],
)
def test_products_of_codes(
    size: str, dtype: str, group: int, target: str, precision: str, images: int, compiler: Compiler
) -> None:
    """Nothing spills; codes and activations are copied in the background, and the matrix units multiply them."""
    of = planned(named(size), target, precision, (images,), (dtype, group))
    specs = [spec for spec in of.specs.values() if dict(spec.constants).get("BITS") and "BM" in dict(spec.constants)]
    packs = [spec for spec in of.specs.values() if spec.source in ("pack.codes", "pack.scales")]
    assert {spec.source for spec in specs} == {"step.qkv", "step.residual", "step.gates", "step.head"}
    compiled = compiler.compile([*specs, *packs], TARGETS[target])
    for spec in (*specs, *packs):
        assert compiled[spec.name].fault(TARGETS[target]) is None, spec
    for spec in specs:
        kernel, c = compiled[spec.name], dict(spec.constants)
        unit = "wgmma" if c["PANELS"] and target == "SM90" else "mma.m16n8k16"
        assert all(kind.startswith(unit) for kind in kernel.products)
        assert kernel.products
        assert not {"1", "2"} & {*kernel.copies}
        assert kernel.copies["16"] >= 2
        depth = int(c["DEEP"] or c["BK"])
        panel = int(c["BN"]) * depth * int(c["BITS"]) // 8
        assert kernel.shared >= 2 * (panel + 2 * depth * int(c["BM"]))


@pytest.mark.parametrize(
    ("dtype", "precision", "most"), [pytest.param("int8", "bf16", 3.0, marks=pytest.mark.slow), ("int4", "fp16", 2.5)]
)
def test_codes_become_numbers_in_the_thread_that_multiplies_them(
    dtype: str, precision: str, most: float, compiler: Compiler, tmp_path: Path
) -> None:
    """From the first product to the last: no store to shared memory, few instructions for each code, and no shuffles
    but those of the norm, whose squares are added up there.
    """
    of = planned(named("3B"), "SM80", precision, (1,), (dtype, 64))
    spec = next(spec for spec in of.specs.values() if spec.source == "step.gates")
    lines = assembly(compiler.compile([spec], TARGETS["SM80"])[spec.name], tmp_path)
    products = [i for i, line in enumerate(lines) if "HMMA.16816" in line]
    between = [line for line in lines[products[0] : products[-1]] if "*/" in line]
    assert not any(" STS" in line for line in between)
    assert sum("SHFL" in line for line in between) <= 8
    codes = 8 * len(products)  # of a thread: 16 by 16 codes in 32 threads, and 8 rows of activations
    assert len(between) <= most * codes, len(between) / codes


def check_product(kernel: Compiled, constants: dict[str, Any], target: str, tiny: bool) -> None:
    """Weights come 16 bytes a thread and in the background, several stages of them; products are the matrix units'."""
    wide = int(constants["BN"]) * int(constants["PARTS"]) >= 64 and target == "SM90"
    assert all(kind.startswith("wgmma.mma.m64" if wide else "mma.m16n8k16") for kind in kernel.products)
    assert kernel.products
    assert not {"1", "2"} & {*kernel.copies}
    if not tiny:
        assert "2" not in kernel.loads
        assert kernel.copies["16"] >= 6  # weights and activations on their way to shared memory
        assert kernel.shared >= 2 * constants["BN"] * constants["BK"] * 2


def test_packing_compiles_for_every_stored_precision(compiler: Compiler) -> None:
    specs: list[Spec] = []
    for order, stored, packed in (
        ("pairs", "*fp16", "*fp16"),
        ("halves", "*fp32", "*bf16"),
        ("plain", "*bf16", "*fp16"),
    ):
        constants = {
            "K": 200, "N": 600, "WIDTH": 624, "ORDER": order, "HEAD": 100, "PADDED": 104,
            "DROP_ROWS": order == "plain", "BN": 32, "BK": 64, "PART": 32,
        }  # fmt: skip
        specs.append(Spec("pack.panels", tuple(constants.items()), (("raw", stored), ("packed", packed)), 4, 1))
    for kernel in compiler.compile(specs, TARGETS["SM80"]).values():
        assert kernel.fault(TARGETS["SM80"]) is None


@pytest.mark.parametrize(
    "target", ["SM86", *(pytest.param(other, marks=pytest.mark.slow) for other in ("SM100", "SM120"))]
)
def test_the_sampler_has_just_the_registers(target: str, compiler: Compiler) -> None:
    """The largest codebook that stays in registers fills them: none may spill."""
    of = planned(named("L", group_size=4), target, "fp16", (1,))
    spec = next(spec for spec in of.specs.values() if spec.source.startswith("draw."))
    kernel = compiler.compile([spec], TARGETS[target])[spec.name]
    assert kernel.fault(TARGETS[target]) is None


@pytest.mark.parametrize(
    ("target", "codes", "warps"), [("SM90", 4096, 4), pytest.param("SM80", 8192, 16, marks=pytest.mark.slow)]
)
def test_registers_stay_registers_where_there_are_enough(
    target: str, codes: int, warps: int, compiler: Compiler
) -> None:
    """Left alone, NVIDIA's assembler takes 128 of 255 and 64 of 128 registers here, and keeps two in memory."""
    of = planned(named("L", group_size=4), target, "fp16", (1,))
    draw = next(spec for spec in of.specs.values() if spec.source.startswith("draw."))
    constants = dict(draw.constants) | {"V": codes, "WIDE": codes, "LINE": 64}
    spec = Spec(draw.source, tuple(constants.items()), draw.parameters, warps, 1)
    assert compiler.compile([spec], TARGETS[target])[spec.name].spills == 0


def assembly(kernel: Compiled, folder: Path) -> list[str]:
    """The instructions of ``kernel``, a line each."""
    (folder / "cubin").write_bytes(kernel.cubin)
    tool = [knobs.nvidia.nvdisasm.path, "-c", str(folder / "cubin")]
    return subprocess.run(tool, check=True, capture_output=True, text=True).stdout.split("\n")


#: What matters for the order of memory, as letters.
ORDER = {
    r"STG": "S", r"BAR\.SYNC": "B", r"MEMBAR\.\w+\.GPU": "M", r"ATOMG": "A", r"CCTL\.IVALL": "C", r"LDG.*STRONG": "L"
}  # fmt: skip
#: Kernels that read gains or tables of angles before they wait, which nobody writes.
CONSTANT = ("step.embed", "step.qkv", "step.residual")


@pytest.mark.slow
def test_memory_is_read_and_written_in_the_order_that_dependent_launches_need(
    compiler: Compiler, tmp_path: Path
) -> None:
    """What other kernels write is read after the wait; inputs of the call come past the L1 cache before it. Parts of a
    sum are counted when all threads have stored theirs, and read when all threads know the count. The next kernel may
    start when the last product is done.
    """
    of = planned(named("3B", group_size=16), "SM90", "bf16", (1,))
    specs = [spec for spec in of.specs.values() if spec.source != "pack.panels"]
    compiled, joined = compiler.compile(specs, TARGETS["SM90"]), set()
    for spec in specs:
        lines = assembly(compiled[spec.name], tmp_path)
        wait = next(i for i, line in enumerate(lines) if "ACQBULK" in line)
        early, later = lines[:wait], lines[wait:]
        assert not any(re.search("LDGSTS|STG|ATOM|RED", line) for line in early), spec.source
        assert spec.source in CONSTANT or not any(re.search(r"LDG\.E(\.\d+)? ", line) for line in early), spec.source
        assert let_next_when_the_sums_are_done(early, later), spec.source
        letters = "".join(letter for line in later for what, letter in ORDER.items() if re.search(what, line))
        if "A" in letters:
            assert re.search("SB+MACBS?L", letters), spec.source
            joined.add(spec.source)
    assert joined == {"attention.attend", "step.residual"}


def let_next_when_the_sums_are_done(early: list[str], later: list[str]) -> bool:
    """Whether instructions before and after the wait let the next kernel start once, behind the last product."""
    starts = [i for i, line in enumerate(later) if "PREEXIT" in line]
    alone = len(starts) == 1 and not any("PREEXIT" in line for line in early)
    return alone and not any("MMA" in line for line in later[starts[0] :])


@pytest.mark.slow
@pytest.mark.parametrize("codes", [None, ("int8", 64), ("int4", 64)])
def test_products_in_parts_and_of_codes_let_the_next_kernel_start_when_their_sums_are_done(
    compiler: Compiler, tmp_path: Path, codes: tuple[str, int] | None
) -> None:
    of = planned(named("L"), "SM90", "fp16", (1,), codes)
    specs = [spec for spec in of.specs.values() if "BM" in dict(spec.constants)]
    assert len(specs) >= 4
    assert codes is not None or {dict(spec.constants)["PARTS"] for spec in specs} > {1}
    compiled = compiler.compile(specs, TARGETS["SM90"])
    for spec in specs:
        lines = assembly(compiled[spec.name], tmp_path)
        wait = next(i for i, line in enumerate(lines) if "ACQBULK" in line)
        assert let_next_when_the_sums_are_done(lines[:wait], lines[wait:]), spec


def behind_what_is_held(lines: list[str], of_thread: int) -> list[str]:
    """What follows when the next kernel was let start, right after the wait; before it each thread loads so many
    pieces of 16 bytes, all of them on their way together, and stores them in shared memory.
    """
    wait = next(i for i, line in enumerate(lines) if "ACQBULK" in line)
    letters = "".join(
        "L" if "LDG.E.128" in line else "S" for line in lines[:wait] if re.search("LDG.E.128|STS.128", line)
    )
    assert letters.count("L") == letters.count("S") == of_thread
    assert letters.index("S") >= 0.8 * of_thread, letters  # the assembler may begin to store when most are asked for
    later = lines[wait:]
    start = next(i for i, line in enumerate(later) if "PREEXIT" in line)
    assert not any(re.search("LDG|MMA|LDGSTS", line) for line in later[:start])
    return later[start:]


@pytest.mark.parametrize("size", ["L", pytest.param("XL", marks=pytest.mark.slow)])
def test_held_weights_are_in_shared_memory_before_the_wait(size: str, compiler: Compiler, tmp_path: Path) -> None:
    """All of them are asked for before the first is stored there, so that they are on their way together. With
    ``at_once`` the next kernel is let start right after the wait.
    """
    card = replace(TARGETS["SM90"], held_bytes=MOST_HELD_BYTES, at_once=True)
    of = planned(named(size), card, "fp16", (1,))
    specs = [s for s in of.specs.values() if dict(s.constants).get("HELD") and s.source != "attention.attend"]
    assert {spec.source for spec in specs} >= {"step.qkv", "step.residual", "step.gates"}
    compiled = compiler.compile(specs, card)
    for spec in specs:
        kernel, c = compiled[spec.name], dict(spec.constants)
        assert kernel.fault(card) is None, spec
        assert all(kind.startswith("wgmma") for kind in kernel.products)
        of_thread = int(c["HELD"]) * int(c["BN"]) * int(c["BK"]) * 2 // (32 * spec.warps * 16)
        assert any("MMA" in line for line in behind_what_is_held(assembly(kernel, tmp_path), of_thread)), spec


@pytest.mark.parametrize(
    ("size", "spans"), [("L", 1), ("L", 2), pytest.param("3B", 2, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("query", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_held_keys_are_in_shared_memory_before_the_wait(
    size: str, spans: int, query: int, compiler: Compiler, tmp_path: Path
) -> None:
    """Keys and values, all asked for before the first is stored there. What is left to load is the queries, and the
    keys of the call itself.
    """
    card = replace(TARGETS["SM90"], at_once=True)
    config = named(size, group_size=query)
    tile = next(each for each in holding_keys(config, card) if -(-config.n_tokens // each.span) == spans)
    of = planned(config, card, "fp16", (1,), given={"attention": tile})
    (spec,) = (spec for spec in of.specs.values() if spec.source == "attention.attend")
    c = dict(spec.constants)
    assert (c["SPAN"], c["SPLITS"], c["HELD"], spec.warps) == (tile.span, spans, tile.span, tile.warps)
    kernel = compiler.compile([spec], card)[spec.name]
    assert kernel.fault(card) is None
    lines = assembly(kernel, tmp_path)
    later = behind_what_is_held(lines, 2 * tile.span * int(c["WIDE"]) * 2 // (32 * spec.warps * 16))
    products = [i for i, line in enumerate(later) if "MMA" in line]
    own = max(64, query) * int(c["WIDE"]) * 2 * 2 // (32 * spec.warps * 16)
    before = [line for line in later[: products[0]] if "LDG.E.128" in line]
    assert own <= len(before) <= own + 2
    if spans == 1:  # nobody has to join anything
        assert not any("LDG" in line for line in later[products[0] :])
    assert not any("LDL" in line or "STL" in line for line in lines)


def test_nothing_is_overwritten_before_all_threads_have_loaded_it(compiler: Compiler, tmp_path: Path) -> None:
    """With more threads than numbers in a tile, the compiler loads x twice, for two layouts of threads."""
    of = planned(named("L", group_size=4), "SM90", "fp16", (1,))
    wo = next(spec for spec in of.specs.values() if spec.source == "step.residual")
    spec = replace(wo, warps=8, constants=tuple((dict(wo.constants) | {"BN": 16, "SPLIT": 2}).items()))
    lines = assembly(compiler.compile([spec], TARGETS["SM90"])[spec.name], tmp_path)
    last = lines[next(i for i, line in enumerate(lines) if "ATOMG" in line) :]  # what the last block to arrive does
    loads = [i for i, line in enumerate(last) if re.search(r"LDG\.E(\.64|\.128)? ", line)]
    stores = [i for i, line in enumerate(last) if "STG.E" in line and ", RZ" not in line]  # the counter gets a zero
    barriers = [i for i, line in enumerate(last) if "BAR.SYNC" in line]
    assert loads
    assert any(loads[-1] < barrier < stores[0] for barrier in barriers)


def test_only_gpus_that_need_it_need_a_driver_of_cuda_13(compiler: Compiler) -> None:
    """The form of a cubin is in byte 8 of it: 7 is what drivers of CUDA 12 load, 8 what the ptxas of CUDA 13 writes."""
    embed = {}
    for target in ("SM80", "SM90", "SM120", "SM90"):
        of = planned(TINY, target, "fp16", (1,))
        spec = next(spec for spec in of.specs.values() if spec.source == "step.embed")
        embed[target] = compiler.compile([spec], TARGETS[target])[spec.name].cubin[8]
    assert (embed["SM80"], embed["SM90"]) == (7, 7)
    assert embed["SM120"] >= 7
