"""The parity gate of the model: the step graphs on ONNX Runtime against the PyTorch oracle.

Greedy parity costs one teacher-forced pass: generate greedily on the graph, then feed these tokens to the oracle. If
the oracle's argmax is the same token at every position, it would have generated the same image, by induction. An image
that is fed random tokens runs in the same batch: on a CPU a call costs what reading the weights costs, for the graph
and for the oracle.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from par_export.gate import runner
from par_export.gate.compare import compare_greedy, compare_logits
from par_export.gate.magnitudes import Largest, check_range
from par_export.gate.oracle import check_finite, oracle_logits, rounding_error
from par_export.graphs.step import COMPATIBLE_STEP
from par_export.graphs.writer import OPSET, WeightTable
from par_export.weights import WeightsWriter, parameters
from par_model.checkpoint import Checkpoint
from par_model.config import PARConfig
from par_model.ordering import phases
from par_runtime.system import available_bytes, give_back

#: Models of more parameters generate one greedy image, not two.
ONE_IMAGE_FROM = 10**9
#: Weights of smaller files are not packed: for one image it is not worth it.
PACK_FROM_BYTES = 64 * 2**20
#: What the gate needs beside weights in fp32: caches, logits, activations of the oracle.
MARGIN_BYTES = 3 * 10**9


def gate(
    folder: Path,
    config: PARConfig,
    checkpoint: Checkpoint,
    weights: WeightsWriter,
    *,
    guidance: float,
    seed: int = 0,
    stored: bool = False,
) -> dict[str, Any]:
    """Compare every phase and a whole greedy image of the graphs in ``folder`` with the oracle.

    ``stored``: the checkpoint holds what the weights file holds, quantised matrices times their scales. The oracle then
    takes its numbers as they are; else it rounds them to the bundle's precision.
    Returns the manifest's ``parity`` and ``selftest`` entries. Raises ParityError beyond a tolerance or where numbers
    come near to what fp16 holds, and CheckpointError where the weights are not finite.
    """
    dtype = weights.entries["embed"].dtype
    rounded = "float32" if stored else dtype  # what the oracle's weights are rounded to
    # ONNX Runtime has no bf16 kernels for CPUs: the static graphs of bf16 bundles run in fp32, over the bf16 weights.
    static_compute = "float32" if dtype == "bfloat16" else dtype
    opset = runner.runnable_opset()
    stand_in = None if (static_compute, opset) == (dtype, OPSET) else runner.StandIn(weights, static_compute, opset)
    rng = np.random.default_rng(seed)
    # Image 0 is fed random tokens, unguided; the others are greedy and guided.
    greedy = np.arange(min(1 if parameters(config) > ONE_IMAGE_FROM else 2, config.n_classes))
    labels = np.concatenate([rng.integers(0, config.n_classes, 1), greedy])
    batch = runner.GuidedRows(np.array([1.0, *[guidance] * len(greedy)], np.float32))
    teacher = np.full((len(labels), config.n_tokens), -1)
    teacher[0] = rng.integers(0, config.vocab_size, config.n_tokens)

    pack = weights.path.stat().st_size > PACK_FROM_BYTES and fits(weights)
    try:
        tokens, got = runner.run_step(folder, config, labels, batch.guidance, teacher, pack=pack)
        all_finite = bool(np.isfinite(got).all())
    except Exception:  # a token drawn from NaN may be no code; the next call then fails with an error of ONNX Runtime
        _raise_if_not_finite(config, checkpoint, teacher[:1], labels[:1], dtype, rounded)
        raise
    if not all_finite:
        _raise_if_not_finite(config, checkpoint, teacher[:1], labels[:1], dtype, rounded)
    _, compatible = runner.run_step(folder, config, labels[:1], 1.0, teacher[:1], COMPATIBLE_STEP, runner.SOME_GROUPS)
    static = runner.run_static(folder, config, int(labels[0]), teacher[:1], stand_in)
    for path in folder.glob(".gate-*"):
        path.unlink()
    give_back()

    rows = batch.labels(labels, config.n_classes)
    largest = Largest()
    wanted = batch.guided(oracle_logits(config, checkpoint, tokens[batch.of_row], rows, rounded, largest))
    check_range(largest, dtype)
    scale = float(np.abs(wanted[0]).max()) or 1.0
    report: dict[str, Any] = {"logit_scale": scale, "static_compute": static_compute, "opset": opset, "phases": {}}
    for phase in phases(config):
        if phase.repeat:
            positions = slice(phase.start, phase.start + phase.query * phase.repeat)
            report["phases"][phase.name] = compare_logits(
                f"step network, {phase.name}", got[:1, positions], wanted[:1, positions], scale, "float32"
            )
    some = sum(
        phase.query * runner.calls_up_to(phase, runner.SOME_GROUPS) for phase in phases(config)
    )  # positions that were run
    report[COMPATIBLE_STEP] = compare_logits(
        f"{COMPATIBLE_STEP}.onnx", compatible[:, :some], wanted[:1, :some], scale, "float32"
    )
    for phase in phases(config):
        if phase.repeat:
            part = static[phase.name]
            positions = slice(phase.start, phase.start + part.shape[1])
            compared = compare_logits(
                f"{phase.name} (static graph)", part, wanted[:1, positions], scale, static_compute
            )
            report["phases"][phase.name] |= {"static_" + key: value for key, value in compared.items()}
    margins, ties = compare_greedy(tokens[1:], wanted[1:])
    report["largest"] = largest.report()
    report["greedy"] = {"tokens": int(tokens[1:].size), "ties": ties, "smallest_margin": float(margins.min())}
    if rounded != "float32":
        report["rounding"] = rounding_error(config, checkpoint, teacher[:1], labels[:1], wanted[:1], dtype)
    selftest = {"labels": greedy.tolist(), "guidance": guidance, "tokens": tokens[1:].tolist()}
    return {"parity": report, "selftest": selftest}


def _raise_if_not_finite(
    config: PARConfig, checkpoint: Checkpoint, tokens: np.ndarray, labels: np.ndarray, dtype: str, rounded: str
) -> None:
    """Raise the error that tells why logits are not finite: weights that are not, or numbers beyond the precision.

    Raises CheckpointError, ParityError; returns where the oracle's numbers for ``tokens`` [R,N] are all in range.
    """
    check_finite(checkpoint, rounded)
    largest = Largest()
    oracle_logits(config, checkpoint, tokens, labels, rounded, largest)
    check_range(largest, dtype)


def fits(table: WeightTable) -> bool:
    """Whether memory allows a session that holds all weights in fp32."""
    return sum(4 * math.prod(stored.shape) for stored in table.entries.values()) + MARGIN_BYTES <= (
        available_bytes() or 0
    )
