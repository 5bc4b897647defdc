"""The parity gate: the exported graphs on ONNX Runtime against the PyTorch oracle. Nothing is published below the floor.

The oracle is fed layer by layer from the checkpoint, so a 3B model is compared without being in memory whole, and
with its weights rounded to the bundle's precision, so the comparison is tight in every precision: what is tested
is the graph. (The effect of the rounding itself is measured beside it, and written into the manifest.)

Greedy parity costs one teacher-forced pass: generate greedily on the graph, feed the oracle these tokens; if its
argmax agrees at every position then, by induction, it would have generated the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from par_export.graph import COMPATIBLE_OPSET, OPSET, WEIGHTS_FILE
from par_export.memory import give_back
from par_export.step import padded_head_dim, step_graph
from par_export.weights import TORCH_TYPE, Weights
from par_model.checkpoint import Checkpoint
from par_model.config import PARConfig, VQConfig
from par_model.ordering import LEARNABLE, TOKEN, Phase, input_kinds, phases
from par_model.transformer import PAR
from par_model.vq import VQModel

#: Largest allowed |logit error| relative to the largest |logit|, by what the graph computes in.
LOGIT_FLOOR = {"float32": 2e-5, "float16": 2e-2}
#: Two candidates closer than this (relative to the largest |logit|) may swap by rounding; counted, not refused.
TIE = 2e-5
IMAGE_FLOOR = 1  # grey levels of 255
#: The step network for ONNX Runtime releases without opset 24; the same function, checked like the other.
COMPATIBLE_STEP = "step_opset23"
FOLD_LIMIT_BYTES = 64 * 2**20
SOME_GROUPS = 3  # group calls that are compared of all graphs but the main one, which is compared whole


class ParityError(Exception):
    """The exported graphs do not compute what the model computes; nothing was published."""


@dataclass
class Driver:
    """The smallest possible runner of a step graph: numpy in and out, one cache that is input and output."""

    session: ort.InferenceSession
    config: PARConfig
    rows: int

    def __post_init__(self) -> None:
        c = self.config
        kinds = {i.name: i for i in self.session.get_inputs()}
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[kinds["past_k.0"].type]
        self._static = "image" in kinds  # static graphs differ in two inputs, see step.io_table
        self._length_dtype = np.int32 if self._static else np.int64
        shape = (self.rows, c.n_heads, c.n_tokens, padded_head_dim(c))
        self.caches = {name: np.zeros(shape, dtype) for name in kinds if name.startswith("past_")}

    def __call__(
        self, ids: np.ndarray, start: int, images: int, guidance: float, greedy: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """One call: ``ids`` [R,q] at positions start.. ; returns tokens [R,q] and logits [B,q,V]."""
        rows, query = ids.shape
        cond = np.arange(images)
        feed: dict[str, np.ndarray] = {
            "ids": ids,
            "positions": np.tile(np.arange(start, start + query), (rows, 1)),
            "write": np.full(rows, start),
            "length": np.full(rows, start + query, self._length_dtype),
            "image": np.tile(cond, rows // images),
            "cond_row": cond,
            "uncond_row": cond + images if rows > images else cond,
            "uniform": np.zeros((images, query), np.float32),
            "guidance": np.full(images, guidance, np.float32),
            "temperature": np.ones(images, np.float32),
            "top_k": np.full(images, 1 if greedy else 0),
            "top_p": np.ones(images, np.float32),
        }
        if not self._static:
            del feed["image"]
        binding = self.session.io_binding()
        for name, array in (feed | self.caches).items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in self.caches.items():
            present = name.replace("past_", "present_")
            binding.bind_output(present, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output("tokens")
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        tokens, logits = (value.numpy() for value in binding.get_outputs()[-2:])
        return tokens, logits


def input_ids(config: PARConfig, labels: np.ndarray, tokens: np.ndarray, start: int, query: int) -> np.ndarray:
    """Ids [R,q] of the embedding table at input positions start.. for ``labels`` [R] and ``tokens`` [R,N]."""
    kind, index = input_kinds(config)
    columns = []
    for p in range(start, start + query):
        if kind[p] == TOKEN:
            columns.append(tokens[:, index[p]])
        elif kind[p] == LEARNABLE:
            columns.append(np.full(len(labels), config.vocab_size + config.n_classes + 1 + index[p]))
        else:
            columns.append(config.vocab_size + labels)
    return np.stack(columns, 1).astype(np.int64)


def session(path: Path) -> ort.InferenceSession:
    """A CPU session that holds the weights once: slower than the runtime's, which may hold them twice.

    No pre-packing; and where weights are stored in half precision and are large, their cast to fp32 is not folded,
    which would hold both forms while the session is made.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 3
    data = path.parent / WEIGHTS_FILE
    large = data.is_file() and data.stat().st_size > FOLD_LIMIT_BYTES
    disabled = ["ConstantFolding"] if large else None
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)


