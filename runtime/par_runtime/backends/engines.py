"""Engines of a bundle in ``engines/<runtime>-<version>-<target>-<precision>/``, and which one fits.

There are two kinds: TensorRT plans, and our own kernels (``program.py``). An engine folder holds ``engine.json``; the
plans, and what TensorRT-RTX compiled for this GPU (``runtime.cache``, written at run time), or the cubins. It holds the
hash of the bundle that it was built from, so an engine can never serve another model, and its own hash, as a manifest
does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from par_runtime.backends.base import IMAGE_INPUTS, tensors
from par_runtime.backends.commands import command_by_name, command_for
from par_runtime.backends.program import CONSTANTS, Kernels, Launch, Pointer, Program, from_json
from par_runtime.backends.tails import TAILS
from par_runtime.bundle import WEIGHTS, Bundle, FileCheck, canonical_hash, file_fault
from par_runtime.checked import UNPRINTABLE, Mismatch, Value, load_json, read_regular, shown
from par_runtime.dtypes import BYTES, PRECISIONS
from par_runtime.errors import EngineError
from par_runtime.reading import advised
from par_runtime.system import cache_folder

ENGINES = "engines"
RTX = "tensorrt_rtx"
KERNELS = "kernels"  #: the ``runtime`` of engines of our own kernels
POINTER_ALIGN = 16  #: bytes: what kernels were compiled to expect of every address
ENGINE_DIR = "PARVIS_ENGINE_DIR"  #: environment variable: engines that do not lie in their bundles
ENGINE_JSON = "engine.json"
ENGINE_SCHEMA = 1
MOST_BYTES = 4 * 2**20  #: of an engine.json, which lists the kernels of its plans
MOST_BYTES_LISTED = 16 * 2**20  #: of all that are looked at for one bundle: some seconds
MOST_OF_A_PROFILE = 4096  #: images, that an engine may say it has
MOST_BATCH = 256  #: images, of the largest batch that 'parvis build' builds an engine for
MOST_PROFILES = 64  #: batch sizes of an engine
MOST_ENGINES = 64  #: folders that are looked at
#: How much of an image is one CUDA graph: all of it, a call, or nothing.
Capture = Literal["image", "call", "none"]
CAPTURES: tuple[Capture, ...] = get_args(Capture)


@dataclass(frozen=True)
class Plan:
    """One plan file: ``query`` positions per call (0 for the decoder), and the phases that it serves."""

    file: str
    bytes: int
    sha256: str
    query: int
    phases: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """An opened engine folder: checked, not loaded.

    It has either ``plans`` and perhaps a ``decoder``, or ``kernels``.
    ``target`` is "SM80" and the like, for which it was compiled; classic TensorRT plans also name the ``device`` they
    were tuned on. ``images`` are the batch sizes it has profiles for, ascending; rows are twice as many.
    """

    path: Path
    bundle_path: Path
    bundle_hash: str
    runtime: str
    version: str
    target: str
    device: str | None
    precision: str
    mode: str
    images: tuple[int, ...]
    sampling: str
    plans: Mapping[str, Plan]
    decoder: Plan | None
    tuned: Mapping[str, Any]
    report: Mapping[str, Any]
    kernels: Kernels | None = None

    @property
    def capability(self) -> tuple[int, int]:
        """(8, 0) for SM80, (12, 0) for SM120."""
        digits = self.target.removeprefix("SM")
        return int(digits[:-1]), int(digits[-1])

    @property
    def measured_ms(self) -> float:
        """Milliseconds per image that ``parvis tune`` measured, of the batch size it tuned for; infinite without."""
        rows = self.tuned.get("rows") or ()
        return min((row["ms_per_image"] for row in rows if row["images"] == self.tuned.get("images")), default=math.inf)

    @property
    def rebuild(self) -> str:
        """The command that builds it again."""
        mode = "" if self.mode == "shared" else f" --engines {self.mode}"
        if self.runtime != KERNELS and self.sampling in TAILS:
            mode += f" --sampling {self.sampling}"
        again = command_for(self.bundle_path, self.runtime, self.target, self.precision)
        return f"{again} --max-images {self.images[-1]}{mode}"

    @property
    def decodes(self) -> bool:
        """Whether it makes images, and not tokens alone."""
        return self.decoder is not None if self.kernels is None else "decoder" in self.kernels.programs

    @property
    def files(self) -> list[tuple[str, int, str]]:
        """Name, bytes and sha256 of each of its files, beside ``engine.json``."""
        plans = [*self.plans.values(), *([self.decoder] if self.decoder else [])]
        out = [(plan.file, plan.bytes, plan.sha256) for plan in plans]
        if self.kernels is not None:
            out += dict.fromkeys((k.file, k.bytes, k.sha256) for k in self.kernels.kernels.values())
            out.append((CONSTANTS, self.kernels.constants_bytes, self.kernels.constants_sha256))
        return out

    @property
    def calls(self) -> Mapping[str, Plan | Program]:
        """What makes calls of the step, by name: without the decoder."""
        if self.kernels is None:
            return self.plans
        return {name: program for name, program in self.kernels.programs.items() if program.query}

    def serving(self, phase: str) -> tuple[str, int]:
        """The name of what runs ``phase``, and q, its positions per call. Raises EngineError."""
        for name, each in self.calls.items():
            if phase in each.phases:
                return name, each.query
        raise EngineError(f"{self.path}: no plan serves the phase {phase!r}; rebuild with: {self.rebuild}")

    @staticmethod
    def open(path: Path, bundle: Bundle | None = None, verify: FileCheck = "auto") -> Engine:
        """Read and check the engine at ``path``; with ``bundle``, that it was built from it. Raises EngineError."""
        file = path / ENGINE_JSON
        of = path.parent.parent if bundle is None else bundle.path
        again = f"build it again with: {command_by_name(path.name, of)}"

        def fault(message: str) -> EngineError:
            return EngineError(advised(message, again))

        entry = load_json(read_regular(file, MOST_BYTES, fault), str(file), fault)
        schema = entry.get("schema") if isinstance(entry, dict) else entry
        if type(schema) is not int or schema != ENGINE_SCHEMA:
            raise fault(f"{file}: schema {shown(schema)}, this parvis reads {ENGINE_SCHEMA}")
        if entry.get("hash") != canonical_hash(entry):
            raise EngineError(
                f"{file}: its content does not match its own hash; it was changed after the build: {again}"
            )
        try:
            _check(Value(entry))
            engine = _parse(path, of, entry)
            again = f"rebuild with: {engine.rebuild}"
            if bundle is not None and engine.bundle_hash == bundle.hash:
                _check_plans(engine, bundle)
                if engine.kernels is not None:
                    _check_kernels(engine, engine.kernels, bundle)
        except Mismatch as mismatch:
            raise fault(f"{file}: {mismatch}") from None
        if bundle is not None and engine.bundle_hash != bundle.hash:
            raise EngineError(
                f"{path}: was built from a bundle with hash {engine.bundle_hash[:12]}, this one is "
                f"{bundle.hash[:12]}; rebuild with: {engine.rebuild}"
            )
        engine.check_files(verify)
        return engine

    def check_files(self, verify: FileCheck) -> None:
        """Raise EngineError for a file that is not as ``engine.json`` says; ``verify``: see ``bundle.FileCheck``."""
        for name, size, digest in self.files:
            why = file_fault(self.path / name, size, digest, verify)
            if why is not None:
                raise EngineError(advised(f"{self.path / name}: {why}", f"rebuild with: {self.rebuild}"))


def list_engines(bundle: Bundle, verify: FileCheck = "none") -> tuple[list[Engine], list[str]]:
    """The engines of ``bundle`` that can be read, and one line of text for each folder that cannot."""
    engines: list[Engine] = []
    bad: list[str] = []
    for folder in engine_folders(bundle):
        read = 0
        paths = sorted(folder.iterdir())
        for path in paths[:MOST_ENGINES]:
            if not path.is_dir() or path.name.startswith("."):
                continue
            if UNPRINTABLE.search(path.name):
                bad.append(f"{folder}: the folder {shown(path.name)} has a name that cannot be printed; remove it")
                continue
            file = path / ENGINE_JSON
            read += file.stat().st_size if file.is_file() else 0
            if read > MOST_BYTES_LISTED:
                bad.append(f"{folder}: more than {MOST_BYTES_LISTED} bytes of {ENGINE_JSON}; remove engines")
                break
            try:
                engines.append(Engine.open(path, bundle, verify))
            except EngineError as error:
                bad.append(str(error))
        if len(paths) > MOST_ENGINES:
            bad.append(f"{folder}: holds {len(paths)} folders, of which the first {MOST_ENGINES} are read; remove some")
    return engines, bad


def joined(reasons: list[str], most: int = 4) -> str:
    """The first of ``reasons`` why engines cannot be used, as one text, and how many more there are."""
    more = f"; and {len(reasons) - most} more" if len(reasons) > most else ""
    return "; ".join(reasons[:most]) + more


def has_engines(bundle: Bundle) -> bool:
    """Whether the bundle has a folder of engines, usable or not."""
    return bool(engine_folders(bundle))


def engine_folders(bundle: Bundle) -> list[Path]:
    """The folders that hold engines of ``bundle``: its own, that of ``PARVIS_ENGINE_DIR``, and the user's cache."""
    elsewhere = os.environ.get(ENGINE_DIR)
    folders = [
        bundle.path / ENGINES,
        engine_folder(bundle, Path(elsewhere)) if elsewhere else None,
        cached_engine_folder(bundle),
    ]
    return [folder for folder in folders if folder is not None and os.path.isdir(folder) and os.access(folder, os.R_OK)]


