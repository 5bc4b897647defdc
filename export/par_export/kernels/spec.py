"""What is planned before anything is compiled: kernels by their source and constants, and programs that launch them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from par_runtime.backends.program import ALIGN, Launch, Program, Weight

Constant = int | float | bool | str
#: dtype of a stored tensor -> type of its address
STORED_KINDS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def power(number: int) -> int:
    """The least power of two that is not below ``number``, from 1 on."""
    return 1 << (number - 1).bit_length()


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def laid_out(sizes: Mapping[str, int]) -> tuple[dict[str, tuple[int, int]], int]:
    """Buffers of ``sizes`` in bytes, one after the other: name -> offset and bytes, and the bytes of all."""
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = (end, size)
        end += round_up(size, ALIGN)
    return places, end


@dataclass(frozen=True)
class Spec:
    """One kernel to compile: ``source`` is "step.qkv", a file and a function of ``kernels/sources``.

    ``constants`` are its compile-time arguments, ``parameters`` (name, type) its run-time arguments in order: types as
    in ``program.POINTERS`` and ``program.NUMBERS``. Every pointer is a multiple of 16 bytes; so is each parameter in
    ``aligned`` (numbers of elements, for instance strides). ``dependent``: it waits by itself for the kernel before it
    (from SM90 on), which its constants say too.
    """

    source: str
    constants: tuple[tuple[str, Constant], ...]
    parameters: tuple[tuple[str, str], ...]
    warps: int
    stages: int
    dependent: bool = False

    @property
    def many_registers(self) -> bool:
        """Whether the assembler is told that a thread may have as many registers as a block leaves it: a kernel that
        holds weights (``product.hold``) or keys has so many loads on their way that it would else do them a few at a
        time.
        """
        return any(name == "HELD" and value for name, value in self.constants)

    @property
    def name(self) -> str:
        """A short name that no other kernel has, for instance "qkv-1a2b3c4d"."""
        content = json.dumps([self.source, self.constants, self.parameters, self.warps, self.stages])
        return f"{self.source.rpartition('.')[2]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


#: Kernels that the compiler found no registers or no shared memory for: others are planned in their place.
Refused = frozenset[Spec]


@dataclass
class Planned:
    """Kernels, programs and weights of an engine, or of a part of one.

    ``constants``: name -> bytes of a weight that comes from no stored tensor; the entry of ``weights`` of that name
    gets its offset when the file is written.
    """

    specs: dict[str, Spec] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    constants: dict[str, bytes] = field(default_factory=dict)

    def add(self, spec: Spec) -> str:
        """Have ``spec`` compiled; returns its name, for launches."""
        self.specs[spec.name] = spec
        return spec.name

    def launch(self, spec: Spec, grid: tuple[int, int, int], arguments: Mapping[str, object]) -> Launch:
        """A launch of ``spec`` with ``arguments`` by the names of its parameters, all of them."""
        names = [name for name, _ in spec.parameters]
        if set(names) != set(arguments):
            raise ValueError(f"{spec.source}: arguments {sorted(arguments)}; expected {sorted(names)}")
        return Launch(self.add(spec), grid, tuple(arguments[name] for name in names))  # type: ignore[misc]

    def merge(self, other: Planned) -> None:
        """Take over everything of ``other``."""
        self.specs |= other.specs
        self.programs |= other.programs
        self.weights |= other.weights
        self.constants |= other.constants
