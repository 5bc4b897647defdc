"""Manifest to configuration: every ablation comes back, a manifest changed by hand is refused with a reason."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from par_export.parts import architecture_entries
from par_model.config import ORDERS, PARConfig, VQConfig
from par_model.manifest import (
    ManifestError,
    config_from_manifest,
    phase_entries,
    read_manifest,
    tokenizer_from_manifest,
)
from par_model.ordering import token_order
from par_runtime.bundle import Stored

Manifest = dict[str, Any]
VQ = VQConfig(codebook_size=20, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32)


def config_of(n: int, grid: tuple[int, int, int] = (1, 8, 8), **ablation: Any) -> PARConfig:
    return PARConfig(
        dim=48, n_layers=2, n_heads=3, vocab_size=20, n_classes=5, grid=grid, group_size=n, **ablation
    )  # fmt: skip


class AnyPlace(dict[str, Stored]):
    """A table without entries, which has a place for every name that it is asked for."""

    def __missing__(self, name: str) -> Stored:
        return Stored("float32", (1,), 0, 4)


class NoWeights:
    """A weight table without entries."""

    entries: dict[str, Stored] = AnyPlace()


def manifest_of(config: PARConfig, vq: VQConfig | None = None) -> Manifest:
    """The entries that an export writes, as they come back from JSON."""
    graphs = {"step": {"inputs": [], "outputs": []}}
    entries = architecture_entries(config, vq, graphs, 0, NoWeights())  # type: ignore[arg-type]
    written: Manifest = json.loads(json.dumps(entries))
    return written


ABLATIONS = [
    pytest.param(n, grid, order, initial, id=f"{order} {'sequential' if initial else 'parallel'} start {grid} n{n}")
    for (n, grid), order, initial in product(
        [
            (1, (1, 8, 8)),
            (1, (2, 4, 4)),
            (4, (1, 8, 8)),
            (16, (1, 8, 8)),
            (4, (1, 6, 8)),
            (4, (3, 4, 4)),
            (16, (2, 8, 8)),
        ],
        ORDERS,
        (True, False),
    )
]


@pytest.mark.parametrize(("n", "grid", "order", "initial"), ABLATIONS)
def test_every_ablation_comes_back(n: int, grid: tuple[int, int, int], order: str, initial: bool) -> None:
    config = config_of(n, grid, order=order, sequential_initial=initial)
    manifest = manifest_of(config)
    assert manifest["phases"] == phase_entries(config)
    read = config_from_manifest(manifest)
    if n == 1:  # both orders are the raster order then, and the default is taken
        assert token_order(read).tolist() == token_order(config).tolist()
        config = config_of(n, grid, sequential_initial=initial)
    assert read == config


def test_the_tokenizer_comes_back() -> None:
    assert tokenizer_from_manifest(manifest_of(config_of(4), VQ)) == VQ
    assert tokenizer_from_manifest(manifest_of(config_of(4))) is None


@pytest.mark.parametrize("name", ["fp32", "n1", "n16"])
def test_exported_bundles_are_read(name: str, bundles: dict[str, Path]) -> None:
    manifest = read_manifest(bundles[name])
    config = config_from_manifest(manifest)
    assert config.group_size == {"fp32": 4, "n1": 1, "n16": 16}[name]
    assert token_order(config).tolist() == manifest["order"]
    assert (tokenizer_from_manifest(manifest) is None) == (name != "fp32")


def test_the_committed_bundles_are_read(tiny: Path) -> None:
    demo = Path(__file__).parents[2] / "models" / "demo"
    for path in (tiny, demo):
        manifest = read_manifest(path)
        config, vq = config_from_manifest(manifest), tokenizer_from_manifest(manifest)
        assert (config.order, config.sequential_initial, config.group_size) == ("distant", True, 4)
        assert vq is not None
        assert json.loads(json.dumps(asdict(vq))) == manifest["tokenizer"]["config"]


def swap_two_tokens(manifest: Manifest) -> None:
    order = manifest["order"]
    order[5], order[6] = order[6], order[5]


def reverse(manifest: Manifest) -> None:
    manifest["order"].reverse()


def cut(manifest: Manifest) -> None:
    manifest["order"].pop()


def widen(manifest: Manifest) -> None:
    manifest["model"]["ffn_dim"] += 256


def lose_a_phase(manifest: Manifest) -> None:
    del manifest["phases"][1]


def lose_all_phases(manifest: Manifest) -> None:
    manifest["phases"] = []


def call_once_more(manifest: Manifest) -> None:
    manifest["phases"][-1]["repeat"] += 1


def feed_a_token(manifest: Manifest) -> None:
    manifest["phases"][2]["inputs"][1] = "token"


def lose_the_order(manifest: Manifest) -> None:
    del manifest["order"]


def lose_the_width(manifest: Manifest) -> None:
    del manifest["model"]["dim"]


def name_the_width(manifest: Manifest) -> None:
    manifest["model"]["dim"] = "48"


def list_the_model(manifest: Manifest) -> None:
    manifest["model"] = [48, 2]


def other_group(manifest: Manifest) -> None:
    manifest["group_size"] = 9


def forget_a_phase_field(manifest: Manifest) -> None:
    del manifest["phases"][0]["start"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_two_tokens, "order is none of distant, raster for grid 1x8x8 and group_size=4; export the bundle again"),
        (reverse, "order is none of distant, raster"),
        (cut, "order has 63 tokens, grid 1x8x8 has 64; export the bundle again"),
        (widen, "ffn_dim 512: a model of width 48 has 256; export the bundle again"),
        (
            lose_a_phase,
            r"phases \(prefill 1x1 from 0, transition 1x4 from 4, group 14x4 from 8\) are those of no model .*; "
            r"expected "
            r"prefill 1x1 from 0, sequential 3x1 from 1, transition 1x4 from 4, group 14x4 from 8; export",
        ),
        (lose_all_phases, r"phases \(none\) are those of no model with 64 tokens and group_size=4"),
        (call_once_more, r"group 15x4 from 8\) are those of no model"),
        (feed_a_token, "are those of no model"),
        (lose_the_order, "manifest.json has no entry 'order'; export the bundle again"),
        (lose_the_width, "no entry 'dim'"),
        (forget_a_phase_field, "no entry 'start'"),
        (name_the_width, "an entry of another form"),
        (list_the_model, "an entry of another form"),
        (other_group, "does not split into 3x3 equal regions"),
    ],
)
def test_a_changed_manifest_is_refused(change: Callable[[Manifest], None], message: str) -> None:
    manifest = manifest_of(config_of(4))
    assert config_from_manifest(copy.deepcopy(manifest)) == config_of(4)
    change(manifest)
    with pytest.raises(ManifestError, match=message) as raised:
        config_from_manifest(manifest)
    assert "\n" not in str(raised.value)


def test_the_order_of_another_grid_is_refused() -> None:
    manifest = manifest_of(config_of(4, (1, 4, 16)))
    manifest["grid"] = [1, 8, 8]
    with pytest.raises(ManifestError, match="order is none of"):
        config_from_manifest(manifest)


def test_a_wrong_tokenizer_is_refused() -> None:
    for change, message in (
        ({"config": {"codes": 3}}, "an entry of another form .*codes"),
        ({"config": {"channels": 48}}, "not a multiple of norm_groups=32.*; export the bundle again"),
        ({}, "no entry 'config'"),
    ):
        with pytest.raises(ManifestError, match=message):
            tokenizer_from_manifest({"tokenizer": change})
    with pytest.raises(ManifestError, match="no entry 'tokenizer'"):
        tokenizer_from_manifest({})


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no manifest.json that can be read \(.*\); give the folder of a bundle"):
        read_manifest(tmp_path)
    for text, message in (
        ("{", "that can be read"),
        ("[1]", "holds no JSON object"),
        ("[" * 10**6, "that can be read"),
        ('{"a": ' + "1" * 10**5 + "}", "that can be read"),
        ('{"a": [{"b": 1, "b": 1}]}', r"an object has the name 'b' twice; give it once"),
        ('{"a": NaN}', r"number NaN; expected a finite one"),
        (" " * (8 * 2**20 + 1), "no file of at most 8388608 bytes"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ManifestError, match=message):
            read_manifest(tmp_path)


def test_a_pipe_in_place_of_a_manifest_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(ManifestError, match="no file of at most"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("value", [10**18, 10**4000, -1, 0, True, 4.0, "x" * 10**6, "\x1b[2J", None, [1] * 10**5])
@pytest.mark.parametrize("name", ["dim", "n_layers", "vocab_size", "group_size", "grid", "order", "name of a phase"])
def test_any_value_is_one_short_line(name: str, value: Any) -> None:
    manifest = manifest_of(config_of(4))
    holder = manifest["phases"][0] if "phase" in name else manifest if name in manifest else manifest["model"]
    holder["name" if "phase" in name else name] = value
    with pytest.raises(ManifestError) as raised:
        config_from_manifest(manifest)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("value", [10**18, -1, True, "x" * 10**6, None, [10**18], [1.5], [None] * 10**5])
@pytest.mark.parametrize("name", ["channels", "channel_multipliers", "res_blocks", "config"])
def test_any_value_of_a_tokenizer_is_one_short_line(name: str, value: Any) -> None:
    manifest = manifest_of(config_of(4), VQConfig())
    tokenizer = manifest["tokenizer"]
    (tokenizer if name == "config" else tokenizer["config"])[name] = value
    with pytest.raises(ManifestError) as raised:
        tokenizer_from_manifest(manifest)
    assert len(str(raised.value)) < 500
