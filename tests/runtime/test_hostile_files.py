"""Files of a bundle as an enemy made them: none, links, too short, too large for memory; and what each verb says."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hostile
import pytest
from hostile import manifest_of, put

from par_runtime import loaded
from par_runtime.bundle import Bundle, seal
from par_runtime.cli import dispatch as cli
from par_runtime.errors import BundleError, RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.request import class_index

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**6, "nested more than 32 levels deep"),
        ('{"schema": ' + "9" * 10**5 + "}", "an integer of 100000 digits; expected at most 100"),
        ('{"schema": 1, "x": Infinity}', "number Infinity; expected a finite one"),
        ('{"schema": 1, "hash": "' + "\\u001b" * 10**6 + '"}', r"its hash is '\\x1b"),
        (" " * (8 * 2**20 + 1), "8388609 bytes; expected at most 8388608"),
        ("\x00", "not valid JSON"),
        ("[1]", "has no schema number"),
        ("null", "has no schema number"),
    ],
    ids=range(8),
)
def test_a_text_that_is_no_manifest(bundle: Path, text: str, message: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    hostile.check_line(caught.value)


@pytest.mark.parametrize(("name", "of"), [("guidance", "defaults"), ("precision", None), ("bytes", "files")])
def test_a_name_that_stands_twice_is_refused(bundle: Path, name: str, of: str | None) -> None:
    """Though its last value is the right one, which the hash is of: another reader takes the first."""
    file = bundle / "manifest.json"
    text = file.read_text()
    at = text.index(f'"{name}"', 0 if of is None else text.index(f'"{of}"'))
    file.write_text(f'{text[:at]}"{name}": "other", {text[at:]}')
    with pytest.raises(BundleError, match=rf"manifest\.json: .* has the name '{name}' twice; give it once") as caught:
        Bundle.open(bundle)
    hostile.check_line(caught.value)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("make", hostile.NO_FILES)
@pytest.mark.parametrize("name", ["manifest.json", "weights.data", "step.onnx", "encoder.onnx"])
def test_what_is_no_file_is_refused(bundle: Path, name: str, make: Callable[[Path], None]) -> None:
    (bundle / name).unlink()
    make(bundle / name)
    for verify in ("auto", "none"):
        with pytest.raises(BundleError, match=rf"{name}: is a \w+, not a file"):
            Bundle.open(bundle, verify)  # type: ignore[arg-type]


def test_a_link_is_followed_and_its_content_is_checked(bundle: Path, tiny: Path) -> None:
    """Caches of downloads keep files elsewhere, and links to them in the folder."""
    (bundle / "weights.data").unlink()
    (bundle / "weights.data").symlink_to(tiny / "weights.data")
    Bundle.open(bundle)
    (bundle / "decoder.onnx").unlink()
    (bundle / "decoder.onnx").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match=r"decoder\.onnx: truncated"):
        Bundle.open(bundle)


def test_a_file_that_is_shorter_than_the_manifest_says_is_never_read_beyond_its_end(tmp_path: Path) -> None:
    """Without checks of files too: the C kernels read where the table of weights says."""
    demo = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    with (demo / "weights.data").open("r+b") as file:
        file.truncate(10**6)
    with pytest.raises(BundleError, match=r"truncated|out of bounds|cannot load it"):
        Pipeline.load(demo, "cpu", verify="none")
    manifest = manifest_of(demo)
    manifest["files"]["weights.data"]["bytes"] = 10**6
    hostile.write(demo, seal(manifest))
    with pytest.raises(BundleError, match="needs at least 3538944 bytes of weights"):
        Bundle.open(demo)


@pytest.mark.parametrize("device", ["cpu", "cpu-ort"])
def test_weights_that_memory_does_not_hold(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file claims any size without taking disk, and Linux grants the memory before it kills the process."""
    monkeypatch.setattr(loaded, "available_bytes", lambda: 10**7)
    with pytest.raises(BundleError, match=r"demo: its weights take 0\.0[12] GB, 0\.01 GB of memory are free"):
        Pipeline.load(DEMO, device)


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.ENOMEM, MemoryError, "weights.data: 0.00 GB cannot be mapped into memory; see ulimit -v"),
        # Mapping takes a descriptor.
        (
            errno.EMFILE,
            BundleError,
            "weights.data: cannot be read (Too many open files); raise the limit of open files (ulimit -n)",
        ),
    ],
)
def test_weights_that_cannot_be_mapped_name_their_file(
    code: int, kind: type[Exception], text: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's error names none."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    files = loaded.LoadedFiles(Bundle.open(tiny))
    monkeypatch.setattr(loaded.mmap, "mmap", refused)
    with pytest.raises(kind) as error:
        files.weights()
    assert str(error.value) == f"{tiny / text}"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["otter"] * 50_000, r"names classes 0 \(otter\) and .* and 49992 more; give the index"),
        (["x" * 1000] * 10, r"this model has 10 classes: x{97}\.\.\., x"),
        ([f"otter {'y' * 900}"] * 10, r"this model has 10 classes: otter y+\.\.\., otter"),
    ],
    ids=range(3),
)
def test_a_label_among_names_made_to_fill_the_screen(tiny: Path, names: list[str], message: str) -> None:
    bundle = Bundle.open(tiny)
    many = replace(bundle, class_names=tuple(names), model=dict(bundle.model) | {"n_classes": len(names)})
    with pytest.raises(RequestError, match=message) as caught:
        class_index(many, "otter")
    assert len(str(caught.value)) < 2000


VERBS = [
    ["generate", "BUNDLE", "--label", "0", "--out", "OUT"],
    ["inspect", "BUNDLE"],
    ["verify", "BUNDLE"],
    ["bench", "BUNDLE"],
    ["bench", "BUNDLE", "--against", "eager"],
    ["reconstruct", "PNG", "--bundle", "BUNDLE", "--out", "OUT"],
    ["edit", "PNG", "--bundle", "BUNDLE", "--keep", "left", "--out", "OUT"],
    ["redo", "PNG", "--bundle", "BUNDLE"],
    ["build", "BUNDLE", "--target", "SM80"],
    ["tune", "BUNDLE"],
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: "-".join(verb[:1] + verb[2:4]))
def test_every_verb_says_it_in_one_line(
    bundle: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    png = tmp_path / "a.png"
    assert cli.main(["generate", str(tiny), "--label", "0", "--out", str(png), "--quiet"]) == 0
    capsys.readouterr()
    words = {"BUNDLE": str(bundle), "OUT": str(tmp_path / "out.png"), "PNG": str(png)}
    for change in (put("model/n_layers", 10**18), put("class_names/0", "\x1b[2J"), put("weights/output/2", 10**12)):
        manifest = manifest_of(tiny)
        change(manifest)
        hostile.write(bundle, seal(manifest))
        assert cli.main([words.get(word, word) for word in verb]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        assert err.startswith("parvis: error: ")
        assert err[:-1].isprintable()
        assert len(err) < 1000
