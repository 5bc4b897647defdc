"""The least time that hardware allows: against the figures of the specification, and against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from par_runtime.bench.limits import Limits, matrix_tflop_s, measure_cpu, read_gb_s, sizes
from par_runtime.bench.subjects.base import Shape
from par_runtime.bundle import Bundle
from par_runtime.cost.bound import (
    DATA_SHEETS,
    NAMED,
    all_calls,
    bound,
    decoder_calls,
    named_shape,
    phase_calls,
    step_parameters,
)
from par_runtime.cost.decoder import decoder_work
from par_runtime.errors import RequestError


@pytest.mark.parametrize(
    ("name", "n", "wanted_ms"),
    [("PAR-L", 4, 52), ("PAR-XL", 4, 118), ("PAR-XXL", 4, 216), ("PAR-3B", 4, 460), ("PAR-3B", 16, 158)],
)
def test_an_a100s_bound_is_the_specifications(name: str, n: int, wanted_ms: float) -> None:
    """fp16, one guided image, 2.0 TB/s, heads as published (the padding of a 3B's is ours)."""
    shape = named_shape(name, n, pad_heads_to=1)
    assert bound(all_calls(shape, 1, True, 2, 2), 2000, None).ms == pytest.approx(wanted_ms, rel=0.03)


@pytest.mark.parametrize(
    ("name", "millions"), [("PAR-L", 325.1), ("PAR-XL", 752.4), ("PAR-XXL", 1384), ("PAR-3B", 3041)]
)
def test_weights_read_per_step_are_the_specifications(name: str, millions: float) -> None:
    assert step_parameters(named_shape(name, 4, pad_heads_to=1)) / 1e6 == pytest.approx(millions, rel=0.001)


@pytest.mark.parametrize(("n", "calls"), [(1, 576), (4, 147), (16, 51)])
def test_every_call_is_counted(n: int, calls: int) -> None:
    shape = named_shape("PAR-L", n)
    each = all_calls(shape, 1, True, 4, 4)
    assert len(each) == shape.calls == calls
    assert shape.n_tokens == 576
    # The last call sees all 576 keys of two rows: 24 layers, keys and values of 1024 numbers.
    cache = 2 * 576 * 2 * 24 * 1024 * 4
    assert each[-1].bytes == step_parameters(shape) * 4 + cache
    assert (
        sum(len(phase_calls(shape, p, 1, True, 4, 4)) for p in ("prefill", "sequential", "transition", "group"))
        == calls
    )


def test_guidance_doubles_rows_not_weights() -> None:
    shape = named_shape("PAR-L", 4)
    plain, guided = (all_calls(shape, 1, g, 4, 4)[-1] for g in (False, True))
    assert guided.operations == 2 * plain.operations
    assert guided.bytes - plain.bytes == plain.bytes - step_parameters(shape) * 4


def test_vq16s_decoder_is_counted() -> None:
    """Parameters are the specification's; operations are those of its convolutions, within the attention's share."""
    config = {
        "channels": 128,
        "channel_multipliers": [1, 1, 2, 2, 4],
        "codebook_dim": 8,
        "z_channels": 256,
        "res_blocks": 2,
    }
    parameters, operations = decoder_work(config, (1, 24, 24))
    assert parameters == 42_449_795 + 8 * 256 + 256  # the decoder and post_quant_conv
    last_level = 2 * 384 * 384 * 9 * 128 * 128 * 6  # three residual blocks of two convolutions at full size
    assert operations > last_level
    assert operations / 1e9 == pytest.approx(570, rel=0.01)
    assert (
        sum(call.operations for call in decoder_calls(Shape(8, 1, 1, 8, 8, 8, (), parameters, operations), 8, 4, 8))
        == 8 * operations
    )


def test_the_demos_decoder_is_counted_as_it_is_stored(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    stored = sum(
        int(np.prod(dims))
        for name, dims in _initializers(tiny / "decoder.onnx").items()
        if name.startswith("vq.") and not name.endswith("codebook")
    )
    assert Shape.of(bundle).decoder_parameters == stored


def _initializers(path: Path) -> dict[str, list[int]]:
    import onnx  # noqa: TID251, what the graph holds is read with the tool that wrote it

    return {tensor.name: list(tensor.dims) for tensor in onnx.load(path, load_external_data=False).graph.initializer}


def test_data_sheets_and_names_are_those_of_the_issue() -> None:
    assert set(DATA_SHEETS) == {"A100-40", "A100-80", "H100", "H200", "L4", "RTX 4090"}
    assert set(NAMED) == {"PAR-B", "PAR-L", "PAR-XL", "PAR-XXL", "PAR-3B"}


def test_limits_are_measured_here() -> None:
    found = measure_cpu(1, [2**22])
    assert 0.1 < found.reads[0][1] < 2000  # GB/s of any machine
    assert 0.0005 < found.matrix_tflop_s < 50
    assert "1 thread read arrays up to 4 MB" in found.how
    # Each thread has a part of its own: two together read the whole array, and multiply twice as much.
    assert read_gb_s(2, 2**22) > 0
    assert matrix_tflop_s(2, 64) > 0


def test_a_limit_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"limits could not be measured \(.+\); --no-limits leaves them out") as told:
        measure_cpu(1, [-5])
    assert "\n" not in str(told.value)


def test_sizes_hold_each_working_set_and_one_that_no_cache_holds() -> None:
    assert sizes([5 * 2**20, 3], 2**25, 2**35) == [2**22, 2**23, 2**28]
    assert sizes([2**31], 2**29, None) == [2**30]
    assert sizes([2**20], 2**25, 2**28) == [2**22, 2**25]  # an eighth of what is free


def test_the_better_of_two_measurements() -> None:
    a, b = Limits(((1, 5.0), (9, 2.0)), 1.0, "a"), Limits(((1, 4.0), (9, 3.0)), 2.0, "b")
    assert a.better(b) == Limits(((1, 5.0), (9, 3.0)), 2.0, "a")
    assert [a.read_gb_s(size) for size in (1, 2, 9, 100)] == [5.0, 2.0, 2.0, 2.0]
