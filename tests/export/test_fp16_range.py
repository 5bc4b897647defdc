"""Numbers that fp16 does not hold: the CPU's run of a graph in fp16 cannot show them, so the gate asks the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import golden_weights
from par_export.bundle import ExportRequest, export
from par_export.errors import BuildError, ParityError
from par_export.fp16 import FP16_ALLOWED, FP16_MAX, check_build, largest_in
from par_export.gate import runner
from par_export.gate.magnitudes import Largest
from par_export.gate.oracle import oracle_logits
from par_model.checkpoint import open_checkpoint
from par_model.config import PARConfig, VideoTokenizerConfig, VQConfig
from par_model.transformer import PAR
from par_model.video import Swish, VideoTokenizer
from par_model.vq import VQModel

CONFIG = PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=32, n_classes=3, grid=(1, 4, 4), group_size=4)
VQ = VQConfig(codebook_size=32, channels=16, channel_multipliers=(1, 1), res_blocks=1, z_channels=16, norm_groups=4)
State = dict[str, Tensor]


def feed_forward(state: State) -> State:
    """Gates and products of hundreds of thousands; all other numbers stay as they are."""
    scale = {"w1": 300.0, "w3": 300.0, "w2": 1 / 90000}
    return {key: value * scale.get(key.split(".")[-2], 1.0) for key, value in state.items()}


def scores(state: State) -> State:
    """Queries and keys of a few thousand, whose products are far larger."""
    wide = {key: value.clone() for key, value in state.items()}
    wide["layers.1.attention.wqkv.weight"][: 2 * CONFIG.dim] *= 1000
    return wide


def residual(state: State) -> State:
    """Embeddings that fit, a residual stream that does not."""
    return state | {"layers.0.attention.wo.weight": state["layers.0.attention.wo.weight"] * 50000}


def logits(state: State) -> State:
    return state | {"norm.weight": state["norm.weight"] * 3000, "output.weight": state["output.weight"] * 300}


def saved(folder: Path, state: State) -> Path:
    torch.save({"model": state, "config": {"n_heads": CONFIG.n_heads, "grid": CONFIG.grid}}, folder / "c.pt")
    return folder / "c.pt"


@pytest.fixture(scope="module")
def state() -> State:
    return dict(golden_weights(PAR(CONFIG)).state_dict())


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (feed_forward, "the feed-forward product silu(w1 x) * w3 x reaches"),
        (scores, "layer 1: an attention score q k / sqrt(D) reaches"),
        (residual, "layer 0: the residual stream reaches"),
        (logits, "head: a logit reaches"),
    ],
)
def test_fp16_is_refused_and_the_error_names_the_place_and_bf16(
    tmp_path: Path, state: State, change: Any, place: str
) -> None:
    path = saved(tmp_path, change(state))
    assert max(float(tensor.abs().max()) for tensor in change(state).values()) < FP16_MAX  # every weight fits
    with pytest.raises(ParityError) as error:
        export(ExportRequest(path, None, tmp_path / "fp16", "fp16"), say=lambda _: None)
    assert place in str(error.value)
    assert "so up to 32752 is allowed; give --precision bf16, or fp32. Nothing was published" in str(error.value)
    assert not (tmp_path / "fp16").exists()
    out = export(ExportRequest(path, None, tmp_path / "bf16", "bf16"), say=lambda _: None)
    parity = json.loads((out / "manifest.json").read_text())["parity"]
    found = largest_in(parity)
    assert found is not None
    assert found[0] > FP16_ALLOWED
    with pytest.raises(BuildError, match=r"precision fp16: .* in this model; .*; give --precision bf16, or fp32"):
        check_build(parity, "float16", "float32")  # a plan in fp16 of a bundle in bf16
    check_build(parity, "bfloat16", "float32")


def test_the_cpu_hides_what_the_gate_refuses(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph in fp16 has finite logits on a CPU, and an infinite product as soon as that is rounded to fp16."""
    from par_export.gate import model as gate

    monkeypatch.setattr(gate, "check_range", lambda *_: None)
    path = saved(tmp_path, feed_forward(state))
    out = export(ExportRequest(path, None, tmp_path / "b", "fp16"), say=lambda _: None)
    file = out / "prefill.onnx"
    graph = onnx.load(file, load_external_data=False)
    products = [
        node.input[0] for node in graph.graph.node if node.op_type == "MatMul" and node.input[1].endswith(".w2")
    ]
    assert len(products) == CONFIG.n_layers
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT16, None) for n in products)
    onnx.save(graph, out / "seen.onnx")
    session = runner.session(out / "seen.onnx")
    step = runner.StepRunner(session, CONFIG, 1)
    feed: dict[str, Any] = {name: array.astype(np.float16) for name, array in step.caches.items()}
    feed |= {name: np.ones(1, np.float32) for name in ("guidance", "temperature", "top_p")}
    feed |= {"ids": np.array([[CONFIG.vocab_size + 1]]), "positions": np.zeros((1, 1), np.int64)}
    feed |= {"write": np.zeros(1, np.int64), "length": np.ones(1, np.int32), "image": np.zeros(1, np.int64)}
    feed |= {name: np.zeros(1, np.int64) for name in ("cond_row", "uncond_row")}
    feed |= {"uniform": np.zeros((1, 1), np.float32), "top_k": np.ones(1, np.int64)}
    got = session.run(["logits", *products], feed)
    assert np.isfinite(got[0]).all()
    assert any(np.isinf(product).any() for product in got[1:])


