"""The parity gate: the exported graphs on ONNX Runtime against the PyTorch oracle. Nothing is published below the floor.

The oracle is fed layer by layer from the checkpoint, so a 3B model is compared without being in memory whole, and
with its weights rounded to the bundle's precision, so the comparison is tight in every precision: what is tested
is the graph. (The effect of the rounding itself is measured beside it, and written into the manifest.)

Greedy parity costs one teacher-forced pass: generate greedily on the graph, feed the oracle these tokens; if its
argmax agrees at every position then, by induction, it would have generated the same tokens. The image that is fed
random tokens runs in the same batch: on a CPU a call costs what reading the weights costs, and so does the oracle's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from par_export.gate.drive import Driver, Images, input_ids
from par_export.gate.drive import session as session  # part of this module
from par_export.graphs.step import step_graph
from par_export.graphs.writer import COMPATIBLE_OPSET, OPSET, WeightTable
from par_export.weights import TORCH_TYPE, Weights
from par_model.checkpoint import Checkpoint, CheckpointError
from par_model.config import PARConfig, VQConfig
from par_model.ordering import Phase, phases
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_runtime.system import available_bytes, give_back

#: Largest allowed |logit error| relative to the largest |logit|, by what the graph computes in.
LOGIT_FLOOR = {"float32": 2e-5, "float16": 2e-2}
#: Two candidates closer than this (relative to the largest |logit|) may swap by rounding; counted, not refused.
TIE = 2e-5
IMAGE_FLOOR = 1  # grey levels of 255
#: The step network for ONNX Runtime releases without opset 24; the same function, checked like the other.
COMPATIBLE_STEP = "step_opset23"
#: Models of more parameters generate one greedy image, not two.
ONE_IMAGE_FROM = 10**9
#: Weights of smaller files are not worth packing for one image.
PACK_FROM_BYTES = 64 * 2**20
#: What the gate needs beside weights in fp32: caches, logits, activations of the oracle.
MARGIN_BYTES = 3 * 10**9
SOME_GROUPS = 3  # group calls that are compared of all graphs but the main one, which is compared whole


class ParityError(Exception):
    """The exported graphs do not compute what the model computes; nothing was published."""


def rounded(checkpoint: Checkpoint, prefix: str, keys: Iterable[str], dtype: str) -> dict[str, torch.Tensor]:
    """The tensors ``prefix + key`` in fp32, rounded to ``dtype``. Raises CheckpointError where they are not finite."""
    out = {}
    for key in keys:
        tensor = checkpoint.tensor(prefix + key)
        out[key] = tensor.to(TORCH_TYPE[dtype]).float()
        if not bool(out[key].sum().isfinite()) and not bool(out[key].isfinite().all()):
            largest = float(tensor.float().abs().max())
            raise CheckpointError(
                f"{checkpoint.path}: {prefix}{key} holds {int((~tensor.float().isfinite()).sum())} numbers that are NaN "
                "or infinite; give a checkpoint of a training that did not diverge"
                if not math.isfinite(largest)
                else f"{checkpoint.path}: {prefix}{key} holds numbers up to {largest:.3g}, beyond what {dtype} can "
                "store; give --precision bf16 or fp32"
            )
    return out


def check_finite(checkpoint: Checkpoint, dtype: str) -> None:
    """Raise CheckpointError if a tensor of the file, rounded to ``dtype``, is not finite."""
    for key in checkpoint.tensors:
        rounded(checkpoint, "", [key], dtype)


@torch.no_grad()
def oracle_logits(
    config: PARConfig, checkpoint: Checkpoint, tokens: np.ndarray, labels: np.ndarray, dtype: str
) -> np.ndarray:
    """Teacher-forced logits [R,N,V] fp32 of the oracle, weights rounded to ``dtype``, one layer in memory at a time."""

    def load(module: torch.nn.Module, prefix: str) -> None:
        module.load_state_dict(rounded(checkpoint, prefix, module.state_dict(), dtype), assign=True)

    with torch.device("meta"):
        model = PAR(config)
    model.eval()
    outer = ["tok_embeddings", "cls_embedding", "norm", "output"] + (
        ["spe_tok_embeddings"] if config.group_size > 1 else []
    )
    for name in outer:
        load(getattr(model, name), f"{name}.")
    positions = torch.arange(config.n_tokens)
    mask = positions[None, :] < model.visible[:, None]
    x = model.embed(torch.from_numpy(tokens), torch.from_numpy(labels), positions)
    for i, layer in enumerate(model.layers):
        load(layer, f"layers.{i}.")
        x = layer(x, model.cos, model.sin, mask, positions, None)
        layer.to("meta")
        if i % 4 == 3:
            give_back()
    logits: np.ndarray = model.head(x).numpy()
    del model, x
    checkpoint.release()
    give_back()
    return logits


def run_step(
    folder: Path,
    config: PARConfig,
    labels: np.ndarray,
    guidance: float | np.ndarray,
    teacher: np.ndarray | None,
    name: str | None = None,
    groups: int | None = None,
    pack: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """All calls of ``labels`` [B] on the step graph ``name`` (default: the newest that runs here).

    Returns tokens [B,N] and logits [B,N,V]. Greedy, except where ``teacher`` [B,N] is not negative: there it is fed
    instead. ``guidance`` of all, or [B]. ``groups`` stops after so many group calls; what follows is zero.
    ``pack`` is that of ``session``.
    """
    name = name or ("step" if runnable_opset() == OPSET else COMPATIBLE_STEP)
    images = len(labels)
    who = Images(np.broadcast_to(np.asarray(guidance, np.float32), images))
    rows = who.labels(labels, config.n_classes)
    driver = Driver(session(folder / f"{name}.onnx", pack), config, len(rows))
    fed = np.full((len(rows), config.n_tokens), -1, np.int64) if teacher is None else teacher[who.of_row]
    tokens = np.maximum(fed, 0)
    logits = np.zeros((images, config.n_tokens, config.vocab_size), np.float32)
    for phase in phases(config):
        for i in range(_calls(phase, groups)):
            start = phase.start + i * phase.query
            here = slice(start, start + phase.query)
            ids = input_ids(config, rows, tokens, start, phase.query)
            drawn, logits[:, here] = driver(ids, start, images, who.guidance)
            tokens[:, here] = np.where(fed[:, here] < 0, drawn, fed[:, here])
    del driver
    give_back()
    return tokens[:images], logits


def runnable_opset() -> int:
    """The highest of our opsets that this ONNX Runtime runs: before 1.25 (Python 3.10) it has no opset 24."""
    major, minor = ort.__version__.split(".")[:2]
    return OPSET if (int(major), int(minor)) >= (1, 25) else COMPATIBLE_OPSET


@dataclass(frozen=True)
class StandIn:
    """How to write the static graphs again, over the same weights, where this runtime cannot run their files."""

    weights: Weights
    compute: str
    opset: int


def _calls(phase: Phase, groups: int | None) -> int:
    return phase.repeat if groups is None or phase.name != "group" else min(phase.repeat, groups)


def run_static(
    folder: Path,
    config: PARConfig,
    label: int,
    teacher: np.ndarray,
    stand_in: StandIn | None,
) -> dict[str, np.ndarray]:
    """Logits [1,M,V] per phase of the static graphs, fed ``teacher`` [1,N]; the first ``SOME_GROUPS`` group calls."""
    labels = np.array([label])
    out: dict[str, np.ndarray] = {}
    driver: Driver | None = None
    file = ""
    for phase in phases(config):
        if not phase.repeat:
            continue
        wanted = "prefill" if phase.name == "sequential" else phase.name
        if wanted != file:
            file = wanted
            path = folder / f"{file}.onnx"
            if stand_in is not None:
                path = folder / f".verify-{file}.onnx"
                graph = step_graph(
                    config,
                    stand_in.weights,
                    name=file,
                    compute=stand_in.compute,
                    query=phase.query,
                    sampling="plain",
                    opset=stand_in.opset,
                )
                graph.save(path)
            caches = driver.caches if driver else None
            driver = None  # before the next session is made: each holds the weights
            give_back()
            driver = Driver(session(path), config, 1)
            driver.caches = caches or driver.caches
        assert driver is not None
        parts = []
        for i in range(_calls(phase, SOME_GROUPS)):
            start = phase.start + i * phase.query
            parts.append(driver(input_ids(config, labels, teacher, start, phase.query), start, 1, 1.0)[1])
        out[phase.name] = np.concatenate(parts, 1)
    del driver
    give_back()
    return out


def gate(
    folder: Path, config: PARConfig, checkpoint: Checkpoint, weights: Weights, *, guidance: float, seed: int = 0
) -> dict[str, Any]:
    """Compare every phase and a whole greedy image of the graphs in ``folder`` with the oracle.

    Returns the manifest's ``parity`` and ``selftest`` entries. Raises ParityError below the floor, and CheckpointError
    where the weights are not finite.
    """
    dtype = weights.entries["embed"].dtype
    # ONNX Runtime's CPU has no bf16 kernels: there the static graphs are checked in fp32, over the bf16 weights.
    static_compute = "float32" if dtype == "bfloat16" else dtype
    opset = runnable_opset()
    stand_in = None if (static_compute, opset) == (dtype, OPSET) else StandIn(weights, static_compute, opset)
    rng = np.random.default_rng(seed)
    # Image 0 is fed random tokens, unguided; the others are greedy and guided.
    greedy = np.arange(min(1 if parameters(checkpoint) > ONE_IMAGE_FROM else 2, config.n_classes))
    labels = np.concatenate([rng.integers(0, config.n_classes, 1), greedy])
    who = Images(np.array([1.0, *[guidance] * len(greedy)], np.float32))
    teacher = np.full((len(labels), config.n_tokens), -1)
    teacher[0] = rng.integers(0, config.vocab_size, config.n_tokens)

    pack = weights.path.stat().st_size > PACK_FROM_BYTES and fits(weights)
    try:
        tokens, got = run_step(folder, config, labels, who.guidance, teacher, pack=pack)
        sound = bool(np.isfinite(got).all())
    except Exception:  # a token drawn from NaN can be no code at all, which the next call refuses in its own words
        check_finite(checkpoint, dtype)
        raise
    if not sound:
        check_finite(checkpoint, dtype)
    _, compatible = run_step(folder, config, labels[:1], 1.0, teacher[:1], COMPATIBLE_STEP, SOME_GROUPS)
    static = run_static(folder, config, int(labels[0]), teacher[:1], stand_in)
    for path in folder.glob(".verify-*"):
        path.unlink()
    give_back()

    rows = who.labels(labels, config.n_classes)
    wanted = who.guided(oracle_logits(config, checkpoint, tokens[who.of_row], rows, dtype))
    scale = float(np.abs(wanted[0]).max()) or 1.0
    report: dict[str, Any] = {"logit_scale": scale, "static_compute": static_compute, "opset": opset, "phases": {}}
    for phase in phases(config):
        if phase.repeat:
            here = slice(phase.start, phase.start + phase.query * phase.repeat)
            report["phases"][phase.name] = _compare(
                f"step network, {phase.name}", got[:1, here], wanted[:1, here], scale, "float32"
            )
    some = sum(phase.query * _calls(phase, SOME_GROUPS) for phase in phases(config))  # positions that were run
    report[COMPATIBLE_STEP] = _compare(
        f"{COMPATIBLE_STEP}.onnx", compatible[:, :some], wanted[:1, :some], scale, "float32"
    )
    for phase in phases(config):
        if phase.repeat:
            part = static[phase.name]
            here = slice(phase.start, phase.start + part.shape[1])
            compared = _compare(f"{phase.name} (static graph)", part, wanted[:1, here], scale, static_compute)
            report["phases"][phase.name] |= {"static_" + key: value for key, value in compared.items()}
    margins, ties = compare_greedy(tokens[1:], wanted[1:])
    report["greedy"] = {"tokens": int(tokens[1:].size), "ties": ties, "smallest_margin": float(margins.min())}
    if dtype != "float32":
        report["rounding"] = _rounding(config, checkpoint, teacher[:1], labels[:1], wanted[:1], dtype)
    selftest = {"labels": greedy.tolist(), "guidance": guidance, "tokens": tokens[1:].tolist()}
    return {"parity": report, "selftest": selftest}


def fits(table: WeightTable) -> bool:
    """Whether memory allows a session that holds all weights in fp32."""
    return sum(4 * math.prod(stored.shape) for stored in table.entries.values()) + MARGIN_BYTES <= (
        available_bytes() or 0
    )


def parameters(checkpoint: Checkpoint) -> int:
    """How many numbers the checkpoint holds."""
    return sum(tensor.numel() for tensor in checkpoint.tensors.values())


def _rounding(
    config: PARConfig, checkpoint: Checkpoint, tokens: np.ndarray, labels: np.ndarray, rounded: np.ndarray, dtype: str
) -> dict[str, float]:
    """What rounding the weights to ``dtype`` costs: logits [1,N,V] of the file's own weights against ``rounded``."""
    if {tensor.dtype for tensor in checkpoint.tensors.values()} == {TORCH_TYPE[dtype]}:
        return {"max_logit_error": 0.0, "argmax_agreement": 1.0}
    exact = oracle_logits(config, checkpoint, tokens, labels, "float32")
    return {
        "max_logit_error": float(np.abs(exact - rounded).max()),
        "argmax_agreement": float((exact.argmax(-1) == rounded.argmax(-1)).mean()),
    }


