"""Manifests as an enemy would write them: one change each, of every entry, to every kind of value."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from par_runtime.bundle import Bundle, FileCheck, canonical_hash, seal
from par_runtime.errors import BundleError

Change = Callable[[dict[str, Any]], object]  #: of a manifest
#: What replaces a value, whatever it was.
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    63,
    64,
    65,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    -(2**63),
    2**64,
    10**18,
    10**99,
    0.0,
    -0.5,
    0.5,
    1e308,
    5e-324,
    "",
    "x",
    "0",
    "..",
    "/etc/passwd",
    "../weights.data",
    "weights.data",
    "step.onnx",
    "manifest.json",
    "class",
    "token",
    "float32",
    "float64",
    "int4",
    "fp32",
    "x" * 100_000,
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe",
    "a\nb",
    "a\0b",
    [],
    [0],
    [[]],
    [-1] * 3,
    [1] * 64,
    list(range(63)),
    ["x"] * 4,
    {},
    {"": 0},
    {"x": {"y": []}},
]
EXTRA = "\x1b[31mextra"

Place = tuple[str | int, ...]


def drop(path: str) -> Change:
    """A change that takes one entry away, by its place."""

    def change(manifest: Any) -> None:
        *steps, last = path.split("/")
        for step in steps:
            manifest = manifest[step]
        del manifest[last]

    return change


def put(path: str, value: Any) -> Change:
    """A change of one entry, by its place."""

    def change(manifest: Any) -> None:
        *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]
        for step in steps:
            manifest = manifest[step]
        manifest[last] = value

    return change


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Where each value of a manifest is, containers too; of a long list of numbers the first, the second and last."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        short = len(value) <= 8 or not all(isinstance(entry, int) for entry in value)
        for i in range(len(value)) if short else (0, 1, len(value) - 1):
            yield from places(value[i], (*at, i))


def changed(manifest: str, at: Place, change: Any) -> dict[str, Any] | None:
    """The JSON ``manifest`` with one change at ``at``: a value of :data:`VALUES`, or an :class:`Edit`; None where the
    edit does not apply.
    """
    out: dict[str, Any] = json.loads(manifest)
    holder: Any = out
    for step in at[:-1]:
        holder = holder[step]
    old = holder[at[-1]]
    if not isinstance(change, Edit):
        holder[at[-1]] = copy.deepcopy(change)
        return out
    new = change.of(old)
    if new is Edit.DELETE:
        del holder[at[-1]]
    elif new is Edit.NOTHING:
        return None
    else:
        holder[at[-1]] = new
    return out


class Edit:
    """A change that depends on the value that was there."""

    DELETE, NOTHING = object(), object()
    ALL = ("delete", "shorter", "longer", "one more", "one less", "double", "negative", "as text", "extra")

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def of(self, old: Any) -> Any:
        """The new value; ``DELETE``, or ``NOTHING`` where the change does not apply."""
        number = type(old) in (int, float)
        if self.name == "delete":
            return self.DELETE
        if self.name == "as text":
            return str(old) if not isinstance(old, str) else self.NOTHING
        if self.name == "shorter" and isinstance(old, list | str) and old:
            return old[:-1]
        if self.name == "longer" and isinstance(old, list) and old:
            return [*old, copy.deepcopy(old[-1])]
        if self.name == "extra" and isinstance(old, dict):
            return old | {EXTRA: 1}
        if number and self.name in ("one more", "one less", "double", "negative"):
            return {"one more": old + 1, "one less": old - 1, "double": 2 * old, "negative": -old}[self.name]
        return self.NOTHING


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """``manifest`` with the hash of its content."""
    return manifest | {"hash": canonical_hash(manifest)}


#: Tables whose entries are read alike: they differ in their names and numbers.
TABLES = ("weights", "files", "graphs", "inputs", "outputs", "class_names", "phases")


def kind(at: Place) -> Place:
    """The same for the places of one thing in all entries of a table."""
    return tuple("*" if i and at[i - 1] in TABLES else step for i, step in enumerate(at))


def few(everywhere: list[Place], most: int) -> list[Place]:
    """The first ``most`` places of each kind."""
    seen: Counter[Place] = Counter()
    kept = []
    for at in everywhere:
        seen[kind(at)] += 1
        kept += [at] if seen[kind(at)] <= most else []
    return kept


def mutations(
    manifest: dict[str, Any], count: int, seed: int, most: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was changed, the sealed manifest) of ``count`` changes: each value at least once, then by chance.

    ``most``: of places that are read alike, such as the offsets in the table of weights, so many, drawn by ``seed``.
    """
    rng, text = random.Random(seed), json.dumps(manifest)
    changes = [*VALUES, *(Edit(name) for name in Edit.ALL)]
    everywhere = list(places(manifest))
    rng.shuffle(everywhere)
    if most is not None:
        everywhere = few(everywhere, most)
    made = 0
    while made < count:
        for at in everywhere:
            change = rng.choice(changes)
            out = changed(text, at, change)
            if out is None:
                continue
            made += 1
            yield f"{'.'.join(map(str, at))} -> {str(change)[:60]!r}", sealed(out)
            if made == count:
                return


def write(bundle: Path, manifest: dict[str, Any]) -> None:
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def check_line(error: Exception) -> None:
    """One line of bounded length that a terminal prints as it is."""
    text = str(error)
    assert len(text) < 1000, text
    assert text.isprintable(), text


def check_refused(bundle: Path, change: Change, message: str, verify: FileCheck = "auto") -> None:
    """``bundle`` with ``change`` in its manifest, sealed again, is refused with one line that matches ``message``."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    write(bundle, seal(manifest))
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle, verify=verify)
    check_line(caught.value)


# -- what is no file --------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


NO_FILES = [pipe, folder, device, unix_socket]


def manifest_of(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return manifest