@torch.no_grad()
def test_the_largest_numbers_are_those_of_the_model(tmp_path: Path, state: State) -> None:
    model = PAR(CONFIG)
    model.load_state_dict(state)
    tokens, labels = np.arange(2 * CONFIG.n_tokens).reshape(2, -1) % CONFIG.vocab_size, np.array([1, 3])
    largest = Largest()
    found = oracle_logits(CONFIG, open_checkpoint(saved(tmp_path, state)), tokens, labels, "float32", largest)
    got = largest.report()

    positions = torch.arange(CONFIG.n_tokens)
    mask = positions[None, :] < model.visible[:, None]
    x = model.embed(torch.from_numpy(tokens), torch.from_numpy(labels), positions)
    wanted: dict[str, list[float]] = {"residual": [float(x.abs().max())]}
    for layer in model.layers:
        h = layer.attention_norm(x)
        q, k, v = layer.attention.wqkv(h).view(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        cos, sin = (torch.repeat_interleave(table, 2, -1) for table in (model.cos, model.sin))

        def turned(t: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            return t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin

        seen = (turned(q) @ turned(k).transpose(-1, -2) / 4).masked_fill(~mask, 0.0)
        y = layer.attention.wo((seen.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 32))
        after = x + y
        g = layer.ffn_norm(after)
        gate, up = layer.feed_forward.w1(g), layer.feed_forward.w3(g)
        product = F.silu(gate) * up
        out = layer.feed_forward.w2(product)
        x = after + out
        here: dict[str, tuple[Tensor, ...]] = {
            "norm": (h, g), "q": (q, turned(q)), "k": (k, turned(k)), "v": (v,), "scores": (seen,), "attention": (y,),
            "gate": (gate,), "up": (up,), "product": (product,), "feed_forward": (out,), "residual": (after, x),
        }  # fmt: skip
        for name, parts in here.items():
            wanted.setdefault(name, []).append(max(float(part.abs().max()) for part in parts))
    wanted["norm"].append(float(model.norm(x).abs().max()))
    wanted["logits"] = [float(np.abs(found).max())]
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-3, err_msg=name)

    unseen = Largest()
    with unseen.watching(model.layers[0], "layer 0", model.cos, model.sin, mask):
        pass
    model.layers[0](x, model.cos, model.sin, mask, positions, None)  # nobody watches now
    assert not unseen.values


@torch.no_grad()
def test_the_largest_numbers_of_an_image_decoder_are_those_of_the_model() -> None:
    """Layer by layer in fp64, written out again: convolutions, norms, blocks, and the scores of attention."""
    model = golden_weights(VQModel(VQ))
    state = {key: tensor.double() for key, tensor in model.state_dict().items()}
    codes = torch.randn((2, VQ.codebook_dim, 4, 4), generator=torch.Generator().manual_seed(0))
    wanted: dict[str, dict[str, float]] = {"outputs": {}, "scores": {}}

    def seen(name: str, x: Tensor, quantity: str = "outputs") -> Tensor:
        wanted[quantity][name] = float(x.abs().max())
        return x

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return seen(name, F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2))

    def norm(name: str, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (VQ.norm_groups, -1))
        mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, correction=0)
        weight, bias = (state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return seen(name, ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2) * weight + bias)

    def residual(name: str, x: Tensor) -> Tensor:
        y = x
        for i in (1, 2):
            y = norm(f"{name}.norm{i}", y)
            y = conv(f"{name}.conv{i}", y * y.sigmoid())
        return seen(name, x + y)

    def attention(name: str, x: Tensor) -> Tensor:
        y = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        scores = seen(name, torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, "scores")
        y = torch.einsum("bij,bcj->bci", scores.softmax(-1), v).view(x.shape)
        return seen(name, x + conv(f"{name}.proj_out", y))

    x = conv("decoder.conv_in", conv("post_quant_conv", codes.double()))
    x = residual("decoder.mid.2", attention("decoder.mid.1", residual("decoder.mid.0", x)))
    for i in range(2):
        x = attention(f"decoder.conv_blocks.0.attn.{i}", residual(f"decoder.conv_blocks.0.res.{i}", x))
    x = conv("decoder.conv_blocks.0.upsample.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2))
    for i in range(2):
        x = residual(f"decoder.conv_blocks.1.res.{i}", x)
    x = norm("decoder.norm_out", x)
    images = conv("decoder.conv_out", x * x.sigmoid())

    largest = Largest()
    with largest.watching_decoder({"post_quant_conv": model.post_quant_conv, "decoder": model.decoder}):
        found = model.decode_codes(codes)
    torch.testing.assert_close(found.double(), images, rtol=1e-3, atol=1e-4)
    assert largest.values.keys() == wanted.keys()
    for quantity, places in wanted.items():
        assert largest.values[quantity].keys() == places.keys()
        for name, value in places.items():
            np.testing.assert_allclose(largest.values[quantity][name], value, rtol=1e-3, err_msg=f"{quantity}: {name}")
    before = {quantity: dict(places) for quantity, places in largest.values.items()}
    model.decode_codes(1000 * codes)  # nobody watches now
    assert largest.values == before


@torch.no_grad()
def test_what_a_video_decoder_multiplies_with_beta_is_watched() -> None:
    """The graph rounds that product too; it may be large where what comes out is small."""
    config = VideoTokenizerConfig((8, 5, 5), (4, 8), ((2, 2, 2),), res_blocks=1, last_blocks=1, norm_groups=2)
    model = golden_weights(VideoTokenizer(config))
    swishes = {f"decoder_layers.{name}": m for name, m in model.decoder_layers.named_modules() if isinstance(m, Swish)}
    assert len(swishes) == 5  # two of each residual unit, and the last
    inputs: dict[str, Tensor] = {}
    for place, (name, module) in enumerate(swishes.items(), 2):
        module.beta.copy_(torch.linspace(-1, 0.5, module.beta.numel()).view_as(module.beta) * 10**place)
        module.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0].double()}))
    largest = Largest()
    ids = torch.arange(8).view(1, 2, 2, 2)
    with largest.watching_decoder({"decoder_layers": model.decoder_layers}):
        model.decode(ids)
    assert largest.values.keys() == {"outputs"}
    for name, module in swishes.items():
        x, beta = inputs[name].movedim(1, -1), module.beta.double().flatten()
        wanted = max(float((x[..., c] * beta[c]).abs().max()) for c in range(len(beta)))
        np.testing.assert_allclose(largest.values["outputs"][name], wanted, rtol=1e-6, err_msg=name)
    value, _, place = largest.worst()
    assert place == list(swishes)[-1]
    assert value > FP16_ALLOWED
    before = dict(largest.values["outputs"])
    for module in swishes.values():
        module.beta.mul_(1000)
    model.decode(ids)
    assert largest.values["outputs"] == before


