"""``parvis doctor``: what of parvis runs on this machine, what does not and why, and the command that changes it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from par_runtime import __version__
from par_runtime.cli import options
from par_runtime.cli.common import Parser, guarded
from par_runtime.errors import how_to_install, pip_command
from par_runtime.system import available_bytes, available_cores, meminfo_bytes

#: Packages whose versions are printed, as package indexes name them.
PACKAGES = (
    "numpy",
    "pillow",
    "tqdm",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "triton",
    "onnx",
    "ml_dtypes",
    "torch",
    "safetensors",
    "huggingface_hub",
    "starlette",
    "uvicorn",
    "prometheus-client",
)
#: verbs -> the extra that they need beyond a backend, and the modules that show whether it is there
NEEDS = {
    "parvis verify, reconstruct, edit (of a picture that parvis did not make)": ("cpu", ("onnxruntime",)),
    "parvis serve": ("cpu,serve", ("starlette", "uvicorn", "prometheus_client")),
    "parvis export, train, train-tokenizer, train-video-tokenizer, encode": (
        "cpu,export",
        ("onnxruntime", "torch", "onnx", "safetensors", "huggingface_hub"),
    ),
    "parvis calibrate": ("cpu,calibrate", ("onnxruntime", "torch", "onnx", "safetensors", "huggingface_hub")),
    "parvis evaluate": ("cpu,evaluate", ("onnxruntime", "onnx")),
    "parvis build": ("build,tensorrt-rtx", ("onnx", "ml_dtypes", ("tensorrt_rtx", "tensorrt"))),
    "parvis build --engine kernels": ("kernels-build", ("onnx", "ml_dtypes", "triton")),
    "parvis tune": ("build,tensorrt-rtx", ("onnx", "ml_dtypes", ("tensorrt_rtx", "tensorrt"))),
}
#: What Linux calls the instructions that the C kernels use.
X86_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
)
ARM_FLAGS = ("asimddp", "i8mm", "bf16")
NEED_A_GPU = ("parvis tune",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0 if a backend can run here, 1 if none can."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Examine the machine, and print what was found as text or JSON."""
    facts = examine()
    print(json.dumps(facts) if args.json else "\n".join(lines(facts)))
    return 0 if facts["can_run"] else 1


def examine() -> dict[str, Any]:
    """All that ``parvis doctor`` prints, as plain values. Raises nothing: what cannot be found out is said so."""
    backends = [
        _tried("native-cpu", "--device cpu", _native),
        _tried("onnxruntime-cpu", "--device cpu-ort", _ort),
        _tried("onnxruntime-cuda", "--device cuda-ort", _ort_cuda),
        _tried("kernels", "--device cuda", _kernels),
        _tried("tensorrt", "--device cuda", _tensorrt),
    ]
    gpus = _gpus()
    verbs = [
        {
            "verbs": verbs,
            "missing": missing,
            "install": how_to_install(extra) if missing else "",
            "why": gpus["why"] if verbs in NEED_A_GPU else "",
        }
        for verbs, (extra, modules) in NEEDS.items()
        for missing in [_missing(modules)]
    ]
    return {
        "parvis": __version__,
        "folder": str(Path(__file__).parents[1]),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": platform.platform(),
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "cores_to_use": available_cores(),
            "instructions": _instructions(),
        },
        "memory_bytes": {"total": meminfo_bytes("MemTotal"), "available": available_bytes()},
        "compiler": next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None),
        "gpus": gpus,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "backends": backends,
        "verbs": verbs,
        "can_run": any(backend["runs"] for backend in backends),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    cpu, memory = facts["cpu"], facts["memory_bytes"]

    def gigabytes(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 1e9:.1f} GB"

    out = [
        f"parvis    {facts['parvis']}, in {facts['folder']}",
        f"python    {facts['python']['version']}, {facts['python']['executable']}",
        f"system    {facts['system']}",
        f"cpu       {cpu['name']}: {cpu['cores_to_use']} of {cpu['cores']} cores, instructions: "
        f"{' '.join(cpu['instructions']) or 'not known'}",
        f"memory    {gigabytes(memory['available'])} free of {gigabytes(memory['total'])}",
        f"compiler  {facts['compiler'] or 'none: an installation of parvis then leaves the C kernels out'}",
        *(f"gpu       {gpu}" for gpu in facts["gpus"]["found"] or [f"none: {facts['gpus']['why']}"]),
        f"packages  {', '.join(f'{name} {version}' for name, version in facts['packages'].items())}",
        "",
    ]
    for backend in facts["backends"]:
        mark = "runs" if backend["runs"] else "no"
        out.append(f"{mark:5} {backend['name']:17} {backend['option']:18} {backend['why']}")
    for verbs in facts["verbs"]:
        if verbs["why"]:  # what is missing would not help
            out.append(f"no    {verbs['verbs']}: needs a GPU: {verbs['why']}")
        elif verbs["missing"]:
            out.append(f"no    {verbs['verbs']}: needs {', '.join(verbs['missing'])}; {verbs['install']}")
        else:
            out.append(f"runs  {verbs['verbs']}")
    if facts["can_run"]:
        return [*out, "", "ready: parvis generate BUNDLE --label 0"]
    return [*out, "", f"nothing runs here yet; {how_to_install('cpu')}"]


