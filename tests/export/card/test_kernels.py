"""Every kernel against its float64 reference, on the stand-in; and wrong kernels, which are seen whatever they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double.driver import Driver
from double.fixtures import Make
from planted import one_by_default

from par_export.card import kernels as card
from par_export.card.samples import SAMPLES, Sample
from par_export.card.stand import Stand
from par_export.card.subject import kernels_of, programs
from par_export.kernels.sources import attention, decoder, decoder_attention, draw, step
from par_export.quantised import Codes
from par_model.config import PARConfig
from par_runtime.backends.program import Kernel


class Lines(list[dict[str, Any]]):
    """What a stage emits."""

    def __call__(self, kind: str, **fields: Any) -> None:
        self.append({"kind": kind} | fields)

    def failed(self) -> list[str]:
        return [line["name"] for line in self if line["kind"] == "check" and not line["passed"]]


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "AGAIN", 2)


def checked(pipeline: Any, calls: Sequence[int] | None = None) -> Lines:
    lines = Lines()
    for images in pipeline.backend.engine.images[::-1]:
        card._check_batch(Stand(pipeline, "cpu"), images, "t", lines, calls)
    return lines


def test_right_kernels_pass(load_kernels: Make) -> None:
    lines = checked(load_kernels(images=(2,), precision="fp16", decoder="fp16"))
    assert lines.failed() == []
    for line in lines:
        if line["kind"] == "check" and "allowed" in line:
            assert line["error"] < 0.5 * line["allowed"], line  # so that a floor is no excuse
    names = {line["name"].partition(" (")[0] for line in lines if line["kind"] == "check"}
    assert {"t: step.qkv", "t: draw.resident", "t: decoder.conv", "t: step in one go", "t: step's counters"} < names
    begun = [line["name"] for line in lines if line["kind"] == "begin"]
    assert begun[0] == "t: step.embed (batch 2, call 18)"
    assert begun[-1] == "t: step in one go (batch 2, call 0)"


def test_blocks_of_many_rows_are_right_too(load_kernels: Make, tiny: Path) -> None:
    """24 rows in two groups, panels in pairs: the squares of x are compared panel by panel."""
    pipeline = load_kernels(tiny.parent / "small", images=(1, 3), precision="fp16", decoder="fp16", many=True)
    lines = checked(pipeline, [11])
    assert lines.failed() == []
    names = [line["name"] for line in lines if line["kind"] == "check"]
    assert "t: step.residual (batch 3, call 11)" in names


def test_bf16_and_an_older_gpu(load_kernels: Make) -> None:
    pipeline = load_kernels(images=(1,), precision="bf16", decoder="fp32", target="SM80")
    lines = checked(pipeline, [11])
    assert lines.failed() == []
    assert "t: decoder.conv (batch 1)" in [line["name"] for line in lines]


@pytest.fixture(
    scope="module", params=[pytest.param(Codes("int8", 32), marks=pytest.mark.slow), Codes("int4", 64)], ids=str
)
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised bundle with heads of 20 in 24; of groups of 64 only wo and w2 have whole ones."""
    config = PARConfig(dim=160, n_layers=2, n_heads=8, vocab_size=64, n_classes=6, grid=(1, 8, 8))
    sample = Sample("codes", config, None, 4, codes=request.param)
    return sample.write(tmp_path_factory.mktemp("codes"))


@pytest.mark.slow
def test_right_kernels_of_quantised_weights_pass(load_kernels: Make, coded: Path) -> None:
    """With the padding of heads that a quantised wo takes, too; and of eight images, int4 in blocks of many rows."""
    pipeline = load_kernels(coded, images=(1, 8), precision="fp16")
    kernels = [dict(kernel.constants) for kernel in pipeline.backend.engine.kernels.kernels.values()]
    many = any(constants.get("PANELS") and constants["BITS"] for constants in kernels)
    assert many == (pipeline.bundle.weights["layers.0.w2"].dtype == "int4")
    kinds = {at.dtype for name, at in pipeline.bundle.weights.items() if name.startswith("layers.0.w")}
    assert kinds == ({"int8", "float16"} if pipeline.bundle.quantised == "int8" else {"int4", "float16"})
    lines = checked(pipeline, [11])
    assert lines.failed() == []
    measured = [line for line in lines if line["kind"] == "check" and "allowed" in line]
    assert {line["name"].partition(" (")[0] for line in measured} > {"t: step.qkv", "t: step.residual", "t: step.head"}
    assert all(line["error"] < 0.5 * line["allowed"] for line in measured)


@pytest.mark.slow
@pytest.mark.parametrize("coded", [Codes("int8", 32)], indirect=True)
def test_a_scale_that_is_packed_wrong_is_seen(load_kernels: Make, driver: Driver, coded: Path) -> None:
    pipeline = load_kernels(coded, images=(1,), precision="fp16")
    name = "layers.1.wo.scale"
    address, size = programs(pipeline)["step"].shared.addresses[name], kernels_of(pipeline).weights[name].bytes
    driver.span(address, size, "the test").view(np.float16)[:8] *= np.float16(1.05)
    assert "t: step.residual (batch 1, call 11)" in checked(pipeline, [11]).failed()


