"""The whole step, launch by launch, against the bundle's own graph on ONNX Runtime.

One test runs in Triton's interpreter, the others in the stand-in GPU's language, which is faster and checks accesses.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from kernel_arrays import empty, wide
from programs import Host, memory

from conftest import golden_weights
from par_export.gate.runner import runnable_opset
from par_export.kernels.contents import Contents
from par_export.kernels.plan_step import plan
from par_export.kernels.step_weights import storages
from par_export.kernels.targets import TARGETS, Target
from par_export.kernels.tiles import MOST_HELD_BYTES, choose
from par_runtime.backends.draws import distance_of
from par_runtime.backends.program import Pointer
from par_runtime.bundle import Bundle, image_calls
from par_runtime.dtypes import LOGIT_ROUNDING

SETTINGS: dict[str, Any] = {
    "guidance": ("f4", [1.5, 3.0, 1.0]), "temperature": ("f4", [1.0, 0.7, 1.3]), "top_k": ("i8", [0, 20, 1]),
    "top_p": ("f4", [1.0, 0.9, 1.0]),
}  # fmt: skip


class Both:
    """A bundle's step by our kernels and by ONNX Runtime, with a cache each, for ``images`` of a profile."""

    def __init__(
        self, path: Path, images: int, precision: str, card: Target = TARGETS["SM90"], quick: bool = True
    ) -> None:
        self.bundle = Bundle.open(path)
        contents = Contents(self.bundle, precision, "fp32")
        config = contents.config
        phases = [phase.name for phase in self.bundle.phases]
        tiles = choose(config, (images,), card, storages=storages(contents.step))
        self.planned = plan(config, contents.step, contents.read, phases, (images,), precision, card, tiles)
        self.host = Host(self.planned, path, triton=not quick)
        self.images, self.rows, self.query = images, 2 * images, self.bundle.group_size
        self.precision = precision
        heads, size, slots = self.bundle.cache.heads, self.bundle.cache.head_dim, self.bundle.n_tokens
        shape = (self.rows, heads, slots, size)
        self.past = {name: empty(shape, precision) for name in self.bundle.cache.inputs}  # never written: NaN
        self.reference = {name: np.zeros(shape, np.float32) for name in self.bundle.cache.inputs}
        state = self.planned.programs["step"].state["counters"][1]
        self.counters = np.zeros(state, np.uint8)
        graph = self.bundle.graphs["step" if runnable_opset() >= 24 else "step_opset23"]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Without this, products of quantised weights round their activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(path / graph.file, options, providers=["CPUExecutionProvider"])

    def call(self, inputs: dict[str, np.ndarray], real: int, shuffle: int | None = None) -> tuple[np.ndarray, ...]:
        """One call: our tokens [R, q] and logits [B, q, V], and those of ONNX Runtime, of the ``real`` positions."""
        bound = dict(inputs) | self.past | {"counters": self.counters}
        bound["length"] = inputs["length"].astype(np.int32)
        tokens = memory(self.rows * self.query * 8)
        logits = memory(self.images * self.query * self.bundle.vocab_size * 4)
        bound |= {"tokens": tokens, "logits": logits}
        self.host.run("step", self.images, bound, shuffle)
        assert (self.counters == 0).all()
        feed = {name: value for name, value in inputs.items() if name != "image"}
        for name in ("ids", "positions", "uniform"):
            feed[name] = np.ascontiguousarray(inputs[name][:, :real])
        outputs = [out.name for out in self.session.get_outputs()]
        got = dict(zip(outputs, self.session.run(outputs, feed | self.reference), strict=True))
        for past, present in zip(self.bundle.cache.inputs, self.bundle.cache.outputs, strict=True):
            self.reference[past] = got[present]
        return (
            tokens.view(np.int64).reshape(self.rows, self.query)[:, :real],
            logits.view(np.float32).reshape(self.images, self.query, -1)[:, :real],
            got["tokens"],
            got["logits"],
        )

    def check(self, inputs: dict[str, np.ndarray], real: int, shuffle: int | None = None) -> np.ndarray:
        """One call, compared: logits within the rounding of the precision, tokens within what that explains."""
        tokens, logits, _, wanted = self.call(inputs, real, shuffle)
        assert np.isfinite(logits).all()
        assert np.abs(logits - wanted).max() < LOGIT_ROUNDING[self.precision] / 5 * np.abs(wanted).max()
        for b in range(self.images):
            rows = np.flatnonzero(inputs["image"] == b)
            assert (tokens[rows] == tokens[rows[0]]).all()
            settings = [inputs[name][b].item() for name in ("temperature", "top_k", "top_p")]
            for j in range(real):
                token, u = int(tokens[rows[0], j]), float(inputs["uniform"][b, j])
                distance, explained = distance_of(wanted[b, j], logits[b, j], token, u, *settings)
                assert distance is not None
                assert distance <= explained
        return tokens

    def inputs(self, ids: np.ndarray, write: np.ndarray, real: int, seed: int) -> dict[str, np.ndarray]:
        """The tensors of a call in which row r begins at ``write[r]`` and sees ``real`` new positions."""
        rng = np.random.default_rng(seed)
        padded = np.zeros((self.rows, self.query), np.int64)
        padded[:, :real] = ids
        b = self.images
        rows = rng.permutation(self.rows) if b > 1 else np.arange(2)
        image = np.zeros(self.rows, np.int64)
        image[rows[:b]], image[rows[b:]] = np.arange(b), np.arange(b)
        return {
            "ids": padded,
            "positions": write[:, None] + np.arange(self.query),
            "write": write.astype(np.int64),
            "length": (write + real).astype(np.int64),
            "image": image,
            "cond_row": rows[:b].astype(np.int64),
            "uncond_row": rows[b:].astype(np.int64),
            "uniform": rng.random((b, self.query), dtype=np.float32),
            **{name: np.array(values[:b], dtype) for name, (dtype, values) in SETTINGS.items()},
        }


