"""Opening a bundle: every way in which it can be broken has its own sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from par_runtime.bundle import Bundle, canonical_hash, seal
from par_runtime.errors import BundleError


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object], reseal: bool = True) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(seal(manifest) if reseal else manifest))


def test_a_good_bundle_opens(tiny: Path) -> None:
    bundle = Bundle.open(tiny, verify="full")
    assert bundle.calls == 19
    assert bundle.class_names is not None
    assert bundle.class_names[2] == "otter"
    assert (bundle.vocab_size, bundle.n_classes, bundle.image_size) == (64, 6, (16, 16))


def test_the_manifest_hash_covers_everything_but_itself(tiny: Path) -> None:
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert manifest["hash"] == canonical_hash(manifest)
    assert canonical_hash(manifest | {"name": "other"}) != manifest["hash"]


def test_missing_folder_and_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"^'x+\.\.\.: cannot be read \(File name too long\); give the path of a bundle"
    ):
        Bundle.open("x" * 10**6)
    with pytest.raises(BundleError, match=r"^'\\n\\x1b\[2J': no such folder"):
        Bundle.open("\n\x1b[2J")
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "none")
    with pytest.raises(BundleError, match=r"holds no manifest\.json"):
        Bundle.open(tmp_path)


def test_broken_json(broken: Path) -> None:
    (broken / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.open(broken)


def test_newer_schema(broken: Path) -> None:
    edit(broken, lambda m: m.update(schema=99))
    with pytest.raises(BundleError, match=r"schema 99 .*; .* install a newer parvis \(docs/install\.md\)$"):
        Bundle.open(broken)


def test_no_schema(broken: Path) -> None:
    (broken / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="no schema number"):
        Bundle.open(broken)


def test_changed_manifest(broken: Path) -> None:
    edit(broken, lambda m: m.update(name="other"), reseal=False)
    with pytest.raises(BundleError, match="the manifest was changed after export"):
        Bundle.open(broken)


def test_missing_entry(broken: Path) -> None:
    edit(broken, lambda m: m.pop("phases"))
    with pytest.raises(BundleError, match="no entry 'phases'"):
        Bundle.open(broken)


def test_missing_file(broken: Path) -> None:
    (broken / "weights.data").unlink()
    with pytest.raises(BundleError, match=r"weights\.data: missing"):
        Bundle.open(broken)


def test_truncated_weights(broken: Path) -> None:
    file = broken / "weights.data"
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.truncate(size - 1)
    with pytest.raises(BundleError, match=rf"truncated: {size - 1} bytes, expected {size}"):
        Bundle.open(broken)


def test_changed_content_of_the_same_size(broken: Path) -> None:
    file = broken / "weights.data"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="its content was changed"):
        Bundle.open(broken)
    Bundle.open(broken, verify="none")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m["phases"][3].update(repeat=1), "order and phases do not cover the 1x8x8 tokens once"),
        (lambda m: m["phases"].pop(1), "phase 'transition' does not continue at position 1"),
        (lambda m: m["phases"][2]["inputs"].pop(), "phase 'transition' does not continue at position 4"),
        (lambda m: m["order"].reverse() or m["order"].__setitem__(0, 5), "order and phases do not cover"),
        (lambda m: m["files"].update({"../x": {}}), "file '../x' is not one of the bundle's own"),
        (lambda m: m["graphs"]["step"].update(file="other.onnx"), "file 'other.onnx' is not one of the bundle's own"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    broken: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    edit(broken, change)
    with pytest.raises(BundleError, match=text.replace(".", r"\.")):
        Bundle.open(broken)
