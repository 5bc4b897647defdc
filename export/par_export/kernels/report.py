"""The report of an engine of kernels: launches per call, what the kernels take of a processor, bytes that are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from par_export.kernels.compiler import Compiled, Compiler
from par_export.kernels.contents import Contents
from par_export.kernels.plan_decoder import work as decoder_work
from par_export.kernels.targets import Target
from par_runtime.backends.program import Kernels, Profile, Program
from par_runtime.cost.architecture import Architecture
from par_runtime.cost.work import largest_read_bytes
from par_runtime.dtypes import BYTES
from par_runtime.system import peak_bytes


def report(
    contents: Contents, engine: Kernels, compiled: Mapping[str, Compiled], compiler: Compiler, target: Target
) -> dict[str, Any]:
    """The report of ``engine``, for ``engine.json``. Sizes in bytes; ``flop`` counts a multiply-add as two.

    ``read_bytes`` of a step: what a guided call must read at least when all keys are there; ``weight_bytes`` of each
    parameter, on average. Of the decoder: each map and each weight once a use, and what is written.
    """
    architecture = Architecture.of(contents.bundle)
    parameter = contents.bundle.bytes_read(BYTES[contents.precision], stored_scales=True)
    number = BYTES[contents.precision]
    programs = {}
    for name, program in engine.programs.items():
        step = name == "step"
        profiles = []
        for images, profile in program.profiles.items():
            if step:
                work = {"read_bytes": largest_read_bytes(architecture, images, True, parameter, number), "flop": None}
            else:
                assert contents.tokenizer is not None
                done = decoder_work(contents.tokenizer, contents.config, images, contents.decoder_precision, target)
                work = {"read_bytes": int(done.bytes), "flop": int(done.flop)}
            profiles.append(_profile(images, program, profile, engine) | work)
        programs[name] = {"layers": program.layers, "state_bytes": program.state_bytes, "profiles": profiles}
    stored = {weight.stored for weight in engine.weights.values() if weight.stored is not None}
    return {
        "programs": programs,
        "kernels": {
            name: {"loads": k.loads, "copies": k.copies, "products": k.products, "seconds": round(k.seconds, 3)}
            for name, k in compiled.items()
        },
        "weight_bytes": parameter,
        "weights_bytes": sum(weight.bytes for weight in engine.weights.values()),
        "bundle_weights_bytes": sum(entry.length for entry in stored),
        "pack_launches": sum(weight.pack is not None for weight in engine.weights.values()),
        "tools": list(compiler.tools),
        "peak_memory_bytes": (peak_bytes() or 0) + compiler.peak_bytes,
    }


def _profile(images: int, program: Program, profile: Profile, engine: Kernels) -> dict[str, Any]:
    launches = [*profile.before, *profile.layer, *profile.after]
    used = [engine.kernels[name] for name in dict.fromkeys(launch.kernel for launch in launches)]
    around = len(profile.before) + len(profile.after)
    return {
        "images": images,
        "per_layer": len(profile.layer),
        "around": around,
        "total": around + program.layers * len(profile.layer),
        "kernels": len(used),
        "registers": max(kernel.registers for kernel in used),
        "shared": max(kernel.shared for kernel in used),
        "spills": sum(kernel.spills for kernel in used),
        "scratch_bytes": profile.scratch_bytes,
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """The report of an engine as lines of text."""
    lines = [
        f"{'program':8} {'images':>6} {'launches':>9} {'per layer':>10} {'around':>7} {'kernels':>8} {'registers':>10} "
        f"{'shared KB':>10} {'spills':>7} {'scratch MB':>11} {'reads MB':>9} {'GFLOP':>7}"
    ]
    for name, program in report["programs"].items():
        for i, p in enumerate(program["profiles"]):
            layered = program["layers"] > 0
            lines.append(
                f"{'' if i else name:8} {p['images']:6} {p['total']:9} {p['per_layer'] if layered else '-':>10} "
                f"{p['around'] if layered else '-':>7} {p['kernels']:8} {p['registers']:10} {p['shared'] / 1024:10.1f} "
                f"{p['spills']:7} {p['scratch_bytes'] / 1e6:11.1f} {_number(p['read_bytes'], 1e6, 1):>9} "
                f"{_number(p['flop'], 1e9, 0):>7}"
            )
    of_bundle = report["weights_bytes"] / max(report["bundle_weights_bytes"], 1)
    lines.append(
        f"weights on the device: {report['weights_bytes'] / 1e6:.1f} MB ({of_bundle:.2f} times "
        "those that it takes of the bundle), "
        f"{report['pack_launches']} of them put in order when the engine is loaded; a call reads "
        f"{report['weight_bytes']:.2f} bytes for each parameter of the step"
    )
    return lines


def listing(entry: Mapping[str, Any]) -> list[str]:
    """Every launch of the smallest profile of each program of an ``engine.json``, with its kernel's figures."""
    lines = []
    kernels = entry["kernels"]["kernels"]
    for name, program in entry["kernels"]["programs"].items():
        images = min(program["profiles"], key=int)
        lines += ["", f"{name}, {images} {'image' if images == '1' else 'images'}:"]
        for i, (part, launch) in enumerate(_launches(program["profiles"][images])):
            kernel = kernels[launch[0]]
            grid = " x ".join(str(size) for size in launch[1])
            place = "each layer" if part == "layer" else ""
            lines.append(
                f"  {i:4} {place:10} {launch[0]:20} grid {grid:16} {32 * kernel['warps']:4} threads, "
                f"{kernel['registers']:3} registers, {kernel['shared'] / 1024:6.1f} KB shared"
            )
    return lines


def _launches(profile: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for part in ("before", "layer", "after"):
        for launch in profile[part]:
            yield part, launch


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