def test_numbers_that_no_precision_holds(tmp_path: Path, state: State) -> None:
    """Finite weights whose products overflow even fp32: one line, and no word of a bug in the export."""
    wide = state | {
        f"layers.1.feed_forward.{w}.weight": state[f"layers.1.feed_forward.{w}.weight"] * 1e25 for w in ("w1", "w3")
    }
    with pytest.raises(ParityError, match=r"layer 1: .* reaches (inf|nan) in fp32, though every weight is finite"):
        export(ExportRequest(saved(tmp_path, wide), None, tmp_path / "b"), say=lambda _: None)


def test_a_decoder_whose_numbers_fp16_does_not_hold_is_left_out(tmp_path: Path, state: State) -> None:
    vq = dict(golden_weights(VQModel(VQ)).state_dict())
    lines: list[str] = []

    def exported(name: str, tokenizer: State) -> dict[str, Any]:
        torch.save({"model": tokenizer, "config": {"norm_groups": 4}}, tmp_path / f"{name}.pt")
        request = ExportRequest(saved(tmp_path, state), tmp_path / f"{name}.pt", tmp_path / name, encoder=False)
        manifest: dict[str, Any] = json.loads((export(request, say=lines.append) / "manifest.json").read_text())
        return manifest

    usual = exported("usual", vq)
    assert not usual["parity"]["decoder_fp16"]["left_out"]
    assert 0 < usual["parity"]["decoder_fp16"]["largest"] < 1000
    # A norm follows this convolution and undoes its scale: the images stay as they were.
    key = "decoder.mid.0.conv1"
    hot = exported("hot", vq | {f"{key}.{part}": vq[f"{key}.{part}"] * 50000 for part in ("weight", "bias")})
    half = hot["parity"]["decoder_fp16"]
    assert half["psnr_db"] is None or half["psnr_db"] > 40  # the CPU's run shows nothing
    assert half["left_out"]
    assert half["why"].startswith(f"{key} computes numbers up to ")
    assert not (tmp_path / "hot" / "decoder_fp16.onnx").exists()
    assert "decoder_fp16" not in hot["graphs"]
    assert [line for line in lines if line.startswith("decoder_fp16.onnx is left out, images are decoded in fp32: ")]
    with pytest.raises(BuildError, match=r"decoder precision fp16: .*; give --decoder-precision fp32"):
        check_build(hot["parity"], "float32", "float16")
    check_build(usual["parity"], "float16", "float16")
    check_build({"random_weights": True}, "float16", "float16")