@pytest.mark.parametrize(("name", "precision"), [("tiny", "fp16"), ("tiny", "bf16"), ("n1", "fp16"), ("n16", "fp16")])
def test_the_calls_of_an_image(name: str, precision: str, tiny: Path, request: pytest.FixtureRequest) -> None:
    """Prefill, sequential calls (padded where a group has more positions), transition and groups, fed with tokens."""
    both = Both(tiny if name == "tiny" else request.getfixturevalue("bundles")[name], 1, precision)
    bundle = both.bundle
    calls = image_calls(bundle.phases)
    tokens = np.empty((2, 0), np.int64)
    for i, call in enumerate(calls[: max(bundle.group_size, 4) + 2 if name == "tiny" else 4]):
        fed = len(call.phase.token_slots)
        ids = np.tile([entry if isinstance(entry, int) else 0 for entry in call.phase.inputs], (2, 1))
        if call.phase.inputs[0] == "class":
            ids[:, 0] = bundle.class_base + 2, bundle.no_class
        ids[:, call.phase.token_slots] = tokens[:, tokens.shape[1] - fed :]
        new = both.check(both.inputs(ids, np.full(2, call.write), call.query, i), call.query)
        tokens = np.concatenate([tokens, new], 1)


@pytest.mark.slow
def test_rows_at_different_positions_and_batches(tiny: Path) -> None:
    """Three images, each at another place; blocks in any order; the same call twice gives the same bits."""
    both = Both(tiny, 3, "fp16", TARGETS["SM80"], quick=False)
    rng = np.random.default_rng(0)
    starts = np.array([0, 4, 12, 0, 4, 12])
    for first in range(0, 16, 4):  # the keys before, of each row as far as it needs them
        ids = rng.integers(0, 64, (6, 4))
        write = np.minimum(first, starts)
        both.call(both.inputs(ids, write, 4, first), 4)
    inputs = both.inputs(rng.integers(0, 64, (6, 4)), starts, 4, 99)
    one = both.call(inputs, 4)
    both.check(inputs, 4, shuffle=3)
    two = both.call(inputs, 4, shuffle=5)
    assert one[0].tobytes() == two[0].tobytes()
    assert one[1].tobytes() == two[1].tobytes()


