"""The PAR transformer: a pre-norm Llama in which the output at position p predicts token p. Read top-down.

Modules have the key names of the published checkpoints. The phases of cached generation are functions in
``generation.py``; ONNX graphs are written by ``par_export``. Source: paper, section 3.3, and the behaviour of the
published code.

Letters: B sequences, N tokens, q positions of one call, S cache slots, V codes, d width, H heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_model.config import NORM_EPS, PARConfig
from par_model.ordering import LEARNABLE, TOKEN, input_kinds, rotary_table, visible_length

INIT_STD = 0.02  #: standard deviation of the initial weights


class PAR(nn.Module):
    """The whole model. ``forward`` is teacher-forced; ``embed``, ``blocks`` and ``head`` serve the cached phases."""

    cos: Tensor
    sin: Tensor
    visible: Tensor
    input_kind: Tensor
    input_index: Tensor

    def __init__(self, config: PARConfig) -> None:
        super().__init__()
        self.config = config
        d, n = config.dim, config.group_size
        self.cls_embedding = ClassEmbedding(config.n_classes, d)
        self.tok_embeddings = nn.Embedding(config.vocab_size, d)
        if n > 1:
            self.spe_tok_embeddings = LearnableTokens(n - 1, d)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(d)
        self.output = nn.Linear(d, config.vocab_size, bias=False)
        self.tok_dropout = nn.Dropout(config.dropout)
        cos, sin = rotary_table(config)
        self.register_buffer("cos", torch.from_numpy(cos), persistent=False)  # [N, D/2]
        self.register_buffer("sin", torch.from_numpy(sin), persistent=False)
        self.register_buffer("visible", torch.from_numpy(visible_length(config)), persistent=False)  # [N]
        kind, index = input_kinds(config)
        self.register_buffer("input_kind", torch.from_numpy(kind), persistent=False)  # [N]
        self.register_buffer("input_index", torch.from_numpy(index), persistent=False)  # [N]
        if not self.output.weight.is_meta:
            self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
        if self.config.group_size > 1:
            nn.init.normal_(self.spe_tok_embeddings.special_embeddings.weight, std=INIT_STD)
        nn.init.zeros_(self.output.weight)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits [B,N,V] fp32 of ``tokens`` [B,N] in sequence order and ``labels`` [B].

        Label ``n_classes`` is "no class". The logits at p predict ``tokens[:, p]`` from the inputs that p may attend
        to. Raises ValueError for another shape or a label out of range.
        """
        c = self.config
        if tokens.ndim != 2 or tokens.shape[1] != c.n_tokens:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected [B,{c.n_tokens}] in sequence order")
        if labels.shape != tokens.shape[:1]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected [{tokens.shape[0]}], one per row of tokens"
            )
        check_labels(labels, c.n_classes)
        return self.teacher_forced(tokens, labels)

    def teacher_forced(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """What :meth:`forward` computes, of arguments that were checked before: on a GPU nothing waits for it."""
        positions = torch.arange(self.config.n_tokens, device=tokens.device)
        mask = positions[None, :] < self.visible[:, None]  # [N, N]
        x = self.tok_dropout(self.embed(tokens, labels, positions))
        return self.head(self.blocks(x, positions, mask))

    def embed(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Embeddings [B,q,d] of the inputs at ``positions`` [q], given the tokens so far [B,>=k] and labels [B]."""
        kind, index = self.input_kind[positions], self.input_index[positions]
        x = self.cls_embedding.embedding_table(labels)[:, None, :].expand(-1, len(positions), -1)
        if tokens.shape[1]:
            picked = tokens[:, torch.where(kind == TOKEN, index, 0)]
            x = torch.where((kind == TOKEN)[:, None], self.tok_embeddings(picked), x)
        if self.config.group_size > 1:
            learnable = self.spe_tok_embeddings.special_embeddings.weight[torch.where(kind == LEARNABLE, index, 0)]
            x = torch.where((kind == LEARNABLE)[:, None], learnable, x)
        return x

    def blocks(self, x: Tensor, positions: Tensor, mask: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """All layers over ``x`` [B,q,d] at input ``positions`` [q]: [B,q,d]. ``mask`` [q,keys] is true where visible.

        With ``caches``, one per layer, the keys are those of the cache slots 0 .. keys-1.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, positions, None if caches is None else caches[i])
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits [B,q,V] fp32 of ``x`` [B,q,d]."""
        logits: Tensor = self.output(self.norm(x)).float()
        return logits


class KVCache:
    """Keys and values of one layer: two preallocated [B,H,S,D] buffers, written at explicit positions.

    ``width`` stores heads of so many numbers, of which those after the first D are zero.
    """

    def __init__(
        self, batch: int, config: PARConfig, dtype: torch.dtype, device: torch.device, width: int | None = None
    ) -> None:
        shape = (batch, config.n_heads, config.n_tokens, width or config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, positions: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Write ``k``, ``v`` [B,H,q,D] at ``positions`` [q]; returns views of the caches, [B,H,length,width]."""
        self.k[:, :, positions] = widened(k, self.k.shape[-1])
        self.v[:, :, positions] = widened(v, self.v.shape[-1])
        return self.k[:, :, :length], self.v[:, :, :length]


class Block(nn.Module):
    """h = x + attention(norm(x)); y = h + feed_forward(norm(h))."""

    def __init__(self, config: PARConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor, cache: KVCache | None
    ) -> Tensor:
        """``x`` [B,q,d] after this layer: [B,q,d]; the arguments are those of :meth:`PAR.blocks`, for one layer."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, positions, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Attention(nn.Module):
    """Multi-head attention: keys and values have as many heads as queries; scale 1/sqrt(D), no biases, no QK norm."""

    def __init__(self, config: PARConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)  # rows: all q, all k, all v
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor, cache: KVCache | None
    ) -> Tensor:
        """The attention of a layer, [B,q,d] of normed ``x`` [B,q,d]; the arguments are those of :meth:`PAR.blocks`."""
        b, q, d = x.shape
        query, key, value = (
            self.wqkv(x).view(b, q, 3, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        )  # each [B, H, q, D]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(positions, key, value, mask.shape[-1])
        y = attend(query, key, value, mask)
        return self.resid_dropout(self.wo(y.transpose(1, 2).reshape(b, q, d)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: PARConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.ffn_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [...,d] to [...,d]."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in fp32, cast back, then multiplied by the gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [...,d] to [...,d], in the dtype of ``x``."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return y.type_as(x) * self.weight


class ClassEmbedding(nn.Module):
    """Class rows 0..n_classes-1 and, last, the row of "no class" for guidance."""

    def __init__(self, n_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(n_classes + 1, dim)


class LearnableTokens(nn.Module):
    """M_1 .. M_{n-1}: fed once, after the last initial token, in the call that makes the first parallel group."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.special_embeddings = nn.Embedding(count, dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs of ``x`` [B,H,q,D], by ``cos`` and ``sin`` [q,D/2], in fp32, cast back."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of ``query`` [B,H,q,D] over keys and values [B,H,S,width >= D] of a cache: [B,H,q,D].

    ``mask`` [q,S] is true where visible; numbers of keys and values after the first D are zero.
    """
    size, width = query.shape[-1], key.shape[-1]
    if width == size:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    wide = F.scaled_dot_product_attention(widened(query, width), key, value, attn_mask=mask, scale=size**-0.5)
    return wide[..., :size]


def widened(x: Tensor, width: int) -> Tensor:
    """``x`` [...,D] with zeros after its numbers, [...,width]; itself where it is so wide."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def check_labels(labels: Tensor, n_classes: int) -> None:
    """Raise ValueError unless every label is a class or ``n_classes`` ("no class")."""
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) > n_classes):
        raise ValueError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}; expected 0..{n_classes - 1}, or {n_classes} for "
            "no class"
        )
