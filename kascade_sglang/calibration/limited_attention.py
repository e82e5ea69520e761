"""Dense attention for layers that torch's SDPA has no fast path for: caps, windows, sinks.

Gemma 2 caps its logits, ``cap tanh(logit / cap)``, and every second layer of it, five in six of
Gemma 3's, see only a window of positions. Heads of gpt-oss have a sink each. Kascade selects keys
in full-attention layers alone; the others only have to compute what the model computes.
"""

from dataclasses import dataclass

import torch

from kascade_kernels.budget import TILE, tile_of
from kascade_kernels.reference import tile_scores

_QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class Limits:
    """What a layer's attention has beside the causal mask.

    window: positions that a query sees, its own included. softcap: bound of the logits.
    sinks: [Hq], logits of one more key a head, which has no value.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def sinks_by_head(self, kv_heads: int) -> torch.Tensor | None:
        """Return the sinks of each KV head's queries, [H, group, 1], if heads have them."""
        return None if self.sinks is None else self.sinks.view(kv_heads, -1, 1)


def limited_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, limits: Limits
) -> torch.Tensor:
    """Attend causally within the limits, a block of queries at a time, in float32.

    q: [n, Hq, D] at the last n of the L positions of k, v [L, H, D]. Returns [n, Hq, D] in q's
    dtype.
    """
    q_heads, length, sinks = q.shape[1], len(k), limits.sinks_by_head(k.shape[1])
    before = length - len(q)
    outputs = []
    for start in range(before, length, _QUERIES_AT_ONCE):
        end = min(length, start + _QUERIES_AT_ONCE)
        first = 0 if limits.window is None else max(0, start - limits.window + 1)
        logits = _logits(q[start - before : end - before], k[first:end], scale, limits.softcap)
        distance = torch.arange(start, end, device=q.device).unsqueeze(1) - torch.arange(
            first, end, device=q.device
        )
        hidden = distance < 0
        if limits.window is not None:
            hidden |= distance >= limits.window
        weights = softmax(logits.masked_fill_(hidden, float("-inf")), sinks)
        values = v[first:end].transpose(0, 1).unsqueeze(1).to(weights.dtype)  # [H, 1, keys, D]
        block = weights @ values  # [H, group, n, D]
        outputs.append(block.permute(2, 0, 1, 3).reshape(end - start, q_heads, -1).to(q.dtype))
    return torch.cat(outputs)


def softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Weights of the keys, [..., L] like the logits; sinks: as all but the last of these, or one
    for several."""
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    column = sinks.to(logits.dtype).expand(logits.shape[:-1]).unsqueeze(-1)
    return torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]


def capped_scores(q: torch.Tensor, k: torch.Tensor, scale: float, limits: Limits) -> torch.Tensor:
    """Like ``kascade_kernels.reference.tile_scores``, with capped logits.

    q: [n, Hq, D], queries of one tile. k: [L, H, D] up to the last one. Returns [H, C], C the
    number of keys before the tile.
    """
    n, length = len(q), len(k)
    logits = _logits(q, k, scale, limits.softcap)
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1)
    logits[..., length - n :].masked_fill_(later, float("-inf"))
    before = TILE * tile_of(length - 1)
    return softmax(logits, limits.sinks_by_head(k.shape[1]))[..., :before].sum(dim=(1, 2))


def layer_scores(q: torch.Tensor, k: torch.Tensor, scale: float, limits: Limits) -> torch.Tensor:
    """Scores of the keys before a tile, [H, C], in a layer with or without caps and sinks."""
    if limits.softcap is None:
        return tile_scores(q, k, scale, limits.sinks)
    return capped_scores(q, k, scale, limits)


def _logits(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """[n, Hq, D] and [L, H, D] -> [H, group, n, L] in float32, or float64 for float64."""
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.reshape(n, kv_heads, q_heads // kv_heads, dim).permute(1, 2, 0, 3).to(dtype)
    logits = rows @ k.permute(1, 2, 0).unsqueeze(1).to(dtype) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
