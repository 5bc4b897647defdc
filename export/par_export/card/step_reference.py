"""What each kernel of the step must leave, in float64: see the sources for what they compute, ``stand.py`` for the use.

Letters: R rows, q positions of each, M = R * q; d width, F width of the feed-forward layer, H heads of D numbers (D' in
the caches), V codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from par_export.card.stand import ALLOWED, Expected, Reference, View
from par_model.config import NORM_EPS
from par_runtime.backends.draws import distance_of

#: Attention rounds its weights to the type of the values, so it may be off by twice what the result's rounding costs.
ATTENTION = 2.0


def embed(v: View) -> list[Expected]:
    """x = rows of the table; h = x times the gain; ss = sums of squares of tiles of columns."""
    m = v.launch.grid[0]
    table = v.weight("table")
    x = table[v.tensor("ids", m).clamp(0, len(table) - 1)]
    return _residual_stream(v, m, x)


def _residual_stream(v: View, m: int, x: Tensor, fresh: bool = True) -> list[Expected]:
    """What a kernel leaves that makes x [M,d]: x itself, h, and the sums of squares."""
    d, stride = v.constants["D_MODEL"], v.constants["STRIDE"]
    bn = v.constants["BN"] // max(1, v.constants.get("PANELS", 0))  # squares are those of single panels
    inside = torch.arange(stride, device=x.device).expand(m, stride) < d
    wide = torch.zeros(m, stride, dtype=torch.float64, device=x.device)
    wide[:, :d] = x
    gained = wide.clone()
    gained[:, :d] *= v.tensor("gains", d)
    tiles = -(-d // bn)
    squares = torch.zeros(m, tiles * bn, dtype=torch.float64, device=x.device)
    squares[:, :d] = x * x
    return [
        Expected("x", (m, stride), wide, inside, fresh=fresh),
        Expected("h", (m, stride), gained, inside),
        Expected("ss", (m, tiles), squares.reshape(m, tiles, bn).sum(-1)),
    ]


def _normed(v: View, m: int) -> tuple[Tensor, Tensor]:
    """h [M,d], and the factor of each row [M]: the norm's, and the power of two that the gains were divided by."""
    c = v.constants
    d = c["D_MODEL"]
    h = v.tensor("h", m, c["STRIDE"])[:, :d]
    mean = v.tensor("ss", m, c["TILES"]).sum(-1) / d
    power = v.tensor("gains", c["POWER"] + 1)[-1]
    return h, power / (mean + NORM_EPS).sqrt()