@torch.no_grad()
def oracle_logits(
    config: PARConfig, checkpoint: Checkpoint, tokens: np.ndarray, labels: np.ndarray, dtype: str
) -> np.ndarray:
    """Teacher-forced logits [R,N,V] fp32 of the oracle, weights rounded to ``dtype``, one layer in memory at a time."""

    def load(module: torch.nn.Module, prefix: str) -> None:
        state = {key: checkpoint.tensor(prefix + key).to(TORCH_TYPE[dtype]).float() for key in module.state_dict()}
        module.load_state_dict(state, assign=True)

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
    guidance: float,
    teacher: np.ndarray | None,
    name: str | None = None,
    groups: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """All calls of one image on the step graph ``name`` (default: the newest that runs here).

    Returns tokens [B,N] and logits [B,N,V]; greedy, or fed ``teacher`` [B,N]. ``groups`` stops after so many group
    calls; what follows is zero.
    """
    name = name or ("step" if runnable_opset() == OPSET else COMPATIBLE_STEP)
    images = len(labels)
    rows = np.concatenate([labels, np.full_like(labels, config.n_classes)]) if guidance > 1 else labels
    driver = Driver(session(folder / f"{name}.onnx"), config, len(rows))
    repeat = len(rows) // images
    tokens = np.zeros((len(rows), config.n_tokens), np.int64) if teacher is None else np.tile(teacher, (repeat, 1))
    logits = np.zeros((images, config.n_tokens, config.vocab_size), np.float32)
    for phase in phases(config):
        for i in range(_calls(phase, groups)):
            start = phase.start + i * phase.query
            here = slice(start, start + phase.query)
            drawn, logits[:, here] = driver(
                input_ids(config, rows, tokens, start, phase.query), start, images, guidance
            )
            if teacher is None:
                tokens[:, here] = drawn
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
    folder: Path, config: PARConfig, label: int, teacher: np.ndarray, stand_in: StandIn | None
) -> dict[str, np.ndarray]:
    """Logits [1,M,V] per phase of the static graphs, fed ``teacher`` [1,N]; the first ``SOME_GROUPS`` group calls."""
    labels = np.array([label])
    out: dict[str, np.ndarray] = {}
    caches: dict[str, np.ndarray] | None = None
    for phase in phases(config):
        if not phase.repeat:
            continue
        file = "prefill" if phase.name == "sequential" else phase.name
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
        driver = Driver(session(path), config, 1)
        if caches:
            driver.caches = caches
        parts = []
        for i in range(_calls(phase, SOME_GROUPS)):
            start = phase.start + i * phase.query
            parts.append(driver(input_ids(config, labels, teacher, start, phase.query), start, 1, 1.0)[1])
        caches = driver.caches
        del driver  # before the next session is made: each holds the weights
        give_back()
        out[phase.name] = np.concatenate(parts, 1)
    return out


