"""Ways to select a tile's keys: Kascade's, and those that it is compared with at equal budgets.

A selector is a function of one ``Case`` that returns int64 [lists, count] positions before the
tile, ascending; ``lists`` is 1 where one list serves all heads. The engine does the rest alike for
all: it attends to the list and to the own tile, in prefill and in decoding, keeps layer 0 dense,
and hands an anchor's list to the layers after it. As published, Quest, OmniKV and LessIsMore read
more: they run prefill and the first two layers densely, the last two also the layers that select.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kascade_kernels.budget import TILE, tile_of
from kascade_kernels.reference import pool_heads, select_topk, tile_scores
from kascade_sglang.sparsity import QUEST_PAGE

SINKS = 4
"""First keys that ``window`` and ``lessismore`` always keep (StreamingLLM, arXiv 2309.17453)."""


class Case(NamedTuple):
    """One tile of one request in one layer, with a budget smaller than what lies before it.

    q: [n, Hq, D] the tile's queries. keys: [L, H, D] the keys up to the last query's own, float32
    or float64. count: keys to select. pooled: whether one list is to serve all KV heads.
    sinks: [Hq], where heads have them.
    """

    q: torch.Tensor
    keys: torch.Tensor
    count: int
    layer: int
    scale: float
    pooled: bool
    sinks: torch.Tensor | None = None

    @property
    def candidates(self) -> int:
        """Number of keys before the tile."""
        return TILE * tile_of(len(self.keys) - 1)


def topk(case: Case) -> torch.Tensor:
    """Kascade: the exact Top-k of attention mass."""
    scores = tile_scores(case.q, case.keys, case.scale, case.sinks)
    return select_topk(pool_heads(scores) if case.pooled else scores, case.count)


def window(case: Case) -> torch.Tensor:
    """StreamingLLM (arXiv 2309.17453): the first keys and the latest."""
    sinks = torch.arange(SINKS, device=case.q.device)
    start = case.candidates - case.count + SINKS
    latest = torch.arange(start, case.candidates, device=case.q.device)
    return torch.cat([sinks, latest]).unsqueeze(0)


def random(case: Case) -> torch.Tensor:
    """Any keys; the draw depends on layer and tile alone."""
    # Both within the 32 bits that torch's generator keeps of a seed.
    seed = case.layer << 20 | case.candidates // TILE
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(case.keys.shape[1], case.candidates, generator=generator)
    return select_topk(noise.to(case.q.device), case.count)


def quest(case: Case) -> torch.Tensor:
    """Quest (arXiv 2406.10774): pages of 16 keys, by an upper bound of their keys' logits.

    A query's bound of a page is the sum over channels of max(q * min K, q * max K). Open in the
    paper, which serves one query a head: how a tile and a group share a list. Here they sum the
    softmax of their bounds, as Kascade sums attention; for one query of one head that is Quest's
    order. (SGLang 0.5.17's ``quest_algorithm.py`` sums bare bounds.) The last page is cut where
    the budget ends. Quest selects in every layer: ``config.load_config`` sees to that.
    """
    pages = case.keys[: case.candidates].unflatten(0, (-1, QUEST_PAGE))
    low, high = (ends.permute(1, 2, 0).unsqueeze(1) for ends in (pages.amin(1), pages.amax(1)))
    rows = _queries_by_kv_head(case)
    bounds = rows.clamp(min=0) @ high + rows.clamp(max=0) @ low  # [H, group, n, pages]
    scores = torch.softmax(bounds * case.scale, dim=-1).sum(dim=(1, 2))
    ranked = _ranked(pool_heads(scores) if case.pooled else scores).unsqueeze(-1)
    keys = ranked * QUEST_PAGE + torch.arange(QUEST_PAGE, device=ranked.device)
    return keys.flatten(1)[:, : case.count].sort(dim=-1).values


def omnikv(case: Case) -> torch.Tensor:
    """OmniKV (ICLR 2025): one list for all heads, by the greatest attention of any query head.

    Its filter layers are the plan's anchors. OmniKV selects in decoding only, by the last query's
    attention; for several queries its code (antgroup/OmniKV, ``modeling/omnikv.py``) has the
    selector "uniform", which sums each query's maximum over heads. Here those are the tile's.
    """
    scores = _attention(case).amax(dim=0).sum(dim=0, keepdim=True)
    return select_topk(scores, case.count)


def lessismore(case: Case) -> torch.Tensor:
    """LessIsMore (arXiv 2508.07101): one list for all heads, with room kept for the latest keys.

    A quarter of what is attended to goes to the first keys and the latest, and the own tile is a
    part of the latest. For the rest, query heads take turns: each adds its best key, then each its
    second best, until the room is full (``modify_qwen3_lim.py`` in DerrickYLJ/LessIsMore; the
    quarter is ``lim_ratio_factor`` in microsoft/kascade, whose comparison this follows). Open
    there, as prefill is dense: a head ranks keys by its attention summed over the tile. Selection
    layers are the plan's anchors.
    """
    budget = case.count + TILE
    latest = max(budget - 3 * budget // 4 - SINKS - TILE, 0)
    middle = slice(SINKS, case.candidates - latest)
    ranked = _ranked(_attention(case).sum(dim=1)[:, middle])  # [Hq, keys]
    heads = torch.arange(len(ranked), device=ranked.device).unsqueeze(1)
    turns = torch.arange(ranked.shape[1], device=ranked.device) * len(ranked) + heads
    turn = torch.empty_like(ranked).scatter_(1, ranked, turns).amin(dim=0, keepdim=True)
    chosen = select_topk(-turn, case.count - SINKS - latest)[0] + SINKS
    first = torch.arange(SINKS, device=ranked.device)
    last = torch.arange(middle.stop, case.candidates, device=ranked.device)
    return torch.cat([first, chosen, last]).unsqueeze(0)


def _queries_by_kv_head(case: Case) -> torch.Tensor:
    """[H, group, n, D] the tile's queries in the keys' dtype."""
    grouped = case.q.unflatten(1, (case.keys.shape[1], -1))
    return grouped.permute(1, 2, 0, 3).to(case.keys.dtype)


def _attention(case: Case) -> torch.Tensor:
    """[Hq, n, candidates] each query's softmax over all keys that it may see."""
    n, length = len(case.q), len(case.keys)
    keys = case.keys.permute(1, 2, 0).unsqueeze(1)
    logits = _queries_by_kv_head(case) @ keys * case.scale  # [H, group, n, L]
    position = torch.arange(length, device=keys.device)
    hidden = position > position[length - n :].unsqueeze(1)
    logits.masked_fill_(hidden, float("-inf"))
    return torch.softmax(logits, dim=-1).flatten(0, 1)[:, :, : case.candidates]


def _ranked(scores: torch.Tensor) -> torch.Tensor:
    """Numbers of each row's scores, the greatest first; ties go to the lower."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


# By the names that the setting ``selection`` knows.
SELECTORS: dict[str, Callable[[Case], torch.Tensor]] = {
    selector.__name__: selector for selector in (topk, window, random, quest, omnikv, lessismore)
}