def qkv(v: View) -> list[Expected]:
    """Queries, and keys and values in the caches."""
    c, m = v.constants, v.number("M")
    query, heads, size, padded, slots = (c[name] for name in ("QUERY", "HEADS", "HEAD", "PADDED", "SLOTS"))
    rows = m // query
    h, factor = _normed(v, m)
    weights = v.weight("weights").reshape(-1, 3, heads, padded)[..., :size].reshape(len(h[0]), -1)
    made = (h @ weights * factor[:, None]).reshape(m, 3, heads, size)
    position = v.tensor("positions", m).clamp(0, c["ANGLES"] - 1)
    cos, sin = (v.weight(name)[position][:, None, None, : size // 2] for name in ("cos", "sin"))
    pairs = made[:, :2].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    q = torch.zeros(m, heads, padded, dtype=torch.float64, device=h.device)
    q[..., :size] = turned[:, 0] * c["SCALE"]
    inside = torch.arange(padded, device=h.device).expand(m, heads, padded) < size
    out = [Expected("q", (m, heads, padded), q, inside)]
    slot = v.tensor("write", rows).repeat_interleave(query) + torch.arange(query, device=h.device).repeat(rows)
    row = torch.arange(rows, device=h.device).repeat_interleave(query)
    kept = (slot >= 0) & (slot < slots)
    for name, values in (("past_k", turned[:, 1]), ("past_v", made[:, 2])):
        shape = (rows, heads, slots, padded)
        cache = torch.zeros(shape, dtype=torch.float64, device=h.device)
        where = torch.zeros(shape, dtype=torch.bool, device=h.device)
        cache[row[kept], :, slot[kept], :size] = values[kept]
        where[row[kept], :, slot[kept]] = True  # the padding too: it must be zeros
        out.append(Expected(name, shape, cache, where))
    return out


def attend(v: View) -> list[Expected]:
    """The attention of the new positions over the keys that each row sees."""
    c = v.constants
    query, heads, size, padded, slots = (c[name] for name in ("QUERY", "HEADS", "HEAD", "PADDED", "SLOTS"))
    joined = c["JOINED"]  # numbers of a head in y: with their padding, in front of a quantised wo
    rows = v.launch.grid[1] // heads
    m = rows * query
    q = v.tensor("q", m, heads, padded)[..., :size].reshape(rows, query, heads, size).transpose(1, 2)
    k, values = (v.tensor(name, rows, heads, slots, padded)[..., :size] for name in ("past_k", "past_v"))
    y = torch.zeros(m, c["STRIDE"], dtype=torch.float64, device=q.device)
    for row, visible in enumerate(v.tensor("length", rows).clamp(max=slots).tolist()):
        score = q[row] @ k[row, :, :visible].transpose(1, 2) * math.log(2.0)  # SCALE has the logarithm of 2
        mixed = score.softmax(-1) @ values[row, :, :visible]  # [H, q, D]
        wide = torch.nn.functional.pad(mixed, (0, joined - size)).transpose(0, 1)
        y[row * query : (row + 1) * query, : heads * joined] = wide.reshape(query, -1)
    inside = torch.arange(c["STRIDE"], device=q.device).expand(m, -1) < heads * joined
    return [Expected("y", (m, c["STRIDE"]), y, inside, ATTENTION * ALLOWED[v.kinds["y"]])]


def residual(v: View) -> list[Expected]:
    """x += inputs times weights, and what follows from x."""
    c, m = v.constants, v.number("M")
    inputs = v.tensor("inputs", m, c["K_STRIDE"])[:, : c["K"]]
    weights = v.weight("weights")
    if len(weights) != c["K"]:  # wo: rows of the padding of heads
        heads = v.stand.pipeline.bundle.model["n_heads"]
        weights = weights.reshape(heads, -1, weights.shape[1])[:, : c["K"] // heads].reshape(c["K"], -1)
    x = v.tensor("x", m, c["STRIDE"])[:, : c["D_MODEL"]] + inputs @ weights
    return _residual_stream(v, m, x, fresh=False)


def gates(v: View) -> list[Expected]:
    """silu(gate) * up."""
    c, m = v.constants, v.number("M")
    h, factor = _normed(v, m)
    gate, up = (h @ v.weight("weights") * factor[:, None]).chunk(2, -1)
    g = torch.zeros(m, c["F_STRIDE"], dtype=torch.float64, device=h.device)
    g[:, : c["F"]] = gate * gate.sigmoid() * up
    inside = torch.arange(c["F_STRIDE"], device=h.device).expand(m, -1) < c["F"]
    return [Expected("g", (m, c["F_STRIDE"]), g, inside)]


def head(v: View) -> list[Expected]:
    """Guided logits."""
    c, count = v.constants, v.number("COUNT")
    query, vocab = c["QUERY"], c["V"]
    images = count // query
    h, factor = _normed(v, 2 * images * query)
    logits = (h @ v.weight("weights") * factor[:, None]).reshape(-1, query, vocab)
    cond, uncond = (logits[v.tensor(name, images)] for name in ("cond_row", "uncond_row"))
    guided = uncond + (cond - uncond) * v.tensor("guidance", images)[:, None, None]
    return [Expected("logits", (images, query, vocab), guided)]


def draw(v: View) -> list[Expected]:
    """Tokens: each is one that the uniform number draws, up to what sums in another order change."""
    c, rows = v.constants, v.number("ROWS")
    query, vocab, images = c["QUERY"], c["V"], v.launch.grid[0] // c["QUERY"]
    logits = v.stored("logits", images, query, vocab).cpu().numpy()
    uniform = v.stored("uniform", images, query).cpu().numpy()
    temperature, top_p = (v.stored(name, images).cpu().numpy() for name in ("temperature", "top_p"))
    top_k = v.tensor("top_k", images).cpu().numpy()
    image = v.tensor("image", rows).cpu()

    def judge(after: Tensor) -> tuple[float, str]:
        tokens = after.cpu()
        far = 0
        for b, row in ((int(b), int(r)) for r, b in enumerate(image) if int(b) < images):
            for j in range(query):
                token = int(tokens[row, j])
                if not 0 <= token < vocab:
                    return 2.0, f"row {row}, position {j}: token {token} of {vocab} codes"
                settings = (float(temperature[b]), int(top_k[b]), float(top_p[b]))
                distance, explained = distance_of(logits[b, j], logits[b, j], token, float(uniform[b, j]), *settings)
                if distance is None:
                    return 2.0, f"row {row}, position {j}: token {token}, which the filters remove"
                if distance > explained:
                    return 2.0, f"row {row}, position {j}: token {token} is {distance:.2g} from the draw"
                far += distance > 0
        return 0.0, f"{rows * query} draws, {far} beside the edge that numpy finds"

    where = ((image >= 0) & (image < images))[:, None].expand(rows, query).to(v.stand.device)
    nothing = torch.zeros(rows, query, dtype=torch.float64)
    return [Expected("tokens", (rows, query), nothing, where, judge=judge)]


REFERENCES: dict[str, Reference] = {
    "step.embed": embed,
    "step.qkv": qkv,
    "attention.attend": attend,
    "step.residual": residual,
    "step.gates": gates,
    "step.head": head,
    "draw.resident": draw,
    "draw.looped": draw,
}