def engine_folder(bundle: Bundle, root: Path) -> Path:
    """The folder for engines of ``bundle`` below ``root``, which may hold those of many bundles."""
    return root / bundle.hash[:32]


def cached_engine_folder(bundle: Bundle) -> Path | None:
    """The folder for engines of a bundle that cannot be written, in the user's cache; None where there is no home."""
    cache = cache_folder()
    return None if cache is None else engine_folder(bundle, cache / "bundles")


def why_unfit(engine: Engine, runtime: str, version: str, capability: tuple[int, int], device: str) -> str | None:
    """Why ``engine`` cannot run on this GPU with this runtime, or None if it can.

    ``runtime`` and ``version``: of the TensorRT that is installed, or "kernels" and the version that is read here.
    """
    if engine.runtime == KERNELS and engine.version != version:
        return (
            f"{engine.path.name} is of version {engine.version} of kernels, this parvis runs {version}; rebuild with: "
            f"{engine.rebuild}"
        )
    if engine.runtime != runtime or engine.version != version:
        return (
            f"{engine.path.name} was built by {engine.runtime} {engine.version}, installed is {runtime} {version}; "
            f"rebuild with: {engine.rebuild}"
        )
    # What was compiled for a GPU of compute capability 8.x runs on later ones of 8.x too; from 9.0 on it uses what only
    # that one GPU has.
    (major, minor), runs_on_later = engine.capability, runtime == KERNELS and engine.capability < (9, 0)
    here = f"SM{capability[0]}{capability[1]}"
    # Kernels are built for no GPU before SM80: there the command is that for a plan.
    kind = RTX if runtime == KERNELS and capability < (8, 0) else runtime
    build = f"build with: {command_for(engine.bundle_path, kind, here, engine.precision)}"
    if major != capability[0] or not (minor == capability[1] or (runs_on_later and minor < capability[1])):
        return f"{engine.path.name} was built for {engine.target}, this GPU ({device}) is {here}; {build}"
    if engine.kernels is not None and minor != capability[1]:
        needs, has = max(kernel.shared for kernel in engine.kernels.kernels.values()), _shared_bytes(capability)
        if needs > has:
            return (
                f"{engine.path.name} was built for {engine.target} and takes {needs} bytes of shared memory, this GPU "
                f"({device}) has {has}; {build}"
            )
    if engine.device is not None and engine.device != device:
        return f"{engine.path.name} was tuned on {engine.device}, this GPU is {device}; rebuild with: {engine.rebuild}"
    return None


