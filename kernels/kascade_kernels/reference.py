"""Kascade in plain torch: the definition of correct (arXiv 2512.16391, sections 3.2-3.4).

Every function treats one query tile of one request on its own, so no result depends on what
else is in the batch, on how a prompt was cut into chunks, or on what a prefix cache held.
Arithmetic is float32, or float64 for float64 inputs.

Shapes: ``n`` queries of a tile at consecutive positions, ``Hq`` query heads, ``H`` KV heads
(query head ``i`` reads KV head ``i // (Hq / H)``), ``D`` head dimension, ``L`` keys visible to
the tile's last query. Query ``j`` sits at position ``L - n + j`` and sees the keys up to its own.

Keys and values may be fp8, as a pool stores them: a key is then what is stored times the layer's
k_scale, a value that times its v_scale. Logits are linear in the keys, so k_scale is a part of
``scale``; v_scale is an argument of its own.

Sinks, [Hq], are learned: to each query of a head its sink is the logit of one more key, which takes
its share of the weight and has no value (gpt-oss). Weights of real keys then sum to less than 1, so
heads count for less in scores, too.

Infinite logits, beyond 1e30 in base 2: keys of -inf have no weight, also where a query sees no
others; its output is then zero, and it adds nothing to scores. Keys of +inf are selected before
any others; what a tile selects that scores NaN is any valid list. Attention of a query that meets
a logit of +inf or NaN is NaN, as softmax is: no other query's. Values are not looked at: weights
of zero times NaN or infinity are NaN.
"""

import math

import torch

from kascade_kernels.budget import TILE, Budget

LOGIT_BOUND = 1e30
"""A logit beyond it, in base 2, is as good as infinite."""


