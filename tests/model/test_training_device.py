"""Trainers on another device than the CPU: their updates are the plain ones, and touch no tensor on another device.

There is no GPU here. PyTorch's fake tensors have shapes and a device, but no numbers: they find every operation over
two devices, and everything that would wait for a GPU, since a number that is read does not exist.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from par_model.config import PARConfig, VideoTokenizerConfig, VQConfig
from par_model.dtypes import bf16_is_fast
from par_model.training import device as devices
from par_model.training import tokenizer as tokenizer_training
from par_model.training import transformer as transformer_training
from par_model.training import video as video_training
from par_model.training.cli import encode as encode_codes
from par_model.training.cli import tokenizer as train_tokenizer
from par_model.training.cli import transformer as train
from par_model.training.cli import video_tokenizer as train_video
from par_model.training.data import ImageFolder
from par_model.training.device import Batches, adamw, autocast, choose_device, load_optimizer, moved, on_cpu
from par_model.training.files import InputError
from par_model.training.muon import Float32Muon, orthogonal
from par_model.training.run import EMA, channels_last
from par_model.transformer import PAR
from par_model.video import VideoTokenizer
from par_model.vq import VQModel

pytestmark = pytest.mark.usefixtures("without_gpu")

Module = TypeVar("Module", bound=nn.Module)
SMALL = PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=16, n_classes=3, grid=(1, 8, 8), group_size=4, dropout=0.1)
VQ = VQConfig(16, 4, channels=8, channel_multipliers=(1, 2), res_blocks=1, z_channels=8, norm_groups=4)
VIDEO = VideoTokenizerConfig(
    levels=(4, 3), widths=(4, 8), strides=((2, 2, 2),), res_blocks=1, last_blocks=1, norm_groups=2
)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Another device, of tensors without numbers.

    It is called "meta" and not "cuda", since gradients and views of the latter need a PyTorch that was built with CUDA.
    """
    for module in (transformer_training, tokenizer_training, video_training):
        monkeypatch.setattr(module, "autocast", lambda *_, **__: nullcontext())  # PyTorch has none for "meta"
    with FakeTensorMode():
        yield torch.device("meta")


def placed(model: Module, device: torch.device) -> Module:
    """``model`` with tensors of the same shapes on ``device``. (``Module.to`` does not take fake tensors.)"""
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                module._parameters[key] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=device))
        for key, value in module._buffers.items():
            if value is not None:
                module._buffers[key] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return model


def options(optimizer: str) -> argparse.Namespace:
    return argparse.Namespace(lr=1e-3, muon_lr=None, batch=4, optimizer=optimizer)


