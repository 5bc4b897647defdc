"""Single products that are timed on a card: what is tried, and what the page says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double.driver import Driver

from par_export.card import product_times
from par_export.card.findings import Findings
from par_export.card.plan import CODES, MODELS, Model
from par_export.card.product_table import products_table
from par_export.card.products import trials_for
from par_export.card.table import markdown
from par_export.kernels.product_trials import KINDS, Trial, as_a_build_chooses, trials_of
from par_export.kernels.step_weights import BITS
from par_export.kernels.targets import TARGETS
from par_export.kernels.tile_model import matrix_of, model_us
from par_export.kernels.tile_shapes import NUMBERS, Storage
from par_export.kernels.tiles import choose, many_of, products
from par_export.quantised import Codes
from par_runtime.bench.machine import describe
from par_runtime.cli import dispatch as cli

SM90 = TARGETS["SM90"]


# -- what is tried ----------------------------------------------------------------------------------------------------


def test_models_and_rows_are_those_of_the_batches_that_are_asked_for() -> None:
    trials = trials_for(MODELS, (1, 8), SM90)
    order = list(dict.fromkeys((each.product.rows, each.product.model) for each in trials))
    sizes = [f"PAR-{size}" for size in ("3B", "L", "XL", "XXL")]
    codes = [f"PAR-{size} {dtype} group 64" for size in ("3B", "L") for dtype in ("int8", "int4")]
    # n = 4, n = 16, and both in batches of 8; codes at n = 4 alone
    assert order == [(n, name) for n in (8, 32, 64, 256) for name in (*sizes, *(codes if n in (8, 64) else ()))]
    assert {each.product.rows for each in trials_for(MODELS[:1], (1,), SM90)} == {8, 32}
    assert {each.product.rows for each in trials_for(MODELS[:1], (2,), SM90)} == {16, 64}
    assert {each.product.rows for each in trials_for(MODELS[:1], (64,), SM90)} == {256}  # no more
    of_3b = {each.product.kind: each.product for each in trials if each.product.model == "PAR-3B"}
    assert list(of_3b) == list(KINDS)
    matrices = {kind: (product.columns, product.depth) for kind, product in of_3b.items()}
    assert matrices == {
        "gates": (17408, 3200),
        "w2": (3200, 8704),
        "qkv": (9600, 3200),
        "wo": (3200, 3200),
        "head": (16384, 3200),
    }


@pytest.mark.parametrize("size", MODELS[:4], ids=lambda model: model.name)
@pytest.mark.parametrize(("n", "images"), [(4, 1), (16, 1)])
def test_the_first_of_a_product_is_what_a_build_chooses(size: Model, n: int, images: int) -> None:
    config = replace(size.config, group_size=n)
    built = choose(config, (images,), SM90)[images]
    for kind in KINDS:
        own = [each for each in trials_of("x", size.config, 2 * n * images, SM90) if each.product.kind == kind]
        assert own[0].tile == getattr(built, kind)
        assert own[0] == as_a_build_chooses(own, ())
        considered = [each[images] for each in products(config, kind, (images,), SM90)][:12]
        assert [each.tile for each in own if each.planned] == considered
        assert not any(each.planned and (each.tile.held or each.at_once) for each in own)
        assert {each.layout for each in own} == set(range(len(considered)))
        for each in own:
            assert each.model_us == model_us(config, kind, replace(each.tile, held=0), images, SM90)
        for layout, planned in enumerate(considered):
            holding = [each for each in own if each.layout == layout and each.tile.held]
            assert [each.at_once for each in holding] in ([], [False, True])
            assert len({each.tile for each in holding}) <= 1
            tried = [each.tile for each in own if each.layout == layout and each not in holding]
            assert len(set(tried)) == len(tried)
            assert len({tile.stages for tile in tried}) in (1, 2, 3)
            assert {(tile.BN, tile.BK, tile.split, tile.warps) for tile in tried} == {
                (planned.BN, planned.BK, planned.split, planned.warps)
            }
            assert {bool(tile.ahead) for tile in tried} == ({False, True} if planned.ahead else {False})


@pytest.mark.parametrize("codes", [None, *CODES], ids=str)
@pytest.mark.parametrize("size", MODELS[:3], ids=lambda model: model.name)
@pytest.mark.parametrize(("n", "images"), [(4, 8), (16, 4), (16, 8)])
def test_many_rows_are_tried_in_every_block_that_the_planner_weighs(
    size: Model, n: int, images: int, codes: Codes | None
) -> None:
    config, positions = replace(size.config, group_size=n), 2 * n * images
    storage = NUMBERS if codes is None else Storage(BITS[codes.dtype], codes.group)
    built = choose(config, (images,), SM90, storages=dict.fromkeys(KINDS, (storage,)))[images]
    trials = list(trials_of("x", size.config, positions, SM90, storage))
    assert [Trial.from_json(each.to_json()) for each in trials] == trials
    for kind in KINDS:
        own = [each for each in trials if each.product.kind == kind]
        assert own[0].tile == getattr(built, kind)
        assert own[0] == as_a_build_chooses(own, ())
        considered = [each[images] for each in products(config, kind, (images,), SM90, storage=storage)]
        firsts = [next(each.tile for each in own if each.layout == layout) for layout in {each.layout for each in own}]
        assert [tile for tile in considered if tile in firsts] == firsts
        assert len({(tile.BN, tile.split) for tile in firsts}) == len(firsts) > 1
        columns, depth = matrix_of(config, kind)
        for layout, first in enumerate(firsts):
            tried = [each.tile for each in own if each.layout == layout]
            many = list(many_of(replace(first, many=None), kind, columns, depth, positions, SM90))
            assert {tile.many for tile in tried} - {None} == {tile.many for tile in many}
            assert sum(tile.many is None for tile in tried) == 1
        for each in own:
            assert each.planned
            rows, columns_, split = each.grid
            assert rows * each.block_rows == positions
            assert columns_ * each.tile.columns >= columns > (columns_ - 1) * each.tile.columns
            assert split == each.tile.split
            assert each.model_us == model_us(config, kind, each.tile, images, SM90)
            constants = dict(each.spec.constants)
            assert (constants["BM"], constants["BN"]) == (each.block_rows, each.tile.columns)
            assert (constants["PANELS"] > 0) == (each.tile.many is not None)


def test_without_a_block_that_the_compiler_refuses_the_choice_is_the_next_of_the_tried() -> None:
    own = [each for each in trials_of("x", MODELS[0].config, 256, SM90) if each.product.kind == "qkv"]
    refused = [own[0]]
    for _ in range(4):
        chosen = as_a_build_chooses(own, refused)
        assert chosen is not None
        gone = {(each.tile.columns, each.tile.BK, each.block_rows, each.tile.panels) for each in refused}
        assert (chosen.tile.columns, chosen.tile.BK, chosen.block_rows, chosen.tile.panels) not in gone
        assert chosen.model_us >= refused[-1].model_us
        refused.append(chosen)
    words = str(own[0])
    assert words.startswith("x qkv, 256 rows: BN 32, BK 128, split 1, columns 64, block_rows 128, depth 64, warps 4")


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize(("size", "images"), [(MODELS[0], 1), (MODELS[1], 4)], ids=["3B", "L, batch 4"])
def test_the_first_of_a_product_of_codes_is_what_a_build_chooses(size: Model, images: int, codes: Codes) -> None:
    config, storage = replace(size.config, group_size=4), Storage(BITS[codes.dtype], codes.group)
    built = choose(config, (images,), SM90, storages=dict.fromkeys(KINDS, (storage,)))[images]
    trials = list(trials_of("x", size.config, 8 * images, SM90, storage))
    for kind in KINDS:
        own = [each for each in trials if each.product.kind == kind]
        assert own[0].tile == getattr(built, kind)
        assert own[0] == as_a_build_chooses(own, ())
        assert 1 < len({each.layout for each in own}) <= 8
        assert not any(each.tile.held for each in own)
        assert {each.tile.storage for each in own} == {storage}
        assert dict(own[0].spec.parameters)["scales"] == "*fp16"
        assert [Trial.from_json(each.to_json()) for each in own] == own


def test_a_matrix_whose_depth_is_no_number_of_groups_has_no_codes_to_be_tried() -> None:
    config = replace(MODELS[1].config, dim=1024 + 32, n_heads=11)
    assert config.ffn_dim % 64 == 0
    kinds = {each.product.kind for each in trials_of("x", config, 8, SM90, Storage(8, 64))}
    assert kinds == {"w2"}


def test_all_weights_of_a_block_are_held_where_they_fit() -> None:
    trials = [each for each in trials_of("x", MODELS[1].config, 8, SM90) if each.product.kind == "qkv"]
    held = [each for each in trials if (each.tile.BN, each.tile.BK, each.tile.held) == (32, 256, 4)]
    assert [str(each) for each in held] == [
        "x qkv, 8 rows: BN 32, BK 256, split 1, warps 4, stages 2, ahead 0, held 4",
        "x qkv, 8 rows: BN 32, BK 256, split 1, warps 4, stages 2, ahead 0, held 4, at once",
    ]
    assert len({each.spec.name for each in held}) == 2
    assert all(each.spec.many_registers for each in held)
    assert not trials[0].spec.many_registers
    assert [Trial.from_json(each.to_json()) for each in held] == held


def test_numbers_of_stages_go_from_two_to_what_fits() -> None:
    tried = [each.tile.stages for each in trials_of("x", MODELS[0].config, 8, SM90) if each.product.kind == "gates"]
    assert tried[:3] == [6, 4, 2]


@pytest.mark.parametrize("kind", ["gates", "w2"])
def test_without_a_shape_that_the_compiler_refuses_the_choice_is_the_next_one_of_a_build(kind: str) -> None:
    """Which has other panels: of w2 the second layout has those of the first, in more parts of K."""
    config = replace(MODELS[0].config, group_size=16)
    own = [each for each in trials_of("x", config, 32, SM90) if each.product.kind == kind]
    refused = [own[0]]
    for _ in range(3):
        built = choose(config, (1,), SM90, refused=frozenset(each.spec for each in refused))[1]
        chosen = as_a_build_chooses(own, refused)
        assert chosen is not None
        assert chosen.tile == getattr(built, kind)
        refused.append(chosen)
    assert as_a_build_chooses(own, own) is None
    assert as_a_build_chooses(own, [each for each in own if not each.planned]) == own[0]


def test_sums_of_squares_come_in_the_tiles_that_a_build_leaves() -> None:
    """They lie in registers beside the sums of a product, so a wrong number of them is another kernel."""
    config = replace(MODELS[0].config, group_size=16)
    built = choose(config, (1,), SM90)[1]
    found = {each.product.kind: each.product.squares for each in trials_of("x", config, 32, SM90)}
    assert built.wo.BN != built.w2.BN
    assert found["gates"] == -(-config.dim // built.wo.BN)
    assert found["qkv"] == found["head"] == -(-config.dim // built.w2.BN)


# -- the page ---------------------------------------------------------------------------------------------------------


def line(kernel: str, us: float, chosen: bool = False, **changes: Any) -> dict[str, Any]:
    shape = {
        "BN": 64,
        "BK": 128,
        "split": 1,
        "warps": 4,
        "stages": 6,
        "parts": 1,
        "ahead": 0,
        "held": 0,
        "columns": 0,
        "block_rows": 0,
        "depth": 0,
        "at_once": False,
    }
    facts = {"name": "gates-0", "compiler": "triton 3.9.0", "model_us": 9.0, "error": 3e-4}
    about = {"kind": "product", "model": "PAR-L", "kernel": kernel, "rows": 8, "chosen": chosen}
    return about | shape | facts | {"samples_us": [9 * us, us, us / 2, us, us]} | changes


def test_the_page_has_the_choice_of_a_build_beside_the_fastest() -> None:
    lines = [
        line("gates", 5.0, chosen=True),
        line("gates", 4.0, BN=32, held=4, at_once=True),
        line("gates", 6.0, stages=2),
        line("wo", 2.0, chosen=True),
        line("wo", 2.5, split=2),
        line("w2", 3.0, split=4),
        line("gates", 7.0, chosen=True, rows=32),
    ]
    found = Findings(describe(None), "c", "d", lines=lines)
    shape = "BN {}, BK 128, split {}, warps 4, stages 6, ahead 0, held {}"
    of_64, of_32 = shape.format(64, 1, 0), f"{shape.format(32, 1, 4)}, at once"
    table = products_table([found]).splitlines()
    assert table[2:] == [
        f"| PAR-L | gates | 8 | 3 | {of_64} | 5 | {of_32} | 4 | 25.0 % |",
        f"| PAR-L | wo | 8 | 2 | {of_64} | 2 | {of_64} | 2 | 0.0 % |",
        f"| PAR-L | w2 | 8 | 1 |  |  | {shape.format(64, 4, 0)} | 3 |  |",
        f"| PAR-L | gates | 32 | 1 | {of_64} | 7 | {of_64} | 7 | 0.0 % |",
        "",
        "As a build makes them they are 8.3 % slower than the fastest on average, and 25.0 % at most "
        "(PAR-L gates, 8 rows).",
    ]
    later = Findings(describe(None), "c", "e", lines=[line("gates", 8.0, chosen=True)])
    table = products_table([found, later]).splitlines()
    assert table[2] == f"| PAR-L | gates | 8 | 1 | {of_64} | 8 | {of_64} | 8 | 0.0 % |"
    assert len(table) == 8
    assert "Products, each alone" not in markdown([Findings(describe(None), "c", "d")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "attention"}, "kernel is 'attention'; expected one of gates, w2, qkv, wo, head"),
        ({"samples_us": [1.0, 0.0]}, "samples_us is [1.0, 0.0]; expected microseconds above 0"),
        ({"samples_us": []}, "samples_us is []; expected a list of 1 to"),
        ({"chosen": 1}, "chosen is 1; expected true or false"),
        ({"BN": 0}, "BN is 0; expected a whole number from 1 to"),
        ({"ahead": -1}, "ahead is -1; expected a whole number from 0 to"),
        ({"held": None}, "held is None; expected a whole number from 0 to"),
        ({"at_once": 0}, "at_once is 0; expected true or false"),
        ({"model_us": "9"}, "model_us is '9'; expected a number from 0 to"),
        ({"error": None}, "error is None; expected a number from 0 to"),
        ({"model": 3}, "model is 3; expected a text of at most"),
        ({"rows": True}, "rows is True; expected a whole number from 1 to"),
    ],
)
def test_bad_lines_of_a_file_are_one_error(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    where = {"gpu": "H200", "driver": "580.1", "commit": "aaaa", "date": "2026-02-01 10:00 UTC"}
    good = json.dumps(line("gates", 5.0) | where)
    file.write_text(f"{good}\n")
    assert cli.main(["bench", "--suite", "gpu", "--from", str(file)]) == 0
    assert "### Products, each alone" in capsys.readouterr().out
    file.write_text(f"{good}\n{json.dumps(line('gates', 5.0) | where | change)}\n")
    assert cli.main(["bench", "--suite", "gpu", "--from", str(file)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{file}, line 2: not a line of a GPU's report ({message}" in said


def test_a_matrix_is_packed_as_the_kernels_of_an_engine_pack_it(driver: Driver) -> None:
    """Beside the products, which are right on it: ``pack.panels`` itself."""
    import torch
    from double import interpreter

    random = np.random.default_rng(0)
    matrix = random.standard_normal((48, 40)).astype(np.float16)  # [N, K]
    for bn, bk, parts in ((32, 32, 1), (16, 64, 4)):
        tiles, blocks = -(-48 // bn), -(-40 // bk)
        raw, out = np.ascontiguousarray(matrix.T), np.full(tiles * blocks * bn * bk, np.nan, np.float16)
        constants = {"K": 40, "N": 48, "WIDTH": 48, "ORDER": "plain", "HEAD": 8, "PADDED": 8, "DROP_ROWS": False}
        constants |= {"BN": bn, "BK": bk, "PART": bk // parts}
        kinds = (("raw", "*fp16"), ("packed", "*fp16"))
        addresses = [raw.ctypes.data, out.ctypes.data]
        interpreter.run_launch("pack.panels", constants, kinds, (tiles, blocks, 1), addresses)
        ours = product_times.packed(torch.from_numpy(matrix), bn, bk, parts)
        np.testing.assert_array_equal(ours.numpy().ravel(), out)


@pytest.mark.parametrize(("dtype", "group", "sub"), [("int8", 32, 32), ("int4", 64, 64), ("int4", 64, 32)])
def test_codes_are_packed_as_the_kernels_of_an_engine_pack_them(
    driver: Driver, dtype: str, group: int, sub: int
) -> None:
    import torch
    from double import interpreter

    from par_runtime.quantised import packed as stored

    random, bits = np.random.default_rng(0), BITS[dtype]
    n, k, bn, bk = 48, 2 * group, 32, 128
    codes = random.integers(-8 if bits == 4 else -127, 2 ** (bits - 1), (n, k))
    scales = random.standard_normal((n, k // group)).astype(np.float16)
    tiles, blocks, pieces = -(-n // bn), -(-k // bk), -(-k // bk) * bk * bits // 8 // sub
    groups = blocks * bk // group
    common = {"K": k, "N": n, "WIDTH": n, "ORDER": "plain", "HEAD": 8, "PADDED": 8, "BN": bn}
    raw = np.frombuffer(stored(np.ascontiguousarray(codes.T).astype(np.int8), dtype), np.uint8).copy()
    out = np.full((tiles, pieces, bn, sub), 0xFF, np.uint8)
    constants: dict[str, Any] = common | {"SUB": sub, "PIECES": pieces, "BITS": bits}
    addresses = [raw.ctypes.data, out.ctypes.data]
    kinds: tuple[tuple[str, str], ...] = (("raw", "*u8"), ("packed", "*u8"))
    interpreter.run_launch("pack.codes", constants, kinds, (tiles, pieces, 1), addresses)
    ours = product_times.packed_codes(torch.from_numpy(codes), bn, bk, bits, sub)
    np.testing.assert_array_equal(ours.numpy(), out)

    raw, packed = np.ascontiguousarray(scales.T), np.full((tiles, groups, bn), np.nan, np.float16)
    constants = common | {"GROUP": group, "GROUPS": groups, "TOGETHER": 1}
    addresses = [raw.ctypes.data, packed.ctypes.data]
    kinds = (("raw", "*fp16"), ("packed", "*fp16"))
    interpreter.run_launch("pack.scales", constants, kinds, (tiles, groups, 1), addresses)
    np.testing.assert_array_equal(product_times.packed_scales(torch.from_numpy(scales), bn, groups).numpy(), packed)
