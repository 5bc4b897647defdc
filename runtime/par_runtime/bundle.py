"""Reading and checking a bundle on disk. The schema of its manifest is in ``manifest.py``.

A bundle is a folder: ``manifest.json``, ONNX graphs, one ``weights.data`` that they share. The manifest fixes order,
phases, ids, tensor names and hashes. The runtime takes them from there and derives none of them again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from par_runtime.arguments import choice, folder
from par_runtime.checked import Mismatch, load_json, open_regular, read_regular, shown, shown_path, why_not_regular
from par_runtime.dtypes import AUTO, BYTES, Rounding
from par_runtime.errors import BundleError
from par_runtime.manifest import KEPT, MOST_BYTES, MOST_GRAPH_BYTES, check, matrices_of
from par_runtime.manifest_video import VIDEO
from par_runtime.places import WEIGHTS as WEIGHTS  # with the names of the other files
from par_runtime.quantised import MOST_CODE, SCALE
from par_runtime.reading import advised, unreadable
from par_runtime.system import digest_of

SCHEMA = 1
MANIFEST = "manifest.json"
#: Real images that no training has seen, as tokens, for reports; bundles may have it. Generating does not read it.
HELDOUT = "heldout.npz"
#: ``verify="auto"`` hashes only files up to this size, because hashing a gigabyte takes about a second.
HASH_UP_TO_BYTES = 64 * 2**20

#: What is checked of the files of a bundle or an engine when it is opened. "auto": all sizes, and the hashes of files
#: up to 64 MB; "full": all sizes and all hashes; "none": only that they are files.
FileCheck = Literal["auto", "full", "none"]


@dataclass(frozen=True)
class Phase:
    """``repeat`` calls of ``query`` input positions each, the first at position ``start``.

    ``inputs[j]`` is what slot j takes: "class", "token", or the id of a learnable token. If m slots take "token", they
    get the last m tokens that were sampled.
    """

    name: str
    query: int
    repeat: int
    start: int
    inputs: tuple[str | int, ...]

    @cached_property
    def token_slots(self) -> list[int]:
        """The slots that take earlier tokens. m slots take the last m tokens before the call."""
        return [slot for slot, entry in enumerate(self.inputs) if entry == "token"]


@dataclass(frozen=True)
class Call:
    """One call of the step network for one image: q input positions, the first at ``write``. It gives their tokens."""

    phase: Phase
    write: int

    @property
    def query(self) -> int:
        """q, the number of positions."""
        return self.phase.query

    @property
    def positions(self) -> slice:
        """The positions of the call, to index arrays of tokens or noise [B,N]."""
        return slice(self.write, self.write + self.query)


def matrix_names(bundle: Bundle) -> list[str]:
    """Every matrix of the step network that can be quantised, in the order of a call."""
    return matrices_of(bundle.model["n_layers"])


def image_calls(phases: Sequence[Phase]) -> tuple[Call, ...]:
    """Every call of an image, in order."""
    return tuple(Call(phase, phase.start + i * phase.query) for phase in phases for i in range(phase.repeat))


@dataclass(frozen=True)
class Cache:
    """The key-value cache of ``step.onnx``: a buffer [R,heads,S,head_dim] per name.

    ``outputs[i]`` updates ``inputs[i]``.
    """

    dtype: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the bundle."""

    file: str
    opset: int
    sampling: str | None


