"""The whole decoder by its plan: the launches that an engine would make, on host memory, against the graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from programs import Host

from par_export.engines.contents import decoder_weights, step_config, tokenizer_config
from par_export.errors import BuildError
from par_export.graphs.vq import PREFIX
from par_export.kernels import plan_decoder
from par_export.kernels.compiler import Compiler
from par_export.kernels.decoder_tiles import NUMBER_BYTES
from par_export.kernels.spec import Planned, Spec
from par_export.kernels.targets import TARGETS, Target
from par_model.config import PARConfig, VQConfig, named
from par_model.ordering import token_order
from par_model.vq import VQModel
from par_runtime.backends.program import MOST_GRID, Pointer
from par_runtime.bundle import WEIGHTS, Bundle, Stored
from par_runtime.errors import BundleError

SM80, SM90 = TARGETS["SM80"], TARGETS["SM90"]
VQ16, PAR_L = VQConfig(), named("L")


def planned_for(bundle: Path, images: tuple[int, ...], precision: str, **others: Any) -> Planned:
    opened = Bundle.open(bundle)
    vq = tokenizer_config(opened)
    entries = decoder_weights(opened, vq).entries
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in entries.items() if name.startswith(PREFIX)}
    return plan_decoder.plan(vq, step_config(opened), stored, images, precision, SM90, **others)


def decoded(
    planned: Planned, bundle: Path, tokens: np.ndarray, side: int, shuffle: int | None = None, triton: bool = False
) -> np.ndarray:
    images = np.full((len(tokens), side, side, 3), 9, np.uint8)
    Host(planned, bundle, triton).run("decoder", len(tokens), {"tokens": tokens, "images": images}, shuffle)
    return images


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 1e-6)))


@pytest.fixture(scope="module")
def expected(tiny: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of three images, and the images by the graph in fp32."""
    tokens = np.random.default_rng(0).integers(0, 64, (3, 64))
    session = onnxruntime.InferenceSession(tiny / "decoder.onnx", providers=["CPUExecutionProvider"])
    return tokens, session.run(None, {"tokens": tokens})[0]


@pytest.mark.parametrize(("precision", "levels"), [("fp16", 1), ("fp32", 1), ("bf16", 8)])
def test_the_decoder_makes_the_images_of_the_graph(
    tiny: Path, expected: tuple[np.ndarray, np.ndarray], precision: str, levels: int
) -> None:
    tokens, images = expected
    got = decoded(planned_for(tiny, (1,), precision), tiny, tokens[:1], 16, triton=precision == "fp16")
    assert np.abs(got.astype(int) - images[:1]).max() <= levels
    assert psnr(got, images[:1]) > (40 if precision == "bf16" else 55)


@pytest.mark.slow
def test_the_demo_is_decoded() -> None:
    """The committed model, 64x64 pixels."""
    demo = Path(__file__).parents[3] / "models" / "demo"
    tokens = np.random.default_rng(0).integers(0, 1024, (1, 256))
    session = onnxruntime.InferenceSession(demo / "decoder.onnx", providers=["CPUExecutionProvider"])
    images = session.run(None, {"tokens": tokens})[0]
    got = decoded(planned_for(demo, (1,), "fp16"), demo, tokens, 64)
    assert np.abs(got.astype(int) - images).max() <= 1
    assert psnr(got, images) > 55


def test_a_batch_is_decoded_in_groups_that_bound_the_memory(
    tiny: Path, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    """Three images in groups of 1 and 2, blocks in any order: each at its place, and the same as if it were alone."""
    tokens, images = expected
    whole = planned_for(tiny, (3,), "fp16").programs["decoder"].profiles[3]
    planned = planned_for(tiny, (3,), "fp16", scratch_bytes=whole.scratch_bytes * 2 // 3)
    profile = planned.programs["decoder"].profiles[3]
    assert len(profile.before) == 2 * len(whole.before)
    assert profile.scratch_bytes < whole.scratch_bytes
    got = decoded(planned, tiny, tokens, 16, shuffle=1)
    assert np.abs(got.astype(int) - images).max() <= 1
    assert (got[2:] == decoded(planned_for(tiny, (1,), "fp16"), tiny, tokens[2:], 16)).all()


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2)])
def test_groups_begin_at_addresses_that_kernels_take(multipliers: tuple[int, ...]) -> None:
    """Nine tokens are 72 bytes, an image may be 27: kernels were compiled for multiples of 16."""
    vq = VQConfig(32, 3, 12, multipliers, res_blocks=1, z_channels=10, norm_groups=4)
    config = replace(named("L"), grid=(1, 3, 3), group_size=1)
    planned = plan_decoder.plan(vq, config, weights_of(vq), (1, 2, 7, 37), "fp16", SM90, scratch_bytes=1)
    for count, profile in planned.programs["decoder"].profiles.items():
        arguments = [a for launch in profile.before for a in launch.arguments if isinstance(a, Pointer)]
        sizes = [launch.grid[2] for launch in profile.before if launch.kernel.startswith("lookup")]
        firsts = [sum(sizes[:group]) for group in range(len(sizes))]
        for name, size in (("tokens", 72), ("images", 27 * vq.downsampling**2)):
            starts = [a.offset for a in arguments if a.name == name]
            assert starts == [first * size for first in firsts]
            assert not any(start % 16 for start in starts)
        assert sum(sizes) == count
        assert max(sizes) <= {1: 16, 2: 4, 4: 2}[vq.downsampling]


