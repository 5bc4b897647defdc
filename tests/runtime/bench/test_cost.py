"""What a model costs, against the figures for the published models and against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from par_runtime.bundle import Bundle
from par_runtime.cost.architecture import NAMED, Architecture, named_architecture
from par_runtime.cost.bound import bound
from par_runtime.cost.data_sheets import DATA_SHEETS
from par_runtime.cost.decoder import count_decoder
from par_runtime.cost.work import decoder_work, image_work, phase_work


@pytest.mark.parametrize(
    ("name", "n", "wanted_ms"),
    [("PAR-L", 4, 52), ("PAR-XL", 4, 118), ("PAR-XXL", 4, 216), ("PAR-3B", 4, 460), ("PAR-3B", 16, 158)],
)
def test_the_bounds_of_published_models_on_an_a100(name: str, n: int, wanted_ms: float) -> None:
    """fp16, one guided image, 2.0 TB/s, heads as published (the padding of a 3B's is ours)."""
    architecture = named_architecture(name, n, pad_heads_to=1)
    assert bound(image_work(architecture, 1, True, 2, 2), 2000, None).ms == pytest.approx(wanted_ms, rel=0.03)


@pytest.mark.parametrize(
    ("name", "millions"), [("PAR-L", 325.1), ("PAR-XL", 752.4), ("PAR-XXL", 1384), ("PAR-3B", 3041)]
)
def test_the_weights_that_a_call_of_a_published_model_reads(name: str, millions: float) -> None:
    assert named_architecture(name, 4, pad_heads_to=1).step_parameters / 1e6 == pytest.approx(millions, rel=0.001)


@pytest.mark.parametrize(("n", "calls"), [(1, 576), (4, 147), (16, 51)])
def test_every_call_is_counted(n: int, calls: int) -> None:
    architecture = named_architecture("PAR-L", n)
    each = image_work(architecture, 1, True, 4, 4)
    assert len(each) == architecture.calls == calls
    assert architecture.n_tokens == 576
    # The last call sees all 576 keys of two rows: 24 layers, keys and values of 1024 numbers.
    cache = 2 * 576 * 2 * 24 * 1024 * 4
    assert each[-1].bytes == architecture.step_parameters * 4 + cache
    assert (
        sum(len(phase_work(architecture, p, 1, True, 4, 4)) for p in ("prefill", "sequential", "transition", "group"))
        == calls
    )


def test_guidance_doubles_rows_not_weights() -> None:
    architecture = named_architecture("PAR-L", 4)
    plain, guided = (image_work(architecture, 1, g, 4, 4)[-1] for g in (False, True))
    assert guided.operations == 2 * plain.operations
    assert guided.bytes - plain.bytes == plain.bytes - architecture.step_parameters * 4


def test_the_decoder_of_the_published_tokenizer_is_counted() -> None:
    """Parameters are exact; operations are those of its convolutions, and a few percent for its attention."""
    config = {
        "channels": 128,
        "channel_multipliers": [1, 1, 2, 2, 4],
        "codebook_dim": 8,
        "z_channels": 256,
        "res_blocks": 2,
    }
    parameters, operations = count_decoder(config, (1, 24, 24))
    assert parameters == 42_449_795 + 8 * 256 + 256  # the decoder and post_quant_conv
    last_level = 2 * 384 * 384 * 9 * 128 * 128 * 6  # three residual blocks of two convolutions at full size
    assert operations > last_level
    assert operations / 1e9 == pytest.approx(570, rel=0.01)
    assert (
        sum(
            call.operations
            for call in decoder_work(Architecture(8, 1, 1, 8, 8, 8, (), parameters, operations), 8, 4, 8)
        )
        == 8 * operations
    )


def test_a_bundles_decoder_is_counted_as_it_is_stored(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    stored = sum(
        int(np.prod(dims))
        for name, dims in _initializers(tiny / "decoder.onnx").items()
        if name.startswith("vq.") and not name.endswith("codebook")
    )
    assert Architecture.of(bundle).decoder_parameters == stored


def _initializers(path: Path) -> dict[str, list[int]]:
    import onnx  # noqa: TID251, what the graph holds is read with the tool that wrote it

    return {tensor.name: list(tensor.dims) for tensor in onnx.load(path, load_external_data=False).graph.initializer}


def test_the_known_gpus_and_models() -> None:
    assert set(DATA_SHEETS) == {"A100-40", "A100-80", "H100", "H200", "L4", "RTX 4090"}
    assert set(NAMED) == {"PAR-B", "PAR-L", "PAR-XL", "PAR-XXL", "PAR-3B"}
