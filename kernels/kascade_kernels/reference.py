"""Kascade in plain torch: the definition of correct (arXiv 2512.16391, sections 3.2-3.4).

Every function treats one query tile of one request on its own, so no result depends on what
else is in the batch, on how a prompt was cut into chunks, or on what a prefix cache held.
Arithmetic is float32, or float64 for float64 inputs.

Shapes: ``n`` queries of a tile at consecutive positions, ``Hq`` query heads, ``H`` KV heads
(query head ``i`` reads KV head ``i // (Hq / H)``), ``D`` head dimension, ``L`` keys visible to
the tile's last query. Query ``j`` sits at position ``L - n + j`` and sees the keys up to its own.
"""

import torch

from kascade_kernels.budget import TILE


def _working_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _rows_by_kv_head(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, Hq, D] -> [H, group * n, D]: all query rows that read one KV head."""
    n, q_heads, dim = q.shape
    grouped = q.reshape(n, kv_heads, q_heads // kv_heads, dim)
    return grouped.permute(1, 2, 0, 3).reshape(kv_heads, -1, dim).to(_working_dtype(q))


def _causal_penalty(n: int, own: int, rows: int, like: torch.Tensor) -> torch.Tensor:
    """[rows, own] of 0 and -inf: query j of n sees the first ``own - n + 1 + j`` own keys."""
    query = torch.arange(n, device=like.device).repeat(rows // n).unsqueeze(1)
    key = torch.arange(own, device=like.device).unsqueeze(0)
    penalty = torch.zeros(rows, own, dtype=like.dtype, device=like.device)
    return penalty.masked_fill_(key > query + own - n, float("-inf"))


def anchor_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Post-softmax attention mass of every candidate key, summed over the tile and the group.

    q: [n, Hq, D] the tile's queries. k: [L, H, D] the keys up to the last query's own.
    Returns [H, C], C = the number of keys before the tile, in float32 (float64 for float64).
    Source: section 3.3, "post-softmax pooling".
    """
    n, length, kv_heads = q.shape[0], k.shape[0], k.shape[1]
    tile_start = (length - 1) // TILE * TILE
    rows = _rows_by_kv_head(q, kv_heads)
    logits = rows @ k.permute(1, 2, 0).to(rows.dtype) * scale  # [H, group * n, L]
    own = logits[:, :, tile_start:]
    own += _causal_penalty(n, length - tile_start, rows.shape[1], own)
    return torch.softmax(logits, dim=-1)[:, :, :tile_start].sum(dim=1)


def pool_heads(scores: torch.Tensor) -> torch.Tensor:
    """[H, C] -> [1, C]: one score for all KV heads of the layer (the ``pooled`` mode)."""
    return scores.sum(dim=0, keepdim=True)


def select_topk(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the ``count`` largest scores of each row, ascending; ties go to the lower one.

    scores: [H, C]. Returns int64 [H, count]. Raises ValueError where count exceeds C.
    """
    if count > scores.shape[-1]:
        raise ValueError(f"count: expected at most {scores.shape[-1]} candidates, got {count}")
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values


def sparse_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    selected: torch.Tensor,
    own: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one tile to its selected keys and, causally, to its own tile.

    q: [n, Hq, D]. k_cache, v_cache: [slots, H, D].
    selected: [H, count] slots of each KV head's selected keys.
    own: [m] slots of the tile's own keys up to the last query's (m >= n), in order.
    Returns [n, Hq, D] in q's dtype.
    """
    n, q_heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    rows = _rows_by_kv_head(q, kv_heads)
    slots = torch.cat([selected, own.expand(kv_heads, -1)], dim=1)  # [H, count + m]
    heads = torch.arange(kv_heads, device=q.device).unsqueeze(1)
    keys = k_cache[slots, heads].to(rows.dtype)  # [H, count + m, D]
    values = v_cache[slots, heads].to(rows.dtype)
    logits = rows @ keys.transpose(1, 2) * scale
    own_logits = logits[:, :, selected.shape[1] :]
    own_logits += _causal_penalty(n, own.shape[0], rows.shape[1], own_logits)
    out = torch.softmax(logits, dim=-1) @ values  # [H, group * n, D]
    out = out.reshape(kv_heads, -1, n, values.shape[-1]).permute(2, 0, 1, 3)
    return out.reshape(n, q_heads, -1).to(q.dtype)