def _shared_bytes(capability: tuple[int, int]) -> int:
    """Shared memory that a block may have on a GPU of compute capability 8.x."""
    return (163 if capability in ((8, 0), (8, 7)) else 99) * 1024


def best(engines: list[Engine]) -> Engine:
    """The engine to take, of several that fit.

    First one that ``parvis tune`` chose, of several the fastest. Then our own kernels, half precision, the GPU that it
    was compiled for (the latest of those that fit), the most images.
    """
    order = {"fp16": 2, "bf16": 1, "fp32": 0}

    def worth(e: Engine) -> tuple[object, ...]:
        kernels = e.runtime == KERNELS
        return bool(e.tuned.get("chosen")), -e.measured_ms, kernels, order[e.precision], e.capability, e.images[-1]

    return max(engines, key=worth)


def _check(e: Value) -> None:
    """Raise Mismatch for the first entry of an ``engine.json`` that is not of its form."""
    e["bundle"].match("[0-9a-f]{64}", "64 hexadecimal digits")
    e["runtime"].match("[a-z_]{1,32}", "kernels, or the name of a TensorRT")
    e["version"].match(r"[0-9A-Za-z.+_-]{1,64}", "a version")
    e["target"].match("SM[0-9]{2,4}", "SM80 and the like")
    e["device"]
    if e.get("device") is not None:
        e["device"].text()
    e["precision"].one_of(PRECISIONS)
    e["mode"].match("[a-z-]{1,32}", "shared or per-phase")
    e["sampling"].match("[a-z]{1,32}", "a kind of sampling")
    images = e["images"].integers(1, MOST_OF_A_PROFILE)
    if not 1 <= len(images) <= MOST_PROFILES or images != sorted(set(images)):
        e["images"].refuse(f"1 to {MOST_PROFILES} numbers, ascending")
    if (e["runtime"].value == KERNELS) != (e.get("kernels") is not None):
        e["runtime"].refuse("kernels where there is an entry kernels, and only there")
    if e.get("kernels") is not None and (e["plans"].object() or e.get("decoder") is not None):
        e["plans"].refuse("none, and no decoder, in an engine of kernels")
    for name, plan in e["plans"].items(16):
        Value(name, "a name in plans").match("[a-z_]{1,32}", "1 to 32 small letters")
        _check_plan(plan, 1)
    e["decoder"]
    if e.get("decoder") is not None:
        _check_plan(e["decoder"], 0)
    e["report"].object()
    tuned = e["tuned"]
    tuned.object()
    if tuned.get("chosen") is not None:
        tuned["chosen"].boolean()
    if tuned.get("capture") is not None:
        tuned["capture"].one_of(CAPTURES)
    if tuned.get("rows") is not None:
        for row in tuned["rows"].entries(0, 2**12):
            row["images"].integer(1, MOST_OF_A_PROFILE)
            row["ms_per_image"].number(0, 1e12)


