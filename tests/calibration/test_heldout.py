"""Held-out images from files and folders, also from those that somebody made to do harm."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from par_calibration import heldout
from par_calibration.errors import CalibrationError
from par_runtime.bundle import HELDOUT, MANIFEST, Bundle

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(DEMO)


def tokens(bundle: Bundle, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(bundle.vocab_size, size=(count, bundle.n_tokens))


def test_what_is_written_is_read_again_with_the_classes_in_turns(bundle: Bundle, tmp_path: Path) -> None:
    file, given = tmp_path / "heldout.npz", tokens(bundle, 5)
    heldout.write(file, given, [3, 3, 3, 1, 0])
    first = file.read_bytes()
    heldout.write(file, given, [3, 3, 3, 1, 0])
    assert file.read_bytes() == first  # no time in it
    read = heldout.read(bundle, file, "a file")
    assert read.labels == (3, 1, 0, 3, 3)
    np.testing.assert_array_equal(read.tokens, given[[0, 3, 4, 1, 2]])
    assert read.first(2).labels == (3, 1)


def test_a_file_of_parvis_encode_is_put_in_order_and_its_classes_go_by_name(bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.class_names is not None
    file, given = tmp_path / "codes.npz", tokens(bundle, 2)
    raster = np.empty_like(given)
    raster[:, list(bundle.order)] = given
    names = np.array([bundle.class_names[7], bundle.class_names[2]])
    np.savez(
        file, codes=raster.reshape(2, 16, 16).astype(np.uint16), labels=np.array([0, 1], np.uint8), class_names=names
    )
    read = heldout.read(bundle, file, "a file")
    assert read.labels == (7, 2)
    np.testing.assert_array_equal(read.tokens, given)


def _npz(**entries: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def _npy(values: Any, **how: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, values, **how)
    return out.getvalue()


def _claims(shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


LABELS = _npy(np.zeros(1, np.uint16))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no archive": (b"PK nonsense", "not a file of arrays"),
    "empty": (b"", "not a file of arrays"),
    "cut": (_npz(tokens=_npy(np.zeros((1, 256), np.uint16)), labels=LABELS)[:-40], "not a file of arrays"),
    "pickle": (_npz(tokens=_npy(np.array([{}], object), allow_pickle=True), labels=LABELS), "an array of type '|O'"),
    "claims more than it holds": (_npz(tokens=_claims("(1152921504606846976, 256)"), labels=LABELS), "in 0 bytes"),
    "negative": (_npz(tokens=_claims("(-1, -512)", b"\0" * 1024), labels=LABELS), "an array of"),
    "a program as header": (_npz(tokens=_claims("__import__('os').abort()"), labels=LABELS), "not a file of arrays"),
    "no labels": (_npz(tokens=_npy(np.zeros((1, 256), np.uint16))), "it holds tokens, not"),
    "nothing known": (_npz(images=LABELS), "it holds no array"),
    "other length": (_npz(tokens=_npy(np.zeros((1, 64), np.uint16)), labels=LABELS), r"shape \(1, 64\)"),
    "no images": (_npz(tokens=_npy(np.zeros((0, 256), np.uint16)), labels=LABELS), r"shape \(0, 256\)"),
    "text": (_npz(tokens=_npy(np.full((1, 256), "a")), labels=LABELS), "whole numbers"),
    "codes beyond": (_npz(tokens=_npy(np.full((1, 256), 1024, np.uint16)), labels=LABELS), r"expected 0\.\.1023"),
    "negative codes": (_npz(tokens=_npy(np.full((1, 256), -1)), labels=LABELS), r"lie in -1\.\.-1"),
    "classes beyond": (_npz(tokens=_npy(np.zeros((1, 256), np.uint16)), labels=_npy(np.array([12]))), r"0\.\.11"),
    "too few labels": (_npz(tokens=_npy(np.zeros((2, 256), np.uint16)), labels=LABELS), r"labels \[2\]"),
    "unknown class": (
        _npz(tokens=_npy(np.zeros((1, 256), np.uint16)), labels=LABELS, class_names=_npy(np.array(["cat\x1b[2J"]))),
        "unknown label",
    ),
    "names of no length": (
        _npz(tokens=_npy(np.zeros((1, 256), np.uint16)), labels=LABELS, class_names=_npy(np.array("cat"))),
        r"class_names of shape \[\]",
    ),
    "no names": (
        _npz(tokens=_npy(np.zeros((1, 256), np.uint16)), labels=LABELS, class_names=_npy(np.array([], "U3"))),
        r"class_names of shape \[0\]",
    ),
    "names of no characters": (
        _npz(
            tokens=_npy(np.zeros((1, 256), np.uint16)),
            labels=LABELS,
            class_names=_npy(np.array([2**31 - 1], np.uint32).view("U1")),
        ),
        "not a file of arrays",
    ),
    # What Python's parser raises for these is TypeError, and an IndentationError or TokenError of its tokenizer.
    "a shape of no number": (_npz(tokens=_claims("(True, 256)"), labels=LABELS), "not a file of arrays"),
    "an unhashable key": (_npz(tokens=_claims("(1,), [{}]: 1"), labels=LABELS), "not a file of arrays"),
    "a header that does not end": (_npz(tokens=_claims("(1, 256), ("), labels=LABELS), "not a file of arrays"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(bundle: Bundle, tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    file = tmp_path / "heldout.npz"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as error:
        heldout.read(bundle, file, "a file")
    text = str(error.value)
    assert len(text) < 600
    assert text.isprintable()
    assert "parvis encode" in text


def test_what_unpacks_to_too_much_is_refused_before_it_is_unpacked(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "MOST_ARRAY_BYTES", 2**16)
    file = tmp_path / "heldout.npz"
    file.write_bytes(_npz(tokens=b"\0" * 2**20, labels=LABELS))
    with pytest.raises(CalibrationError, match="more than 65536 bytes"):
        heldout.read(bundle, file, "a file")
    with pytest.raises(CalibrationError, match=f"{tmp_path}: is a folder"):
        heldout.read(bundle, tmp_path, "a folder")


def test_pictures_of_folders_are_encoded_by_the_bundle(
    bundle: Bundle, tmp_path: Path, picture: Callable[..., Path]
) -> None:
    for label, count in (("micah", 3), ("0", 1)):
        for i in range(count):
            picture(tmp_path / label / f"{i}.png", seed=i)
    (tmp_path / "micah" / "notes.txt").write_text("no picture")
    found = heldout.find(bundle, tmp_path, 3)
    assert found is not None
    assert found.real
    assert bundle.class_names is not None
    micah = bundle.class_names.index("micah")
    assert found.labels == (0, micah, micah)
    assert found.tokens.shape == (3, bundle.n_tokens)
    (tmp_path / "nobody").mkdir()
    with pytest.raises(CalibrationError, match=r"unknown label 'nobody'.*one folder of pictures for each class"):
        heldout.find(bundle, tmp_path, 3)
    with pytest.raises(CalibrationError, match="holds no folders"):
        heldout.find(bundle, tmp_path / "nobody", 3)


@pytest.fixture
def picture() -> Callable[..., Path]:
    from PIL import Image

    def make(path: Path, seed: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return make


def test_the_demo_holds_real_images_of_every_class(bundle: Bundle) -> None:
    found = heldout.find(bundle, None, 10**6)
    assert found is not None
    assert found.real
    assert len(found) == 240
    assert all(sorted(found.labels[i : i + 12]) == list(range(12)) for i in range(0, 240, 12))
    assert (DEMO / HELDOUT).stat().st_size < 150_000


def test_attaching_changes_the_manifests_hash_and_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(DEMO, copy)
    given = tokens(bundle, 3)
    heldout.attach(Bundle.open(copy), given, [0, 1, 2])
    changed = Bundle.open(copy, "full")
    assert changed.hash != bundle.hash
    assert {name: entry for name, entry in changed.files.items() if name != HELDOUT} == {
        name: entry for name, entry in bundle.files.items() if name != HELDOUT
    }
    before, after = (json.loads((path / MANIFEST).read_text()) for path in (DEMO, copy))
    assert {key for key in before if before[key] != after[key]} == {"files", "hash"}
    found = heldout.find(changed, None, 2)
    assert found is not None
    np.testing.assert_array_equal(found.tokens, given[:2])
    heldout.attach(Bundle.open(copy), found.tokens, found.labels)  # a second time, over the first
    assert len(heldout.find(Bundle.open(copy), None, 9) or ()) == 2
