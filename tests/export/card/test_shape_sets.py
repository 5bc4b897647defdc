"""Sets of shapes of tiles: what is tried on a card, and that an engine of a set is what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from par_export.card.plan import MODELS, Model, shaped
from par_export.card.prepare import tokens_family
from par_export.kernels.plan import plan
from par_export.kernels.shape_sets import AGAIN, CHANGES, ShapeSet, contents_of, sets_of, tiles_of
from par_export.kernels.spec import Spec
from par_export.kernels.step_weights import storages
from par_export.kernels.targets import TARGETS
from par_export.kernels.tile_shapes import AttentionTile, ProductTile
from par_export.kernels.tiles import choose
from par_export.kernels.tune import ORDER
from par_export.quantised import Codes
from par_model.config import PARConfig

CONFIG = PARConfig(dim=128, n_layers=2, n_heads=4, vocab_size=64, n_classes=10, grid=(1, 4, 4))
SMALL = Model("PAR-S", CONFIG, None, group_sizes=(1, 4), codes=(Codes("int8", 32),))


@pytest.fixture(scope="module", params=[None, *SMALL.codes], ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of n = 4, with numbers and with codes."""
    return tokens_family(SMALL, request.param, tmp_path_factory.mktemp("family"))[4]


def test_what_shapes_are_tried_on() -> None:
    chosen = [(model.name, n, str(codes) if codes else "") for model, n, codes in shaped(MODELS)]
    assert chosen[:4] == [(f"PAR-{size}", 4, "") for size in ("3B", "L", "XL", "XXL")]
    assert chosen[4:8] == [(f"PAR-{size}", 16, "") for size in ("3B", "L", "XL", "XXL")]
    assert chosen[8:] == [(f"PAR-{size}", 4, f"{dtype} group 64") for size in ("3B", "L") for dtype in ("int8", "int4")]
    assert [n for _, n, _ in shaped([replace(SMALL, group_sizes=(1,), codes=())])] == [1]


def test_every_set_has_another_shape_of_every_kernel_and_the_first_is_what_a_build_makes(family: Path) -> None:
    contents, card = contents_of(family), TARGETS["SM90"]
    sets = sets_of(contents, (1, 8), card)
    assert [one.number for one in sets] == list(range(len(sets)))
    assert 4 <= sum(not one.words for one in sets) + 1 <= 8
    assert [one.words for one in sets if one.words] == ["as built", *CHANGES, AGAIN]
    assert [one.engine for one in sets] == [*range(len(sets) - 1), 0]
    assert not sets[0].shapes
    built = plan(contents, (1, 8), card)
    assert sets[0](contents, (1, 8), card).specs == built.specs
    for kind in ORDER:
        tried = [getattr(tiles_of(contents, (1, 8), card, sets[0], built.specs)[1], kind)]
        tried += [one.shapes[kind] for one in sets if kind in one.shapes]
        assert len(tried) == len(set(tried)) > 2, kind
    for one in sets:  # the engine of a set has these very shapes
        planned = one(contents, (1, 8), card)
        for batch, tiles in tiles_of(contents, (1, 8), card, one, planned.specs).items():
            for kind in one.shapes:
                tile = getattr(tiles, kind)
                if isinstance(tile, ProductTile):
                    wanted = {"BN": tile.BN, "BK": tile.BK, "BITS": tile.bits}
                else:
                    wanted = {"SPAN": tile.span, "CHUNK": tile.chunk, "HELD": tile.held}
                found = [
                    dict(s.constants)
                    for s in planned.specs.values()
                    if (s.warps, s.stages) == (tile.warps, tile.stages)
                ]
                assert any(wanted.items() <= constants.items() for constants in found), (one.number, batch, kind)


def test_the_last_sets_change_how_kernels_follow_each_other() -> None:
    card, sizes = TARGETS["SM90"], dict[str, set[int]]()
    for words, change in CHANGES.items():
        one = ShapeSet(9, {}, words, change)
        tiles = choose(CONFIG, (1,), one.card(card))[1]
        built = choose(CONFIG, (1,), card)[1]
        for kind in ("qkv", "wo", "gates", "w2", "head"):
            own, other = (replace(getattr(each, kind), ahead=0, held=0, stages=0) for each in (tiles, built))
            assert own == other
            assert (getattr(tiles, kind).held > 0) == ("held" in words), (words, kind)
        assert (tiles.attention.held > 0) == ("keys" in words)
        assert tiles.attention == built.attention or tiles.attention.held
        assert one.card(card).at_once == words.endswith("at once")
        sizes[words] = {getattr(tiles, kind).ahead for kind in ("qkv", "gates", "head")}
        assert one.card(card).dependent == ("early" not in words)
    assert sizes["no kernel is launched early"] == {0}
    assert sizes["nothing is fetched ahead"] == {0}
    large = next(model.config for model in MODELS if model.name == "PAR-L")  # its gates have 11.5 MB
    for change, some in ((CHANGES["matrices of up to 24 MiB are fetched ahead"], True), ({}, False)):
        tiles = choose(large, (1,), ShapeSet(0, {}, "", change).card(card))[1]
        assert (tiles.gates.ahead > 0) == some
        assert tiles.wo.ahead == -(-1024 // tiles.wo.BK) // tiles.wo.split * tiles.wo.BN * tiles.wo.BK * 2  # all of it


def test_the_shapes_of_an_engine_are_those_that_the_compiler_has_left(family: Path) -> None:
    """Also of the engine as a build makes it: what it does not hold was refused, twice in a row here."""
    contents, card = contents_of(family), TARGETS["SM90"]
    one, refused = sets_of(contents, (1, 8), card)[0], frozenset[Spec]()
    for _ in range(2):
        planned = one(contents, (1, 8), card, refused).specs.values()
        refused |= {spec for spec in planned if spec.source in ("step.gates", "step.qkv")}
    engine = one(contents, (1, 8), card, refused)
    found = tiles_of(contents, (1, 8), card, one, engine.specs)
    assert found == choose(contents.config, (1, 8), card, refused, storages=storages(contents.step))
    built = tiles_of(contents, (1, 8), card, one, one(contents, (1, 8), card).specs)
    assert found[1].gates != built[1].gates
    assert found[1].wo == built[1].wo


def test_a_shape_that_the_compiler_refuses_is_not_planned_again(family: Path) -> None:
    contents, card = contents_of(family), TARGETS["SM90"]
    one = sets_of(contents, (1,), card)[1]
    tile = one.shapes["gates"]
    assert isinstance(tile, ProductTile)
    refused = {
        spec
        for spec in one(contents, (1,), card).specs.values()
        if spec.source == "step.gates" and dict(spec.constants)["BN"] == tile.BN
    }
    assert refused
    left = one(contents, (1,), card, frozenset(refused))
    assert not refused & set(left.specs.values())
    attention = one.shapes["attention"]
    assert isinstance(attention, AttentionTile)
    spans = [dict(spec.constants)["SPAN"] for spec in left.specs.values() if spec.source == "attention.attend"]
    assert spans == [attention.span]  # the others stay