def _compare(what: str, got: np.ndarray, wanted: np.ndarray, scale: float, compute: str) -> dict[str, float]:
    if compute != "float32" and np.isfinite(wanted).all() and not np.isfinite(got).all():
        raise ParityError(
            f"{what}: the model computes numbers beyond what {compute} can hold (its logits are not finite); give "
            "--precision bf16 or fp32. Nothing was published"
        )
    error = float(np.abs(got - wanted).max())
    if not error <= LOGIT_FLOOR[compute] * scale:
        raise ParityError(
            f"{what}: logits differ from the oracle by {error:.3g}; at most {LOGIT_FLOOR[compute] * scale:.3g} is allowed "
            f"({compute}, largest logit {scale:.3g}). Nothing was published; this is a bug in the export, please report it"
        )
    return {"max_logit_error": error, "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).mean())}


def compare_greedy(tokens: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, int]:
    """The graph's greedy ``tokens`` [B,N] against the oracle's ``logits`` [B,N,V] for them.

    Returns the oracle's margins [B,N] and how many tokens are ties. Raises ParityError where the oracle chooses another.
    """
    best = np.sort(np.partition(logits, -2, axis=-1)[..., -2:], axis=-1)
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    behind = best[..., 1] - chosen  # 0 where the oracle's argmax is the token
    allowed = TIE * max(1.0, float(np.abs(logits).max()))
    if not (behind <= allowed).all():
        image, position = np.argwhere(~(behind <= allowed))[0]
        raise ParityError(
            f"greedy tokens differ from the oracle first at image {image}, position {position}: the graph chose "
            f"{tokens[image, position]}, whose logit is {behind[image, position]:.3g} below the oracle's choice "
            f"{logits[image, position].argmax()}. Nothing was published; this is a bug in the export, please report it"
        )
    return best[..., 1] - best[..., 0], int((behind > 0).sum())


@torch.no_grad()
def gate_decoder(
    folder: Path, config: PARConfig, vq: VQConfig, checkpoint: Checkpoint, dtype: str, order: np.ndarray
) -> dict[str, Any]:
    """Compare ``decoder.onnx`` with the oracle's decoder on random tokens; largest allowed difference one grey level."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (1, config.n_tokens))
    with torch.device("meta"):
        model = VQModel(vq)
    model.load_state_dict(rounded(checkpoint, "", model.state_dict(), dtype), assign=True)
    # The graph stores the normalised codebook, rounded.
    raster = np.empty_like(tokens)
    raster[:, order] = tokens
    codebook = torch.nn.functional.normalize(checkpoint.tensor("quantize.embedding.weight").float(), dim=-1)
    codes = codebook.to(TORCH_TYPE[dtype]).float()[torch.from_numpy(raster.reshape(-1, *config.grid[1:]))]
    image = model.decode_codes(codes.permute(0, 3, 1, 2))
    wanted = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    got = session(folder / "decoder.onnx").run(["images"], {"tokens": tokens})[0]
    worst = int(np.abs(got.astype(int) - wanted.astype(int)).max())
    if worst > IMAGE_FLOOR:
        raise ParityError(
            f"decoder.onnx: pixels differ from the oracle by up to {worst} of 255; at most {IMAGE_FLOOR} is allowed. Nothing was published"
        )
    return {"max_pixel_error": worst, "equal_pixels": float((got == wanted).mean())}