def test_odd_sizes(tmp_path: Path) -> None:
    """A grid that is not square, norms over 3 and 6 channels, widths that no tile divides; in bf16 as it is stored."""
    vq = VQConfig(32, 3, channels=12, channel_multipliers=(1, 2), res_blocks=1, z_channels=10, norm_groups=4)
    as_the_model(tmp_path, vq, (1, 6, 10), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), [("SM80", "fp16"), ("SM90", "fp16"), ("SM90", "fp32")])
def test_vq16(tmp_path: Path, target: str, precision: str) -> None:
    """All of it, 384x384 pixels, in the tiles of each target: a minute."""
    as_the_model(tmp_path, replace(VQ16, codebook_size=64), (1, 24, 24), precision, TARGETS[target], levels=2)


def as_the_model(
    folder: Path,
    vq: VQConfig,
    grid: tuple[int, int, int],
    precision: str,
    target: Target = SM80,
    levels: int = 1,
) -> None:
    """Random weights, and the images of the model in PyTorch."""
    config = PARConfig(dim=16, n_layers=1, n_heads=2, vocab_size=64, n_classes=2, grid=grid, group_size=4)
    torch.manual_seed(0)
    model = VQModel(vq).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1 if name.endswith("weight") else 0, 0.2)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if "encoder" not in name}
    state["codebook"] = torch.nn.functional.normalize(state["quantize.embedding.weight"].float(), dim=-1).bfloat16()
    stored, data = {}, b""
    for name, tensor in state.items():
        shape = (*tensor.shape, 1, 1) if "norm" in name else tuple(tensor.shape)
        raw = tensor.view(torch.int16).numpy().tobytes()
        stored[name] = Stored("bfloat16", shape, len(data), len(raw))
        data += raw
    (folder / WEIGHTS).write_bytes(data)
    planned = plan_decoder.plan(vq, config, stored, (1,), precision, target)
    tokens = np.random.default_rng(0).integers(0, vq.codebook_size, (1, config.n_tokens))
    images = np.zeros((1, grid[1] * vq.downsampling, grid[2] * vq.downsampling, 3), np.uint8)
    Host(planned, folder).run("decoder", 1, {"tokens": tokens, "images": images})

    model.load_state_dict({name: state.get(name, tensor) for name, tensor in model.state_dict().items()})
    raster = np.empty(config.n_tokens, np.int64)
    raster[token_order(config)] = tokens[0]
    with torch.no_grad():
        codes = state["codebook"].float()[torch.from_numpy(raster.reshape(grid))].permute(0, 3, 1, 2)
        wanted = (model.decode_codes(codes) * 127.5 + 128).clamp(0, 255).floor().permute(0, 2, 3, 1).numpy()
    assert wanted.std() > 20
    assert np.abs(images - wanted).max() <= levels
    assert psnr(images, wanted) > 50


# -- the plan of VQ-16 ------------------------------------------------------------------------------------------------


def test_work_of_vq16() -> None:
    """44 convolutions, 39 norms (13 of large maps in two launches), 4 attentions of two more, and the lookup.

    Upsampled convolutions compute four ninths of what the graph does: copies of a pixel are summed up before.
    """
    one = plan_decoder.work(VQ16, PAR_L, 1, "fp16", SM90)
    assert one.launches == 105
    assert 0.50e12 < one.flop < 0.52e12
    assert 1.5e9 < one.bytes < 2.0e9
    eight = plan_decoder.work(VQ16, PAR_L, 8, "fp16", SM90)
    assert eight.launches == 210
    assert eight.flop == 8 * one.flop


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("target", [*TARGETS])
def test_scratch_of_vq16_is_bounded(precision: str, target: str) -> None:
    stored = weights_of(VQ16)
    images = (1, 3, 8)
    planned = plan_decoder.plan(VQ16, PAR_L, stored, images, precision, TARGETS[target])
    program = planned.programs["decoder"]
    for count, profile in program.profiles.items():
        assert profile.scratch_bytes < plan_decoder.SCRATCH_BYTES * 1.05
        starts = [
            a.offset
            for launch in profile.before
            for a in launch.arguments
            if isinstance(a, Pointer) and a.name == "images"
        ]
        assert starts == sorted(starts)
        assert starts[0] == 0
        assert starts[-1] < count * 384 * 384 * 3
        for launch in profile.before:
            assert all(size <= most for size, most in zip(launch.grid, MOST_GRID, strict=True))
    assert planned.specs.keys() == plan_decoder.plan(VQ16, PAR_L, stored, (1,), precision, TARGETS[target]).specs.keys()
    # Weights of all convolutions, those of upsampling four times 2x2 instead of 3x3.
    size = sum(weight.bytes for weight in planned.weights.values())
    assert 42.4e6 * NUMBER_BYTES[precision] < size < 55e6 * NUMBER_BYTES[precision]
    named_buffers = {
        a.name
        for p in program.profiles.values()
        for launch in p.before
        for a in launch.arguments
        if isinstance(a, Pointer)
    }
    assert named_buffers - planned.weights.keys() - {"tokens", "images"} <= {*program.profiles[1].scratch}


