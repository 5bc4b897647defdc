"""The C decoder in bf16 with dot products: against the network in PyTorch that rounds as it does, and against fp32."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import test_decoder_amx as of_amx
import test_native_clips as of_clips
import test_native_decoder as of_images
import torch
import torch.nn.functional as F
from instruction_sets import decoded_by, needs_dots
from numpy.typing import NDArray
from planted import decoder_with, one_by_default
from test_decoder_amx import DEMO, made, rounded
from torch import Tensor, nn

from par_model.vq import Upsample
from par_runtime import Bundle
from par_runtime.backends.native import decoder as native_decoder
from par_runtime.backends.native import decoding
from par_runtime.backends.native.decoder import KEPT_BYTES
from par_runtime.backends.native.decoding import NativeDecoder
from par_runtime.loaded import LoadedFiles
from par_runtime.metrics import psnr_db
from par_runtime.tokenizer import Tokenizer

pytestmark = needs_dots

ONE_LEVEL = 1
CONVOLUTIONS = 10  #: of the forms of ``test_decoder_amx.py``, at least; counted from the last one
#: Of random weights, which make more of rounding than trained ones: the demo's worst picture has 54 dB.
LEAST_DB = 36.0
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)  #: and infinity


def in_dots(bundle: Bundle, tokens: NDArray[np.int64], threads: int = 2) -> NDArray[np.uint8]:
    with closing(NativeDecoder(LoadedFiles(bundle), threads, "bf16", least_exact=True)) as decoder:
        assert decoder.name.endswith("(avx512, bf16)")
        return decoder.run(tokens)


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """A^T [4,6], G [6,3] and B^T [6,6] of Winograd's form (Toom and Cook's construction) for :data:`POINTS`."""
    powers = np.array([[point**k for k in range(4)] for point in POINTS])
    output = np.concatenate([powers.T, [[0], [0], [0], [1]]], 1)
    others = [[q for q in POINTS if q != p] for p in POINTS]
    factors = np.array([np.prod([p - q for q in rest]) for p, rest in zip(POINTS, others, strict=True)])
    weights = np.concatenate([powers[:, :3] / factors[:, None], [[0, 0, 1]]])
    lowest_first = [np.append(np.poly(rest)[::-1], 0) for rest in others]
    inputs = np.array([*lowest_first, np.poly(POINTS)[::-1]])
    return torch.from_numpy(output), torch.from_numpy(weights), torch.from_numpy(inputs)


class Winograd(nn.Module):
    """A 3x3 convolution in Winograd's form F(4x4,3x3) that rounds what it multiplies."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.output, weights, self.input = transforms()
        self.bias = conv.bias
        self.weight = rounded(torch.einsum("ia,ocab,jb->ijoc", weights, conv.weight, weights))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (1, 1 + -width % 4, 1, 1 + -height % 4))
        tiles = x.unfold(2, 6, 4).unfold(3, 6, 4)  # [images, channels, rows and columns of tiles, 6, 6]
        points = rounded(torch.einsum("ia,ncyxab,jb->ijncyx", self.input, tiles, self.input))
        products = torch.einsum("ijoc,ijncyx->ijnoyx", self.weight, points)
        out = torch.einsum("ui,ijnoyx,vj->noyuxv", self.output, products, self.output)
        return out.flatten(4, 5).flatten(2, 3)[:, :, :height, :width] + self.bias[:, None, None]


