"""What an engine of kernels is made of, as ``engine.json`` describes it: cubins, lists of launches, weights.

``par_export.kernels`` writes it, ``backends/kernels/`` runs it. Between the two there is nothing else: the runtime
knows neither Triton nor what a kernel computes, only which arguments it takes.

A program is the list of launches of one call of the step network, or of the decoder, for each batch size. Its arguments
are numbers, or addresses of

- tensors that the backend binds: inputs and outputs as a plan of TensorRT has them (``ids``, ``past_k.3``, ``tokens``);
- scratch buffers, each at a fixed place of one block of memory, which programs share, so that nothing in it outlives a
  run of the list;
- state, which belongs to the program alone and is zeroed once: counters that each launch leaves as it found them;
- weights, in the order in which kernels read them.

Letters: B images and R = 2B rows of a profile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from par_runtime.bundle import Stored
from par_runtime.checked import Mismatch, Value, shown
from par_runtime.manifest import STORED_BYTES

VERSION = "1"  #: of this form; a runtime reads no other
CONSTANTS = "constants.data"  #: numbers that the build computed, beside the cubins
ALIGN = 256  #: of every buffer's offset, in bytes
#: Types of parameters: addresses of numbers, and numbers.
POINTERS = ("*fp16", "*bf16", "*fp32", "*i64", "*i32", "*u8")
NUMBERS = ("i32", "i64", "fp32")
MOST_GRID = (2**31 - 1, 65535, 65535)
MOST_LAUNCHES = 4096  #: of a list
MOST_KERNELS = 512
MOST_LAYERS = 4096
MOST_OF_LAYERS = 2**14  #: launches in all layers of a list


@dataclass(frozen=True)
class Kernel:
    """One compiled function. ``file`` is its cubin; ``function`` its name there.

    ``source`` ("step.qkv") and ``constants`` say what it was compiled from: for reports, and for tests that run the
    source itself. After the ``parameters`` (name, type) come ``trailing`` addresses of the compiler's own scratch
    memory, which must be null. ``shared``: bytes of shared memory; ``spills``: bytes of registers kept in memory.
    ``dependent``: it waits for the kernel before it by itself, so it may be launched before that one has ended.
    """

    file: str
    bytes: int
    sha256: str
    function: str
    source: str
    constants: Mapping[str, Any]
    parameters: tuple[tuple[str, str], ...]
    trailing: int
    warps: int
    shared: int
    registers: int
    spills: int
    dependent: bool


@dataclass(frozen=True)
class Pointer:
    """An address: ``offset`` bytes behind the start of ``name``, and ``stride`` bytes more for each further layer.

    ``{i}`` in the name stands for the number of the layer.
    """

    name: str
    offset: int = 0
    stride: int = 0

    def of_layer(self, layer: int) -> tuple[str, int]:
        """The name and the offset in bytes in ``layer``."""
        return self.name.replace("{i}", str(layer)), self.offset + layer * self.stride


Argument = int | float | Pointer


@dataclass(frozen=True)
class Launch:
    """One launch: the name of its kernel, its grid and its arguments, one for each parameter of the kernel."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Profile:
    """The launches for one batch size: ``before``, then ``layer`` once for each layer, then ``after``.

    ``scratch``: name -> (offset, bytes) in the shared block, of which it needs ``scratch_bytes``.
    """

    before: tuple[Launch, ...]
    layer: tuple[Launch, ...]
    after: tuple[Launch, ...]
    scratch: Mapping[str, tuple[int, int]]
    scratch_bytes: int


@dataclass(frozen=True)
class Program:
    """All launches of the step (``query`` positions a call) or of the decoder (``query`` 0, ``layers`` 0).

    ``state``: name -> (offset, bytes) in ``state_bytes`` of zeros. ``profiles`` by images B.
    """

    query: int
    phases: tuple[str, ...]
    layers: int
    profiles: Mapping[int, Profile]
    state: Mapping[str, tuple[int, int]]
    state_bytes: int

    def launches(self, images: int) -> Iterator[tuple[Launch, int]]:
        """Every launch for a batch of ``images`` in order, with the number of its layer (0 outside of the layers)."""
        profile = self.profiles[images]
        for launch in profile.before:
            yield launch, 0
        for layer in range(self.layers):
            for launch in profile.layer:
                yield launch, layer
        for launch in profile.after:
            yield launch, 0


