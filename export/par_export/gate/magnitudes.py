"""The largest numbers that a model computes, by quantity and layer, and whether fp16 holds them.

ONNX Runtime's CPU provider runs a graph in fp16 in fp32 between its casts, so that a run of the graph cannot show an
overflow that a GPU would have. The oracle can: it computes in fp32, over the same rounded weights, and everything that
the graph rounds to fp16 is looked at here. What the graph computes in fp32 in every precision is not: the mean of
squares in a norm, guidance, sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from par_export.errors import ParityError
from par_export.fp16 import FP16_ALLOWED, QUANTITIES, REASON
from par_model.transformer import Block
from par_model.video import ResidualUnit, Swish
from par_model.vq import AttnBlock, ResBlock


class Largest:
    """The largest |value| of each quantity, layer by layer; infinite or NaN where a value is."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, float]] = {}  # quantity -> place -> largest

    def add(self, quantity: str, place: str, x: Tensor) -> None:
        """Take the numbers of ``x`` into account."""
        low, high = float(x.amin()), float(x.amax())  # many times faster than torch.aminmax
        largest = max(-low, high) if low <= high else math.nan  # no comparison with NaN is true
        here = self.values.setdefault(quantity, {})
        so_far = here.get(place, 0.0)
        here[place] = so_far if so_far >= largest or math.isnan(so_far) else largest

    @contextmanager
    def watching(self, layer: Block, place: str, cos: Tensor, sin: Tensor, mask: Tensor) -> Iterator[None]:
        """Within this context, all that ``layer`` computes is taken into account under ``place``."""

        def seen(quantity: str) -> Callable[..., None]:
            return lambda _module, _inputs, output: self.add(quantity, place, output)

        turn = torch.complex(cos, sin)[:, None]  # [N,1,D/2], over [N,H,D/2]
        visible = mask.float()

        def turned(part: Tensor) -> Tensor:  # the rotary embedding of [N,H,D], as [H,N,D]
            pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turn).flatten(-2).transpose(0, 1)

        def qkv(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            attention = layer.attention
            columns = torch.stack((output.flatten(0, 1).amin(0), output.flatten(0, 1).amax(0)))  # [2,3d]
            for name, part in zip("qkv", columns.chunk(3, -1), strict=True):
                self.add(name, place, part)
            for row in output:  # one at a time: scores are [H,N,N]
                q, k, _ = row.unflatten(-1, (3, attention.n_heads, attention.head_dim)).unbind(1)
                q, k = turned(q), turned(k)
                self.add("q", place, q)
                self.add("k", place, k)
                scores = (q * attention.head_dim**-0.5) @ k.transpose(-1, -2)
                self.add("scores", place, scores.mul_(visible))

        hooks = [
            layer.attention_norm.register_forward_hook(seen("norm")),
            layer.ffn_norm.register_forward_hook(seen("norm")),
            layer.attention.wqkv.register_forward_hook(qkv),
            layer.attention.wo.register_forward_hook(seen("attention")),
            layer.feed_forward.w1.register_forward_hook(seen("gate")),
            layer.feed_forward.w3.register_forward_hook(seen("up")),
            layer.feed_forward.w2.register_forward_pre_hook(lambda _, inputs: self.add("product", place, inputs[0])),
            layer.feed_forward.w2.register_forward_hook(seen("feed_forward")),
            layer.ffn_norm.register_forward_pre_hook(lambda _, inputs: self.add("residual", place, inputs[0])),
            layer.register_forward_hook(seen("residual")),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def watching_decoder(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within this context, the outputs of the tokenizer's ``modules``, by name, are taken into account."""
        hooks = []

        def scores(name: str, block: AttnBlock) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
                y = block.norm(inputs[0])
                q, k = (conv(y).flatten(2) for conv in (block.q, block.k))  # [B,c,hw]
                self.add("scores", name, (q * q.shape[1] ** -0.5).transpose(1, 2) @ k)

            return hook

        for top, root in modules.items():
            for inner, module in root.named_modules(prefix=top):
                if isinstance(module, Swish):  # of its product with beta, which a graph rounds too
                    hooks.append(
                        module.register_forward_hook(
                            lambda m, x, _y, name=inner: self.add("outputs", name, m.beta * x[0])
                        )
                    )
                if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.GroupNorm, ResBlock, ResidualUnit, AttnBlock)):
                    hooks.append(
                        module.register_forward_hook(lambda _m, _i, y, name=inner: self.add("outputs", name, y))
                    )
                if isinstance(module, AttnBlock):
                    hooks.append(module.register_forward_hook(scores(inner, module)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def worst(self) -> tuple[float, str, str]:
        """The largest value of all, its quantity and its place; a value that is not finite comes first."""
        everything = [
            (value, quantity, place) for quantity, here in self.values.items() for place, value in here.items()
        ]
        broken = [entry for entry in everything if not math.isfinite(entry[0])]
        return broken[0] if broken else max(everything)

    def report(self) -> dict[str, list[float]]:
        """quantity -> its largest value in each layer, for the manifest; four digits are enough."""
        return {name: [float(f"{v:.4g}") for v in here.values()] for name, here in self.values.items()}


def check_range(largest: Largest, dtype: str) -> None:
    """Raise ParityError where the oracle's numbers are not finite, or ``dtype`` is fp16 and does not hold them."""
    value, quantity, place = largest.worst()
    what = f"{place}: {QUANTITIES[quantity]} reaches {value:.4g}"
    if not math.isfinite(value):
        raise ParityError(
            f"{what} in fp32, though every weight is finite: no precision can run this model. Nothing was published; "
            "give a checkpoint of a training that did not diverge"
        )
    if dtype == "float16" and value > FP16_ALLOWED:
        raise ParityError(f"{what}; {REASON}; give --precision bf16, or fp32. Nothing was published")
