"""The process that a subject lives in: ``python -m par_runtime.bench.subjects.worker SPEC``, spoken to in JSON lines.

One request a line on standard input, one answer a line on what was standard output; whatever libraries print goes to
standard error. The process ends with its input, so it does not outlive the bench that started it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from par_runtime.bench.subjects.eager import EagerSubject
from par_runtime.bench.subjects.pipeline import PipelineSubject
from par_runtime.errors import BundleError, CudaError, EngineError, RequestError

#: Failures that the bench knows how to tell, by the name that they cross the border under.
ERRORS: dict[str, type[Exception]] = {
    "EngineError": EngineError,
    "BundleError": BundleError,
    "RequestError": RequestError,
    "CudaError": CudaError,
    "BaselineError": RequestError,  # of par_model, which the runtime does not know
    "MemoryError": MemoryError,
    "OutOfMemory": MemoryError,
}


def opened(spec: Mapping[str, Any]) -> PipelineSubject | EagerSubject:
    """The subject that ``spec`` describes: "kind" is "bundle", "eager" or "compiled"."""
    path, label, threads = Path(spec["path"]), spec["label"], spec["threads"]
    if spec["kind"] == "bundle":
        return PipelineSubject.load(path, label, device=spec["device"], threads=threads, selftest=spec["selftest"])
    compiled = spec["kind"] == "compiled"
    return EagerSubject(path, label, threads=threads, compiled=compiled, device=spec["device"])


def serve(spec: Mapping[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Open the subject, tell its facts, answer until the requests end."""

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def failed(error: Exception) -> None:
        name = next((n for n in ERRORS if n in {kind.__name__ for kind in type(error).__mro__}), "")
        if not name:
            traceback.print_exc()
        answer({"error": name, "text": str(error) or type(error).__name__})

    try:
        subject = opened(spec)
    except Exception as error:
        failed(error)
        return
    answer({"facts": asdict(subject.facts), "load_ms": subject.load_ms, "note": subject.note})
    try:
        for line in requests:
            request = json.loads(line)
            try:
                answer({"ok": _do(subject, request)})
            except Exception as error:
                failed(error)
    finally:
        subject.close()


def _do(subject: Any, request: Mapping[str, Any]) -> Any:
    images = request["images"]
    if request["do"] == "run":
        return asdict(subject.run(images, request["guided"], request["most_calls"]))
    if request["do"] == "decode":
        return asdict(subject.decode(images))
    return subject.first_preview_ms(images, request["guided"])


def main(argv: list[str]) -> int:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of the terminal; the bench ends this one
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(json.loads(argv[0]), sys.stdin, answers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
