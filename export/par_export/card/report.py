"""The report of a GPU: everything that is to be known of a card, in a given time.

Its parts, in their order: whether the driver does what we count on; whether our kernels compute what they should, and
their rows; PyTorch's rows, which all claims are measured by; our kernels in other shapes; single products; ONNX
Runtime; TensorRT-RTX. Whatever fails or does not fit into the time is said, and nothing that was measured is lost.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from par_export.card import libraries
from par_export.card.ahead import check_sources
from par_export.card.checks import Checks
from par_export.card.figure import figure
from par_export.card.findings import THIS_RUN, Findings
from par_export.card.limits import COPY, MATRICES, READ
from par_export.card.options import CardOptions, bundles_to_check
from par_export.card.prepare import Builder, ready_engine
from par_export.card.processes import run_stage
from par_export.card.products import products
from par_export.card.rows import Rows
from par_export.card.session import Session
from par_export.card.shapes import shapes
from par_export.card.table import markdown
from par_export.kernels.plan import Planner, plan
from par_runtime.backends.engines import ENGINES
from par_runtime.bench import machine
from par_runtime.bench.bounds import GPU, with_bounds
from par_runtime.bench.gpu import Gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.limits import Limits
from par_runtime.bench.measure import Progress
from par_runtime.bench.report.output import Outcome
from par_runtime.bench.rows import Row
from par_runtime.errors import EngineError

__all__ = ["CardOptions", "bundles_to_check", "report"]

#: Shares of the time of the part that is about kernels: after the first, checks are ended; after the second, no
#: engine is waited for any more.
CHECKS_END, WAIT_END = 0.4, 0.45
#: Of what time there is, the shares of the parts that were asked for.
WEIGHTS = {"kernels": 4.0, "baselines": 4.0, "shapes": 4.0, "products": 0.5, "cuda-ort": 1.5, "tensorrt-rtx": 2.0}
DRIVER_S = 60.0  #: at most, of the part about the driver


def report(options: CardOptions, gpu: Gpu, progress: Progress, journal: Journal) -> list[Row]:
    """Measure; returns the rows. ``journal.finish`` makes of them the outcome, with the page as text.

    Raises RequestError for ready engines that were built by other sources, OSError.
    """
    if options.engines is not None:
        check_sources(options.engines)
    return Report(options, gpu, progress, journal).run()


class Report:
    """One report; :func:`report` runs it."""

    def __init__(self, options: CardOptions, gpu: Gpu, progress: Progress, journal: Journal) -> None:
        began = time.monotonic()
        end = began + 60 * options.minutes
        self._options = options
        self._builder = Builder(index=options.device, end=end)
        self._engines: dict[str, list[str]] = {"ready": [], "built here": []}
        self._date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        self.session = Session(options, gpu, progress, journal, Path(), self._build, machine.describe(gpu), began, end)
        journal.finish = self.finish

    # -- the result ---------------------------------------------------------------------------------------------------

    def finish(self, rows: Sequence[Row]) -> Outcome:
        """The outcome of ``rows`` and of all that was found beside them."""
        session, limits = self.session, self._limits()
        bounded = with_bounds(rows, session.infos, {} if limits is None else {GPU: limits})
        found = Findings(
            session.machine,
            machine.commit(),
            self._date,
            (time.monotonic() - session.began) / 60,
            bounded,
            session.lines,
            session.left_out,
            self._options.parts,
            THIS_RUN if session.journal.path is None else session.journal.path.name,
        )
        wrong = f"{len(found.wrong)} of {len(found.of('check'))} checks failed" if found.wrong else ""
        if not found.of("check") and set(self._options.parts) != {"baselines"}:
            wrong = "nothing was checked"
        page = markdown([found])
        return Outcome(bounded, [], [], others=found.others, page=page, wrong=wrong, figure=lambda: figure([found]))

    def _limits(self) -> Limits | None:
        values = {line["name"]: line["value"] for line in self.session.lines if line["kind"] == "limit"}
        if COPY not in values:
            return None
        how = "measured in the same run: random bytes copied on the device, both ways counted, or read by torch.amax, "
        how += "whichever is faster; torch.matmul in fp16"
        return Limits(((2**40, max(values[COPY], values.get(READ, 0.0))),), values.get(MATRICES), how)

    # -- the parts ----------------------------------------------------------------------------------------------------

    def run(self) -> list[Row]:
        """Every part, each with its share of the time that is left."""
        parts: dict[str, Callable[[Session], list[Row]]] = {
            "driver": _driver,
            "kernels": _kernels,
            "baselines": _baselines,
            "shapes": partial(shapes, build=self._build),
            "products": products,
            "cuda-ort": libraries.cuda_ort,
            "tensorrt-rtx": libraries.tensorrt_rtx,
        }
        options, rows = self._options, list[Row]()
        with ExitStack() as held:
            held.enter_context(self._builder)
            work = Path(held.enter_context(tempfile.TemporaryDirectory(dir=options.work, prefix="parvis-gpu-")))
            waiting = list(options.parts)
            while waiting:
                part = waiting.pop(0)
                folder = work / part
                folder.mkdir()
                session = self.session.until(time.monotonic() + self._time_of(part, waiting), folder)
                try:
                    rows += parts[part](session)
                except Exception as error:
                    session.wrong(part, error)
                shutil.rmtree(folder, ignore_errors=True)  # weights of one part do not fill the disk of the next
            self.session.progress("")
        for how, names in self._engines.items():
            if options.engines is not None and names:
                self.session.lines.append({"kind": "note", "text": f"engines {how}: {', '.join(names)}"})
        return rows

    def _time_of(self, part: str, waiting: Sequence[str]) -> float:
        """Seconds for ``part``, before those that are ``waiting``."""
        if part == "driver":
            return min(DRIVER_S, self.session.left)
        weights = [WEIGHTS.get(other, 0.0) for other in (part, *waiting)]
        return weights[0] / sum(weights) * self.session.left

    def _build(self, path: Path, images: Sequence[int], *, planner: Planner = plan, among: Path = Path()) -> None:
        """The engine of a bundle: a ready one, which lies in the folder ``among`` of these, else a new one.

        Where there is a folder of ready sets none is built: another compiler would be compared, not another shape.
        """
        options = self._options
        ready = None if options.engines is None else ready_engine(options.engines / among, path, images)
        if ready is None and among.parts and options.engines and (options.engines / among.parent).is_dir():
            raise EngineError(f"no engine of it is in {options.engines / among}: --build-for, --parts {among.parent}")
        if ready is not None:
            shutil.copytree(ready, path / ENGINES / ready.name)
        else:
            (options.build or self._builder)(path, images, planner=planner)
        names = self._engines["ready" if ready is not None else "built here"]
        if (name := f"{path.name} {among.parent}" if among.parts else path.name) not in names:  # one for all sets
            names.append(name)


def _driver(session: Session) -> list[Row]:
    """What we count on of the driver. One process cannot be used after a kernel that failed; PyTorch takes longest."""
    for stage in ("driver", "driver_fault", "driver_pytorch"):
        session.progress(f"checking: {stage}")
        spec = {"index": session.options.device, "torch": session.options.torch}
        session.take(stage.replace("_", ": "), run_stage(stage, spec, session.end))
    return []


def _kernels(session: Session) -> list[Row]:
    """Our own kernels: right, and how fast."""
    with Rows(session, session.options.models) as rows:
        checks = Checks(session, session.share(CHECKS_END))
        checks.run()
        return rows.run(session.share(WAIT_END), checks.memory)


def _baselines(session: Session) -> list[Row]:
    """PyTorch alone."""
    with Rows(session, session.options.baselines) as rows:
        return rows.run()