def sequences(device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [4,64] and labels [4]."""
    torch.manual_seed(1)
    return torch.randint(16, (4, 64), device=device), torch.randint(4, (4,), device=device)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_of_the_transformer_stays_on_its_device(elsewhere: torch.device, optimizer: str) -> None:
    model = placed(PAR(SMALL), elsewhere)
    optimizers = transformer_training.make_optimizers(model, options(optimizer))
    ema = EMA(model, 0.99)
    for step in range(2):  # the second one has a state
        loss = transformer_training.update(model, *sequences(elsewhere), optimizers, bf16=True)
        ema.update(model, step)
        assert loss.device == elsewhere
    assert all(p.device == elsewhere for p in [*model.parameters(), *ema.shadow.values()])
    with pytest.raises((DataDependentOutputException, RuntimeError), match=r"item|_local_scalar_dense"):
        model(*sequences(elsewhere))  # the checks of the oracle read numbers: the test would see it


@pytest.mark.slow
def test_an_update_of_the_tokenizer_stays_on_its_device(elsewhere: torch.device) -> None:
    model = placed(VQModel(VQ), elsewhere)
    optimizer = adamw(model.parameters(), 1e-3, elsewhere)
    ema, usage = EMA(model, 0.99), torch.zeros(16, device=elsewhere)
    x = torch.rand(4, 3, 16, 16, device=elsewhere)
    for step in range(2):
        parts, z, ids = tokenizer_training.update(model, x.to(memory_format=torch.channels_last), optimizer, 1.0)
        ema.update(model, step)
        tokenizer_training.count_codes(usage, ids)
    assert {tensor.device for tensor in [*parts.values(), z, ids, usage, *ema.shadow.values()]} == {elsewhere}
    assert ids.shape == (4 * 8 * 8,)
    with torch.no_grad():
        assert model.encode(x).device == elsewhere


def test_an_encoder_alone_is_trained_on_its_device(elsewhere: torch.device) -> None:
    model = placed(VQModel(VQ), elsewhere)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(tokenizer_training.ENCODER))
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], 1e-3, elsewhere)
    parts, *_ = tokenizer_training.update(model, torch.rand(4, 3, 16, 16, device=elsewhere), optimizer)
    assert parts["l1"].device == elsewhere
    assert model.decoder.conv_in.weight.grad is None


def test_an_update_of_the_video_tokenizer_stays_on_its_device(elsewhere: torch.device) -> None:
    model = placed(VideoTokenizer(VIDEO), elsewhere)
    optimizer = adamw(model.parameters(), 1e-3, elsewhere)
    parts = video_training.update(model, torch.rand(2, 3, 3, 8, 8, device=elsewhere), optimizer)
    assert {part.device for part in parts.values()} == {elsewhere}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_of_a_gpu_take_their_weights_there(optimizer: str) -> None:
    with FakeTensorMode():
        model = placed(PAR(SMALL), torch.device("cuda:0"))
        optimizers = transformer_training.make_optimizers(model, options(optimizer))
        assert optimizers[-1].param_groups[0]["fused"] is True
        ema = EMA(model, 0.99)
        for step in range(2):
            for weight in model.parameters():
                weight.grad = torch.empty_like(weight)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for one in optimizers:
                one.step()
            ema.update(model, step)
        assert {tensor.device.type for tensor in ema.shadow.values()} == {"cuda"}
        vq = placed(VQModel(VQ), torch.device("cuda:0"))
        assert adamw(vq.parameters(), 1e-3, torch.device("cuda:0")).param_groups[0]["fused"] is True


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512", "amx", "fast"),
    [
        ("x86_64", False, False, False, False),  # AVX2 alone: PyTorch multiplies number by number
        ("x86_64", True, False, False, False),  # AVX-512 without products of bf16: it converts
        ("x86_64", True, True, False, True),
        ("AMD64", True, False, True, True),
        ("aarch64", True, False, False, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_bf16_is_computed_where_there_are_instructions_for_it(
    machine: str, onednn: bool, avx512: bool, amx: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert bf16_is_fast(torch.device("cpu")) is fast
    assert bf16_is_fast(torch.device("cuda:1"))
    with autocast(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is fast
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if fast else torch.float32)
    for asked in (True, False):  # what is asked for is done
        with autocast(torch.device("cpu"), asked):
            assert torch.is_autocast_enabled("cpu") is asked
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not bf16_is_fast(torch.device("cpu"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_of_the_transformer_is_the_plain_one(optimizer: str) -> None:
    """Bit for bit, as one writes it down."""
    tokens, labels = sequences()
    states = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = PAR(SMALL)
        optimizers = transformer_training.make_optimizers(model, options(optimizer))
        ema = EMA(model, 0.99)
        shadow = state_of(model)
        losses = []
        for step in range(3):
            if not plain:
                losses.append(float(transformer_training.update(model, tokens, labels, optimizers, bf16=True)))
                ema.update(model, step)
                continue
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(tokens, labels).flatten(0, 1), tokens.flatten())
            for one in optimizers:
                one.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for one in optimizers:
                one.step()
            for key, value in model.state_dict().items():
                shadow[key].lerp_(value, 1 - min(0.99, (step + 1) / (step + 10)))
            losses.append(float(loss.detach()))
        states.append((state_of(model), shadow if plain else ema.shadow, losses))
    (fast, fast_ema, fast_losses), (slow, slow_ema, slow_losses) = states
    assert fast_losses == slow_losses
    assert all(torch.equal(fast[key], slow[key]) for key in slow)
    assert all(torch.equal(fast_ema[key], slow_ema[key]) for key in slow)


@pytest.mark.parametrize("bf16", [True, False])
def test_an_update_of_the_tokenizer_is_the_plain_one(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, as one writes it down."""
    monkeypatch.setattr("par_model.training.device.bf16_is_fast", lambda _: bf16)
    torch.manual_seed(1)
    x = (torch.rand(4, 3, 16, 16) * 2 - 1).to(memory_format=torch.channels_last)
    states = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = channels_last(VQModel(VQ))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
        usage = torch.zeros(16)
        for _ in range(3):
            if not plain:
                _, _, ids = tokenizer_training.update(model, x, optimizer)
                tokenizer_training.count_codes(usage, ids)
                continue
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, ids = plain_reconstruct(model, x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            usage += torch.bincount(ids.flatten(), minlength=16)
        states.append(state_of(model) | {"usage": usage})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def plain_reconstruct(model: VQModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = model.quant_conv(model.encoder(x)).float()
    with torch.autocast("cpu", enabled=False):
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        codebook = F.normalize(model.quantize.embedding.weight, dim=-1)
        ids = (z.detach().reshape(-1, z.shape[-1]) @ codebook.detach().T).argmax(1)
        code = codebook[ids].reshape(z.shape)
        vq = ((z.detach() - code) ** 2).sum(-1).mean() + 0.25 * ((z - code.detach()) ** 2).sum(-1).mean()
        straight = z + (code - z).detach()
    y = model.decode_codes(straight.permute(0, 3, 1, 2)).float()
    l1 = (y - x).abs().mean()  # in the order of the trainer, in which gradients of y are added up
    edges = (y.diff(dim=2) - x.diff(dim=2)).abs().mean() + (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
    return l1 + edges + ((y - x) ** 2).mean() + 0.5 * vq, ids


def test_an_optimizer_goes_on_from_a_state_of_the_other_device() -> None:
    weight = nn.Parameter(torch.ones(3))
    states = {}
    for fused in (None, True):
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        weight.grad = torch.ones(3)
        optimizer.step()
        states[fused] = on_cpu(optimizer.state_dict())
    for ours, theirs in ((None, True), (True, None)):
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=ours)
        load_optimizer(optimizer, states[theirs])
        assert optimizer.param_groups[0]["fused"] is ours
        weight.grad = torch.ones(3)
        optimizer.step()
        assert float(optimizer.state[weight]["step"]) == 2


def test_muon_in_fp32_is_that_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the precision of its products, and a run goes on with either."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # PyTorch's, in fp32
    results = []
    for first, second in ((torch.optim.Muon, Float32Muon), (Float32Muon, torch.optim.Muon)):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(size)) for size in ((8, 24), (24, 8), (8, 8), (3, 3))]
        before, state = [weight.detach().clone() for weight in weights], None
        for kind in (first, first, second):
            optimizer = kind(weights, lr=0.02, momentum=0.95, weight_decay=0.05)
            if state is not None:
                optimizer.load_state_dict(state)
            for weight in weights[:3]:
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
            state = optimizer.state_dict()
        assert all((weight != old).all() for weight, old in zip(weights[:3], before, strict=False))
        assert (weights[3] == before[3]).all()  # has no gradient
        results.append([weight.detach() for weight in weights])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16)])
