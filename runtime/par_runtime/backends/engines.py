"""Engines of a bundle: TensorRT plans in ``engines/<runtime>-<version>-<target>-<precision>/``, and which one fits.

An engine folder holds ``engine.json``, the plans, and what TensorRT-RTX compiled for this GPU (``runtime.cache``,
written at run time). ``engine.json`` holds the hash of the bundle that it was built from, so a plan can never serve
another model, and its own hash, as a manifest does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from par_runtime.bundle import Bundle, FileCheck, canonical_hash, file_fault
from par_runtime.checked import UNPRINTABLE, Mismatch, Value, load_json, read_regular, shown
from par_runtime.dtypes import PRECISIONS
from par_runtime.errors import EngineError
from par_runtime.system import cache_folder

ENGINES = "engines"
ENGINE_DIR = "PARVIS_ENGINE_DIR"  #: environment variable: engines that do not lie in their bundles
ENGINE_JSON = "engine.json"
ENGINE_SCHEMA = 1
MOST_BYTES = 4 * 2**20  #: of an engine.json, which lists the kernels of its plans
MOST_BYTES_LISTED = 16 * 2**20  #: of all that are looked at for one bundle: some seconds
MOST_IMAGES = 4096  #: of a profile
MOST_ENGINES = 64  #: folders that are looked at
CAPTURES = ("image", "call", "none")


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

    ``target`` is "SM80" and the like for TensorRT-RTX; classic TensorRT plans also name the ``device`` they were
    tuned on. ``images`` are the batch sizes it has profiles for, ascending; rows are twice as many.
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

    @property
    def capability(self) -> tuple[int, int]:
        """(8, 0) for SM80, (12, 0) for SM120."""
        digits = self.target.removeprefix("SM")
        return int(digits[:-1]), int(digits[-1])

    @property
    def rebuild(self) -> str:
        """The command that builds it again."""
        bundle = self.bundle_path
        target = self.target if self.runtime == "tensorrt_rtx" else "local"
        mode = "" if self.mode == "shared" else f" --engines {self.mode}"
        return (
            f"parvis build {bundle} --target {target} --precision {self.precision} --max-images {self.images[-1]}{mode}"
        )

    @property
    def decodes(self) -> bool:
        """Whether it makes images, and not tokens alone."""
        return self.decoder is not None

    def serving(self, phase: str) -> tuple[str, int]:
        """The name of what runs ``phase``, and q, its positions per call. Raises EngineError."""
        for name, plan in self.plans.items():
            if phase in plan.phases:
                return name, plan.query
        raise EngineError(f"{self.path}: no plan serves the phase {phase!r}; rebuild with: {self.rebuild}")

    @staticmethod
    def open(path: Path, bundle: Bundle | None = None, verify: FileCheck = "auto") -> Engine:
        """Read and check the engine at ``path``; with ``bundle``, that it was built from it. Raises EngineError."""
        file = path / ENGINE_JSON
        of = path.parent.parent if bundle is None else bundle.path
        again = f"build it again with: parvis build {of}"

        def fault(message: str) -> EngineError:
            return EngineError(f"{message}; {again}")

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
            if bundle is not None and engine.bundle_hash == bundle.hash:
                _check_plans(engine, bundle)
        except Mismatch as mismatch:
            raise fault(f"{file}: {mismatch}") from None
        if bundle is not None and engine.bundle_hash != bundle.hash:
            raise EngineError(
                f"{path}: was built from a bundle with hash {engine.bundle_hash[:12]}, this one is "
                f"{bundle.hash[:12]}; rebuild with: {engine.rebuild}"
            )
        for plan in [*engine.plans.values(), *([engine.decoder] if engine.decoder else [])]:
            why = file_fault(path / plan.file, plan.bytes, plan.sha256, verify)
            if why is not None:
                raise EngineError(f"{path / plan.file}: {why}; rebuild with: {engine.rebuild}")
        return engine


def list_engines(bundle: Bundle, verify: FileCheck = "none") -> tuple[list[Engine], list[str]]:
    """The engines of ``bundle`` that can be read, and one line of text for each folder that cannot."""
    engines: list[Engine] = []
    bad: list[str] = []
    for folder in engine_folders(bundle):
        read = 0
        for path in sorted(folder.iterdir())[:MOST_ENGINES]:
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
    """Why ``engine`` cannot run on this GPU with this TensorRT, or None if it can."""
    if engine.runtime != runtime or engine.version != version:
        return (
            f"{engine.path.name} was built by {engine.runtime} {engine.version}, installed is {runtime} {version}; "
            f"rebuild with: {engine.rebuild}"
        )
    if engine.capability != capability:
        here = f"SM{capability[0]}{capability[1]}"
        target = here if runtime == "tensorrt_rtx" else "local"
        return (
            f"{engine.path.name} was built for {engine.target}, this GPU ({device}) is {here}; "
            f"build with: parvis build {engine.bundle_path} --target {target} --precision {engine.precision}"
        )
    if engine.device is not None and engine.device != device:
        return f"{engine.path.name} was tuned on {engine.device}, this GPU is {device}; rebuild with: {engine.rebuild}"
    return None


def best(engines: list[Engine]) -> Engine:
    """The engine to take, of several that fit.

    First one that ``parvis tune`` chose, then one in half precision, then the one for the most images.
    """
    order = {"fp16": 2, "bf16": 1, "fp32": 0}
    return max(engines, key=lambda e: (bool(e.tuned.get("chosen")), order.get(e.precision, 0), e.images[-1]))


def _check(e: Value) -> None:
    """Raise Mismatch for the first entry of an ``engine.json`` that is not of its form."""
    e["bundle"].match("[0-9a-f]{64}", "64 hexadecimal digits")
    e["runtime"].match("[a-z_]{1,32}", "the name of a TensorRT")
    e["version"].match(r"[0-9A-Za-z.+_-]{1,64}", "a version")
    e["target"].match("SM[0-9]{2,4}", "SM80 and the like")
    e["device"]
    if e.get("device") is not None:
        e["device"].text()
    e["precision"].one_of(PRECISIONS)
    e["mode"].match("[a-z-]{1,32}", "shared or per-phase")
    e["sampling"].match("[a-z]{1,32}", "a kind of sampling")
    images = e["images"].integers(1, MOST_IMAGES)
    if not 1 <= len(images) <= 64 or images != sorted(set(images)):
        e["images"].refuse("1 to 64 numbers, ascending")
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


def _check_plan(plan: Value, least_query: int) -> None:
    plan["file"].file_name("engine")
    plan["bytes"].integer(0, 2**50)
    plan["sha256"].match("[0-9a-f]{64}", "64 hexadecimal digits")
    plan["query"].integer(least_query, 2**20 if least_query else 0)
    for phase in plan["phases"].entries(0, 16):
        phase.match("[a-z_]{1,32}", "1 to 32 small letters")


def _check_plans(engine: Engine, bundle: Bundle) -> None:
    """Raise Mismatch where the plans do not serve the phases of the bundle that they were built from."""
    for phase in bundle.phases:
        serving = [plan for plan in engine.plans.values() if phase.name in plan.phases]
        if not serving or not phase.query <= serving[0].query <= bundle.group_size:
            raise Mismatch(
                f"plans have none for the phase {phase.name!r} of {phase.query} positions and at most "
                f"{bundle.group_size}"
            )
    if engine.decoder is not None and bundle.image_size is None:
        raise Mismatch("decoder is there; expected none, because the bundle ends at tokens")


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
    )