def _check_plan(plan: Value, least_query: int) -> None:
    plan["file"].file_name("engine")
    plan["bytes"].integer(0, 2**50)
    plan["sha256"].match("[0-9a-f]{64}", "64 hexadecimal digits")
    plan["query"].integer(least_query, 2**20 if least_query else 0)
    for phase in plan["phases"].entries(0, 16):
        phase.match("[a-z_]{1,32}", "1 to 32 small letters")


def _check_plans(engine: Engine, bundle: Bundle) -> None:
    """Raise Mismatch where the plans do not serve the phases of the bundle that they were built from."""
    what = "program" if engine.kernels else "plan"
    for phase in bundle.phases:
        serving = [each for each in engine.calls.values() if phase.name in each.phases]
        if not serving or not phase.query <= serving[0].query <= bundle.group_size:
            fits = " to ".join(str(query) for query in dict.fromkeys((phase.query, bundle.group_size)))
            raise Mismatch(f"no {what} serves the phase {phase.name!r}; expected one with a query of {fits} positions")
    if engine.decodes and bundle.image_size is None:
        raise Mismatch("decoder is there; expected none, because the bundle ends at tokens")


def _check_kernels(engine: Engine, kernels: Kernels, bundle: Bundle) -> None:
    """Raise Mismatch where launches name what is not there, or an address that is not inside of what they name."""
    stored_bytes = bundle.files[WEIGHTS]["bytes"]
    weights = {name: weight.bytes for name, weight in kernels.weights.items()}
    for name, weight in kernels.weights.items():
        place, size = weight.source
        end = kernels.constants_bytes if weight.stored is None else stored_bytes
        if place + size > end:
            file = CONSTANTS if weight.stored is None else WEIGHTS
            raise Mismatch(f"kernels.weights.{name} is {size} bytes at {place} of {file}, which has {end}")
        if weight.stored is not None and weight.pack is not None:
            _check_launch(f"kernels.weights.{name}.pack", weight.pack, 0, {"raw": size, "packed": weight.bytes})
    for name, program in kernels.programs.items():
        where = f"kernels.programs.{name}"
        if (program.query == 0) != (name == "decoder"):
            raise Mismatch(f"{where}.query is {program.query}; expected 0 for the decoder and only there")
        if tuple(sorted(program.profiles)) != engine.images:
            raise Mismatch(f"{where}.profiles are {sorted(program.profiles)}; expected {list(engine.images)}")
        for images, profile in program.profiles.items():
            known = [
                weights,
                _tensor_bytes(engine, bundle, program, images),
                {key: size for key, (_, size) in profile.scratch.items()},
                {key: size for key, (_, size) in program.state.items()},
            ]
            sizes = {key: size for each in known for key, size in each.items()}
            if len(sizes) != sum(map(len, known)):
                raise Mismatch(f"{where}: a tensor, a weight, scratch and state have different names")
            for launch, layer in program.launches(images):
                _check_launch(f"{where}.profiles.{images}", launch, layer, sizes)


