"""A small report of a GPU for tests: tiny models, engines that compute nothing, real processes on the stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from double import kernels

from par_export.card.plan import Model
from par_export.card.report import CardOptions, report
from par_export.card.samples import Sample
from par_export.kernels.plan import Planner
from par_export.kernels.plan import plan as plan_kernels
from par_export.kernels.spec import Planned, Spec
from par_export.quantised import Codes
from par_model.config import PARConfig, VQConfig
from par_runtime.backends.program import Pointer, Profile, Program, Weight
from par_runtime.bench import gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.rows import Row
from par_runtime.bundle import Bundle

SMALL = Model(
    "PAR-L",
    PARConfig(dim=64, n_layers=2, n_heads=4, vocab_size=256, n_classes=10, grid=(1, 8, 8)),
    VQConfig(codebook_size=256, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32),
    twins=(4,),
    group_sizes=(1, 4),
    codes=(Codes("int8", 32),),
)


SAMPLE = Sample("odd", SMALL.config, None, 4)


BASELINE = replace(SMALL, twins=(1, 4), codes=(), ours=False)


Lines = list[dict[str, Any]]


def planned(bundle: Bundle, images: Sequence[int]) -> Planned:
    """An engine whose one kernel takes a matrix of each layer; the decoder has a kernel too. Neither computes."""
    plan = Planned()
    constants = {"K": 64, "N": 64, "WIDTH": 64, "ORDER": "plain", "HEAD": 8, "PADDED": 8, "DROP_ROWS": False}
    types = (("raw", "*fp16"), ("packed", "*fp16"))
    spec = Spec("pack.panels", tuple(sorted((constants | {"BN": 16, "BK": 16, "PART": 16}).items())), types, 4, 1)
    for name, at in bundle.weights.items():
        pack = plan.launch(spec, (4, 4, 1), {"raw": Pointer("raw"), "packed": Pointer("packed")})
        whole = len(at.shape) == 2 and at.dtype == "float16" and name != "embed"
        plan.weights[name] = Weight(at.length, at, 0, pack if whole else None)
    layer = plan.launch(spec, (4, 4, 1), {"raw": Pointer("layers.{i}.w2"), "packed": Pointer("x")})
    end = plan.launch(spec, (1, 1, 1), {"raw": Pointer("x"), "packed": Pointer("tokens")})
    decoded = plan.launch(spec, (1, 1, 1), {"raw": Pointer("tokens"), "packed": Pointer("images")})
    profiles = {b: Profile((), (layer,), (end,), {"x": (0, 4096)}, 4096) for b in images}
    phases = tuple(phase.name for phase in bundle.phases)
    layers = bundle.model["n_layers"]
    plan.programs["step"] = Program(bundle.group_size, phases, layers, profiles, {}, 0)
    if bundle.image_size is not None:
        only = {b: Profile((decoded,), (), (), {}, 0) for b in images}
        plan.programs["decoder"] = Program(0, (), 0, only, {}, 0)
    return plan


def build(path: Path, images: Sequence[int], *, planner: Planner = plan_kernels) -> None:
    bundle = Bundle.open(path)
    kernels.write_engine(bundle, planned(bundle, images), precision="fp16", decoder_precision="fp16")


def options(tmp_path: Path, tiny: Path, **changes: object) -> CardOptions:
    small = {"copy_bytes": 2**20, "launches": 9, "side": 64}
    settings = {"minutes": 2.0, "checked": [tiny], "models": [SMALL], "images": (1,), "repetitions": 2, "stress": 4}
    settings |= {"samples": (), "codes": ()}
    settings |= {"published": ("PAR-S", SMALL.config, SMALL.vq), "baselines": [BASELINE]}
    settings |= {"work": tmp_path, "torch": "cpu", "groups": 1, "limits": small, "build": build}
    return CardOptions(**(settings | changes))  # type: ignore[arg-type]


def of_parts(tmp_path: Path, tiny: Path, gpu_: gpu.Gpu, *parts: str, **changes: object) -> tuple[list[Row], str, Lines]:
    """Rows, page and lines of a report of these parts."""
    journal = Journal(None, lambda _: None)
    rows = report(options(tmp_path, tiny, parts=parts, **changes), gpu_, lambda _: None, journal)
    outcome = journal.finish(rows)
    return outcome.rows, outcome.page, outcome.others


def wrong(lines: Lines) -> dict[str, str]:
    """Texts of the checks that failed, by their names."""
    return {line["name"]: line["text"] for line in lines if line["kind"] == "check" and not line["passed"]}
