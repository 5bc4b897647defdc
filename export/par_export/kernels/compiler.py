"""Kernels compiled ahead of time by Triton, on a machine without a GPU, in processes of their own (``worker.py``).

Triton is never imported here. Each worker has an environment without settings that would change what it makes, keeps
its files in a temporary folder, and is gone when the compiler is closed, whatever happened.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import par_export
from par_export.errors import BuildError
from par_export.kernels.spec import Spec
from par_export.kernels.targets import Target
from par_runtime.errors import how_to_install
from par_runtime.system import available_cores

SOURCES = "par_export.kernels.sources"
MOST_WORKERS = 8
#: How the variables begin that a worker gets: what Python and the system need to start a program, and where NVIDIA's
#: assembler is, where Triton comes without it. All others stay out: Triton and LLVM read some whose names no list of
#: ours would keep up with (DISABLE_LLVM_OPT, DISABLE_MMA_V3), and an engine must not depend on them.
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_", "LD_", "PYTHON", "PARVIS_")
_TOOLS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_CUOBJDUMP_PATH")


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what is known about it.

    ``trailing``: addresses of scratch memory after its own parameters; ``scratch``: bytes of that memory. ``shared``,
    ``spills`` in bytes, ``registers`` of a thread. ``loads``, ``copies`` (to shared memory): instructions that read
    memory, by their bytes for each thread; ``products``: matrix instructions by kind.
    """

    cubin: bytes
    function: str
    warps: int
    shared: int
    registers: int
    spills: int
    trailing: int
    scratch: int
    loads: Mapping[str, int]
    copies: Mapping[str, int]
    products: Mapping[str, int]
    seconds: float

    def fault(self, target: Target) -> str | None:
        """Why it cannot run well on ``target``: memory it needs and should not, or cannot have. None if it can."""
        if self.shared > target.shared_block:
            return f"needs {self.shared} bytes of shared memory, a block has at most {target.shared_block}"
        if self.spills:
            return f"keeps {self.spills} bytes of registers in memory"
        if self.scratch:
            return f"needs {self.scratch} bytes of scratch memory, which it is not given"
        return None


