"""The parts of a report that run what is not ours, where it is installed: ONNX Runtime on CUDA, and TensorRT-RTX."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from par_export.card.plan import label_of
from par_export.card.processes import run_stage
from par_export.card.session import GRACE_S, Session
from par_export.engines.request import local_gpu
from par_export.random_bundle import RandomTensors, write_family
from par_runtime.backends.engines import ENGINES
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.process import SubjectProcess, open_bundle
from par_runtime.bundle import Bundle

ORT, PLAN = "cuda-ort", "tensorrt-rtx"
N = 4  #: tokens per group of the model of a published size
CHECKS_END = 0.6  #: share of a part's time after which checks are ended
PRECISION = "fp16"
TUNE_S = 120.0


def cuda_ort(session: Session) -> list[Row]:
    """ONNX Runtime: checks of the demo and of PAR-L with random weights, then their rows."""
    until, device = session.share(CHECKS_END), f"cuda-ort:{session.options.device}"
    bundles = _bundles(session)
    for name, path in bundles.items():
        session.progress(f"checking: {name}")
        spec = _spec(session, path, f"{name} {ORT}", device) | {"predicted": session.options.predicted}
        session.take(f"{name} {ORT}", run_stage("ort", spec, until))
    return _rows(session, bundles, ORT, device)


def tensorrt_rtx(session: Session) -> list[Row]:
    """TensorRT-RTX: is its plan accepted here? If so: right, and how fast."""
    until, bundles = session.share(CHECKS_END), _bundles(session)
    accepted: dict[str, Path] = {}
    own, _ = local_gpu(session.options.device)
    for name, path in bundles.items():
        kept = path.with_name(f"{path.name}-accepted")
        for target in (own, "local"):
            shutil.rmtree(path / ENGINES, ignore_errors=True)
            session.progress(f"{name}: a plan for {target}")
            spec = _spec(session, path, f"{name} {PLAN}", session.device)
            spec |= {"target": target, "precision": PRECISION, "images": list(session.options.images)}
            began = len(session.lines)
            session.take(f"{name} {PLAN}: {target}", run_stage("plan", spec, until))
            if _passed(session.lines[began:]):
                accepted[name] = path
                shutil.rmtree(kept, ignore_errors=True)
                (path / ENGINES).rename(kept)
        if name in accepted:  # the plan that was accepted last: a later one may have been refused
            shutil.rmtree(path / ENGINES, ignore_errors=True)
            kept.rename(path / ENGINES)
        if not accepted:  # what the first bundle is refused, every other one is
            return []
    for name, path in accepted.items():
        session.progress(f"checking: {name}")
        spec = _spec(session, path, f"{name} {PLAN}", session.device)
        session.take(f"{name} {PLAN}", run_stage("images", spec, until))
    rows = _rows(session, accepted, PLAN, session.device)
    first = next(iter(accepted))
    if session.left > TUNE_S / 2:
        session.progress(f"{first}: tuning")
        spec = _spec(session, accepted[first], f"{first} {PLAN}", session.device) | {"precision": PRECISION}
        spec |= {"index": session.options.device}
        session.take(f"{first} {PLAN}: tune", run_stage("tune", spec, min(session.end, time.monotonic() + TUNE_S)))
    else:
        session.leave_out(f"{first} {PLAN}: tune", "time")
    return rows


def _passed(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are checks, and all of them passed."""
    checks = [line for line in lines if line["kind"] == "check"]
    return bool(checks) and all(line["passed"] for line in checks)


def _bundles(session: Session) -> dict[str, Path]:
    """Copies of the checked bundles without engines, the largest first, and one of a published size, by name.

    What that one computes is checked too, so its weights are numbers, unlike those of the engines' rows.
    """
    out: dict[str, Path] = {}
    checked = sorted(session.options.checked, key=lambda path: -(path / "weights.data").stat().st_size)
    for source in checked[:1]:
        path = session.work / source.name
        shutil.copytree(source, path, ignore=shutil.ignore_patterns(ENGINES))
        out[label_of(source.name, Bundle.open(path, verify="none").group_size)] = path
    name, config, vq = session.options.published
    session.progress(f"writing {name}")
    written = write_family(config, [N], session.work, name=name, precision=PRECISION, vq=vq, tensors=RandomTensors)
    return out | {label_of(name, N): written[N]}


def _spec(session: Session, path: Path, name: str, device: str) -> dict[str, Any]:
    return {
        "path": str(path),
        "name": name,
        "device": device,
        "reference": "cpu",
        "groups": 1,
        "seed": 7,
        "images": session.options.stress,
    }


def _rows(session: Session, bundles: Mapping[str, Path], kind: str, device: str) -> list[Row]:
    """The rows of ``bundles`` in every batch, in turns, and of their loading."""
    rows: list[Row] = []
    with ExitStack() as held:
        opened: list[SubjectProcess] = []
        for name, path in bundles.items():
            session.progress(f"{name}: loading")
            label = f"{name} {kind}"
            try:
                opened.append(open_bundle(path, label, device=device, selftest=False, end=session.end + GRACE_S))
            except Exception as error:
                session.leave_out(label, error)
        for subject in opened:
            held.callback(subject.close)
        if not opened:
            return rows
        session.limits()
        rows += [session.loaded(subject) for subject in opened]
        session.infos.update({subject.info.label: subject.info for subject in opened})
        for i, images in enumerate(session.options.images):
            until = time.monotonic() + session.left / (len(session.options.images) - i)
            rows += session.rows(f"{kind}, batch {images}", opened, session.setting(images, until))
    return rows
