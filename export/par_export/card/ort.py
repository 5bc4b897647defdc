"""ONNX Runtime on this GPU (``cuda-ort``): which operators run where, and whether a bundle computes what it should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from par_export.card.images import check_repeat, check_selftest, one_image, verified
from par_export.card.lines import Emit
from par_runtime.pipeline import Pipeline

#: What the released wheels said of a decoder without a GPU, over libraries that do nothing: docs/install.md.
PREDICTED: Mapping[str, frozenset[str]] = {"step": frozenset(), "decoder": frozenset({"InstanceNormalization"})}


def check_ort(spec: Mapping[str, Any], emit: Emit) -> None:
    """All checks of the bundle ``path`` on ``device``, a "cuda-ort"; ``name`` begins their names.

    ``groups``, ``seed``, ``reference``: as for :func:`par_export.card.images.check_images`.
    """
    from par_runtime.backends.ort import gpu as ort_cuda

    path, name = Path(spec["path"]), spec["name"]
    emit("begin", name=f"{name}: loads")
    pipeline = Pipeline.load(path, spec["device"], selftest=False)
    backend: Any = pipeline.backend
    info = backend.info
    emit("check", name=f"{name}: loads", passed=True, text=f"{info.name} {info.version}")
    for graph, session in backend.opened().items():
        emit("begin", name=f"{name}: placement of {graph}")
        elsewhere = frozenset(ort_cuda.not_on_provider(session, ort_cuda.CUDA))
        wanted = PREDICTED[graph] if spec["predicted"] else elsewhere
        emit("note", text=f"{name}: {graph}: {_placed(session)}")
        text = f"on the CPU, besides shapes: {_words(elsewhere)}"
        if elsewhere != wanted:
            text += f"; without a GPU it was predicted: {_words(wanted)}"
        emit("check", name=f"{name}: placement of {graph}", passed=elsewhere == wanted, text=text)
    check_selftest(pipeline, spec, emit)
    check_repeat(pipeline, one_image(pipeline, spec), spec, emit)
    verified(pipeline, spec, emit)
    pipeline.close()


def _placed(session: Any) -> str:
    """How many nodes of each operator run where: "CUDA 512; CPU 14 (Concat 3, Gather 11)"."""
    nodes: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        kinds = nodes.setdefault(part.ep_name.removesuffix("ExecutionProvider"), Counter())
        kinds.update(node.op_type for node in part.get_nodes())
    lines: list[str] = []
    for provider, kinds in sorted(nodes.items(), key=lambda item: -item[1].total()):
        few = f" ({', '.join(f'{kind} {n}' for kind, n in sorted(kinds.items()))})" if len(lines) else ""
        lines.append(f"{provider} {kinds.total()}{few}")
    return "; ".join(lines)


def _words(operators: frozenset[str]) -> str:
    return ", ".join(sorted(operators)) or "nothing"
