"""A process that compiles kernels, one at a time: it reads a line of JSON for each and answers with one.

It is a process of its own because Triton reads its settings from the environment, once: the tests of this project run
kernels in Triton's interpreter in their own process, and a user's settings must not change what a build makes. It
imports nothing of parvis but the sources of the kernels. ``compiler.py`` starts it, and says what the lines hold.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REGISTERS = 65536  #: of a processor, on every GPU that kernels are built for
#: Bits of a parameter of each type, as PTX declares it.
BITS = {"i32": 32, "fp32": 32, "i64": 64}
_ENTRY = re.compile(r"\.entry\s+\w+\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+\.[a-z](\d+)")
_LOAD = re.compile(r"\bld\.(?:relaxed\.\w+\.|acquire\.\w+\.|volatile\.)?global\S*?(?:\.v(\d))?\.[busf](\d+)\s")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")
_PRODUCT = re.compile(r"\b((?:mma\.sync|wgmma\.mma_async\.sync)\.aligned\.m\d+n\d+k\d+|tcgen05\.mma)\b")
_USED = re.compile(r"REG:(\d+) STACK:(\d+)")


def main() -> None:
    """Answer lines until there are none.

    Who starts this process also ends it, so no more lines means that it is gone, killed perhaps. The folder that it
    named, of files for the time of the build, is removed then, since nobody else will.
    """
    folder = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Triton prints sources of kernels that fail
    with suppress(BrokenPipeError):
        print(json.dumps(hello()), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # an answer that nobody reads would be an error at the end of Python


def hello() -> dict[str, Any]:
    """Who compiles: the versions of Triton and of NVIDIA's assemblers, or why there is none."""
    try:
        import triton
        from triton import knobs
    except Exception as error:
        return {"missing": isinstance(error, ImportError) and not _is_there("triton"), "error": one_line(error)}
    tools = []
    for name in ("ptxas", "ptxas_blackwell"):
        tool = getattr(knobs.nvidia, name, None)
        if tool is not None:
            tools.append(f"{name} {tool.version}")
    return {"version": triton.__version__, "tools": tools}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Compile the kernel that ``job`` describes into the file ``job["out"]``: facts about it, or an error."""
    started = time.monotonic()
    try:
        with _assembler(job["capability"]):
            facts = compiled(job)
    except MemoryError:
        raise
    except Exception as error:  # whatever a compiler raises is an error of this kernel
        return {"error": one_line(error), "system": isinstance(error, OSError)}
    return facts | {"seconds": time.monotonic() - started, "peak_bytes": _peak_bytes()}


def compiled(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel. Raises what Triton raises, ValueError for a kernel that is not as it was planned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, _, function = job["source"].partition(".")
    kernel = getattr(importlib.import_module(f"{job['package']}.{module}"), function)
    parameters, constants = dict(job["parameters"]), dict(job["constants"])
    names = list(kernel.arg_names)
    unknown = sorted(set(names) ^ (parameters.keys() | constants.keys()))
    if unknown or list(parameters) != [name for name in names if name in parameters]:
        raise ValueError(f"planned with parameters {list(parameters)} and {sorted(constants)}, it takes {names}")
    aligned = {name for name, kind in parameters.items() if kind.startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature={name: parameters.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Without these every load is of one number, since nothing else says that addresses are aligned.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", job["capability"], 32)
    # Explicit, because the defaults move between versions of Triton.
    options = {"num_warps": job["warps"], "num_stages": job["stages"], "enable_fp_fusion": True}
    # NVIDIA's assembler saves registers to make room for another block, where a block could have more of them: it has
    # fewer loads on their way than the kernel asks for, or keeps some registers in memory. A limit that is named is the
    # one that it works to.
    every = {"maxnreg": most_registers(job["warps"])}
    result = compile(source, target=target, options=options | (every if job["many_registers"] else {}))
    Path(job["out"]).write_bytes(result.asm["cubin"])
    registers, stack = _used(job["out"])
    if stack and not job["many_registers"]:
        result = compile(source, target=target, options=options | every)
        Path(job["out"]).write_bytes(result.asm["cubin"])
        registers, stack = _used(job["out"])
    metadata = result.metadata
    trailing = _trailing(result.asm["ptx"], list(parameters.values()))
    return {
        "function": metadata.name,
        "warps": metadata.num_warps,
        "shared": metadata.shared,
        "registers": registers,
        "spills": stack,
        "trailing": trailing,
        "scratch": sum(getattr(metadata, f"{kind}_scratch_size", 0) or 0 for kind in ("global", "profile")),
        **statistics(result.asm["ptx"]),
    }


@contextmanager
def _assembler(capability: int) -> Iterator[None]:
    """Have kernels for SM90 assembled by the ptxas of CUDA 12, as those for GPUs before it.

    Triton 3.9 takes that of CUDA 13 there, and only drivers of CUDA 13 load what it makes. The code is as good.
    """
    from triton import knobs

    with knobs.nvidia.scope():
        if capability < 100:
            with suppress(RuntimeError):  # where Triton has only the newer one, that will do
                knobs.nvidia.ptxas_blackwell = knobs.nvidia.ptxas.path
        yield


def most_registers(warps: int) -> int:
    """Registers that each thread of a block of ``warps`` warps can have."""
    return min(255, REGISTERS // (32 * warps) // 8 * 8)


def statistics(ptx: str) -> dict[str, dict[str, int]]:
    """How the kernel reads memory and multiplies: instructions by bytes for each thread, and by kind."""
    loads: Counter[str] = Counter()
    for count, bits in _LOAD.findall(ptx):
        loads[str(int(count or 1) * int(bits) // 8)] += 1
    copies = Counter(str(int(size, 0)) for size in _COPY.findall(ptx))
    products = Counter(kind.replace(".sync.aligned", "").replace("_async", "") for kind in _PRODUCT.findall(ptx))
    return {"loads": dict(loads), "copies": dict(copies), "products": dict(products)}


def one_line(error: BaseException) -> str:
    """What ``error`` says, in one line of bounded length.

    Triton reports where in the source, and nested calls, around the error that says what is wrong.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines)}" if lines else type(error).__name__
    return text if len(text) <= 400 else f"{text[:100]} ... {text[-290:]}"


def _trailing(ptx: str, kinds: list[str]) -> int:
    """How many addresses of scratch memory come after our own parameters, which must be of the planned widths."""
    entry = _ENTRY.search(ptx)
    widths = [int(bits) for bits in _PARAMETER.findall(entry.group(1))] if entry else []
    planned = [64 if kind.startswith("*") else BITS[kind] for kind in kinds]
    rest = widths[len(planned) :]
    if widths[: len(planned)] != planned or set(rest) - {64}:
        raise ValueError(f"compiled to parameters of {widths} bits; planned are {planned} and addresses")
    return len(rest)


def _used(cubin: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of its memory: registers that found no place, or arrays."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = _USED.findall(text)
    if len(used) != 1:
        raise ValueError(f"cuobjdump says nothing about registers: {one_line(ValueError(text))}")
    return int(used[0][0]), int(used[0][1])


def _is_there(package: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
