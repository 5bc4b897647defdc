"""The part ``products``: every product of a step alone, in the shapes that the planner considers.

It loads no engine: the kernel of a product is compiled by itself, given random numbers, compared with PyTorch and
timed, in some milliseconds. So a lease of one minute shows the fastest shape of each product, and what the model's
choice costs beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from par_export.card.plan import Model, shaped
from par_export.card.processes import run_stage
from par_export.card.product_files import REPEAT, ProductKernels, compiled
from par_export.card.session import GRACE_S, Session
from par_export.kernels.build import target
from par_export.kernels.product_trials import MOST_ROWS_TRIED, Trial, as_a_build_chooses, trials_of
from par_export.kernels.spec import power
from par_export.kernels.step_weights import BITS
from par_export.kernels.targets import Target
from par_export.kernels.tile_shapes import NUMBERS, Storage, rows_of
from par_export.quantised import Codes
from par_runtime.bench.rows import Row
from par_runtime.bench.suites.gpu import PRODUCTS
from par_runtime.errors import EngineError

COMPILE_END = 0.6  #: share of the part's time after which nothing is compiled any more
TRIES = 4  #: processes; each but the first goes on behind the kernel that ended the one before


def products(session: Session) -> list[Row]:
    """Time the products of every model; there are no rows of them, but lines.

    Raises BuildError where they must be compiled and there is no compiler, EngineError for ready kernels of other
    sources or for another GPU, OSError.
    """
    card = target("local", session.options.device)
    trials = trials_for(session.options.models, session.options.images, card)
    kernels, why = _kernels(session, trials, card)
    wanted = [trial for trial in trials if trial.spec.name not in kernels.refused]
    if refused := len(trials) - len(wanted):
        text = f"{PRODUCTS}: {refused} of {len(trials)} kernels keep registers in memory, or do not compile"
        session.lines.append({"kind": "note", "text": text})
    entries = [entry for entry in _entries(trials, kernels) if entry["kernel"] in kernels.kernels]
    done = _run(session, kernels.folder, entries)
    for (model, rows), of_rows in groupby(wanted, lambda trial: (trial.product.model, trial.product.rows)):
        own = list(of_rows)
        missing = sum(trial.spec.name not in kernels.kernels for trial in own)
        late = sum(trial.spec.name in kernels.kernels and _check_of(trial) not in done for trial in own)
        for count, reason in ((missing, why), (late, "time")):
            if count:
                session.leave_out(f"{PRODUCTS} of {model}, {rows} rows, {count} of {len(own)} kernels", reason)
    return []


def trials_for(models: Sequence[Model], images: Sequence[int], card: Target) -> list[Trial]:
    """What is tried of ``models`` in batches of ``images``: the fewest rows first, of these all models in fp16, then
    those with codes.
    """
    of_rows: dict[int, dict[tuple[str, Codes | None], Model]] = {}
    for model, n, codes in shaped(models):
        for batch in images:
            rows = max(rows_of(2 * n * batch), min(power(2 * n * batch), MOST_ROWS_TRIED))
            of_rows.setdefault(rows, {})[model.name, codes] = model
    out: list[Trial] = []
    for rows in sorted(of_rows):
        for (name, codes), model in of_rows[rows].items():
            storage = NUMBERS if codes is None else Storage(BITS[codes.dtype], codes.group)
            out += trials_of(name if codes is None else f"{name} {codes}", model.config, rows, card, storage)
    return out


def _kernels(session: Session, trials: Sequence[Trial], card: Target) -> tuple[ProductKernels, str]:
    """The kernels, ready ones or else compiled now, while the GPU is idle; and why one may be missing."""
    ready = None if session.options.engines is None else session.options.engines / PRODUCTS
    if ready is not None and ready.is_dir():
        found = ProductKernels.read(ready)
        if found.target != card.name:
            raise EngineError(f"{ready}: kernels for {found.target}; this GPU needs those for {card.name}: {REPEAT}")
        return found, f"not in {ready}: {REPEAT}"
    began = time.monotonic()
    found = compiled(session.work / PRODUCTS, trials, card, session.share(COMPILE_END), session.progress)
    text = f"{PRODUCTS}: {len(found.kernels)} kernels compiled here in {time.monotonic() - began:.0f} s"
    session.lines.append({"kind": "note", "text": text})
    return found, "time to compile them"


def _entries(trials: Sequence[Trial], kernels: ProductKernels) -> list[dict[str, Any]]:
    """A line of the plan for each trial: itself, its kernel, the name of its check, and whether a build chooses it."""
    out = []
    for _, of_product in groupby(trials, lambda trial: trial.product):
        own = list(of_product)
        chosen = as_a_build_chooses(own, [trial for trial in own if trial.spec.name in kernels.refused])
        for trial in own:
            entry = {"trial": trial.to_json(), "kernel": trial.spec.name, "check": _check_of(trial)}
            out.append(entry | {"chosen": trial == chosen})
    return out


def _check_of(trial: Trial) -> str:
    return f"{PRODUCTS}: {trial}"


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """What tells the line of an entry from others: its kernel, and what it was timed for."""
    product = entry["trial"]["product"]
    return entry["kernel"], product["model"], product["kind"], product["rows"]


def _run(session: Session, folder: Path, entries: Sequence[dict[str, Any]]) -> Collection[str]:
    """Check and time ``entries``; returns the names of the checks of which something is known now.

    Not of kernels, of which two numbers of rows may have one in common.
    """
    plan, options, done = session.work / "plan.json", session.options, set[str]()
    spec = {"index": options.device, "torch": options.torch, "plan": str(plan), "folder": str(folder)}
    spec |= {"cold_bytes": options.cold_bytes, "until": session.end}
    left = list(entries)
    for _ in range(TRIES):
        if not left or session.left < 0:
            break
        session.progress(f"{PRODUCTS}: {len(left)} kernels")
        plan.write_text(json.dumps(left))
        ended = run_stage(PRODUCTS, spec, session.end + GRACE_S)
        session.take(PRODUCTS, ended)
        lines = {kind: [line for line in ended.lines if line["kind"] == kind] for kind in ("product", "check")}
        timed = {(line["name"], line["model"], line["kernel"], line["rows"]) for line in lines["product"]}
        checks = {line["name"] for line in lines["check"]} | {ended.during}
        done |= {entry["check"] for entry in left if entry["check"] in checks or _key(entry) in timed}
        at = next((i for i, entry in enumerate(left) if entry["check"] == ended.during), None)
        if at is None:
            break
        left = left[at + 1 :]
    return done