class Compiler:
    """Triton, in up to ``workers`` processes (default: as many as there are cores, at most 8). Use it in ``with``.

    ``version`` ("triton 3.9.0") and ``tools`` say what compiles; ``package`` holds the sources. Raises BuildError where
    Triton is not installed.
    """

    def __init__(self, workers: int | None = None, package: str = SOURCES) -> None:
        self._most = workers or min(available_cores(), MOST_WORKERS)
        self._package = package
        self._folder = tempfile.TemporaryDirectory(prefix="parvis-kernels-", ignore_cleanup_errors=True)
        self._workers: list[_Worker] = []
        try:
            hello = self._start().answer()
            if "error" in hello:
                raise BuildError(_no_triton(hello))
        except BaseException:
            self.close()
            raise
        self.version = f"triton {hello['version']}"
        self.tools: tuple[str, ...] = tuple(hello["tools"])
        self._peaks: dict[int, int] = {}
        self._made: dict[tuple[str, str], Compiled] = {}

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def peak_bytes(self) -> int:
        """The most memory that all workers have held, in sum."""
        return sum(self._peaks.values())

    def compile(
        self,
        specs: Iterable[Spec],
        target: Target,
        done: Callable[[int, int], None] = lambda *_: None,
        failed: dict[str, str] | None = None,
    ) -> dict[str, Compiled]:
        """name -> the compiled kernel, of each of ``specs``. ``done``: called with how many are, and of how many.

        What was compiled before is taken from memory. ``failed`` gets name -> why of those that do not compile. Without
        it the first of them raises BuildError, which names the kernel and the target; so does a system that cannot
        compile at all.
        """
        wanted = {spec.name: spec for spec in specs}
        waiting = [spec for name, spec in wanted.items() if (name, target.name) not in self._made][::-1]
        while len(self._workers) < min(self._most, len(waiting)):
            self._start()
        at_work: dict[_Worker, Spec] = {}
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            while waiting or at_work:
                for worker in self._workers:
                    if waiting and worker not in at_work:
                        at_work[worker] = waiting.pop()
                        worker.send(self._job(at_work[worker], target))
                for key, _ in selector.select():
                    worker = key.data
                    spec = at_work[worker]
                    answer = worker.answer(f"kernel {spec.source} for {target.name}")
                    if "version" in answer:  # it has started, and the job lies before it
                        continue
                    del at_work[worker]
                    self._peaks[worker.pid] = answer.pop("peak_bytes", 0)
                    try:
                        self._made[spec.name, target.name] = self._compiled(spec, target, answer)
                    except BuildError as error:
                        if failed is None or answer.get("system"):
                            raise
                        failed[spec.name] = str(error)
                    done(len(wanted) - len(waiting) - len(at_work), len(wanted))
        made = {name: self._made.get((name, target.name)) for name in wanted}
        return {name: kernel for name, kernel in made.items() if kernel is not None}

    def close(self) -> None:
        """End all workers and remove their files."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._folder.cleanup()

    def _start(self) -> _Worker:
        worker = _Worker(Path(self._folder.name), len(self._workers))
        self._workers.append(worker)
        return worker

    def _job(self, spec: Spec, target: Target) -> dict[str, Any]:
        return {
            "package": self._package,
            "source": spec.source,
            "parameters": spec.parameters,
            "constants": spec.constants,
            "warps": spec.warps,
            "stages": spec.stages,
            "many_registers": spec.many_registers,
            "capability": target.capability,
            "out": str(self._cubin(spec, target)),
        }

    def _cubin(self, spec: Spec, target: Target) -> Path:
        return Path(self._folder.name) / f"{spec.name}-{target.name}.cubin"

    def _compiled(self, spec: Spec, target: Target, answer: dict[str, Any]) -> Compiled:
        if answer.get("system"):
            raise BuildError(
                f"kernel {spec.source} for {target.name} cannot be compiled in {self._folder.name} "
                f"({answer['error']}); TMPDIR names another folder for temporary files"
            )
        if "error" in answer:
            raise BuildError(
                f"kernel {spec.source} for {target.name}: {self.version} does not compile it ({answer['error']}); "
                "another version of triton may (3.9.0 is tested)"
            )
        file = self._cubin(spec, target)
        cubin = file.read_bytes()
        file.unlink()
        return Compiled(cubin, **answer)


class _Worker:
    """One process that compiles, ``number`` of those whose files lie in ``folder``."""

    def __init__(self, folder: Path, number: int) -> None:
        self._errors = folder / f"worker-{number}.txt"
        with self._errors.open("wb") as errors:
            # In a session of its own, so that Ctrl-C ends the build here, and this process and its children with it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from par_export.kernels.worker import main; main()", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
                text=True,
            )
        assert self._process.stdout is not None
        self.output = self._process.stdout
        self.pid = self._process.pid

    def send(self, job: Mapping[str, Any]) -> None:
        """Give it a kernel to compile."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer that does not come will tell
            print(json.dumps(job), file=self._process.stdin, flush=True)

    def answer(self, what: str = "triton") -> dict[str, Any]:
        """Its next answer. Raises BuildError where it ended instead; ``what`` it was asked to do."""
        line = self.output.readline()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        lines = self._errors.read_text(errors="replace").split("\n")
        last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        advice = f"install another triton (3.9.0 is tested): {how_to_install('kernels-build')}"
        if code == -signal.SIGKILL:
            advice = "the system does so where memory is short: free some, or start fewer such processes (taskset -c 0)"
        raise BuildError(f"{what}: the process that compiles {how}{f': {last}' if last else ''}; {advice}")

    def end(self) -> None:
        """End it and its children at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def _environment(folder: Path) -> dict[str, str]:
    """The environment of a worker: of that of this process what it needs to start, no settings of a compiler.

    Triton writes into ``folder`` instead of the user's home.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith((*_KEPT, *_TOOLS))}
    places = [str(Path(part).absolute()) for part in sys.path if part]  # it runs in another folder
    ours = str(Path(par_export.__path__[0]).parent.absolute())
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*places, ours])),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_HOME": str(folder),
        "TRITON_DISABLE_LINE_INFO": "1",  # a cubin would name the folder in which parvis is installed
        "TMPDIR": str(folder),
    }


def _no_triton(hello: Mapping[str, Any]) -> str:
    if hello["missing"]:
        return f"engines of kernels are compiled by triton, which is not installed: {how_to_install('kernels-build')}"
    return f"triton cannot be loaded ({hello['error']}); install another: {how_to_install('kernels-build')}"