# -- backends ---------------------------------------------------------------------------------------------------------


def _tried(name: str, option: str, probe: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    """The entry of a backend. ``probe`` gives whether it runs, and which one it is or why it does not."""
    try:
        runs, why = probe()
    except Exception as error:  # whatever is broken here, the rest is worth knowing
        runs, why = False, _said(error)
    return {"name": name, "option": option, "runs": runs, "why": why}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _ort() -> tuple[bool, str]:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        return False, f"needs onnxruntime, which is not installed; {how_to_install('cpu')}"
    return True, f"onnxruntime {onnxruntime.__version__}"


def _native() -> tuple[bool, str]:
    from par_runtime.backends.native.library import described, library_file, open_library

    instructions = described(open_library(library_file()))  # raises KernelError
    in_c, decoder = _decoder()
    runs, why = _ort()
    if not runs and not in_c:
        return False, f"its decoder {why}"
    return True, f"C kernels for {instructions}; {decoder}"


def _decoder() -> tuple[bool, str]:
    """Whether the C decoder runs, and what decodes beside the C step."""
    from par_runtime.backends.native.compiled import KernelError
    from par_runtime.backends.native.decoder import AMX, DOTS, bf16_form
    from par_runtime.backends.native.decoding import decoder_file, open_decoder_library

    try:
        lib = open_decoder_library(decoder_file())
    except KernelError as error:
        return False, f"onnxruntime decodes: {error}"
    how = {AMX: "AMX", DOTS: "dot products in bf16"}.get(bf16_form(lib))
    bf16 = f" (--decoder-precision bf16 takes {how})" if how else ""
    return True, f"decoder in C{bf16}, or onnxruntime for a bundle without a table of the decoder's weights"


def _ort_cuda() -> tuple[bool, str]:
    runs, why = _ort()
    if not runs:
        return False, f"needs onnxruntime-gpu, which is not installed; {how_to_install('onnxruntime-gpu')}"
    import onnxruntime

    from par_runtime.backends.ort.gpu import CUDA, CUDA_SINCE, how_to_replace
    from par_runtime.backends.ort.sessions import version

    if CUDA not in onnxruntime.get_available_providers():
        return False, f"{why} has no CUDA; {how_to_replace()}"
    if version() < CUDA_SINCE:
        return (
            False,
            f"{why}; expected {'.'.join(map(str, CUDA_SINCE))} or newer: {pip_command()} install --upgrade "
            "onnxruntime-gpu",
        )
    gpus = _gpus()
    return bool(gpus["found"]), gpus["why"] or why


def _kernels() -> tuple[bool, str]:
    if _missing(("cuda",)):
        return False, f"needs cuda-python, which is not installed; {how_to_install('kernels')}"
    gpus = _gpus()
    if gpus["why"]:
        return False, gpus["why"]
    able = any(int(gpu.rpartition("SM")[2]) >= 80 for gpu in gpus["found"])
    return able, "engines of a bundle: parvis build --engine kernels" if able else "needs a GPU of SM80 or newer"


def _tensorrt() -> tuple[bool, str]:
    from par_runtime.backends.trt import module
    from par_runtime.errors import TensorRTMissingError

    try:
        trt = module.load()
    except TensorRTMissingError as error:
        return False, str(error)
    gpus = _gpus()
    return bool(gpus["found"]), gpus["why"] or f"{trt.name} {trt.version}; plans of a bundle: parvis build"


# -- the machine ------------------------------------------------------------------------------------------------------


def _gpus() -> dict[str, Any]:
    """The GPUs that the driver shows, or why there are none."""
    from par_runtime.backends import cuda

    try:
        found = []
        for index in range(cuda.device_count()):
            with cuda.Device.open(index) as gpu:
                found.append(f"{index}: {gpu.name}, SM{gpu.capability[0]}{gpu.capability[1]}")
        return {"found": found, "why": "" if found else cuda.why_no_device()}
    except Exception as error:  # of a driver that is broken in its own way
        return {"found": [], "why": _said(error)}


def _cpu_name() -> str:
    with suppress(OSError, IndexError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def _instructions() -> list[str]:
    """Those instruction sets that the C kernels use, of this CPU; empty where the system does not list them."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    have = ["neon"] if arm else []  # every one has it
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                flags = line.split()
                return have + [name for name in (ARM_FLAGS if arm else X86_FLAGS) if name in flags]
    return have


# -- packages ---------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    with suppress(Exception):  # a damaged installation has no version either
        return metadata.version(package)
    return None


def _missing(modules: Sequence[str | tuple[str, ...]]) -> list[str]:
    """Those of ``modules`` that cannot be imported; of several in parentheses one is enough."""
    missing = []
    for module in modules:
        names = (module,) if isinstance(module, str) else module
        if not any(_can_import(name) for name in names):
            missing.append(names[0])
    return missing


def _can_import(name: str) -> bool:
    """Whether a package can be found. It is not imported: PyTorch alone takes seconds."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis doctor``."""
    p = Parser(
        prog="parvis doctor",
        description="Say what of parvis runs on this machine, what does not and why, and how to install what is "
        "missing. Exit code 0: a backend runs; 1: none.",
    )
    options.add_json(p)
    return p
