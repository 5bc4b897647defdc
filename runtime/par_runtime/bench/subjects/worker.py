"""The process that a subject lives in: ``python -m par_runtime.bench.subjects.worker SPEC``. It speaks JSON lines.

It reads a request from each line of standard input and writes an answer as a line of standard output; what libraries
print goes to standard error instead. The process ends when its input ends, so it does not outlive the bench that
started it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from par_runtime.bench.subjects.base import TooManyImagesError
from par_runtime.bench.subjects.baselines import EagerSubject, optional
from par_runtime.bench.subjects.pipeline import PipelineSubject
from par_runtime.dtypes import Rounding
from par_runtime.errors import BundleError, CudaError, EngineError, RequestError
from par_runtime.system import explain

#: Errors that the bench reports in one line, by the name that an answer carries.
ERRORS: dict[str, type[Exception]] = {
    "EngineError": EngineError,
    "BundleError": BundleError,
    "TooManyImagesError": TooManyImagesError,
    "RequestError": RequestError,
    "CudaError": CudaError,
    "BaselineError": RequestError,  # of par_model, which the runtime does not import
    "MemoryError": MemoryError,
    "OutOfMemory": MemoryError,
    "OSError": RequestError,
}


def open_subject(spec: Mapping[str, Any]) -> PipelineSubject | EagerSubject:
    """The subject that ``spec`` describes: "kind" is "bundle", "random" (weights made on the GPU), "eager" or
    "compiled".
    """
    if spec["kind"] == "random":
        subject: PipelineSubject = optional("par_export.card.subject", "the GPU's report", "open_subject")(spec)
        return subject
    path, label, threads = Path(spec["path"]), spec["label"], spec["threads"]
    if spec["kind"] == "bundle":
        how = {name: spec[name] for name in ("device", "selftest")}
        return PipelineSubject.load(path, label, threads=threads, rounding=Rounding(**spec["rounding"]), **how)
    compiled = spec["kind"] == "compiled"
    if compiled and spec.get("compile_threads"):  # PyTorch reads it when it is imported
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(spec["compile_threads"]))
    return EagerSubject(path, label, threads=threads, compiled=compiled, device=spec["device"])


def serve(spec: Mapping[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Open the subject, send its info, and answer until the requests end."""

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def answer_error(error: Exception) -> None:
        name = next((n for n in ERRORS if n in {kind.__name__ for kind in type(error).__mro__}), "")
        if not name:
            traceback.print_exc()
        text = explain(error) if isinstance(error, OSError) else str(error)
        answer({"error": name, "text": text or type(error).__name__})

    try:
        subject = open_subject(spec)
    except Exception as error:
        answer_error(error)
        return
    loading = {"load_ms": subject.load_ms, "selftest_ms": subject.selftest_ms}
    answer({"info": asdict(subject.info), **loading, "note": subject.note})
    try:
        for line in requests:
            request = json.loads(line)
            try:
                answer({"ok": _do(subject, request)})
            except Exception as error:
                answer_error(error)
    finally:
        subject.close()


def _do(subject: Any, request: Mapping[str, Any]) -> Any:
    if request["do"] == "forget":
        return subject.forget()
    images = request["images"]
    if request["do"] == "run":
        return asdict(subject.run(images, request["guided"], request["most_calls"]))
    if request["do"] == "image":
        return asdict(subject.image(images, request["guided"]))
    if request["do"] == "kernels":
        return subject.kernels(images, request["guided"], request["image"])
    if request["do"] == "call":
        return subject.call_us(images)
    if request["do"] == "logits":
        return subject.logits(images, Path(request["into"]))
    if request["do"] == "decode":
        return asdict(subject.decode(images))
    return subject.first_preview_ms(images, request["guided"])


def main(argv: list[str]) -> int:
    """Serve the subject of the JSON object ``argv[0]`` on standard input and output."""
    # Ctrl-C reaches every process of the terminal; the bench ends this one. Where a process can be started with it
    # blocked, this one was.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = json.loads(argv[0])
    if spec.get("apart"):
        # A group of this process and of what it starts, to be stopped as one. In the session of the bench, so that the
        # system lets a stopped group go on, and end, where the bench was killed.
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else some terminals stop what such a group writes to them
    with suppress(BrokenPipeError), os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:  # the bench has ended
        os.dup2(2, 1)
        serve(spec, sys.stdin, answers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
