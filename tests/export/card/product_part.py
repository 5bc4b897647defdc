"""The part about single products on the stand-in GPU, in the process of a test: its compiler, its stage, its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from double.driver import Driver
from double.kernels import stand_in_of

from par_export.card import stages
from par_export.card.again import read_runs
from par_export.card.findings import Findings
from par_export.card.options import CardOptions
from par_export.card.plan import Model
from par_export.card.processes import Ended
from par_export.card.product_files import ProductKernels
from par_export.card.report import report
from par_export.kernels.compiler import Compiled
from par_export.kernels.spec import Spec
from par_export.kernels.targets import TARGETS, Target
from par_export.kernels.tiles import products
from par_export.quantised import Codes
from par_model.config import PARConfig
from par_runtime.backends.program import Kernel
from par_runtime.bench import gpu
from par_runtime.bench.journal import Journal
from par_runtime.metrics import finite

SM90 = TARGETS["SM90"]
#: Its rows of activations are padded, K ends inside of a panel, and columns inside of a tile.
ODD = PARConfig(dim=72, n_layers=1, n_heads=2, vocab_size=72, n_classes=10, grid=(1, 8, 8))
SMALL = Model("PAR-S", ODD, None, group_sizes=(1, 4))
#: Groups of 32 fit into the depth of each of its matrices; K ends inside of a panel all the same.
CODED = Model("PAR-C", replace(ODD, dim=96), None, group_sizes=(4,), codes=(Codes("int8", 32), Codes("int4", 32)))


class StandIn:
    """In place of the compiler: cubins are names. ``refuse`` says why a kernel does not compile, or ""."""

    version = "stand-in 1"
    refuse: Callable[[Spec], str] = staticmethod(lambda _: "")
    spills: Callable[[Spec], int] = staticmethod(lambda _: 0)
    compiled: list[str]  #: names of all kernels

    def __init__(self, workers: int) -> None:
        assert workers >= 1

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def compile(self, specs: Sequence[Spec], target: Target, failed: dict[str, str]) -> dict[str, Compiled]:
        out = {}
        for spec in specs:
            self.compiled.append(spec.name)
            if why := type(self).refuse(spec):
                failed[spec.name] = why
                continue
            cubin, spills = f"stand-in for {spec.name} on {target.name}", type(self).spills(spec)
            out[spec.name] = stand_in_of(spec, cubin, shared=64 * 1024, spills=spills)
        return out


class Lines(list[dict[str, Any]]):
    """What a stage emits, as its process writes it."""

    def __call__(self, kind: str, **fields: Any) -> None:
        self.append(finite({"kind": kind} | fields))


Planted = Callable[[Kernel], Kernel]


def two_layouts(*given: Any, **more: Any) -> list[Any]:
    """The planner's first, and one that splits K, or the second."""
    first, second, *others = products(*given, **more)
    (images,) = first
    return [first, next((each for each in others if each[images].split > 1), second)]


def here(driver: Driver, planted: Mapping[str, Planted] | None = None) -> Callable[..., Ended]:
    """``run_stage`` in this process. ``planted``: what the kernel of a check is in truth."""

    def run(name: str, spec: Mapping[str, Any], until: float) -> Ended:
        assert until > spec["until"]
        kernels = ProductKernels.read(Path(spec["folder"]))
        for entry in json.loads(Path(spec["plan"]).read_text()):
            kernel = kernels.kernels[entry["kernel"]]
            right = (planted or {}).get(entry["check"], lambda one: one)(kernel)
            driver.register(kernels.cubin(entry["kernel"]), right, (9, 0))
        lines = Lines()
        stages.STAGES[name](spec, lines)
        assert not driver.device
        assert not driver.modules
        assert not driver.executables
        return Ended([line for line in lines if line["kind"] != "begin"])

    return run


def of_products(tmp_path: Path, **changes: Any) -> Findings:
    """What a report of this part finds, read back from its file."""
    settings: dict[str, Any] = {"minutes": 2.0, "models": [SMALL], "images": (1,), "cold_bytes": 1}
    options = CardOptions(parts=("products",), torch="cpu", work=tmp_path, **(settings | changes))
    journal = Journal(None, lambda _: None)
    assert report(options, gpu.describe(0), lambda _: None, journal) == []
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in journal.finish([]).others))
    (found,) = read_runs([file])
    return found