def gate(
    folder: Path, config: PARConfig, checkpoint: Checkpoint, weights: Weights, *, guidance: float, seed: int = 0
) -> dict[str, Any]:
    """Compare every phase and a whole greedy image of the graphs in ``folder`` with the oracle.

    Returns the manifest's ``parity`` and ``selftest`` entries. Raises ParityError below the floor.
    """
    dtype = weights.entries["embed"].dtype
    # ONNX Runtime's CPU has no bf16 kernels: there the static graphs are checked in fp32, over the bf16 weights.
    static_compute = "float32" if dtype == "bfloat16" else dtype
    rng = np.random.default_rng(seed)
    teacher_label = rng.integers(0, config.n_classes, 1)
    teacher = rng.integers(0, config.vocab_size, (1, config.n_tokens))
    wanted = oracle_logits(config, checkpoint, teacher, teacher_label, dtype)
    opset = runnable_opset()
    stand_in = None if (static_compute, opset) == (dtype, OPSET) else StandIn(weights, static_compute, opset)
    _, got = run_step(folder, config, teacher_label, 1.0, teacher)
    scale = float(np.abs(wanted).max()) or 1.0
    report: dict[str, Any] = {"logit_scale": scale, "static_compute": static_compute, "opset": opset, "phases": {}}
    for phase in phases(config):
        if phase.repeat:
            here = slice(phase.start, phase.start + phase.query * phase.repeat)
            report["phases"][phase.name] = _compare(
                f"step network, {phase.name}", got[:, here], wanted[:, here], scale, "float32"
            )
    _, compatible = run_step(folder, config, teacher_label, 1.0, teacher, COMPATIBLE_STEP, SOME_GROUPS)
    some = sum(phase.query * _calls(phase, SOME_GROUPS) for phase in phases(config))  # positions that were run
    report[COMPATIBLE_STEP] = _compare(
        f"{COMPATIBLE_STEP}.onnx", compatible[:, :some], wanted[:, :some], scale, "float32"
    )
    static = run_static(folder, config, int(teacher_label[0]), teacher, stand_in)
    for phase in phases(config):
        if phase.repeat:
            part = static[phase.name]
            here = slice(phase.start, phase.start + part.shape[1])
            report["phases"][phase.name] |= {
                "static_" + k: v
                for k, v in _compare(
                    f"{phase.name} (static graph)", part, wanted[:, here], scale, static_compute
                ).items()
            }
    for path in folder.glob(".verify-*.onnx"):
        path.unlink()
    labels = np.arange(min(2, config.n_classes))
    tokens, margins, ties = _greedy(folder, config, checkpoint, dtype, labels, guidance)
    report["greedy"] = {"tokens": int(tokens.size), "ties": ties, "smallest_margin": float(margins.min())}
    if dtype != "float32":
        exact = oracle_logits(config, checkpoint, teacher, teacher_label, "float32")
        report["rounding"] = {
            "max_logit_error": float(np.abs(exact - wanted).max()),
            "argmax_agreement": float((exact.argmax(-1) == wanted.argmax(-1)).mean()),
        }
    return {"parity": report, "selftest": {"labels": labels.tolist(), "guidance": guidance, "tokens": tokens.tolist()}}


def _compare(what: str, got: np.ndarray, wanted: np.ndarray, scale: float, compute: str) -> dict[str, float]:
    error = float(np.abs(got - wanted).max())
    if not error <= LOGIT_FLOOR[compute] * scale:
        raise ParityError(
            f"{what}: logits differ from the oracle by {error:.3g}; at most {LOGIT_FLOOR[compute] * scale:.3g} is allowed "
            f"({compute}, largest logit {scale:.3g}). Nothing was published; this is a bug in the export, please report it"
        )
    return {"max_logit_error": error, "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).mean())}


def _greedy(
    folder: Path, config: PARConfig, checkpoint: Checkpoint, dtype: str, labels: np.ndarray, guidance: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Greedy tokens [B,N] of the graph, the oracle's margins [B,N] for them, and how many are ties."""
    tokens, _ = run_step(folder, config, labels, guidance, None)
    rows = np.concatenate([labels, np.full_like(labels, config.n_classes)])
    logits = oracle_logits(config, checkpoint, np.tile(tokens, (2, 1)), rows, dtype)
    cond, uncond = np.split(logits, 2)
    logits = uncond + (cond - uncond) * np.float32(guidance) if guidance > 1 else cond
    best = np.sort(np.partition(logits, -2, axis=-1)[..., -2:], axis=-1)
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    behind = best[..., 1] - chosen  # 0 where the oracle's argmax is the token
    allowed = TIE * max(1.0, float(np.abs(logits).max()))
    if (behind > allowed).any():
        image, position = np.argwhere(behind > allowed)[0]
        raise ParityError(
            f"greedy tokens differ from the oracle first at image {image}, position {position}: the graph chose "
            f"{tokens[image, position]}, whose logit is {behind[image, position]:.3g} below the oracle's choice "
            f"{logits[image, position].argmax()}. Nothing was published; this is a bug in the export, please report it"
        )
    return tokens, best[..., 1] - best[..., 0], int((behind > 0).sum())


@torch.no_grad()
def gate_decoder(
    folder: Path, config: PARConfig, vq: VQConfig, checkpoint: Checkpoint, dtype: str, order: np.ndarray
) -> dict[str, Any]:
    """Compare ``decoder.onnx`` with the oracle's decoder on random tokens; largest allowed difference one grey level."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, (1, config.n_tokens))
    with torch.device("meta"):
        model = VQModel(vq)
    keys = model.state_dict()
    model.load_state_dict({key: checkpoint.tensor(key).to(TORCH_TYPE[dtype]).float() for key in keys}, assign=True)
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