@dataclass(frozen=True)
class Weight:
    """A tensor of ``bytes`` in device memory.

    It comes from the bundle's weights file (``stored``), or, where that is None, from ``bytes`` at ``offset`` of
    :data:`CONSTANTS`. ``pack`` puts it in its final order: its arguments name ``raw``, the tensor as it is stored, and
    ``packed``, the place where it belongs. Without ``pack`` it is copied as it is.
    """

    bytes: int
    stored: Stored | None
    offset: int
    pack: Launch | None

    @property
    def source(self) -> tuple[int, int]:
        """Its offset in its file, and its bytes there."""
        return (self.offset, self.bytes) if self.stored is None else (self.stored.offset, self.stored.length)


@dataclass(frozen=True)
class Kernels:
    """All of an engine of kernels. ``programs`` has "step", and "decoder" where the engine decodes.

    ``decoder_precision`` is what the decoder computes in; ``compiler`` ("triton 3.9.0") what made the cubins.
    """

    compiler: str
    decoder_precision: str
    kernels: Mapping[str, Kernel]
    programs: Mapping[str, Program]
    weights: Mapping[str, Weight]
    constants_bytes: int
    constants_sha256: str


# -- to and from engine.json --------------------------------------------------------------------------------------


def to_json(kernels: Kernels) -> dict[str, Any]:
    """``kernels`` as plain values for ``engine.json``; :func:`from_json` reads them."""
    return {
        "compiler": kernels.compiler,
        "decoder_precision": kernels.decoder_precision,
        "kernels": {
            name: vars(k) | {"constants": dict(k.constants), "parameters": [list(p) for p in k.parameters]}
            for name, k in kernels.kernels.items()
        },
        "programs": {
            name: {
                "query": p.query,
                "phases": list(p.phases),
                "layers": p.layers,
                "state": {key: list(place) for key, place in p.state.items()},
                "state_bytes": p.state_bytes,
                "profiles": {
                    str(images): {
                        "before": [_launch_json(launch) for launch in profile.before],
                        "layer": [_launch_json(launch) for launch in profile.layer],
                        "after": [_launch_json(launch) for launch in profile.after],
                        "scratch": {key: list(place) for key, place in profile.scratch.items()},
                        "scratch_bytes": profile.scratch_bytes,
                    }
                    for images, profile in p.profiles.items()
                },
            }
            for name, p in kernels.programs.items()
        },
        "weights": {
            name: {
                "bytes": w.bytes,
                "stored": None if w.stored is None else vars(w.stored) | {"shape": list(w.stored.shape)},
                "offset": w.offset,
                "pack": None if w.pack is None else _launch_json(w.pack),
            }
            for name, w in kernels.weights.items()
        },
        "constants_bytes": kernels.constants_bytes,
        "constants_sha256": kernels.constants_sha256,
    }


def _launch_json(launch: Launch) -> list[Any]:
    arguments = [[a.name, a.offset, a.stride] if isinstance(a, Pointer) else a for a in launch.arguments]
    return [launch.kernel, list(launch.grid), arguments]


def from_json(entry: Value) -> Kernels:
    """The engine that ``entry`` describes, every part of it checked against the others. Raises Mismatch."""
    kernels = {name: kernel_from_json(value) for name, value in entry["kernels"].items(MOST_KERNELS)}
    programs = {name: _program(value, kernels) for name, value in entry["programs"].items(2)}
    if "step" not in programs or programs.keys() - {"step", "decoder"}:
        entry["programs"].refuse("step and perhaps decoder")
    return Kernels(
        compiler=entry["compiler"].text(),
        decoder_precision=entry["decoder_precision"].one_of(("fp32", "fp16", "bf16")),
        kernels=kernels,
        programs=programs,
        weights={name: _weight(value, kernels) for name, value in entry["weights"].items()},
        constants_bytes=entry["constants_bytes"].integer(0, 2**40),
        constants_sha256=entry["constants_sha256"].match("[0-9a-f]{64}", "64 hexadecimal digits"),
    )


def kernel_from_json(entry: Value) -> Kernel:
    """A kernel from what ``dataclasses.asdict`` made of it. Raises Mismatch."""
    for _, constant in entry["constants"].items(64):
        if not isinstance(constant.value, bool | int | float | str):
            constant.refuse("a number, a text, or true or false")
    parameters = []
    for pair in entry["parameters"].entries(1, 64):
        name, kind = pair.entries(2, 2)
        parameters.append((name.match("[A-Za-z_][A-Za-z0-9_]*", "a name"), kind.one_of((*POINTERS, *NUMBERS))))
    return Kernel(
        file=entry["file"].file_name("engine"),
        bytes=entry["bytes"].integer(1, 2**30),
        sha256=entry["sha256"].match("[0-9a-f]{64}", "64 hexadecimal digits"),
        function=entry["function"].match("[A-Za-z_][A-Za-z0-9_]{0,200}", "the name of a function"),
        source=entry["source"].match("[a-z_]+[.][a-z_]+", "a file and a function, for instance step.qkv"),
        constants=entry["constants"].value,
        parameters=tuple(parameters),
        trailing=entry["trailing"].integer(0, 8),
        warps=entry["warps"].integer(1, 32),
        shared=entry["shared"].integer(0, 2**20),
        registers=entry["registers"].integer(0, 255),
        spills=entry["spills"].integer(0, 2**20),
        dependent=entry["dependent"].boolean(),
    )


