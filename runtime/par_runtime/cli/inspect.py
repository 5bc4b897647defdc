"""``parvis inspect``: what a bundle is, what it holds, what it needs, and the least time that hardware allows it."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from par_runtime.backends.engines import list_engines
from par_runtime.bundle import MANIFEST, Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Parser, guarded
from par_runtime.cost.architecture import Architecture
from par_runtime.cost.data_sheets import bandwidth_bounds_ms
from par_runtime.cost.memory import memory_table
from par_runtime.dtypes import BYTES
from par_runtime.errors import RequestError
from par_runtime.manifest import KEPT

NO_ENCODER = "encoder   none: edits what it made itself; pictures of others need a bundle that has one"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 where the path is neither a bundle nor a checkpoint."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Describe a checkpoint or a bundle; ``--selftest`` runs the self-test of a bundle too."""
    path = Path(args.path)
    if _is_checkpoint(args.path):
        # Reading a checkpoint needs torch; the runtime never imports it itself.
        show = importlib.import_module("par_export.cli.inspect").show
        return int(show(args.path, args.json, args.weights, args.heads, args.grid))
    for name in ("weights", "heads", "grid"):
        if (value := getattr(args, name)) is not None:
            raise RequestError(f"--{name} {value}: is for a checkpoint; {path} is none; leave it out")
    bundle = Bundle.open(path, verify="full" if args.full else "auto")
    facts = describe(bundle)
    if args.selftest:
        from par_runtime.pipeline import Pipeline

        with Pipeline.load(path, device="cpu", selftest=False, verify="none") as pipeline:
            pipeline.selftest()  # raises where it fails
            facts["selftest"]["state"] = f"passed on {pipeline.backend.info.name}"
    print(json.dumps(facts) if args.json else "\n".join(lines(facts)))
    return 0


def _is_checkpoint(text: str) -> bool:
    """Whether the argument is a checkpoint: on the hub, a file, or a folder that contains one and is no bundle."""
    path = Path(text)
    kinds = [
        f"{where}*.{end}*" for where in ("", "*/", "*/*/") for end in ("safetensors", "pt", "bin", "ckpt", "distcp")
    ]
    holds = any(file for kind in kinds for file in path.glob(kind)) if path.is_dir() else path.exists()
    return "://" in text or (holds and not (path / MANIFEST).is_file())