def _check_launch(where: str, launch: Launch, layer: int, sizes: Mapping[str, int]) -> None:
    for argument in launch.arguments:
        if isinstance(argument, Pointer):
            name, offset = argument.of_layer(layer)
            if name not in sizes:
                raise Mismatch(f"{where}: {launch.kernel} takes {shown(name)}, which is no tensor, weight or buffer")
            if offset >= sizes[name] or offset % POINTER_ALIGN:
                raise Mismatch(
                    f"{where}: {launch.kernel} takes byte {offset} of {shown(name)}; expected a multiple of "
                    f"{POINTER_ALIGN} below {sizes[name]}"
                )


def _tensor_bytes(engine: Engine, bundle: Bundle, program: Program, images: int) -> dict[str, int]:
    """Bytes of each tensor that ``program`` is bound to at a batch size."""
    number = dict.fromkeys((*bundle.cache.inputs, *bundle.cache.outputs), int(BYTES[engine.precision]))
    number |= {name: np.dtype(kind).itemsize for name, kind in IMAGE_INPUTS.items()}
    number |= dict.fromkeys(("length", "uniform", "logits"), 4) | {"images": 1}
    return {
        name: math.prod(shape) * images * (2 if letter == "R" else 1) * number.get(name, 8)
        for name, (letter, *shape) in tensors(bundle, program.query).items()
    }


def _parse(path: Path, bundle_path: Path, entry: dict[str, Any]) -> Engine:
    """The engine of an ``engine.json`` that passed :func:`_check`."""

    def plan(item: dict[str, Any]) -> Plan:
        return Plan(item["file"], item["bytes"], item["sha256"], item["query"], tuple(item["phases"]))

    return Engine(
        path=path,
        bundle_path=bundle_path,
        bundle_hash=entry["bundle"],
        runtime=entry["runtime"],
        version=entry["version"],
        target=entry["target"],
        device=entry["device"],
        precision=entry["precision"],
        mode=entry["mode"],
        images=tuple(entry["images"]),
        sampling=entry["sampling"],
        plans={name: plan(item) for name, item in entry["plans"].items()},
        decoder=None if entry["decoder"] is None else plan(entry["decoder"]),
        tuned=entry["tuned"],
        report=entry["report"],
        kernels=from_json(Value(entry)["kernels"]) if entry.get("kernels") is not None else None,
    )