@dataclass(frozen=True)
class Stored:
    """One tensor of ``weights.data``; ``offset`` and ``length`` in bytes. The shape of a matrix is (in, out)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Calibration:
    """What ``parvis calibrate`` made of a bundle, and proved to be harmless."""

    weights: str  #: "int8", "int4", or "kept"
    group: int  #: rows of a matrix that share a scale; 0 where weights were kept
    kept: tuple[str, ...]  #: names of matrices that are not quantised
    arithmetic: str  #: what the C step multiplies in by default, one of ``dtypes.ARITHMETICS``
    cache: str  #: what the C step keeps keys and values in by default: "fp32" or "bf16"
    source: str  #: hash of the bundle that it was made from
    report: Mapping[str, Any]  #: the figures of its report
    decoder_precision: str = "fp32"  #: what the C decoder computes in by default, where the CPU can


@dataclass(frozen=True)
class Defaults:
    """The sampling settings of requests that give none."""

    guidance: float
    temperature: float
    top_k: int
    top_p: float
    guidance_interval: int = -1  #: manifests hold it only where it is another


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest is read and checked, its weights are not loaded."""

    path: Path
    name: str
    hash: str
    model: Mapping[str, int]
    grid: tuple[int, int, int]
    group_size: int
    n_tokens: int
    precision: str
    order: tuple[int, ...]
    phases: tuple[Phase, ...]
    class_base: int
    no_class: int
    graphs: Mapping[str, Graph]
    cache: Cache
    image_size: tuple[int, int] | None  #: (H, W) in pixels, None where the bundle ends at tokens
    class_names: tuple[str, ...] | None  #: one string per class; further names of a class after ", "
    class_synsets: tuple[str, ...] | None  #: WordNet's, for ImageNet models
    defaults: Defaults
    selftest: Mapping[str, Any]
    parity: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, Stored]  #: of the step network, by name; older bundles have no such table
    calibration: Calibration | None  #: None for a bundle as it was exported
    tokenizer: Mapping[str, Any] | None  #: the sizes of the tokenizer; None where the bundle ends at tokens
    decoder_weights: Mapping[str, Stored]  #: of the decoder, by name; older bundles have no such table
    frames: int = 1  #: T, of a clip; 1 for images, and where the bundle ends at tokens
    time_downsampling: int = 1  #: frames of each latent frame but the first, which is one frame
    #: file -> its state when it was checked: what is loaded later must be that file, not one of the next version
    checked: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        """V, the number of codes that a token can have."""
        return self.model["vocab_size"]

    @property
    def n_classes(self) -> int:
        """The number of classes, without "no class"."""
        return self.model["n_classes"]

    @property
    def latent_frames(self) -> int:
        """Latent frames of a clip: each is a grid of tokens, and they come one after another. 1 for images."""
        return self.grid[0]

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.grid[1] * self.grid[2]

    @property
    def video(self) -> bool:
        """Whether it makes clips: its grid has several latent frames."""
        return self.latent_frames > 1

    @property
    def kind(self) -> str:
        """What it makes, for messages: "image" or "clip"."""
        return "clip" if self.video else "image"

    def frames_of(self, latent: int) -> int:
        """Frames of the first ``latent`` latent frames."""
        return 1 + (latent - 1) * self.time_downsampling if latent else 0

    @property
    def calls(self) -> int:
        """Model calls per image."""
        return sum(phase.repeat for phase in self.phases)

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of one parameter that a call reads, on average, as it is stored: scales are counted too."""
        return self.bytes_read(None)

    def bytes_read(self, number_bytes: float | None, *, stored_scales: bool = False) -> float:
        """:attr:`weight_bytes` for a backend that holds all but codes in ``number_bytes``; None: as they are stored.

        With ``stored_scales`` scales are as they are stored too.
        """
        read = {name: at for name, at in self.weights.items() if name not in ("embed", "cos", "sin")}
        parameters = sum(math.prod(at.shape) for name, at in read.items() if not name.endswith(SCALE))
        if not parameters:
            return BYTES[self.precision] if number_bytes is None else number_bytes
        size = 0.0
        for name, at in read.items():
            kept = number_bytes is None or at.dtype in MOST_CODE or (stored_scales and name.endswith(SCALE))
            size += at.length if kept or number_bytes is None else math.prod(at.shape) * number_bytes
        return size / parameters

    @property
    def quantised(self) -> str | None:
        """The dtype of its quantised matrices, "int8" or "int4"; None where there are none."""
        return None if self.calibration is None or self.calibration.weights == KEPT else self.calibration.weights

    @property
    def stored(self) -> str:
        """What its matrices are stored in: "fp32", "fp16", "bf16", "int8", "int4"."""
        return self.quantised or self.precision

    def rounding(self, asked: Rounding = AUTO) -> Rounding:
        """``asked``, with what its calibration has proven in the place of each "auto"; fp32 where there is none."""
        proven = self.calibration or Rounding()
        return Rounding(
            *(getattr(proven, name) if value == "auto" else value for name, value in asked._asdict().items())
        )

    @staticmethod
    def open(path: str | Path, verify: FileCheck = "auto") -> Bundle:
        """Read and check the bundle at ``path``.

        ``verify``: how much of its files is checked, see :data:`FileCheck`. Raises BundleError, RequestError.
        """
        path = folder("path", path)
        choice("verify", verify, get_args(FileCheck))
        manifest = _read_manifest(path)
        try:
            check(manifest)
        except Mismatch as fault:
            raise BundleError(
                f"{path / MANIFEST}: {fault}; the manifest is not one of schema {SCHEMA}; export the bundle again"
            ) from None
        bundle = _parse(path, manifest)
        _check_files(bundle, verify)
        return bundle


def canonical_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 (hex) of the manifest without its own "hash", as JSON with sorted keys and no spaces."""
    hashed = {key: value for key, value in manifest.items() if key != "hash"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """``manifest`` with its hash, ready to be written."""
    # Through JSON, so that the hash is of what a reader will get: for instance, tuples become lists.
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    return plain | {"hash": canonical_hash(plain)}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        what = "" if path.is_dir() else "is a file, not a folder" if path.exists() else "no such folder"
    except OSError as error:  # a name that is too long, or a folder above that may not be entered
        what = unreadable(error)
    if what:
        raise BundleError(advised(f"{shown_path(path)}: {what}", "give the path of a bundle, made by 'parvis export'"))
    file = path / MANIFEST
    if why_not_regular(file) == "missing":
        raise BundleError(f"{path}: holds no {MANIFEST}, so it is not a bundle; make one with 'parvis export'")
    again = "copy the bundle again or export it again"

    def fault(message: str) -> BundleError:
        return BundleError(advised(message, again))

    manifest = load_json(read_regular(file, MOST_BYTES, fault), str(file), fault)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int:
        raise BundleError(
            f"{file}: has no schema number; expected a manifest of schema {SCHEMA}; export the bundle again"
        )
    if schema > SCHEMA:
        raise BundleError(
            f"{file}: schema {shown(schema)} was made by a newer parvis; this one reads up to {SCHEMA}: "
            "install a newer parvis (docs/install.md)"
        )
    if schema < SCHEMA:
        raise BundleError(f"{file}: schema {shown(schema)} is older than {SCHEMA}; export the bundle again")
    given, own = manifest.get("hash"), canonical_hash(manifest)
    if given != own:
        raise BundleError(
            f"{file}: its hash is {shown(given, 16)}, its content gives {own[:12]}; "
            f"the manifest was changed after export: {again}"
        )
    checked: dict[str, Any] = manifest
    return checked


def _parse(path: Path, m: dict[str, Any]) -> Bundle:
    """The bundle of a manifest that passed :func:`par_runtime.manifest.check`."""
    t, h, w = m["grid"]
    tokenizer = m["tokenizer"]
    video = tokenizer is not None and tokenizer.get("kind") == VIDEO
    cache = m["cache"]
    return Bundle(
        path=path,
        name=m["name"],
        hash=m["hash"],
        model=m["model"],
        grid=(t, h, w),
        group_size=m["group_size"],
        n_tokens=m["n_tokens"],
        precision=m["precision"],
        order=tuple(m["order"]),
        phases=tuple(Phase(p["name"], p["query"], p["repeat"], p["start"], tuple(p["inputs"])) for p in m["phases"]),
        class_base=m["ids"]["class_base"],
        no_class=m["ids"]["no_class"],
        graphs={name: Graph(g["file"], g["opset"], g["sampling"]) for name, g in m["graphs"].items()},
        cache=Cache(cache["dtype"], tuple(cache["inputs"]), tuple(cache["outputs"]), cache["heads"], cache["head_dim"]),
        image_size=None if tokenizer is None else (tokenizer["image_size"][0], tokenizer["image_size"][1]),
        class_names=tuple(m["class_names"]) if m["class_names"] else None,
        class_synsets=tuple(m["class_synsets"]) if m.get("class_synsets") else None,
        defaults=Defaults(**m["defaults"]),
        selftest=m["selftest"],
        parity=m["parity"],
        files=m["files"],
        weights=_table(m.get("weights")),
        calibration=_calibration(m.get("calibration")),
        tokenizer=None if tokenizer is None else tokenizer["config"],
        decoder_weights=_table(None if tokenizer is None else tokenizer.get("weights")),
        frames=tokenizer["frames"] if video else 1,
        time_downsampling=tokenizer["time_downsampling"] if video else 1,
    )


def _table(entry: Mapping[str, Any] | None) -> dict[str, Stored]:
    return {name: Stored(dtype, tuple(shape), *at) for name, (dtype, shape, *at) in (entry or {}).items()}


def _calibration(entry: Mapping[str, Any] | None) -> Calibration | None:
    if entry is None:
        return None
    names = ("weights", "group", "arithmetic", "cache", "source", "report")
    decoder = entry.get("decoder_precision", "fp32")
    return Calibration(**{name: entry[name] for name in names}, kept=tuple(entry["kept"]), decoder_precision=decoder)


def _check_files(bundle: Bundle, verify: FileCheck) -> None:
    """Raise BundleError for a file that is not as the manifest says.

    Even ``verify="none"`` refuses what is no file, or could not be opened without harm: whoever opens them later,
    ONNX Runtime among them, does not look.
    """
    graphs = {graph.file for graph in bundle.graphs.values()}
    for name, entry in bundle.files.items():
        file = bundle.path / name
        with suppress(OSError, ValueError):
            bundle.checked[name] = state(file.stat())  # before it is read
        why = file_fault(file, entry["bytes"], entry["sha256"], verify)
        if why is None and name in graphs and file.stat().st_size > MOST_GRAPH_BYTES:
            why = f"{file.stat().st_size} bytes; expected at most {MOST_GRAPH_BYTES} of a graph"
        if why is not None:
            raise BundleError(advised(f"{file}: {why}", "copy the bundle again or export it again"))


def state(status: os.stat_result) -> tuple[int, int]:
    """Size in bytes and time of the last change of a file: another content has another pair."""
    return status.st_size, status.st_mtime_ns


def file_fault(file: Path, size: int, digest: str, verify: FileCheck) -> str | None:
    """What is wrong with a file that was written with ``size`` bytes and sha256 ``digest``, or None; what to do stands
    behind it where the system is at fault (``reading.advised``).

    "auto" hashes files up to 64 MB, "full" all; "none" only looks whether it is a file.
    """
    why = why_not_regular(file)
    if why is not None or verify == "none":
        return why
    try:
        with open_regular(file) as opened:
            have = os.fstat(opened.fileno()).st_size
            if have != size:
                return f"{'truncated' if have < size else 'too long'}: {have} bytes, expected {size}"
            if verify != "full" and have > HASH_UP_TO_BYTES:
                return None
            content = digest_of(opened)
    except OSError as error:
        return unreadable(error)
    return None if content == digest else f"its content was changed (sha256 {content[:12]}, expected {digest[:12]})"
