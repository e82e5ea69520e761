"""Ways to select a tile's keys: Kascade's, and those that it is compared with at equal budgets.

A selector is a function of one ``Case`` that returns int64 [lists, count] positions before the
tile, ascending; ``lists`` is 1 where one list serves all heads. The engine does the rest alike for
all: it attends to the list and to the own tile, in prefill and in decoding, keeps layer 0 dense,
and hands an anchor's list to the layers after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kascade_kernels.budget import TILE, tile_of
from kascade_kernels.reference import anchor_scores, pool_heads, select_topk

SINKS = 4
"""First keys that ``window`` always keeps (StreamingLLM, arXiv 2309.17453)."""


class Case(NamedTuple):
    """One tile of one request in one layer, with a budget smaller than what lies before it.

    q: [n, Hq, D] the tile's queries. keys: [L, H, D] the keys up to the last query's own, float32
    or float64. count: keys to select. pooled: whether one list is to serve all KV heads.
    """

    q: torch.Tensor
    keys: torch.Tensor
    count: int
    layer: int
    scale: float
    pooled: bool

    @property
    def candidates(self) -> int:
        """Number of keys before the tile."""
        return TILE * tile_of(len(self.keys) - 1)


def topk(case: Case) -> torch.Tensor:
    """Kascade: the exact Top-k of attention mass."""
    scores = anchor_scores(case.q, case.keys, case.scale)
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


# By the names that the setting ``selection`` knows.
SELECTORS: dict[str, Callable[[Case], torch.Tensor]] = {
    selector.__name__: selector for selector in (topk, window, random)
}
