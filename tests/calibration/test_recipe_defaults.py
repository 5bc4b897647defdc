"""The recipe's change of a bundle's sampling settings: what changes, what does not, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from recipe_scripts import full_disk, scripts

from par_model.training.files import InputError
from par_runtime import Pipeline
from par_runtime.bundle import Bundle, Defaults, seal

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """``defaults.py``."""
    with scripts("defaults") as (module,):
        yield module


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of n = 16 of the demo."""
    return Path(shutil.copytree(MODELS / "demo-n16", tmp_path / "n16"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_requests_without_settings_take_the_new_ones_and_only_the_manifest_changes(
    recipe: ModuleType, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, opened = contents(bundle), Bundle.open(bundle)
    settings = ["--guidance", "3", "--top-k", "40", "--top-p", "0.5", "--temperature", "0.75"]
    assert recipe.main([str(bundle), *settings]) == 0, capsys.readouterr()
    said = "guidance 3, temperature 0.75, top-k 40, top-p 0.5"
    assert capsys.readouterr().out.endswith(f"-> {said}\n")
    after = contents(bundle)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"manifest.json"}
    changed = Bundle.open(bundle, verify="full")
    assert changed.defaults == Defaults(guidance=3.0, temperature=0.75, top_k=40, top_p=0.5)
    assert changed.hash != opened.hash
    assert replace(changed, defaults=opened.defaults, hash=opened.hash) == opened
    with Pipeline.load(bundle) as pipeline:
        made = pipeline.generate("micah", seed=5)
        same = pipeline.generate("micah", seed=5, guidance=3.0, temperature=0.75, top_k=40, top_p=0.5)
    np.testing.assert_array_equal(made.tokens, same.tokens)
    assert recipe.main([str(bundle), "--top-k", "0"]) == 0, capsys.readouterr()
    assert Bundle.open(bundle).defaults == replace(changed.defaults, top_k=0)  # what is not given stays


def test_all_bundles_change_or_none(
    recipe: ModuleType, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = Path(shutil.copytree(bundle, tmp_path / "longer"))
    manifest = longer / "manifest.json"
    entries = json.loads(manifest.read_text())
    entries["class_names"] = [f"{name}, {'x' * 100}" for name in entries["class_names"]]
    manifest.write_text(json.dumps(seal(entries), indent=1))
    before = contents(tmp_path)
    with full_disk(manifest.stat().st_size - 500):  # the first one would fit
        assert recipe.main([str(bundle), str(longer), "--top-p", "0.5"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"defaults.py: error: {manifest} is larger than this system")
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert contents(tmp_path) == before
    named_twice = [str(bundle), str(longer), f"{longer}/../n16", str(longer)]
    assert recipe.main([*named_twice, "--top-p", "0.5"]) == 0
    assert capsys.readouterr().out.count(" -> ") == 2
    assert {Bundle.open(path).defaults.top_p for path in (bundle, longer)} == {0.5}


def test_what_cannot_be_is_said_and_no_bundle_changes(
    recipe: ModuleType, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    for more, message in (
        ([], "no setting is given; give one or more of --guidance,"),
        (["--top-p", "0"], "--top-p 0.0: expected a number above 0, at most 1"),
        (["--temperature", "nan"], "--temperature nan: expected"),
        (["--top-k", "-1"], "--top-k -1: expected 0 to"),
        ([str(tmp_path / "none"), "--top-p", "0.5"], "none: no such folder"),
    ):
        assert recipe.main([str(bundle), *more]) == 2, message
        assert message in capsys.readouterr().err
    opened = Bundle.open(MODELS / "demo")
    plain = {name: replace(graph, sampling="plain") for name, graph in opened.graphs.items() if graph.sampling}
    with pytest.raises(InputError, match=r"draws from the whole codebook, or greedily; give such settings, or export"):
        recipe.check(replace(opened, graphs=plain), opened.defaults)
    recipe.check(replace(opened, graphs=plain), replace(opened.defaults, top_p=1.0))
    assert contents(tmp_path) == before
