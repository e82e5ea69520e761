"""Selection and attention of rows that are far apart, each a decoding step of its own.

``kascade_kernels.reference`` does the same for one row. Here a prompt's rows go through a layer
together, as one call a row would leave a GPU waiting for Python.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import embedding

from kascade_kernels.budget import TILE, Budget, PoolRule, tile_of
from kascade_kernels.reference import working_dtype
from kascade_sglang.calibration.hf_attention import LayerCall
from kascade_sglang.calibration.limited_attention import softmax


class Lists(NamedTuple):
    """What R rows attend to beside their own tile.

    keys: int64 [R, H, C], positions, greatest scores first. counts: int64 [R], how many of the C.
    """

    keys: torch.Tensor
    counts: torch.Tensor

    def of_heads(self, head_map: torch.Tensor, device: torch.device) -> "Lists":
        """Return the lists of the heads that a map names, [R, len(head_map), C], on a device."""
        keys = self.keys[:, head_map.to(self.keys.device)]
        return Lists(keys.to(device), self.counts.to(device))


def select_keys(call: LayerCall, rows: torch.Tensor, budget: Budget, pooled: bool) -> Lists:
    """Select for every row the keys before its tile that have most of its attention.

    call: q [R, Hq, D] of the rows, k [L, H, D] of all positions. rows: int64 [R], their positions.
    pooled: whether all heads take the same keys.
    """
    return best_keys(score_keys(call, rows, pooled), rows, budget)


def best_keys(
    score: torch.Tensor, rows: torch.Tensor, budget: Budget, rule: PoolRule | None = None
) -> Lists:
    """Return the keys with the greatest scores [R, H, L], as many as every row's budget takes.

    rule: where given, as many as are in a candidate pool that the budget selects from.
    """
    tiles = [tile_of(int(row)) for row in rows]
    taken = [rule.pooled(tile, budget) if rule else budget.selected(tile) for tile in tiles]
    counts = torch.tensor(taken, device=rows.device)
    return Lists(score.topk(int(counts.max())).indices, counts)


def score_keys(
    call: LayerCall, rows: torch.Tensor, pooled: bool, pool: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of every row to every key, summed over a group: [R, H, L], -1 from its tile on.

    Arguments as of ``select_keys``. pool: bool [R, H, L], where given the keys before a row's tile
    that it attends to; others have -1, too.
    """
    positions = torch.arange(len(call.k), device=rows.device)
    own = positions >= (rows // TILE * TILE)[:, None]  # [R, L]
    seen = positions <= rows[:, None]
    scores = []
    for head in range(call.k.shape[1]):
        shown = seen if pool is None else seen & (own | pool[:, head])
        logits = _logits(call, call.k[None, :, head], head)  # [R, group, L]
        scores.append(_softmax(call, logits.add_(_bias(shown, call.q)), head).sum(1))
    score = torch.stack(scores, dim=1)  # [R, H, L]
    if pooled:
        score = score.sum(1, keepdim=True).expand_as(score)
    outside = own[:, None] if pool is None else own[:, None] | ~pool
    return score.masked_fill(outside, -1.0)


def attend_rows(call: LayerCall, rows: torch.Tensor, lists: Lists | None) -> torch.Tensor:
    """Attention of rows to their lists and own tiles, or, without lists, to their window.

    call: q [R, Hq, D] of the rows, k and v [L, H, D] of all positions. Returns [R, Hq, D] in q's
    dtype, computed in float32, or float64 for float64.
    """
    kv_heads, device = call.k.shape[1], rows.device
    if lists is None:
        window = min(call.limits.window, len(call.k))
        own, taken = rows[:, None] - torch.arange(window, device=device), None
    else:
        own = rows[:, None] // TILE * TILE + torch.arange(TILE, device=device)
        taken = torch.arange(lists.keys.shape[2], device=device) < lists.counts[:, None]
    seen = (own >= 0) & (own <= rows[:, None])
    own = own.clamp(0, len(call.k) - 1)
    outputs = []
    for head in range(kv_heads):
        slots, shown = own, seen
        if lists is not None:
            slots = torch.cat([lists.keys[:, head], own], dim=1)
            shown = torch.cat([taken, seen], dim=1)
        # Several times as fast as indexing, on a CPU.
        keys, values = (embedding(slots, one[:, head].contiguous()) for one in (call.k, call.v))
        logits = _logits(call, keys, head)  # [R, group, C]
        weights = _softmax(call, logits.add_(_bias(shown, call.q)), head)
        outputs.append(weights @ values.to(weights.dtype))
    return torch.cat(outputs, dim=1).to(call.q.dtype)


def _bias(shown: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Of the logits of keys [R, C] that are shown, or not: [R, 1, C], 0 or -inf."""
    zeros = torch.zeros(shown.shape, dtype=working_dtype(q), device=q.device)
    return zeros.masked_fill_(~shown, float("-inf"))[:, None]


def _logits(call: LayerCall, keys: torch.Tensor, head: int) -> torch.Tensor:
    """Logits [R, group, C] of a KV head's query heads over keys [R or 1, C, D]."""
    group = call.q.shape[1] // call.k.shape[1]
    dtype = working_dtype(call.q)
    queries = call.q[:, head * group : (head + 1) * group].to(dtype) * call.scale
    if len(keys) == 1:  # one product: a batch would read the same keys once a row
        logits = (queries.flatten(0, 1) @ keys[0].to(dtype).T).unflatten(0, (-1, group))
    else:
        logits = queries @ keys.to(dtype).transpose(1, 2)
    cap = call.limits.softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _softmax(call: LayerCall, logits: torch.Tensor, head: int) -> torch.Tensor:
    """Weights of the keys, of logits [R, group, C] of a KV head's query heads."""
    sinks = call.limits.sinks_by_head(call.k.shape[1])
    return softmax(logits, None if sinks is None else sinks[head, :, 0])