def _program(entry: Value, kernels: Mapping[str, Kernel]) -> Program:
    profiles = {}
    for images, value in entry["profiles"].items(64):
        if not images.isdecimal() or not 1 <= int(images[:9]) <= 4096:
            raise Mismatch(f"{value.place}: expected a number of images from 1 to 4096")
        lists = {
            part: tuple(_launch(launch, kernels) for launch in value[part].entries(0, MOST_LAUNCHES))
            for part in ("before", "layer", "after")
        }
        size = value["scratch_bytes"].integer(0, 2**40)
        profiles[int(images)] = Profile(**lists, scratch=_places(value["scratch"], size), scratch_bytes=size)
    size = entry["state_bytes"].integer(0, 2**40)
    layers = entry["layers"].integer(0, MOST_LAYERS)
    longest = max((len(profile.layer) for profile in profiles.values()), default=0)
    if layers * longest > MOST_OF_LAYERS:
        entry["layers"].refuse(f"at most {MOST_OF_LAYERS // longest} layers of {longest} launches")
    return Program(
        query=entry["query"].integer(0, 2**20),
        phases=tuple(phase.match("[a-z_]{1,32}", "1 to 32 small letters") for phase in entry["phases"].entries(0, 16)),
        layers=layers,
        profiles=profiles,
        state=_places(entry["state"], size),
        state_bytes=size,
    )


def _places(entry: Value, size: int) -> dict[str, tuple[int, int]]:
    places = {}
    for name, place in entry.items(256):
        offset, length = place.integers(0, size, count=2)
        if offset % ALIGN or offset + length > size:
            place.refuse(f"a place inside {size} bytes that begins at a multiple of {ALIGN}")
        places[name] = (offset, length)
    return places


def _launch(entry: Value, kernels: Mapping[str, Kernel]) -> Launch:
    name, grid, arguments = entry.entries(3, 3)
    kernel = kernels.get(name.text())
    if kernel is None:
        name.refuse(f"one of the {len(kernels)} kernels of this engine")
    sizes = grid.integers(1, MOST_GRID[0], count=3)
    if any(size > most for size, most in zip(sizes, MOST_GRID, strict=True)):
        grid.refuse(f"at most {MOST_GRID}")
    count = len(kernel.parameters)
    kinds = (kind for _, kind in kernel.parameters)
    given = [_argument(a, kind) for a, kind in zip(arguments.entries(count, count), kinds, strict=True)]
    return Launch(name.value, (sizes[0], sizes[1], sizes[2]), tuple(given))


def _argument(entry: Value, kind: str) -> Argument:
    if kind in POINTERS:
        name, offset, stride = entry.entries(3, 3)
        return Pointer(name.text(), offset.integer(0, 2**40), stride.integer(0, 2**40))
    if kind == "fp32":
        return entry.number(-3.5e38, 3.5e38)
    bits = 31 if kind == "i32" else 53
    return entry.integer(-(2**bits), 2**bits - 1)


def _weight(entry: Value, kernels: Mapping[str, Kernel]) -> Weight:
    stored = entry.get("stored")
    pack = entry.get("pack")
    size = entry["bytes"].integer(1, 2**40)
    tensor = None
    if stored is not None:
        dtype = stored["dtype"].one_of(STORED_BYTES)
        shape = tuple(stored["shape"].integers(1, 2**31))
        length = stored["length"].integer(1, 2**40)
        wanted = math.ceil(math.prod(shape) * STORED_BYTES[dtype])
        if wanted != length:
            stored.refuse(f"{wanted} bytes for {dtype} {shown(list(shape))}")
        tensor = Stored(dtype, shape, stored["offset"].integer(0, 2**50), length)
        if pack is None and length != size:
            entry["bytes"].refuse(f"{length}, the bytes of the stored tensor, which is not packed")
    elif pack is not None:
        pack.refuse("null, because the tensor is not one of the bundle")
    return Weight(size, tensor, entry["offset"].integer(0, 2**40), None if pack is None else _launch(pack, kernels))