def test_updates_of_muon_are_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    group = torch.optim.Muon([nn.Parameter(matrix)]).param_groups[0]
    made = orthogonal(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])
    values = torch.linalg.svdvals(made)
    assert 0.6 < values.min() <= values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((u @ v) * made).sum() / made.norm() / (u @ v).norm() > 0.97  # the nearest orthogonal one, nearly


@pytest.mark.parametrize(("fast", "kind"), [(True, torch.optim.Muon), (False, Float32Muon)])
def test_muon_computes_in_fp32_where_bf16_is_slow(fast: bool, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_training, "bf16_is_fast", lambda _: fast)
    assert type(transformer_training.make_optimizers(PAR(SMALL), options("muon"))[0]) is kind


def test_a_state_comes_from_any_device() -> None:
    with FakeTensorMode():
        state = on_cpu({"a": torch.ones(2, device="cuda"), "b": [{"c": torch.ones(1, device="cuda")}], "d": (1, "x")})
        assert {state["a"].device.type, state["b"][0]["c"].device.type} == {"cpu"}
        assert state["d"] == (1, "x")


def test_pixels_that_lie_on_the_device_make_the_same_batches() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    folder = ImageFolder(pixels, np.zeros(10, np.uint8), ["a"], 4)
    index = np.array([3, 1, 9])
    kept = Batches(folder, torch.device("cpu"), keep=True)
    assert kept.kept is not None
    assert Batches(folder, torch.device("cpu")).kept is None
    assert torch.equal(kept.batch(index), folder.batch(index))
    assert torch.equal(Batches(folder, torch.device("cpu")).batch(index), folder.batch(index))
    assert torch.equal(moved(index, torch.device("cpu")), torch.from_numpy(index))