Wrong = Callable[[Driver, Kernel, Sequence[Any]], None]


def numbers(driver: Driver, kernel: Kernel, arguments: Sequence[Any], name: str, dtype: type, count: int) -> Any:
    at = [parameter for parameter, _ in kernel.parameters].index(name)
    return driver.span(int(arguments[at]), count * np.dtype(dtype).itemsize, "the test").view(dtype)


def slightly_off(driver: Driver, kernel: Kernel, arguments: Sequence[Any]) -> None:
    values = numbers(driver, kernel, arguments, "g", np.float16, 64)
    values[:] = values * np.float16(1.01)


def one_number_is_missing(driver: Driver, kernel: Kernel, arguments: Sequence[Any]) -> None:
    numbers(driver, kernel, arguments, "y", np.float16, 8)[3] = np.nan


def writes_a_seen_key(driver: Driver, kernel: Kernel, arguments: Sequence[Any]) -> None:
    numbers(driver, kernel, arguments, "past_k", np.float16, 1)[0] += np.float16(0.5)


def another_token(driver: Driver, kernel: Kernel, arguments: Sequence[Any]) -> None:
    tokens = numbers(driver, kernel, arguments, "tokens", np.int64, 1)
    tokens[0] = (tokens[0] + 17) % 64


def a_counter_is_left(driver: Driver, kernel: Kernel, arguments: Sequence[Any]) -> None:
    numbers(driver, kernel, arguments, "counters", np.int32, 1)[0] = 1


def grey(driver: Driver, kernel: Kernel, arguments: Sequence[Any]) -> None:
    if kernel.constants["PIXELS"]:
        numbers(driver, kernel, arguments, "out", np.uint8, 1)[0] ^= 8


def every_time_another(driver: Driver, kernel: Kernel, arguments: Sequence[Any]) -> None:
    """As by a race: numbers that are right up to rounding, and differ from run to run."""
    logits = numbers(driver, kernel, arguments, "logits", np.float32, 64)
    logits[:] += np.float32(1e-6) * len(driver.launches)


@pytest.mark.parametrize(
    ("source", "wrong", "seen"),
    one_by_default(
        [
            ("step.gates", slightly_off, "t: step.gates ("),
            ("attention.attend", one_number_is_missing, "t: attention.attend ("),
            ("step.qkv", writes_a_seen_key, "t: step.qkv ("),
            ("draw.resident", another_token, "t: draw.resident ("),
            ("step.residual", a_counter_is_left, "t: step's counters ("),
            ("decoder.conv", grey, "t: decoder.conv ("),
            ("step.head", every_time_another, "t: step in one go ("),
        ]
    ),
)
def test_a_wrong_kernel_is_seen(load_kernels: Make, driver: Driver, source: str, wrong: Wrong, seen: str) -> None:
    pipeline = load_kernels(images=(1,), precision="fp16", decoder="fp16")
    right = driver.twin
    assert right is not None

    class Planted:
        def __call__(self, kernel: Kernel, grid: tuple[int, int, int], arguments: list[Any], *more: Any) -> None:
            right(kernel, grid, arguments, *more)
            if kernel.source == source:
                wrong(driver, kernel, arguments)

        def done(self) -> None:
            right.done()

    pipeline.generate([0], seed=0)
    driver.twin = Planted()
    failed = checked(pipeline, [11]).failed()
    assert any(name.startswith(seen) for name in failed), failed


def test_every_kernel_of_the_sources_has_a_reference() -> None:
    """A kernel is what takes DEPENDENT and writes something that was given, and is no part of others."""
    found = set()
    for module in (step, attention, draw, decoder, decoder_attention):
        name = module.__name__.rpartition(".")[2]
        for function in vars(module).values():
            arguments = getattr(function, "arg_names", ())
            if "DEPENDENT" in arguments and len(arguments) > 4 and function.fn.__module__ == module.__name__:
                found |= {f"{name}.{function.fn.__name__}"} - {"decoder._normalised"}
    assert found == set(card.REFERENCES)


def test_samples_have_the_shapes_of_the_published_models() -> None:
    of = {sample.name: sample for sample in SAMPLES}
    assert (of["L-layer"].config.dim, of["3B-layer"].config.dim) == (1024, 3200)
    assert {sample.precision for sample in SAMPLES} == {"fp16", "bf16"}
    assert {sample.codes.dtype for sample in SAMPLES if sample.codes is not None} == {"int8", "int4"}
    assert {sample.n for sample in SAMPLES} == {1, 4, 9, 16}
    assert len({sample.name for sample in SAMPLES}) == len(SAMPLES)