def describe(bundle: Bundle) -> dict[str, Any]:
    """All that ``parvis inspect`` prints about a bundle, as plain values. Sizes in bytes, times in milliseconds."""
    m = bundle.model
    architecture = Architecture.of_model(m, bundle.phases)
    number_bytes = BYTES[bundle.precision]
    on_gpu = (bundle.weight_bytes, number_bytes)
    # Quantised weights stay so on a CPU too; the others count as what ONNX Runtime makes of them.
    keys = BYTES["fp32" if bundle.calibration is None else bundle.calibration.cache]
    on_cpu = (bundle.weight_bytes if bundle.quantised else BYTES["fp32"], keys)
    engines, bad = list_engines(bundle)
    return {
        "name": bundle.name,
        "hash": bundle.hash,
        "model": dict(m) | {"grid": list(bundle.grid), "group_size": bundle.group_size, "tokens": bundle.n_tokens},
        "precision": bundle.precision,
        "weight_bytes": round(bundle.weight_bytes, 4),
        "calibration": None if bundle.calibration is None else asdict(bundle.calibration),
        "class_names": None if bundle.class_names is None else len(bundle.class_names),
        "image_size": None if bundle.image_size is None else list(bundle.image_size),
        "frames": bundle.frames if bundle.video else None,
        "encoder": "encoder" in bundle.graphs,
        "calls": {"total": bundle.calls} | {phase.name: phase.repeat for phase in bundle.phases},
        "parameters_read_per_call": architecture.step_parameters,
        "files": {name: entry["bytes"] for name, entry in bundle.files.items()},
        "engines": [
            {
                "folder": engine.path.name if engine.path.is_relative_to(bundle.path) else str(engine.path),
                "target": engine.target,
                "precision": engine.precision,
                "mode": engine.mode,
                "images": list(engine.images),
                "runtime": engine.runtime,
                "bytes": sum(size for _, size, _ in engine.files),
            }
            for engine in engines
        ],
        "bad_engines": bad,
        "memory_bytes": memory_table(architecture, {"cpu": on_cpu, "gpu": on_gpu}),
        "defaults": vars(bundle.defaults),
        "selftest": {"tokens": sum(map(len, bundle.selftest["tokens"])), "state": "not run (--selftest runs it)"},
        "parity": dict(bundle.parity),
        "bound_ms": bandwidth_bounds_ms(architecture, *on_gpu),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text."""
    m, calls = facts["model"], facts["calls"]
    t, h, w = m["grid"]
    size, frames = facts["image_size"], facts["frames"]
    kind = "clip" if t > 1 else "image"
    pixels = f"{frames} frames of " if frames else ""
    phases = ", ".join(f"{count} {name}" for name, count in calls.items() if name != "total")
    out = [
        f"{facts['name']}  ({_stored(facts)}, hash {facts['hash'][:12]})",
        f"model     {m['parameters']:,} parameters: width {m['dim']}, {m['n_layers']} layers, {m['n_heads']} heads of "
        f"{m['head_dim']}, {m['vocab_size']} codes, {m['n_classes']} classes"
        + (f" ({facts['class_names']} named)" if facts["class_names"] else ""),
        f"{kind:9} grid {t}x{h}x{w}, n = {m['group_size']}, {m['tokens']} tokens in {calls['total']} calls ({phases})"
        + (f", {pixels}{size[1]}x{size[0]} pixels" if size else ", ends at tokens"),
        *([] if not size else ["encoder   yes" if facts["encoder"] else NO_ENCODER]),
        *_calibration(facts),
        f"defaults  {', '.join(f'{k} {v:g}' for k, v in facts['defaults'].items() if v != -1)}",
        f"files     {', '.join(f'{name} {_mb(size)}' for name, size in facts['files'].items())}",
        "memory    of weights and cache, guided, on a CPU and a GPU: "
        + ", ".join(
            f"{b} {kind}{'s' if b != '1' else ''} {_mb(v['cpu'])} and {_mb(v['gpu'])}"
            for b, v in facts["memory_bytes"].items()
        ),
        f"self-test {facts['selftest']['tokens']} tokens, {facts['selftest']['state']}",
    ]
    for engine in facts["engines"]:
        out.append(
            f"engine    {engine['folder']}: {engine['target']}, {engine['precision']}, {engine['mode']}, batches of "
            f"{', '.join(map(str, engine['images']))}, {_mb(engine['bytes'])}"
        )
    out += [f"engine    unusable: {reason}" for reason in facts["bad_engines"]]
    if not facts["engines"]:
        out.append("engine    none; 'parvis build' makes them")
    bounds = ", ".join(f"{gpu} {ms:.3g}" for gpu, ms in facts["bound_ms"].items())
    out.append(f"bound     at least, by memory bandwidth, for one guided {kind} without decoding, in ms: {bounds}")
    return out


def _stored(facts: dict[str, Any]) -> str:
    """What the weights are stored in, in a word or two."""
    c = facts["calibration"]
    return facts["precision"] if c is None or c["weights"] == KEPT else f"{c['weights']} and {facts['precision']}"


def _calibration(facts: dict[str, Any]) -> list[str]:
    """What ``parvis calibrate`` changed, and the figures that it measured."""
    c = facts["calibration"]
    if c is None:
        return []
    kept = f"; kept: {_some(c['kept'])}" if c["kept"] else ""
    weights = "as exported"
    if c["weights"] != KEPT:
        weights = f"{c['weights']} (group {c['group']}), {facts['weight_bytes']:.3g} bytes a parameter{kept}"
    out = [
        f"weights   {weights}; on a CPU multiplied in {c['arithmetic']}, keys and values in {c['cache']}"
        f"{'' if c['decoder_precision'] == 'fp32' else ', decoded in ' + c['decoder_precision']}; made from "
        f"{c['source'][:12]}"
    ]
    measures = c["report"].get("measures")
    if isinstance(measures, Mapping):
        numbers = [f"{name} {value:.4g}" for name, value in measures.items() if isinstance(value, (int, float))]
        out += [f"report    {_some(numbers)}"] if numbers else []
    return out


def _some(names: Sequence[str], most: int = 12) -> str:
    """The first ``most`` of ``names``."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _mb(size: int) -> str:
    """Bytes as GB, MB or kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.{2 if name == 'GB' else 1}f} {name}"
    return f"{size / 1e3:.1f} kB"


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis inspect``."""
    p = Parser(
        prog="parvis inspect",
        description="Describe a bundle or a checkpoint: architecture, files, engines, calls, memory, and the least "
        "time that the memory bandwidth of known GPUs allows (by data sheet; not measured).",
    )
    p.add_argument(
        "path",
        type=options.place,
        metavar="BUNDLE|CHECKPOINT",
        help="a folder or file, or hf://OWNER/REPOSITORY/FILE@REVISION",
    )
    p.add_argument("--weights", choices=["model", "ema"], help="of a checkpoint that holds both (as of parvis export)")
    p.add_argument("--heads", type=int, help="of a checkpoint whose heads are known from nowhere (as of parvis export)")
    p.add_argument("--grid", help="of a checkpoint: tokens, L, HxW or TxHxW (as of parvis export)")
    p.add_argument("--full", action="store_true", help="hash every file, however large")
    p.add_argument("--selftest", action="store_true", help="run the bundle's self-test on the CPU")
    options.add_json(p)
    return p