def weights_of(vq: VQConfig) -> dict[str, Stored]:
    """As if the published weights were there: nothing of them is read for a plan."""
    with torch.device("meta"):
        state = VQModel(vq).state_dict()
    stored = {}
    for name, tensor in state.items():
        shape = (*tensor.shape, 1, 1) if "norm" in name else tuple(tensor.shape)
        stored[name] = Stored("float32", shape, 0, 4 * tensor.numel())
    stored["codebook"] = stored["quantize.embedding.weight"]
    return stored


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "decoder.mid.1.q.weight is missing; expected shape (512, 512, 1, 1)"),
        (
            {"shape": (512, 512)},
            "decoder.mid.1.q.weight is float32 of shape (512, 512); expected shape (512, 512, 1, 1)",
        ),
        ({"dtype": "int8"}, "decoder.mid.1.q.weight is int8 of shape"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Any] | None, words: str) -> None:
    stored = weights_of(VQ16)
    tensor = stored.pop("decoder.mid.1.q.weight")
    if change is not None:
        stored["decoder.mid.1.q.weight"] = replace(tensor, **change)
    with pytest.raises(BundleError) as caught:
        plan_decoder.plan(VQ16, PAR_L, stored, (1,), "fp16", SM90)
    assert words in str(caught.value)
    assert "export the bundle again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_map_of_too_many_numbers_is_refused() -> None:
    config = named("L", grid=(1, 256, 256))
    with pytest.raises(BuildError, match=r"a feature map of \d+ numbers; kernels count up to 2147483647"):
        plan_decoder.plan(VQ16, config, weights_of(VQ16), (1,), "fp16", SM90)


@pytest.mark.parametrize(
    ("precision", "way"), [("fp32", "--decoder-precision fp16, or with --engine"), ("fp16", "--engine")]
)
def test_attention_that_fits_no_block_is_refused(precision: str, way: str) -> None:
    vq = replace(VQ16, channel_multipliers=(1, 16))
    with pytest.raises(
        BuildError, match=f"2048 channels in {precision} does not fit .* SM80; build with {way} tensorrt"
    ):
        plan_decoder.work(vq, PAR_L, 1, precision, SM80)


# -- compiled ---------------------------------------------------------------------------------------------------------


def kinds_of(planned: Planned) -> list[Spec]:
    """One kernel of each kind of a plan, the last: those of the largest maps."""
    found: dict[tuple[Any, ...], Spec] = {}
    for spec in planned.specs.values():
        c = dict(spec.constants)
        found[(spec.source, *(bool(c.get(key)) for key in ("UP", "OTHER", "RESIDUAL", "PIXELS", "SWISH")))] = spec
    return list(found.values())


@pytest.fixture(scope="module")
def compiler() -> Any:
    with Compiler(2) as compiler:
        yield compiler


@pytest.mark.slow
@pytest.mark.parametrize("target", ["SM80", "SM90"])
def test_kernels_of_vq16_are_compiled_as_they_are_meant(compiler: Compiler, target: str) -> None:
    specs = kinds_of(plan_decoder.plan(VQ16, PAR_L, weights_of(VQ16), (1,), "fp16", TARGETS[target]))
    assert len(specs) == 15
    if target == "SM80":  # a few, for the time
        specs = [
            spec
            for spec in specs
            if spec.source not in ("decoder.conv", "decoder_pack.pack_conv") or dict(spec.constants)["UP"]
        ]
    for name, kernel in compiler.compile(specs, TARGETS[target]).items():
        assert kernel.fault(TARGETS[target]) is None, name
        if name.startswith(("conv", "qkv", "attention")):
            kinds = {kind.partition(".")[0] for kind in kernel.products}
            assert kinds == {"wgmma" if target == "SM90" else "mma"}, name
            assert kernel.copies.keys() == {"16"}, name
        if name.startswith("normalise"):
            assert kernel.loads["16"] >= 1, name
        assert kernel.loads.get("2", 0) <= 8, name  # the codebook's rows: as many as a thread looks up


@pytest.mark.slow
@pytest.mark.parametrize("target", [*TARGETS])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_all_kernels_fit(compiler: Compiler, target: str, precision: str) -> None:
    planned = plan_decoder.plan(VQ16, PAR_L, weights_of(VQ16), (1, 2, 4, 8), precision, TARGETS[target])
    for name, kernel in compiler.compile(planned.specs.values(), TARGETS[target]).items():
        assert kernel.fault(TARGETS[target]) is None, name
