"""The model that chooses the shapes of tiles: what it must never choose, and what it must know."""

from __future__ import annotations

from dataclasses import replace

import pytest

from par_export.errors import BuildError
from par_export.kernels import tile_model, tile_shapes, tiles
from par_export.kernels.spec import Spec
from par_export.kernels.targets import TARGETS
from par_model.config import PARConfig, named

IMAGES = (1, 2, 4, 8)
TINY = PARConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64, n_classes=6, grid=(1, 8, 8), group_size=4)
CONFIGS = {name: named(name) for name in ("L", "XL", "3B")} | {"tiny": TINY, "3B n = 16": named("3B", group_size=16)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("target", TARGETS)
def test_shapes_fit_the_target_and_do_not_make_a_row_depend_on_its_batch(name: str, target: str) -> None:
    config, card = CONFIGS[name], TARGETS[target]
    chosen = tiles.choose(config, IMAGES, card)
    assert list(chosen) == list(IMAGES)
    depth = {"w2": config.ffn_dim}
    for kind in ("qkv", "wo", "gates", "w2", "head"):
        of_batch = [getattr(chosen[batch], kind) for batch in IMAGES]
        assert len({(tile.BN, tile.BK, tile.split) for tile in of_batch}) == 1  # weights are put in order once
        for batch, tile in zip(IMAGES, of_batch, strict=True):
            rows = tile_shapes.rows_of(2 * config.group_size * batch, tile)
            assert tile_shapes.shared_bytes(tile, rows) < card.shared_block
            assert tile.block_stages >= 2
            assert tile.split == 1 or kind in ("wo", "w2")
            turns = -(-depth.get(kind, config.dim) // tile.BK)
            assert tile.split <= turns
            slab = 0 if tile.many else turns // tile.split * tile.BN * tile.BK * 2
            assert tile.ahead % 2048 == 0
            assert 0 <= tile.ahead <= slab
            assert card.dependent or tile.ahead == 0
    assert len({chosen[batch].attention for batch in IMAGES}) == 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("target", TARGETS)
def test_blocks_of_many_rows_take_whole_panels_and_have_registers_for_their_sums(name: str, target: str) -> None:
    config, card, seen = CONFIGS[name], TARGETS[target], 0
    for kind in ("qkv", "wo", "gates", "w2", "head"):
        columns, depth = tile_model.matrix_of(config, kind)
        for shape in tiles.products(config, kind, (64,), card):
            tile = shape[64]
            positions = 2 * config.group_size * 64
            for each in tiles.many_of(tile, kind, columns, depth, positions, card):
                many = each.many
                assert many is not None
                panels = -(-columns // each.BN)
                assert panels % each.panels == 0
                assert (tile.BK // tile.parts) % many.depth == 0
                assert (
                    many.columns >= 16 * many.warps
                )  # a warp has sixteen columns, and on SM90 four of them one product
                sums = many.columns * many.rows // (32 * many.warps)
                most = 128 if target in ("SM90", "SM100") else 64
                assert sums * each.parts <= most
                assert kind in ("gates", "head") or sums <= (most / 2 if kind == "qkv" else 64)
                assert tile_shapes.shared_bytes(each, many.rows) < card.shared_block
                assert (each.BN, each.BK, each.split, each.parts) == (tile.BN, tile.BK, tile.split, tile.parts)
                seen += 1
    assert seen > 20 or name == "tiny"


def test_many_rows_are_taken_where_the_matrix_units_are_what_counts() -> None:
    """Of 3B at n = 16, eight images are 256 rows, of which blocks of 64 would read the weights four times."""
    config, card = named("3B", group_size=16), TARGETS["SM90"]
    chosen = tiles.choose(config, IMAGES, card)
    for kind in ("qkv", "wo", "gates", "w2", "head"):
        assert getattr(chosen[1], kind).many is None
        assert getattr(chosen[8], kind).many is not None
    codes = tile_shapes.Storage(8, 64)
    of_codes = tiles.choose(config, IMAGES, card, storages={"gates": (codes,)})[8].gates
    assert of_codes.many is not None
    assert of_codes.many.depth == of_codes.sub  # a piece: what more makes numbers of codes, and multiplies sums


def test_a_block_of_many_rows_that_was_refused_is_not_chosen_again() -> None:
    config, card = named("3B", group_size=16), TARGETS["SM90"]
    first = tiles.choose(config, IMAGES, card)
    tile = first[8].gates
    rows = tile_shapes.rows_of(256, tile)
    refused = frozenset({spec(tile.columns, tile.BK, rows, panels=tile.panels)})
    second = tiles.choose(config, IMAGES, card, refused)
    assert second[8].gates.many != tile.many
    assert second[1].gates == first[1].gates  # its own shape was not refused


def test_more_blocks_are_made_where_a_card_has_more_processors_than_tiles() -> None:
    """PAR-L's down product has 1024 columns: 16 tiles of 64 for 132 processors: smaller tiles, or K in parts."""
    w2 = tiles.choose(named("L"), (1,), TARGETS["SM90"])[1].w2
    assert -(-1024 // w2.BN) * w2.split >= 60


@pytest.mark.parametrize("name", ["L", "3B"])
def test_no_choice_is_slower_by_the_model_than_one_plain_shape(name: str) -> None:
    config, card = named(name), TARGETS["SM90"]
    plain = tile_shapes.ProductTile(64, 64, 1, 4, 4, 0)
    chosen = tiles.choose(config, (1,), card)[1]
    for tile, columns in ((chosen.qkv, 3 * config.dim), (chosen.gates, 2 * config.ffn_dim)):
        time = tile_model.product_us(tile, columns, config.dim, 8, card)
        assert time <= tile_model.product_us(plain, columns, config.dim, 8, card)
        assert time >= columns * config.dim * 2 / 4.8e6  # never faster than the memory


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["L", "3B", "3B n = 16", "demo"])
def test_panels_of_codes_are_whole_pieces_of_one_group(name: str, bits: int, group: int) -> None:
    storage = tile_shapes.Storage(bits, group)
    config = CONFIGS.get(name) or replace(TINY, dim=256, n_heads=4)
    storages = dict.fromkeys(("qkv", "wo", "gates", "w2", "head"), (storage,))
    for card in (TARGETS["SM80"], TARGETS["SM90"]):
        chosen = tiles.choose(config, IMAGES, card, storages=storages)
        for kind in storages:
            of_batch = [chosen[batch].of(kind, storage) for batch in IMAGES]
            assert len({(tile.BN, tile.BK, tile.split, tile.sub) for tile in of_batch}) == 1
            for batch, tile in zip(IMAGES, of_batch, strict=True):
                rows = tile.sub * 8 // bits  # of a piece; each half of it is inside of a group
                assert tile.BK % (rows * tile.parts) == 0
                assert group % tile.sub == 0
                assert tile.sub >= 32
                assert (
                    tile_shapes.shared_bytes(tile, tile_shapes.rows_of(2 * config.group_size * batch))
                    < card.shared_block
                )


def test_fewer_bytes_take_less_time() -> None:
    """The head of PAR-3B, the product that is nearest to its bytes: about half and a quarter of the time."""
    config, card = named("3B"), TARGETS["SM90"]
    times = []
    for storage in (tile_shapes.NUMBERS, tile_shapes.Storage(8, 64), tile_shapes.Storage(4, 64)):
        tile = tiles.choose(config, (1,), card, storages={"head": (storage,)})[1].head
        times.append(tile_model.product_us(tile, config.vocab_size, config.dim, 8, card))
        panel = tile.BN * tile.BK
        assert storage.bytes(panel) == panel * {0: 2, 8: 1 + 2 / 64, 4: 0.5 + 2 / 64}[storage.bits]
    assert 0.45 < times[1] / times[0] < 0.65
    assert 0.25 < times[2] / times[0] < 0.4


def test_matrices_of_a_kind_that_stay_numbers_have_a_shape_of_their_own() -> None:
    config, card, codes = named("L"), TARGETS["SM80"], tile_shapes.Storage(4, 32)
    alone = tiles.choose(config, IMAGES, card)[1]
    both = tiles.choose(config, IMAGES, card, storages={"w2": (codes, tile_shapes.NUMBERS)})[1]
    assert both.w2.storage == codes
    assert both.of("w2", tile_shapes.NUMBERS) == alone.w2
    assert both.qkv == alone.qkv
    refused = frozenset({spec(alone.w2.BN, alone.w2.BK, 8, "step.residual")})  # of numbers: codes keep theirs
    again = tiles.choose(config, IMAGES, card, refused, storages={"w2": (codes, tile_shapes.NUMBERS)})[1]
    assert again.w2 == both.w2
    assert again.of("w2", tile_shapes.NUMBERS) != alone.w2


def spec(bn: int, bk: int, rows: int, source: str = "step.gates", panels: int = 0) -> Spec:
    return Spec(source, (("BITS", 0), ("BN", bn), ("BK", bk), ("BM", rows), ("PANELS", panels)), (), 4, 4)


def test_a_shape_that_was_refused_is_not_chosen_again() -> None:
    config, card = named("L"), TARGETS["SM90"]
    first = tiles.choose(config, IMAGES, card)[4].gates
    refused = frozenset({spec(first.BN, first.BK, tile_shapes.rows_of(2 * 4 * 4))})
    second = tiles.choose(config, IMAGES, card, refused)
    assert {(second[batch].gates.BN, second[batch].gates.BK) for batch in IMAGES} != {(first.BN, first.BK)}


def test_measured_shapes_are_kept_as_far_as_they_fit() -> None:
    config, card = named("3B"), TARGETS["SM86"]
    given = tile_shapes.ProductTile(BN=64, BK=128, split=1, warps=8, stages=5, ahead=0)
    keys = tile_shapes.AttentionTile(span=32, chunk=32, warps=2, stages=3)
    chosen = tiles.choose(config, IMAGES, card, given={"gates": given, "attention": keys}, at=8)
    assert [(t.gates.BN, t.gates.BK, t.gates.split, t.gates.warps) for t in chosen.values()] == [(64, 128, 1, 8)] * 4
    assert [t.gates.stages for t in chosen.values()] == [4, 4, 3, 2]  # 99 KiB, less what the compiler adds
    assert all(t.gates.many is None for t in chosen.values())
    assert {t.attention for t in chosen.values()} == {keys}
    assert {b: t.qkv for b, t in chosen.items()} == {b: t.qkv for b, t in tiles.choose(config, IMAGES, card).items()}


def test_other_batches_than_the_measured_one_may_take_many_rows_of_the_same_panels() -> None:
    config, card = named("3B", group_size=16), TARGETS["SM90"]
    first = tiles.choose(config, IMAGES, card)
    few, many = first[1].gates, first[8].gates
    assert many.many is not None
    for given, at in ((few, 1), (many, 8)):
        chosen = tiles.choose(config, IMAGES, card, given={"gates": given}, at=at)
        assert chosen[1].gates == few
        assert chosen[8].gates.many == many.many
    measured = tiles.choose(config, IMAGES, card, given={"gates": replace(many, many=None)}, at=8)
    assert measured[8].gates.many is None  # it was faster there


def test_without_any_shape_one_line_says_what_to_do() -> None:
    everything = frozenset(spec(bn, bk, 8, "step.qkv") for bn in (16, 32, 64, 128) for bk in (16, 32, 64, 128, 256))
    with pytest.raises(BuildError, match=r"no shape of the product qkv .* fits SM90 at 1 images; give fewer with --m"):
        tiles.choose(named("L"), (1,), TARGETS["SM90"], everything)


def test_what_the_model_expects_is_what_it_ranks_by() -> None:
    """Of each kind the first shape is the one with the least time, where one batch counts."""
    config, target = named("L"), TARGETS["SM90"]
    for kind in ("qkv", "wo", "gates", "w2", "head"):
        ranked = [
            tile_model.model_us(config, kind, shape[1], 1, target)
            for shape in tiles.products(config, kind, (1,), target)
        ]
        assert ranked == sorted(ranked)
        assert 1 < ranked[0] < 100
    attention = [
        tile_model.model_us(config, "attention", tile, 1, target) for tile in tiles.attentions(config, (1,), target)
    ]
    assert attention == sorted(attention)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_held_fits_and_changes_nothing_else_that_a_result_depends_on(name: str) -> None:
    config, card = CONFIGS[name], replace(TARGETS["SM90"], held_bytes=tiles.MOST_HELD_BYTES)
    plain, chosen = (tiles.choose(config, IMAGES, each) for each in (TARGETS["SM90"], card))
    most = 0
    for batch in IMAGES:
        rows = tile_shapes.rows_of(2 * config.group_size * batch)
        for kind in ("qkv", "wo", "gates", "w2", "head"):
            tile, without = getattr(chosen[batch], kind), getattr(plain[batch], kind)
            names = ("BN", "BK", "split", "warps", "parts")
            assert [getattr(tile, each) for each in names] == [getattr(without, each) for each in names]
            panels = -(-(config.ffn_dim if kind == "w2" else config.dim) // tile.BK)
            left = panels // tile.split - tile.held
            assert left >= 2 or (left == 0 and panels % tile.split == 0) or not tile.held
            assert tile.held.bit_count() <= 2  # one operand of the matrix units, or two
            assert tile.held * tile_shapes.panel_bytes(tile) <= tiles.MOST_HELD_BYTES
            assert tile.held * tile_shapes.panel_bytes(tile) <= 160 * 4 * 32 * tile.warps  # registers
            assert tile_shapes.shared_bytes(tile, rows) < card.shared_block
            assert tile.ahead <= left * tile_shapes.panel_bytes(tile)
            most = max(most, tile.held)
    assert most >= (4 if name in ("L", "XL", "3B") else 1)


def test_all_weights_of_small_blocks_are_held() -> None:
    """Of PAR-L's qkv a block has 64 KiB: 4 panels of 16; PAR-XL's has 5 of them, which are two operands."""
    card = replace(TARGETS["SM90"], held_bytes=tiles.MOST_HELD_BYTES)
    for name, panels in (("L", 4), ("XL", 5)):
        tile = tiles.choose(named(name), (1,), card)[1].qkv
        assert (tile.BN, tile.BK, tile.held, tile.stages, tile.ahead) == (32, 256, panels, 2, 0)


def test_nothing_is_held_where_no_kernel_starts_early_nor_of_codes() -> None:
    config, codes = named("L"), tile_shapes.Storage(8, 64)
    for card, storage in (
        (TARGETS["SM80"], tile_shapes.NUMBERS),
        (replace(TARGETS["SM90"], early=False), tile_shapes.NUMBERS),
        (TARGETS["SM90"], codes),
    ):
        holds = replace(card, held_bytes=tiles.MOST_HELD_BYTES)
        tile = tiles.choose(config, (1,), holds, storages={"qkv": (storage,)})[1].qkv
        assert tile.held == 0
        assert tiles.holding(tile, 9, 3072, 1024, 8, holds) == tile


def test_a_measured_shape_keeps_what_it_holds_as_far_as_that_fits() -> None:
    config, card = named("L"), TARGETS["SM90"]
    first = tiles.choose(config, (1,), card)[1].qkv
    given = tiles.holding(first, 9, 3072, 1024, 8, card)
    chosen = tiles.choose(config, IMAGES, card, given={"qkv": given})
    assert [tile.qkv.held for tile in chosen.values()] == [4, 4, 2, 1]  # rows of activations need registers too
    assert {tile.gates.held for tile in chosen.values()} == {0}


def test_spans_of_keys_that_are_held_are_one_operand_or_two_and_fit() -> None:
    """The fewest spans first; the keys of 3B, which has heads of 100 numbers in 128, are twice as many bytes."""
    card = TARGETS["SM90"]
    found = {name: tiles.holding_keys(named(name, group_size=16), card) for name in ("L", "3B")}
    assert [(tile.span, tile.warps) for tile in found["L"]] == [(576, 8), (320, 4), (192, 4)]
    assert [(tile.span, tile.warps) for tile in found["3B"]] == [(320, 8), (192, 8)]
    for name, shapes in found.items():
        for tile in shapes:
            assert tile.held == tile.chunk == tile.span
            assert tile.span.bit_count() <= 2
            assert 2 * tile.span * {"L": 64, "3B": 128}[name] * 2 <= tiles.MOST_LOADED * 32 * tile.warps
    assert tiles.holding_keys(TINY, card) == [tile_shapes.AttentionTile(n, n, 4, 2, n) for n in (64, 32)]
    for other in (TARGETS["SM80"], replace(card, early=False)):
        assert tiles.holding_keys(named("L"), other) == []
    holds = replace(card, held_keys=True)
    assert {each.attention for each in tiles.choose(named("L"), IMAGES, holds).values()} == {found["L"][0]}
    refused = frozenset({Spec("attention.attend", (("SPAN", 576), ("CHUNK", 576), ("HELD", 576)), (), 8, 2)})
    assert {each.attention for each in tiles.choose(named("L"), IMAGES, holds, refused).values()} == {found["L"][1]}
    long = PARConfig(dim=1024, n_layers=2, n_heads=8, vocab_size=64, n_classes=3, grid=(5, 32, 32), group_size=4)
    assert tiles.holding_keys(long, card) == []  # 5,120 keys of 128 numbers
    assert not tiles.choose(long, (1,), holds)[1].attention.held


def test_few_spans_of_keys_are_whole_chunks_and_fit() -> None:
    """PAR-L has 576 keys: one span, or two; a card with little shared memory takes them in smaller pieces."""
    found = {name: tiles.few_spans(named("L"), TARGETS[name]) for name in ("SM90", "SM86")}
    assert found["SM90"] == [tile_shapes.AttentionTile(640, 128, 4, 3), tile_shapes.AttentionTile(384, 128, 4, 3)]
    assert found["SM86"] == [tile_shapes.AttentionTile(576, 64, 4, 3), tile_shapes.AttentionTile(320, 64, 4, 3)]
    assert tiles.few_spans(TINY, TARGETS["SM90"]) == [tile_shapes.AttentionTile(128, 128, 4, 3)]