LARGEST = 3e38
"""What an infinite key counts as in 8 bits, so that its step is finite."""


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension of [..., N]; zeros where all logits are -inf."""
    weights = torch.softmax(logits, dim=-1)
    if _is_finite(weights):
        return weights
    return weights.masked_fill_((logits == -math.inf).all(dim=-1, keepdim=True), 0.0)


def _is_finite(weights: torch.Tensor) -> bool:
    """Whether softmax met no NaN, no +inf and no row of -inf: each makes its whole row NaN."""
    return not weights[..., :1].isnan().any()


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that arithmetic on a tensor is in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _with_sinks(logits: torch.Tensor, sinks: torch.Tensor | None, queries: int) -> torch.Tensor:
    """Logits [H, group * n, N] of n queries with their sinks [Hq] as a last column, if any."""
    if sinks is None:
        return logits
    column = sinks.to(logits.dtype).view(logits.shape[0], -1, 1).repeat_interleave(queries, dim=1)
    return torch.cat([logits, column], dim=-1)


def _rows_by_kv_head(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, Hq, D] -> [H, group * n, D]: all query rows that read one KV head."""
    n, q_heads, dim = q.shape
    grouped = q.reshape(n, kv_heads, q_heads // kv_heads, dim)
    return grouped.permute(1, 2, 0, 3).reshape(kv_heads, -1, dim).to(working_dtype(q))


def _hide_later(logits: torch.Tensor, n: int) -> None:
    """Make logits [H, rows, own] of n queries with their own tile -inf where the key is later.

    Query j sees the first ``own - n + 1 + j``.
    """
    _, rows, own = logits.shape
    query = torch.arange(n, device=logits.device).repeat(rows // n).unsqueeze(1)
    key = torch.arange(own, device=logits.device).unsqueeze(0)
    logits.masked_fill_(key > query + own - n, -math.inf)


def _tile_start(k: torch.Tensor) -> int:
    """Position of the first key of the tile that the last of the keys [L, H, D] is in."""
    return (k.shape[0] - 1) // TILE * TILE


def _tile_logits(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """[H, group * n, L]: logits of a tile's query rows, -inf where the key comes later."""
    start, rows = _tile_start(k), _rows_by_kv_head(q, k.shape[1])
    logits = rows @ k.permute(1, 2, 0).to(rows.dtype) * scale
    _hide_later(logits[:, :, start:], q.shape[0])
    return logits


def tile_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    weight: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-sum-exp in base 2 of every query row over all keys that it sees, and its head's sink.

    q: [n, Hq, D]. k: [L, H, D]. weight: [L], the logarithm of how many keys each stands for.
    sinks: [Hq], where heads have them.
    Returns [H, n * group]: of each KV head the group's heads of one query side by side, within
    +-1e30.
    """
    logits = _tile_logits(q, k, scale)
    if weight is not None:
        logits = logits + weight * math.log(2)
    lse = torch.logsumexp(_with_sinks(logits, sinks, q.shape[0]), dim=-1) / math.log(2)
    lse = lse.clamp(-LOGIT_BOUND, LOGIT_BOUND)
    return lse.view(k.shape[1], -1, q.shape[0]).transpose(1, 2).flatten(1)


def tile_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Post-softmax attention mass of every candidate key, summed over the tile and the group.

    q: [n, Hq, D] the tile's queries. k: [L, H, D] the keys up to the last query's own.
    sinks: [Hq], where heads have them.
    Returns [H, C], C = the number of keys before the tile, in float32 (float64 for float64); +inf
    for keys whose logit is.
    Source: section 3.3, "post-softmax pooling".
    """
    logits = _with_sinks(_tile_logits(q, k, scale), sinks, q.shape[0])
    start = _tile_start(k)
    weights = torch.softmax(logits, dim=-1)
    if not _is_finite(weights):
        weights = weights.nan_to_num(nan=0.0).masked_fill_(logits == math.inf, math.inf)
    return weights[:, :, :start].sum(dim=1)


def pool_heads(scores: torch.Tensor) -> torch.Tensor:
    """[H, C] -> [1, C]: one score for all KV heads of the layer (the ``pooled`` mode)."""
    return scores.sum(dim=0, keepdim=True)


def pool_keys(k_cache: torch.Tensor, pool: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Keys that an anchor with a candidate pool scores: a context of pool and own tile.

    k_cache: [slots, H, D]. pool: [H, P] slots of each KV head's pool, whole tiles of them.
    own: [m] slots of the own tile. Returns [P + m, H, D], for ``tile_scores``: selected are then
    places in the pool.
    """
    slots = torch.cat([pool, own.expand(len(pool), -1)], dim=1).T
    return k_cache[slots, torch.arange(len(pool), device=pool.device)]


def decode_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """``tile_scores`` of a tile of which one query, [Hq, D], is new."""
    return tile_scores(q.unsqueeze(0), k, scale, sinks)


def select_topk(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the ``count`` largest scores of each row, ascending; ties go to the lower one.

    scores: [H, C]. Returns int64 [H, count]. Raises ValueError where count exceeds C.
    """
    if count > scores.shape[-1]:
        raise ValueError(f"count: expected at most {scores.shape[-1]} candidates, got {count}")
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values


def select_slots(scores: torch.Tensor, slots: torch.Tensor, count: int) -> torch.Tensor:
    """``select_topk`` as the slots, [at least C], of the positions: [H, count]."""
    return slots[select_topk(scores, count)]


def tile_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    selected: torch.Tensor,
    own: torch.Tensor,
    scale: float,
    v_scale: float = 1.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one tile to its selected keys and, causally, to its own tile.

    q: [n, Hq, D]. k_cache, v_cache: [slots, H, D].
    selected: [H, count] slots of each KV head's selected keys.
    own: [m] slots of the tile's own keys up to the last query's (m >= n), in order.
    sinks: [Hq], where heads have them.
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
    _hide_later(logits[:, :, selected.shape[1] :], n)
    weights = softmax(_with_sinks(logits, sinks, n))[:, :, : logits.shape[2]]
    out = weights @ values * v_scale  # [H, group * n, D]
    out = out.reshape(kv_heads, -1, n, values.shape[-1]).permute(2, 0, 1, 3)
    return out.reshape(n, q_heads, -1).to(q.dtype)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    listed: torch.Tensor,
    scale: float,
    v_scale: float = 1.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one new query, [Hq, D], to the slots [H, count] on its KV heads' lists.

    sinks: [Hq], where heads have them.
    """
    own = listed[0, :0]
    return tile_attention(q.unsqueeze(0), k_cache, v_cache, listed, own, scale, v_scale, sinks)[0]


def merge_parts(
    out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over all keys, [D], from that over some of them: out [parts, D], lse [parts].

    lse: of each part's logits, in base 2. sink: [], the head's, of which no part knows.
    """
    logits = lse * math.log(2)
    if sink is not None:
        logits = torch.cat([logits, sink.to(lse.dtype).view(1)])
    return softmax(logits)[: len(out)] @ out


def decode_lists(ends: list[int], budgets: list[Budget]) -> list[int]:
    """How many keys each row's list holds, own tile included; its query sees ``ends`` keys."""
    return [budget.attended(end - 1) for end, budget in zip(ends, budgets, strict=True)]


def copy_keys(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [..., D] in steps of their largest magnitude / 127: int8 [..., D], steps [...].

    Infinite ones count as 3e38, which keeps steps finite; NaN as the negative of it.
    """
    keys = k.to(working_dtype(k)).nan_to_num(-LARGEST, LARGEST, -LARGEST)
    scales = keys.abs().amax(dim=-1).clamp(min=1e-30) / 127
    return torch.floor(keys / scales.unsqueeze(-1) + 0.5).to(torch.int8), scales


def copy_row_slots(
    req_to_token: torch.Tensor, requests: list[int], ends: list[int]
) -> list[torch.Tensor]:
    """The slots of each row's keys."""
    return [req_to_token[request, :end] for request, end in zip(requests, ends, strict=True)]


def find_shared_prefixes(
    slots: list[torch.Tensor], most: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Groups of up to ``most`` rows with the same first slot.

    slots: of each row's keys. Returns how many slots, from the first on, all rows of a row's
    group have in common (0 for a row alone), and the groups.
    """
    alike: dict[int, list[int]] = {}
    for row, own in enumerate(slots):
        alike.setdefault(int(own[0]), []).append(row)
    shared, groups = [0] * len(slots), []
    for rows in alike.values():
        for group in (tuple(rows[at : at + most]) for at in range(0, len(rows), most)):
            groups.append(group)
            length = min(len(slots[row]) for row in group)
            same = torch.stack([slots[row][:length] == slots[group[0]][:length] for row in group])
            for row in group if len(group) > 1 else ():
                shared[row] = int(same.all(dim=0).long().cumprod(dim=0).sum())
    return shared, groups