def replace_convolutions(module: nn.Module, replaced: list[tuple[nn.Module, str, nn.Module]] | None = None) -> None:
    """All but those of doubled maps, which stay in fp32. They are added to ``replaced`` in their order."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
            setattr(module, name, Winograd(child))
            if replaced is not None:
                replaced.append((module, name, child))
        elif not isinstance(child, Upsample):
            replace_convolutions(child, replaced)


def test_the_form_in_pytorch_is_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding; else the other tests would compare with something else."""
    monkeypatch.setattr("test_decoder_dots.rounded", lambda x: x)
    conv, x = nn.Conv2d(5, 7, 3, padding=1).double(), torch.randn(2, 5, 9, 14, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(Winograd(conv)(x), conv(x), atol=1e-12, rtol=0)


def only(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the convolutions, counted from the last one, this one alone is computed in bf16, here and there: a number that
    rounds otherwise in one of them makes many of the next do so, and then pixels prove little.
    """

    def in_c(self: native_decoder.Operations, op: native_decoder.Op) -> bool:
        behind = [o for o in self._ops[self._ops.index(op) + 1 :] if o.kind == native_decoder.CONV]
        return op.kind == native_decoder.CONV and len(behind) == index

    def in_pytorch(module: nn.Module) -> None:
        replace_convolutions(module, every := [])
        for parent, name, conv in every[: -index - 1] + every[len(every) - index :]:
            setattr(parent, name, conv)

    monkeypatch.setattr(native_decoder.Operations, "_rounds", in_c)
    monkeypatch.setattr(of_amx, "round_convolutions", in_pytorch)


def largest_difference(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the pixels of a decoder in which one convolution is in bf16, over all of them; fp32 would be another."""
    tokens, most = of_images.tokens_of(bundle, 1), 0
    exact = of_images.ours(bundle.path, 1)
    assert exact.std() > 3, "an image without a content proves nothing"
    for index in range(CONVOLUTIONS):
        with monkeypatch.context() as patch:
            only(index, patch)
            right, got = of_amx.wanted(bundle, tokens), in_dots(bundle, tokens)
        assert (got != exact).any(), index
        most = max(most, int(np.abs(right.astype(int) - got).max()))
    return most


@pytest.mark.parametrize("form", of_amx.FORMS)
def test_every_number_is_rounded_where_it_is_multiplied(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made(tmp_path, form, monkeypatch)
    assert largest_difference(bundle, monkeypatch) <= ONE_LEVEL
    # All of them at once: nearer to PyTorch, which rounds the same numbers, than to fp32.
    tokens, exact = of_images.tokens_of(bundle, 2), of_images.ours(bundle.path, 2)
    monkeypatch.setattr(of_amx, "round_convolutions", replace_convolutions)
    got = in_dots(bundle, tokens)
    assert psnr_db(got, of_amx.wanted(bundle, tokens)) > psnr_db(got, exact) + 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
@pytest.mark.parametrize(
    ("line", "bug"),
    [
        ("-81.0f / 130", "-80.0f / 130"),
        ("8.0f / 65", "8.0f / 64"),
        ("vec_set1(-FAR * FAR)", "vec_set1(-FAR)"),
        ("vec_set1(-NEAR * NEAR - FAR * FAR)", "vec_set1(-FAR * FAR)"),
        ("vec_set1(FAR * FAR * FAR), minus_2", "vec_set1(FAR * FAR), minus_2"),
        ("_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));\n}\n\n/* c [rows]", "_mm512_or_si512(high, _mm512_slli_epi32(low, 16)));\n}\n\n/* c [rows]"),  # noqa: E501
        ("sum[i][1], columns[1], pair", "sum[i][1], columns[0], pair"),
        ("pass = 4, pairs_rows(4,", "pass = 4, pairs_rows(3,"),
        ("lane / NUMBERS;", "lane;"),
        ("t[NUMBERS - 1][i][j]", "t[0][i][j]"),
    ],
)  # fmt: skip
def test_a_planted_bug_is_seen(tmp_path: Path, line: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = made(tmp_path / "b", "several blocks", monkeypatch)
    library = decoder_with(tmp_path, line, bug)
    monkeypatch.setattr(decoding, "decoder_file", lambda: library)
    assert largest_difference(bundle, monkeypatch) > ONE_LEVEL


@pytest.mark.parametrize("form", one_by_default(list(of_images.FORMS)))
def test_every_form_of_tokenizer_is_near_fp32(tmp_path: Path, form: str) -> None:
    bundle = Bundle.open(of_images.make(tmp_path, form))
    for one, exact in zip(in_dots(bundle, of_images.tokens_of(bundle, 3)), of_images.ours(bundle.path, 3), strict=True):
        assert psnr_db(one, exact) >= LEAST_DB


@pytest.mark.parametrize("form", one_by_default(list(of_clips.FORMS)))
def test_every_form_of_clips_is_near_fp32(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(of_clips.make(tmp_path, form))
    tokens = of_clips.tokens_of(bundle, 2)
    got = in_dots(bundle, tokens)
    for one, exact in zip(got, of_clips.ours(bundle, tokens), strict=True):
        assert psnr_db(one, exact) >= LEAST_DB
    for at_once in (1, 2):  # in calls of one or two latent frames: the same bits
        pixels = at_once * 2 * bundle.time_downsampling * got[0, 0, :, :, 0].size
        monkeypatch.setattr("par_runtime.backends.native.clips.CALL_PIXELS", pixels)
        np.testing.assert_array_equal(in_dots(bundle, tokens), got)


def test_an_image_is_the_same_in_any_batch_and_with_any_number_of_threads() -> None:
    bundle = Bundle.open(DEMO)
    tokens = of_images.tokens_of(bundle, 5)
    batch = in_dots(bundle, tokens, 1)
    assert psnr_db(batch, of_images.ours(DEMO, 5)) > 50
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(in_dots(bundle, tokens, threads), batch)
    with closing(NativeDecoder(LoadedFiles(bundle), 2, "bf16", least_exact=True)) as decoder:
        for part in (slice(3, 4), slice(0, 5), slice(0, 1)):
            np.testing.assert_array_equal(decoder.run(tokens[part]), batch[part])


def test_weights_that_are_transformed_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(DEMO)
    tokens = of_images.tokens_of(bundle, 2)
    right = in_dots(bundle, tokens)
    for kept in (0, KEPT_BYTES // 100):
        monkeypatch.setattr("par_runtime.backends.native.decoder.KEPT_BYTES", kept)
        np.testing.assert_array_equal(in_dots(bundle, tokens), right)


def test_memory_that_holds_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    of_amx.check_that_memory_is_written_first(in_dots, monkeypatch)


@pytest.mark.parametrize("path", [DEMO, DEMO.parent / "fashion"])
def test_a_swish_far_below_zero_is_zero(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, got = of_amx.with_steep_norms(path, monkeypatch, in_dots)
    assert exact.std() > 3
    assert psnr_db(got, exact) >= LEAST_DB


@pytest.mark.parametrize(("instructions", "same"), [("dots", True), ("avx512", False), ("avx2", False)])
def test_which_instructions_take_it(tmp_path: Path, instructions: str, same: bool) -> None:
    bundle = Bundle.open(DEMO)
    tokens = of_images.tokens_of(bundle, 2)
    pixels = decoded_by(instructions, DEMO, tokens, tmp_path, precision="bf16", name=", bf16)" if same else "")
    np.testing.assert_array_equal(pixels, in_dots(bundle, tokens) if same else of_images.ours(DEMO, 2))


def test_a_proof_takes_the_form_that_rounds_the_most() -> None:
    """Where AMX decodes too, an AMD may decode the bundle that was proven there."""
    bundle = Bundle.open(DEMO)
    tokens = of_images.tokens_of(bundle, 2)
    with closing(Tokenizer(bundle, 1, "bf16", least_exact=True)) as tokenizer:
        np.testing.assert_array_equal(tokenizer.decode(tokens), in_dots(bundle, tokens))
    with closing(Tokenizer(bundle, 1, "fp32", least_exact=True)) as tokenizer:
        np.testing.assert_array_equal(tokenizer.decode(tokens), of_images.ours(DEMO, 2))


@pytest.mark.parametrize("form", ["", *of_images.FORMS])
def test_dot_products_round_more_than_amx(tmp_path: Path, form: str) -> None:
    """Else a proof in them would be none for AMX, which is computed here as the network in PyTorch that rounds so."""
    bundle = Bundle.open(of_images.make(tmp_path, form) if form else DEMO)
    tokens = of_images.tokens_of(bundle, 3)
    exact = of_images.ours(bundle.path, 3)
    assert psnr_db(in_dots(bundle, tokens), exact) < psnr_db(of_amx.wanted(bundle, tokens), exact)