def test_weights_and_keys_that_are_held_give_the_same_call(bundles: dict[str, Path]) -> None:
    """And kernels that are launched at once are no others: the same sums, but for how numpy adds up longer rows."""
    card = replace(TARGETS["SM90"], held_bytes=MOST_HELD_BYTES, held_keys=True, at_once=True)
    plain, holds = (Both(bundles["n16"], 1, "fp16", each) for each in (TARGETS["SM90"], card))
    held = [dict(s.constants).get("HELD", 0) for s in holds.planned.specs.values() if s.source != "attention.attend"]
    keys = [dict(s.constants)["HELD"] for s in holds.planned.specs.values() if s.source == "attention.attend"]
    early = {dict(spec.constants).get("EARLY") for spec in holds.planned.specs.values()}
    assert sum(count > 0 for count in held) >= 4
    assert keys == [64]
    assert early == {True, None}
    ids = np.array([[plain.bundle.class_base], [plain.bundle.no_class]])
    inputs = plain.inputs(ids, np.zeros(2, np.int64), 1, 0)
    holds.check(inputs, 1)
    one, other = (both.call(inputs, 1)[1] for both in (plain, holds))
    assert np.abs(one - other).max() < 2e-3 * np.abs(one).max()


def test_a_row_does_not_depend_on_its_batch(tiny: Path) -> None:
    """One image alone and as one of three: the same logits up to the sums of numpy, whose order depends on shapes."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 64, (6, 4))
    small, large = Both(tiny, 1, "fp16"), Both(tiny, 3, "fp16")
    of_large = large.inputs(ids, np.zeros(6, np.int64), 4, 7)
    pair = [int(of_large["cond_row"][0]), int(of_large["uncond_row"][0])]
    of_small = small.inputs(ids[pair], np.zeros(2, np.int64), 4, 7)
    one, three = small.call(of_small, 4)[1], large.call(of_large, 4)[1]
    assert np.abs(one[0] - three[0]).max() < 2e-3 * np.abs(one).max()


def test_the_launches_of_a_step(tiny: Path) -> None:
    """At most five a layer and six around; every pointer is an input, an output, scratch, state or a weight."""
    both = Both(tiny, 3, "fp16")
    program = both.planned.programs["step"]
    profile = program.profiles[3]
    assert len(profile.layer) == 5
    assert len(profile.before) + len(profile.after) == 3
    known = {*both.past, *profile.scratch, *program.state, *both.planned.weights}
    known |= {*both.inputs(np.zeros((6, 1), int), np.zeros(6, int), 1, 0), "tokens", "logits"}
    for launch, layer in program.launches(3):
        kinds = dict(both.planned.specs[launch.kernel].parameters)
        for argument, (name, kind) in zip(launch.arguments, kinds.items(), strict=True):
            assert isinstance(argument, Pointer) == kind.startswith("*"), name
            if isinstance(argument, Pointer):
                assert argument.of_layer(layer)[0] in known
                assert argument.of_layer(layer)[1] % 16 == 0
    places = sorted(profile.scratch.values())
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_a_bundle_in_another_precision(stored: str, bundles: dict[str, Path]) -> None:
    """Weights stored in fp32 or bf16 are packed into fp16, the tables read as they are."""
    both = Both(bundles[stored], 1, "fp16")
    ids = np.array([[both.bundle.class_base], [both.bundle.no_class]])
    both.check(both.inputs(ids, np.zeros(2, np.int64), 1, 0), 1)
    assert np.isfinite(wide(both.past["past_k.0"][:, :, :1])).all()


@pytest.mark.parametrize(
    ("dim", "heads", "size", "query", "vocab"),
    [(40, 2, 6, 9, 100), (12, 1, 4, 4, 33), (200, 2, 4, 1, 70)],
    ids=lambda value: str(value),
)
def test_sizes_that_fit_nothing(dim: int, heads: int, size: int, query: int, vocab: int, tmp_path: Path) -> None:
    """Heads of 20, 12 and 100 numbers, which the caches pad; groups of nine; codes that no tile divides."""
    import torch

    from par_export.bundle import ExportRequest, export
    from par_model.config import PARConfig
    from par_model.transformer import PAR

    config = PARConfig(
        dim=dim, n_layers=2, n_heads=heads, vocab_size=vocab, n_classes=3, grid=(1, size, size), group_size=query
    )
    torch.save(golden_weights(PAR(config)).state_dict(), tmp_path / "c.pt")
    made = ExportRequest(tmp_path / "c.pt", None, tmp_path / "bundle", "fp16", heads=heads, grid=(1, size, size))
    both = Both(export(made, say=lambda _: None), 2, "fp16")
    rng = np.random.default_rng(0)
    for write, real in ((0, 1), (1, query), (1 + query, query)):  # unwritten slots hold NaN until then
        ids = rng.integers(0, vocab, (4, real))
        both.check(both.inputs(ids, np.full(4, write), real, write), real, shuffle=write)
