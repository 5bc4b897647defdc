"""Kernels of single products in a folder: ``index.json`` says what lies where in ``cubins.bin``.

Two files, because a thousand small ones take long to copy to a rented machine. What is compiled is appended to the
second and then named in the first, which is replaced as a whole: a build that was ended goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from par_export.kernels import build as kernels_build
from par_export.kernels.compiler import Compiled, Compiler
from par_export.kernels.product_trials import Trial
from par_export.kernels.spec import Spec
from par_export.kernels.targets import Target
from par_runtime.backends.program import Kernel, kernel_from_json
from par_runtime.checked import Mismatch, Value, load_json, read_regular
from par_runtime.errors import EngineError
from par_runtime.system import available_cores

INDEX, CUBINS = "index.json", "cubins.bin"
MOST_INDEX_BYTES, MOST_CUBINS_BYTES = 2**26, 2**31
AT_A_TIME = 12  #: kernels for each processor, between two looks at the clock
REPEAT = "parvis bench --suite gpu --build-for TARGET --engines FOLDER --parts products"


@dataclass
class ProductKernels:
    """Compiled kernels by the names of their specs, for the target of that name.

    ``places``: where each begins in the file of cubins, in bytes; ``size``: of all of them. ``refused``: why the
    compiler made no kernel that can run well, by name.
    """

    folder: Path
    target: str
    compiler: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    size: int = 0

    @staticmethod
    def read(folder: Path) -> ProductKernels:
        """Those in ``folder``. Raises EngineError where it holds none, or kernels of other sources than these."""
        content = load_json(
            read_regular(folder / INDEX, MOST_INDEX_BYTES, EngineError), str(folder / INDEX), EngineError
        )
        index = Value(content)
        try:
            if index["sources"].text() != kernels_build.sources():
                raise EngineError(f"{folder}: built by other sources than this checkout's; build them again: {REPEAT}")
            out = ProductKernels(folder, index["target"].text(), index["compiler"].text())
            out.size = index["size"].integer(0, MOST_CUBINS_BYTES)
            out.refused = {name: why.text(2000) for name, why in index["refused"].items()}
            for name, entry in index["kernels"].items():
                kernel = kernel_from_json(entry["kernel"])
                out.kernels[name] = kernel
                out.places[name] = entry["place"].integer(0, out.size - kernel.bytes)
        except Mismatch as error:
            raise EngineError(f"{folder / INDEX}: no index of kernels ({error}); build it again: {REPEAT}") from error
        return out

    def cubin(self, name: str) -> bytes:
        """The cubin of a kernel. Raises EngineError where the file does not hold it any more, OSError."""
        kernel = self.kernels[name]
        with (self.folder / CUBINS).open("rb") as file:
            file.seek(self.places[name])
            content = file.read(kernel.bytes)
        if hashlib.sha256(content).hexdigest() != kernel.sha256:
            raise EngineError(f"{self.folder / CUBINS}: damaged at kernel {name}; build it again: {REPEAT}")
        return content

    def add(self, made: Sequence[tuple[Spec, Compiled]]) -> None:
        """Append kernels, and name them in the index. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / CUBINS).open("ab") as file:
            file.truncate(self.size)  # what a build that was ended has not named
            for spec, compiled in made:
                self.kernels[spec.name] = kernels_build.described(CUBINS, spec, compiled)
                self.places[spec.name] = self.size
                self.size += file.write(compiled.cubin)
            file.flush()
            os.fsync(file.fileno())
        kernels = {name: {"place": self.places[name], "kernel": asdict(one)} for name, one in self.kernels.items()}
        index: dict[str, Any] = {"sources": kernels_build.sources(), "target": self.target, "compiler": self.compiler}
        index |= {"size": self.size, "refused": self.refused, "kernels": kernels}
        part = self.folder / f".{INDEX}.part"
        part.write_text(json.dumps(index, separators=(",", ":")))
        part.replace(self.folder / INDEX)


def compiled(
    folder: Path,
    trials: Sequence[Trial],
    card: Target,
    end: float = math.inf,
    say: Callable[[str], None] = lambda _: None,
) -> ProductKernels:
    """The kernels of ``trials`` in ``folder``, compiled there for ``card`` unless they are there already.

    In the order of ``trials``, on all processors; none is begun after ``end`` by ``time.monotonic``. ``say`` gets a
    line of text after some of them. Raises BuildError where there is no compiler, OSError.
    """
    found = _of_before(folder, card, say)
    missing = _missing(found, trials)
    if not missing:
        return found
    with Compiler(available_cores()) as compiler:
        if found.compiler not in ("", compiler.version):  # kernels of two compilers are not compared
            shutil.rmtree(folder)
            found = ProductKernels(folder, card.name)
            missing = _missing(found, trials)
        found.compiler = compiler.version
        step = AT_A_TIME * available_cores()
        for first in range(0, len(missing), step):
            if time.monotonic() > end:
                break
            some = {spec.name: spec for spec in missing[first : first + step]}
            made = compiler.compile(some.values(), card, failed=found.refused)
            faults = {name: fault for name, each in made.items() if (fault := each.fault(card)) is not None}
            found.refused |= faults
            found.add([(some[name], each) for name, each in made.items() if name not in faults])
            say(f"products: kernel {min(first + step, len(missing))} of {len(missing)} for {card.name}")
    return found


def _missing(found: ProductKernels, trials: Sequence[Trial]) -> list[Spec]:
    """What must be compiled for ``trials``."""
    specs = {trial.spec.name: trial.spec for trial in trials}
    return [spec for name, spec in specs.items() if name not in found.kernels and name not in found.refused]


def _of_before(folder: Path, card: Target, say: Callable[[str], None]) -> ProductKernels:
    """What an earlier build left in ``folder``, if it was of these sources and for ``card``; else nothing, and what was
    there is removed. Raises OSError.
    """
    if folder.exists():
        try:
            found = ProductKernels.read(folder)
            if found.target == card.name:
                return found
            say(f"products: {folder} holds kernels for {found.target}: they are removed")
        except EngineError as error:
            say(f"products: what is there is removed ({error})")
        shutil.rmtree(folder)
    return ProductKernels(folder, card.name)