def test_the_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch says about this machine is given; the rest is the real choice."""

    def has(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    has(0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(
        InputError, match=r"--device cuda: PyTorch sees no GPU here \(it is built .*; give --device cpu"
    ):
        choose_device("cuda")
    has(1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(
        InputError, match="--device cuda:1: there is no such GPU, PyTorch sees only cuda:0 here; expected"
    ):
        choose_device("cuda:1")
    has(4)
    assert choose_device("cuda:3") == torch.device("cuda:3")
    with pytest.raises(InputError, match="cuda:0 to cuda:3"):
        choose_device("cuda:4")
    for wrong in ("gpu", "", "cuda:", "cuda:-1", "CUDA", "mps"):
        with pytest.raises(InputError, match="expected auto, cpu, cuda, or cuda:N"):
            choose_device(wrong)
    assert devices.EXPECTED.startswith("expected")


def test_a_wrong_device_or_time_is_one_line_and_exit_code_2(
    tmp_path: Path, training_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, vq = tmp_path / "codes.npz", tmp_path / "vq.pt"
    np.savez(codes, codes=np.zeros((2, 4, 4), np.uint16), labels=np.zeros(2, np.int64), class_names=np.array(["a"]))
    torch.save({"model": VQModel(VQ).state_dict(), "config": vars(VQ) | {"kind": "vq"}}, vq)
    clips = tmp_path / "clips"
    clips.mkdir()
    np.zeros((2, 3, 8, 8, 1), np.uint8).tofile(clips / "clips.u8")
    np.zeros(2, np.uint8).tofile(clips / "labels.u8")
    (clips / "meta.json").write_text('{"count": 2, "frames": 3, "size": 8, "channels": 1, "class_names": ["a"]}')
    images, run = ["--data", str(training_images), "--val", str(training_images)], ["--run", str(tmp_path / "run")]
    small = ["--codes", "16", "--channels", "8", "--multipliers", "1", "2", "--z-channels", "8", "--norm-groups", "4"]
    video = ["--levels", "4", "3", "--widths", "4", "8", "--time-strides", "2", "--norm-groups", "2"]
    verbs: list[tuple[Any, list[str]]] = [
        (train, ["--codes", str(codes), "--val", str(codes), "--vocab", "16", *run]),
        (train_tokenizer, [*images, *run, *small]),
        (train_tokenizer, [*images, *run, "--encoder-for", str(vq)]),
        (train_video, ["--data", str(clips), "--val", str(clips), *run, *video]),
        (encode_codes, ["--data", str(training_images), "--tokenizer", str(vq), "--out", str(tmp_path / "out.npz")]),
    ]
    for module, arguments in verbs:
        assert module.main([*arguments, "--device", "gpu"]) == 2
        assert capsys.readouterr().err == (
            "parvis: error: --device gpu: expected auto, cpu, cuda, or cuda:N with the number of a GPU\n"
        )
        if module is not encode_codes:
            assert module.main([*arguments, "--minutes", "0"]) == 2
            assert capsys.readouterr().err == "parvis: error: --minutes 0.0: expected a number above 0\n"
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out.npz").exists()
