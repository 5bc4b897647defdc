"""The checks of a report: is what our kernels compute right? Several at once, since none of them is timed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from par_export.card.lines import check
from par_export.card.prepare import CHECKED_IMAGES, QUANTISED, copies
from par_export.card.processes import Ended, run_stage
from par_export.card.samples import Sample
from par_export.card.session import Session
from par_runtime.system import available_cores

CHECKS_AT_ONCE = 8
SANITIZER = "compute-sanitizer"
TOOLKIT = "/usr/local/cuda/bin"  #: where it is, if not on the path
SANITIZER_OPTIONS = ("--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all")
MEMORY_S = 30.0
SANITIZER_S = 90.0


class Checks:
    """All checks of the engines of our kernels, until ``until`` by ``time.monotonic``."""

    def __init__(self, session: Session, until: float) -> None:
        self._session, self._until = session, until
        self._work = session.work
        self._of_memory: dict[str, Mapping[str, Any]] = {}  # specs of the stage, by bundle
        self._run = partial(run_stage, threads=max(1, available_cores() // CHECKS_AT_ONCE))

    def run(self) -> None:
        """Run them."""
        options = self._session.options
        started: list[tuple[str, Future[Ended]]] = []
        with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:

            def start(name: str, run: Callable[[], Ended]) -> None:
                started.append((name, pool.submit(run)))

            def start_sample(sample: Sample) -> None:
                start(f"{sample.name}: kernels", partial(self._of_sample, sample))

            for sample in options.samples:
                if sample.codes is None:
                    start_sample(sample)
            bundles: dict[str, Path] = {}
            for name, path in self._checked_bundles():
                bundles[name] = path
                spec = {"path": str(path), "name": name, "device": self._session.device, "reference": "cpu", "seed": 7}
                spec |= {"groups": options.groups, "images": options.stress}
                start(f"{name}: images", partial(self._run, "images", spec, self._until))
                if path.parent.name != QUANTISED:  # codes change nothing about memory
                    self._of_memory[name] = spec
            for name, run in self.sanitized(bundles):
                start(name, run)
            for sample in options.samples:
                if sample.codes is not None:  # after whole images: where there is no time for all, these matter less
                    start_sample(sample)
            took: dict[str, float] = {}
            for name, future in started:
                self._session.progress(f"checking: {name}")
                try:
                    ended = future.result()
                    took[name] = ended.seconds
                    self.take(name, ended)
                except Exception as error:
                    self._session.wrong(name, error)
        if took:
            self._session.lines.append({"kind": "note", "text": seconds_of(took)})

    def memory(self) -> None:
        """The memory of the device over many images. Nothing else may be at work there, since all of it is counted."""
        for name, spec in self._of_memory.items():
            self._session.progress(f"checking: {name}: memory")
            until = min(self._session.end, time.monotonic() + MEMORY_S)
            self._session.take(f"{name}: memory", run_stage("memory", spec, until))

    def _of_sample(self, sample: Sample) -> Ended:
        """Every kernel of a sample's engine, which is built for it. Raises what the build raises."""
        if time.monotonic() > self._until:
            return Ended(why="there was no time for it")
        path = sample.write(self._work / "samples" / sample.name)
        self._session.build(path, sample.images)
        spec = {"path": str(path), "name": sample.name, "device": self._session.device}
        return self._run("kernels", spec | {"torch": self._session.options.torch}, self._until)

    def _checked_bundles(self) -> Iterator[tuple[str, Path]]:
        """Copies of the bundles to check, and quantised ones, each as soon as it has an engine: its name and path."""
        session = self._session
        for path, make in copies(session.options.checked, session.options.codes, self._work).items():
            name = path.name
            try:
                make()
                session.progress(f"building an engine of {name}")
                session.build(path, CHECKED_IMAGES)
            except Exception as error:
                session.wrong(f"{name}: an engine is built", error)
                continue
            yield name, path

    def sanitized(self, bundles: Mapping[str, Path]) -> list[tuple[str, Callable[[], Ended]]]:
        """One image of the smallest bundle under NVIDIA's checker of memory accesses, where there is one."""
        program = shutil.which(SANITIZER) or shutil.which(SANITIZER, path=TOOLKIT)
        if program is None:
            self._session.leave_out(SANITIZER, f"neither on this machine's path nor in {TOOLKIT}")
            return []
        if not bundles:
            return []
        name, path = min(bundles.items(), key=lambda item: (item[1] / "weights.data").stat().st_size)
        spec = {"path": str(path), "name": name, "device": self._session.device}
        until = min(self._until, time.monotonic() + SANITIZER_S)
        return [(SANITIZER, partial(self._run, "one_image", spec, until, (program, *SANITIZER_OPTIONS)))]

    def take(self, name: str, ended: Ended) -> None:
        """Keep the lines of a stage; what the checker of memory accesses said becomes a check."""
        if name != SANITIZER:
            self._session.take(name, ended)
            return
        said = [line.strip("= ") for line in ended.said if "=====" in line]
        if not any("ERROR SUMMARY" in line for line in said):  # it cannot watch here, which says nothing of us
            self._session.leave_out(SANITIZER, " ".join([ended.why, *said])[:300])
            return
        errors = [line for line in said if "COMPUTE-SANITIZER" not in line]
        self._session.lines.append(check(f"{SANITIZER}: one image", not ended.why, "; ".join(errors[:4])))


def seconds_of(took: Mapping[str, float]) -> str:
    """How long each check took, the longest first: what to shorten where one is ended before its time."""
    longest_first = sorted(took, key=lambda name: -took[name])
    each = ", ".join(f"{name} {took[name]:.0f}" for name in longest_first)
    return f"seconds of the checks, up to {CHECKS_AT_ONCE} at once: {each}"
